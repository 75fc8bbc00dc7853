"""What several tests need: the import path, tiny data, and a way to run a program."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402

METHODS = ("simclr", "moco", "byol", "simsiam")


def write_idx(path, tensor):
    """Write a uint8 tensor as an IDX file."""
    header = bytes([0, 0, 8, tensor.ndim]) + b"".join(n.to_bytes(4, "big") for n in tensor.shape)
    path.write_bytes(header + tensor.numpy().tobytes())


def write_fashion_mnist(folder, n_train=320, n_test=100):
    """Write four IDX files of small random images whose class shows as a bright row."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for part, n in (("train", n_train), ("t10k", n_test)):
        labels = torch.arange(n) % 10
        images = torch.randint(0, 100, (n, 28, 28), generator=generator)
        images[torch.arange(n), 2 * labels + 4] += 150
        write_idx(folder / f"{part}-images-idx3-ubyte", images.to(torch.uint8))
        write_idx(folder / f"{part}-labels-idx1-ubyte", labels.to(torch.uint8))
    return folder


def run(folder, *command):
    """Run a script of the project in `folder`; return the finished process with its output."""
    script, *options = map(str, command)
    return subprocess.run(
        [sys.executable, ROOT / script, *options], cwd=folder, capture_output=True, text=True
    )


def call(capfd, folder, *command):
    """Do what `run` does, but in this process, which saves the seconds that importing takes."""
    script, *options = map(str, command)
    source = (ROOT / script).read_text()
    guard = source[source.index('if __name__ == "__main__":') :]
    guard = guard.replace("main()", "main(options)").replace("parse_args()", "parse_args(options)")
    module = importlib.import_module(script.removesuffix(".py"))
    before, code = os.getcwd(), 0
    os.chdir(folder)
    capfd.readouterr()
    try:
        exec(guard, vars(module) | {"__name__": "__main__", "options": options})
    except SystemExit as stop:
        code = stop.code
    finally:
        os.chdir(before)
    output = capfd.readouterr()
    return subprocess.CompletedProcess(command, code, output.out, output.err)


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
