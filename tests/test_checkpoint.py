"""Checkpoints, --resume, kills, Ctrl-C, and everything that is refused in one line."""

import atexit
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import METHODS, ROOT, train, write_fashion_mnist
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
    """Folders of runs of two epochs that ended, and that got Ctrl-C after one; both outputs."""
    whole, half = tmp_path_factory.mktemp("whole") / "new", tmp_path_factory.mktemp("half")
    ended = {name: train(half, tiny, name, "--out", whole / f"{name}.pt") for name in METHODS}

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
def test_what_a_run_prints_and_leaves_when_it_ends_and_at_ctrl_c(runs, name):
    folder, _, ended, stopped = runs
    saved = torch.load(folder / f"{name}.pt", weights_only=True)
    assert set(saved) == {"args", "code", "metrics", "model", "optimizer"}
    assert saved["code"] == (ROOT / f"{name}.py").read_text()
    assert saved["args"]["method"] == name and saved["args"]["images"] == [320, 1, 28, 28]
    assert len(saved["args"]["mean"]) == len(saved["args"]["std"]) == 1
    rows = saved["metrics"]
    lines = ["  ".join(f"{key} {row[key]:.5g}" for key in row) for row in rows]
    assert ended[name].returncode == 0 and ended[name].stderr == ""
    assert ended[name].stdout.splitlines() == ["device cpu, bf16 False, processes 1", *lines]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert list(rows[1]) == ["epoch", "loss", "z_std", "seconds", "knn"]
    assert rows[1]["knn"] > 20 and 0 < rows[1]["z_std"] < 1.5 and rows[1]["seconds"] > 0
    assert not list(folder.glob("*.tmp"))
    # Ctrl-C: in the first epoch's checkpoint, before its line.
    assert stopped[name].returncode == 1 and len(stopped[name].stdout.splitlines()) == 1
    assert stopped[name].stderr == "stopped: --resume goes on from the last whole epoch\n"


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_ends_as_if_never_stopped(runs, tiny, tmp_path, name):
    """Also under another name, and with the data in another folder. Once more changes nothing."""
    shutil.copy(runs[1] / f"{name}.pt", tmp_path / "renamed.pt")
    shutil.copytree(tiny, tmp_path / "data")
    process = train(tmp_path, "data", name, "--resume", "--out", "renamed.pt")
    assert process.returncode == 0 and process.stdout.splitlines()[1].startswith("epoch 2 ")
    assert state(tmp_path / "renamed.pt") == state(runs[0] / f"{name}.pt")
    before = (tmp_path / "renamed.pt").read_bytes()
    process = train(tmp_path, tiny, name, "--resume", "--out", "renamed.pt")
    assert process.returncode == 0 and "epoch" not in process.stdout
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
    process = train(half, tiny, "simclr", "--resume", "--out", "byol.pt")
    refused(process, "byol.pt has method byol, not simclr")
    assert path.read_bytes() == before


def test_no_file_is_replaced_unasked(tiny, tmp_path):
    (tmp_path / "old.pt").write_bytes(b"old")
    for name in METHODS:
        refused(train(tmp_path, tiny, name, "--out", "old.pt"), "--out old.pt exists: pass")
        refused(train(tmp_path, tiny, name, "--resume"), f"--out {name}.pt does not exist")
    assert (tmp_path / "old.pt").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["old.pt"]


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
        refused(process, "the loss became nan in epoch 2: lower --lr")
        assert (half / f"{name}.pt").read_bytes() == before


def test_a_bug_keeps_its_traceback(tiny, tmp_path, monkeypatch):
    """A learner who breaks a line sees where: only errors of data and options are one line."""
    monkeypatch.setattr(NORMALIZE, lambda x, *_: x.no_such_attribute)
    for name in METHODS:
        with pytest.raises(AttributeError, match="no_such_attribute"):
            train(tmp_path, tiny, name)


OPTIONS = [
    (METHODS, ["--epochs", "0"], "--epochs 0 is not from 1 to"),
    (METHODS, ["--batch-size", "1"], "--batch-size 1"),
    (METHODS, ["--batch-size", "321"], "--batch-size 321: use a multiple of 1 up to 320"),
    (METHODS, ["--lr", "nan"], "--lr nan"),
    (METHODS, ["--seed", "-1"], "--seed -1"),
    (METHODS, ["--dataset", "no-such-folder"], "--dataset no-such-folder is neither"),
    (["moco"], ["--momentum", "1.5"], "--momentum 1.5 is not from 0 to 1"),
    (["moco"], ["--queue-size", "many"], "--queue-size: invalid int value: 'many'"),
    (["byol"], ["--tau", "-0.1"], "--tau -0.1 is not from 0 to 1"),
]
if not torch.cuda.is_available():
    OPTIONS += [(METHODS, ["--device", "cuda"], "--device: invalid choice: 'cuda'")]


@pytest.mark.parametrize("names, options, words", OPTIONS)
def test_bad_options_are_refused(tiny, tmp_path, names, options, words):
    for name in names:
        refused(train(tmp_path, tiny, name, *options), words)
    assert not list(tmp_path.iterdir())


def test_processes_must_divide_the_batch(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda: None)
    monkeypatch.setattr(atexit, "register", lambda function: None)
    for name in METHODS:
        process = train(tmp_path, tiny, name)
        refused(process, "--batch-size 64: use a multiple of 3 up to 320")
