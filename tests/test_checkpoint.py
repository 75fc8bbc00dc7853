"""Checkpoints, --resume, kills, Ctrl-C, and everything that is refused in one line."""

import atexit
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import METHODS, ROOT, common, train, write_fashion_mnist, write_images
from kill import state

NORMALIZE = "torchvision.transforms.v2.functional.normalize"  # the scripts import it from there


def refused(process, words):
    """One line on stderr after argparse's usage, a status that is not 0, nothing trained."""
    *usage, line = process.stderr.strip().splitlines()
    assert process.returncode != 0 and "Traceback" not in process.stderr, process.stderr
    assert not usage or usage[0].startswith("usage: "), process.stderr
    assert "epoch 1" not in process.stdout and words in line, line


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Runs of two epochs: paths of those that ended, the folder of those that got Ctrl-C after one,
    and what both printed.
    """
    base, half = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("half")
    whole = {name: base / name / "new" / "run.pt" for name in METHODS}  # makes two folders
    ended = {name: train(half, tiny, name, "--out", path) for name, path in whole.items()}

    def replace_and_interrupt(*paths, replace=os.replace):
        replace(*paths)
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace_and_interrupt)
        try:
            stopped = {name: train(half, tiny, name) for name in METHODS}
        except KeyboardInterrupt:  # else it would end pytest
            pytest.fail("a script has let Ctrl-C through")
        finally:
            signal.signal(signal.SIGINT, before)
    return whole, half, ended, stopped


@pytest.fixture
def half(runs):
    return runs[1]


@pytest.mark.parametrize("name", METHODS)
def test_what_a_run_prints_and_leaves_when_it_ends_and_at_ctrl_c(runs, tiny, name):
    whole, _, ended, stopped = runs
    saved = torch.load(whole[name], weights_only=True)
    assert set(saved) == {"args", "metrics", "model", "optimizer"}
    assert saved["args"]["method"] == name and saved["args"]["images"] == [320, 1, 28, 28]
    data = common.load_dataset("fashion-mnist", tiny)
    assert [saved["args"]["mean"], saved["args"]["std"]] == [data.mean.tolist(), data.std.tolist()]
    rows = saved["metrics"]
    lines = ["  ".join(f"{key} {row[key]:.5g}" for key in row) for row in rows]
    assert ended[name].returncode == 0 and ended[name].stderr == ""
    assert ended[name].stdout.splitlines() == ["cpu, bf16 False, processes 1, steps 10", *lines]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert list(rows[1]) == ["epoch", "loss", "z_std", "seconds", "knn"]
    assert rows[1]["knn"] > 20 and 0 < rows[1]["z_std"] < 1.5 and rows[1]["seconds"] > 0
    assert list(whole[name].parent.iterdir()) == [whole[name]]
    # Ctrl-C: in the first epoch's checkpoint, before its line.
    assert stopped[name].returncode == 1 and len(stopped[name].stdout.splitlines()) == 1
    assert stopped[name].stderr == "stopped (--resume goes on with the run in --out)\n"


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_ends_as_if_never_stopped(runs, tiny, tmp_path, name):
    """Also under another name, and with the data in another folder. Once more, now
    with --bf16, changes nothing.

    MoCo's queue is resumed in the middle of a round: 320 of its 4,096 rows are written.
    """
    shutil.copy(runs[1] / f"{name}.pt", tmp_path / "renamed.pt")
    shutil.copytree(tiny, tmp_path / "data")
    process = train(tmp_path, "data", name, "--resume", "--out", "renamed.pt")
    assert process.returncode == 0 and "renamed.pt has 1 of 2 epochs" in process.stdout
    assert process.stdout.splitlines()[2].startswith("epoch 2 ")
    assert state(tmp_path / "renamed.pt") == state(runs[0][name])
    before = (tmp_path / "renamed.pt").read_bytes()
    process = train(tmp_path, tiny, name, "--resume", "--out", "renamed.pt", "--bf16")
    assert process.returncode == 0
    assert process.stdout.splitlines()[1:] == ["renamed.pt has 2 of 2 epochs"]
    assert (tmp_path / "renamed.pt").read_bytes() == before


def test_resume_needs_the_same_options_images_and_method(half, tiny, tmp_path):
    path, other = half / "byol.pt", write_fashion_mnist(tmp_path, 200, 20)
    before = path.read_bytes()
    changes = [("lr", 0.7, 0.3), ("epochs", 3, 2), ("batch_size", 32, 64), ("seed", 1, 0)]
    changes += [("tau", 0.9, 0.95), ("hidden_dim", 64, 512), ("backbone", "resnet18", "convnet")]
    for name, new, old in changes:
        process = train(half, tiny, "byol", "--resume", f"--{name.replace('_', '-')}", new)
        refused(process, f"byol.pt has {name} {old}, not {new}")
    words = "byol.pt has images [320, 1, 28, 28], not [200, 1, 28, 28]"
    refused(train(half, other, "byol", "--resume"), words)
    shutil.copytree(tiny, tmp_path / "similar")  # as many images, but the last is white
    pixels = tmp_path / "similar" / "train-images-idx3-ubyte"
    pixels.write_bytes(pixels.read_bytes()[:-784] + b"\xff" * 784)
    refused(train(half, tmp_path / "similar", "byol", "--resume"), "byol.pt has mean [")
    process = train(half, tiny, "simclr", "--resume", "--out", "byol.pt")
    refused(process, "byol.pt has method byol, not simclr")
    assert path.read_bytes() == before


def test_no_file_is_replaced_unasked(tiny, tmp_path):
    (tmp_path / "old.pt").write_bytes(b"old")
    for name in METHODS:
        refused(train(tmp_path, tiny, name, "--out", "old.pt"), "File exists: 'old.pt' (--resume")
    assert (tmp_path / "old.pt").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["old.pt"]


@pytest.mark.parametrize("name", METHODS)
def test_a_second_run_does_not_get_the_name_of_one_that_has_just_begun(
    tiny, tmp_path, name, monkeypatch
):
    seconds = []

    def save(*args, original=torch.save):
        seconds.append(train(tmp_path, tiny, name))  # while the first epoch's end is written
        original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        assert train(tmp_path, tiny, name, "--epochs", "1").returncode == 0
    refused(seconds[0], f"File exists: '{name}.pt'")
    assert len(torch.load(tmp_path / f"{name}.pt", weights_only=True)["metrics"]) == 1


@pytest.mark.parametrize("out", ["folder/", "file/x.pt", "/proc/x.pt"])
def test_a_name_that_cannot_be_written_is_refused_at_once(tiny, tmp_path, out):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for name in METHODS:
        refused(train(tmp_path, tiny, name, "--out", out), out.split("/")[0])


def test_a_run_that_finished_no_epoch_is_resumed_from_the_start(runs, tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(NORMALIZE, Mock(side_effect=KeyboardInterrupt))
        assert train(tmp_path, tiny, "moco").returncode == 1
    assert (tmp_path / "moco.pt").stat().st_size == 0
    process = train(tmp_path, tiny, "moco", "--resume")
    assert process.returncode == 0, process.stderr
    assert state(tmp_path / "moco.pt") == state(runs[0]["moco"])


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize("kind", ["missing", "text", "cut", "other", "list", "evil"])
def test_resume_refuses_what_is_no_checkpoint(half, tiny, tmp_path, kind, monkeypatch):
    """In one line; and no file runs code."""
    monkeypatch.chdir(tmp_path)
    path, whole = tmp_path / "run.pt", (half / "byol.pt").read_bytes()
    if kind in ("text", "cut"):
        path.write_bytes(b"not a checkpoint" if kind == "text" else whole[: len(whole) // 2])
    elif kind != "missing":
        torch.save({"other": {"weights": 1}, "list": [1, 2], "evil": Evil()}[kind], path)
    for name in METHODS:
        process = train(tmp_path, tiny, name, "--resume", "--out", "run.pt")
        refused(process, "--resume: run.pt cannot be read as a checkpoint (")
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"] * (kind != "missing")


@pytest.mark.parametrize("error", [OSError, RuntimeError])  # torch.save raises either
def test_a_full_disk_spares_the_checkpoint(half, tiny, monkeypatch, error):
    def save(checkpoint, path):
        if error is OSError:  # the other comes before there is a file
            Path(path).write_bytes(b"half a file")
        raise error("no space left on device")

    for name in METHODS:
        before = (half / f"{name}.pt").read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", save)
            refused(train(half, tiny, name, "--resume"), f"{name}.pt.tmp cannot be written")
        assert (half / f"{name}.pt").read_bytes() == before and not list(half.glob("*.tmp"))


def test_a_reader_who_leaves_ends_the_run_in_one_line(tiny, tmp_path):
    """As in `python simclr.py | head -1`."""
    command = f"{sys.executable} {ROOT / 'simclr.py'} --epochs 9 --data-dir {tiny} --device cpu"
    command = ["bash", "-c", f"set -o pipefail; {command} --batch-size 160 | head -1"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert process.stdout == "cpu, bf16 False, processes 1, steps 18\n" and process.returncode
    assert "Broken pipe" in process.stderr and "Traceback" not in process.stderr
    assert len(torch.load(tmp_path / "simclr.pt", weights_only=True)["metrics"]) < 9


def test_killed_runs_end_as_if_never_killed():
    command = [sys.executable, ROOT / "tools" / "kill.py", "--kills", "2", "--methods", "moco"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "2 kills at random moments, 2 at moves of files: all the same" in process.stdout


def test_a_loss_that_is_not_finite_spares_the_checkpoint(half, tiny, monkeypatch):
    monkeypatch.setattr(NORMALIZE, lambda x, *_: x * float("nan"))
    for name in METHODS:
        before = (half / f"{name}.pt").read_bytes()
        process = train(half, tiny, name, "--resume")
        refused(process, "epoch 2: loss nan or a weight is not finite: lower --lr")
        assert (half / f"{name}.pt").read_bytes() == before


@pytest.mark.parametrize("name", METHODS)
def test_weights_that_the_last_step_made_infinite_are_not_saved(half, tiny, monkeypatch, name):
    """The loss of an epoch can be finite while the weights after its last step are not."""
    steps, before = [], (half / f"{name}.pt").read_bytes()

    def step(optimizer, original=torch.optim.SGD.step):
        steps.append(original(optimizer))
        if len(steps) == 5:  # the epoch's last
            optimizer.param_groups[0]["params"][0].data[0] = math.inf

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    refused(train(half, tiny, name, "--resume"), "or a weight is not finite: lower --lr")
    assert (half / f"{name}.pt").read_bytes() == before


def test_a_bug_keeps_its_traceback(tiny, tmp_path, monkeypatch):
    """A learner who breaks a line sees where: only errors of data and options are one line."""
    monkeypatch.setattr(NORMALIZE, lambda x, *_: x.no_such_attribute)
    for name in METHODS:
        with pytest.raises(AttributeError, match="no_such_attribute"):
            train(tmp_path, tiny, name)


OPTIONS = [
    (METHODS, ["--epochs", "0"], "above 0"),
    (METHODS, ["--projection-dim", "-1"], "above 0"),
    (METHODS, ["--batch-size", "1"], "--batch-size 1: take 2 to 320, divisible by 1"),
    (METHODS, ["--batch-size", "321"], "--batch-size 321: take 2 to 320, divisible by 1"),
    (METHODS, ["--batch-size", "0"], "--batch-size 0: take 2 to 320, divisible by 1"),
    (METHODS, ["--lr", "-1"], "above 0"),
    (METHODS, ["--lr", "1e20"], "is not finite: lower --lr"),
    (METHODS, ["--dataset", "no-such-folder"], "--dataset no-such-folder is neither"),
    (["simclr", "moco"], ["--temperature", "0"], "--temperature"),
    (METHODS[:3], ["--hidden-dim", "0"], "above 0"),
    (["simsiam"], ["--bottleneck-dim", "0"], "above 0"),
    (["moco"], ["--momentum", "1.5"], "--momentum is from 0 to 1"),
    (["moco"], ["--momentum", "-0.1"], "--momentum is from 0 to 1"),
    (["moco"], ["--queue-size", "0"], "above 0"),
    (["moco"], ["--queue-size", "many"], "--queue-size: invalid int value: 'many'"),
    (["byol"], ["--tau", "-0.1"], "--tau is from 0 to 1"),
    (["byol"], ["--tau", "1.5"], "--tau is from 0 to 1"),
]
if not torch.cuda.is_available():
    OPTIONS += [(METHODS, ["--device", "cuda"], "--device: invalid choice: 'cuda'")]


@pytest.mark.parametrize("names, options, words", OPTIONS)
def test_bad_options_are_refused(tiny, tmp_path, names, options, words):
    for name in names:
        refused(train(tmp_path, tiny, name, *options), words)
    assert not [path for path in tmp_path.iterdir() if path.stat().st_size]


@pytest.mark.parametrize("world, batch, words", [(3, 64, "divisible by 3"), (2, 2, "take 4 to")])
def test_processes_must_share_the_batch(tiny, tmp_path, monkeypatch, world, batch, words):
    """Equally, and with two images each."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda: None)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world)
    monkeypatch.setattr(atexit, "register", lambda function: None)
    for name in METHODS:
        process = train(tmp_path, tiny, name, "--batch-size", batch)
        refused(process, f"--batch-size {batch}: take {2 * world} to 320, divisible by {world}")


def test_a_world_size_left_by_an_earlier_job_is_no_matter(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    process = train(tmp_path, tiny, "moco", "--epochs", "1")
    assert process.returncode == 0 and process.stdout.startswith("cpu, bf16 False, processes 1,")


def test_a_run_on_images_without_labels_takes_no_knn(tmp_path):
    write_images(tmp_path / "images", 8)
    for name in METHODS:
        options = ["--dataset", "images", "--batch-size", 4, "--epochs", 1]
        process = train(tmp_path, tmp_path / "data", name, *options)
        assert process.returncode == 0 and "epoch 1 " in process.stdout, process.stderr
        assert "knn" not in process.stdout


def test_a_run_without_docstrings_in_an_ascii_terminal(tiny, tmp_path):
    command = [sys.executable, "-OO", ROOT / "byol.py", "--data-dir", tiny, "--device", "cpu"]
    command += ["--epochs", "1", "--batch-size", "160"]
    environment = os.environ | dict(PYTHONIOENCODING="ascii")
    for options in ([], ["--help"]):
        process = subprocess.run(
            [*command, *options], capture_output=True, text=True, cwd=tmp_path, env=environment
        )
        assert process.returncode == 0, process.stderr
