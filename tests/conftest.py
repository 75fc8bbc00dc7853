"""What several tests need: the import path, tiny data, and a way to run a program.

Every run names its device, so the tests say the same on machines with and without a GPU.
"""

import contextlib
import importlib.util
import io
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import common  # noqa: E402

os.environ["OMP_NUM_THREADS"] = "1"  # of programs that tests start; tiny images need no more
torch.set_num_threads(1)
METHODS = ("simclr", "moco", "byol", "simsiam")
DIFFS = {path.stem: path for path in sorted((ROOT / "docs" / "variants").glob("*.diff"))}


def write_idx(path, tensor):
    """Write a uint8 tensor as an IDX file."""
    header = bytes([0, 0, 8, tensor.ndim]) + b"".join(n.to_bytes(4, "big") for n in tensor.shape)
    path.write_bytes(header + tensor.numpy().tobytes())


def write_fashion_mnist(folder, n_train=320, n_test=100):
    """Write four IDX files of small random images whose class shows as a bright row.

    The first two pixels of training image i are i // 16 and i % 16, so that it can be recognised.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for part, n in (("train", n_train), ("t10k", n_test)):
        labels = torch.arange(n) % 10
        images = torch.randint(0, 100, (n, 28, 28), generator=generator)
        images[torch.arange(n), 2 * labels + 4] += 150
        images[:, 0, 0], images[:, 0, 1] = torch.arange(n) // 16, torch.arange(n) % 16
        write_idx(folder / f"{part}-images-idx3-ubyte", images.to(torch.uint8))
        write_idx(folder / f"{part}-labels-idx1-ubyte", labels.to(torch.uint8))
    return folder


def write_image(path, pixels):
    """Write uint8 pixels (3, H, W) as an image file."""
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(path)


def write_images(folder, n, channels=(255, 255, 255), size=20):
    """Write n small images of one colour each, 0.png, 1.png and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, colour in enumerate(torch.rand(n, 3, generator=torch.Generator().manual_seed(n))):
        pixels = (colour * torch.tensor(channels)).byte()[:, None, None].expand(3, size, size)
        write_image(folder / f"{i}.png", pixels)


@contextlib.contextmanager
def in_float64():
    """Train in float64, the loss too, so that a test need not know how a processor rounds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def call(folder, script, *options):
    """Run a script as a program, in this process: that saves the seconds that importing takes."""
    out, err, before, argv, code = io.StringIO(), io.StringIO(), os.getcwd(), sys.argv, 0
    sys.argv = [script, *map(str, options)]
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:  # a text is printed and means 1, as Python itself does it
        code = 1 if isinstance(stop.code, str) else stop.code or 0
        err.write(f"{stop.code}\n" if isinstance(stop.code, str) else "")
    finally:
        os.chdir(before)
        sys.argv = argv
    return subprocess.CompletedProcess(sys.argv, code, out.getvalue(), err.getvalue())


def train(folder, tiny, script, *options):
    """Run a training script on the tiny images, on the CPU: two epochs of five steps."""
    fixed = ["--data-dir", tiny, "--device", "cpu", "--epochs", "2", "--batch-size", "64"]
    return call(folder, f"{script}.py", *fixed, *options)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder for --data-dir with a Fashion-MNIST of 320 + 100 images."""
    return write_fashion_mnist(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def fashion_mnist():
    """The real Fashion-MNIST; skipped where it is not installed, unless it is required."""
    required = os.environ.get("REQUIRE_FASHION_MNIST")
    if not required and not common.DEBIAN_FASHION_MNIST.is_dir():
        pytest.skip("Fashion-MNIST is not installed: apt-get install dataset-fashion-mnist")
    return common.load_dataset("fashion-mnist", "there-is-no-such-folder")


@pytest.fixture(scope="session")
def variants(tmp_path_factory):
    """A folder, no repository, with today's scripts and all variants of them."""
    folder = tmp_path_factory.mktemp("variants")
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    for path in DIFFS.values():
        subprocess.run(["git", "apply", path], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="session")
def load_variant(variants):
    """A function from the name of a variant to its module."""

    def load(name):
        spec = importlib.util.spec_from_file_location(name, variants / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
