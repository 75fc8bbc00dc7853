"""Kills, full disks, Ctrl-C, damaged or foreign checkpoints: nothing lost, nothing believed."""

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import byol
import pytest
import torch
from conftest import METHODS, ROOT, call, write_fashion_mnist

RUN = ["--epochs", "2", "--batch-size", "64", "--knn-every", "0"]


@pytest.fixture(scope="module")
def good(tiny, tmp_path_factory):
    """A checkpoint of byol.py after its first epoch of two."""
    folder = tmp_path_factory.mktemp("good")
    save, taken = byol.save, []
    byol.save = lambda path, checkpoint: taken or taken.append(save(path, checkpoint))
    try:
        byol.main(["--data-dir", str(tiny), *RUN, "--out", str(folder / "byol.pt")])
    finally:
        byol.save = save
    assert torch.load(folder / "byol.pt", weights_only=True)["epoch"] == 1
    return folder / "byol.pt"


def one_line(process, code=2):
    assert process.returncode == code, process.stderr
    assert process.stderr.count("\n") == 1 and "Traceback" not in process.stderr, process.stderr
    return process.stderr


def test_killed_runs_end_as_if_never_killed():
    command = [sys.executable, ROOT / "tests" / "kill.py", "--kills", "3"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "tests")
    assert process.returncode == 0, process.stderr
    assert "3 kills at random moments, 8 at moves of files: all the same" in process.stdout


def limited(megabytes):
    """A function that lets a child write files of so many megabytes at most: a disk that fills."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (megabytes * 2**20,) * 2)

    return limit


def test_too_little_room_is_found_before_the_first_epoch(tiny, tmp_path):
    (tmp_path / "byol.pt").write_bytes(b"old")
    command = [sys.executable, ROOT / "byol.py", "--data-dir", tiny, *RUN, "--overwrite"]
    process = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=limited(5)
    )
    assert "byol.pt.trial: File too large" in one_line(process) and process.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["byol.pt"]
    assert (tmp_path / "byol.pt").read_bytes() == b"old"


@pytest.mark.parametrize("which", [1, 2, 3, 4, 5])
def test_disk_full_while_training(tiny, tmp_path, capfd, monkeypatch, which):
    """The which-th file cannot be written: first the trial, then csv and checkpoint in turn."""
    write_bytes, calls = Path.write_bytes, []

    def full(path, data):
        calls.append(path)
        if len(calls) == which:
            write_bytes(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    process = call(capfd, tmp_path, "byol.py", "--data-dir", tiny, *RUN)
    assert "No space left on device; mend that or name another file" in one_line(process)
    assert not list(tmp_path.glob("*.tmp"))
    monkeypatch.undo()
    if (tmp_path / "byol.pt").exists():
        assert torch.load(tmp_path / "byol.pt", weights_only=True)["epoch"] == (which - 2) // 2
        assert call(capfd, tmp_path, "byol.py", "--data-dir", tiny, *RUN, "--resume").stderr == ""
        assert torch.load(tmp_path / "byol.pt", weights_only=True)["epoch"] == 2
    else:
        assert which <= 3


def test_read_only_folder_is_found_before_the_first_epoch(capfd):
    with tempfile.TemporaryDirectory() as folder:  # tmp_path may be closed to other users
        folder = Path(folder)
        data = write_fashion_mnist(folder / "data", 128, 10)
        folder.chmod(0o555)
        root = os.geteuid() == 0
        try:
            if root:  # for whom every folder can be written
                os.seteuid(65534)
            process = call(capfd, folder, "simclr.py", "--data-dir", data, *RUN)
        finally:
            if root:
                os.seteuid(0)
            folder.chmod(0o755)
        assert "simclr.pt.trial: Permission denied" in one_line(process)
        assert [path.name for path in folder.iterdir()] == ["data"]


def test_ctrl_c_says_how_to_go_on(tiny, tmp_path):
    options = ["--data-dir", tiny, "--epochs", "100000", "--batch-size", "64", "--knn-every", "0"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "moco.py", *options],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores interrupts, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout.readline().startswith("epoch 1 ")
    for _ in range(10):  # Python drops an interrupt that falls into a callback of its own
        process.send_signal(signal.SIGINT)
        try:
            error = process.communicate(timeout=6)[1]
            break
        except subprocess.TimeoutExpired:
            continue
    assert error == "stopped: --resume goes on from moco.pt\n"
    assert process.returncode == 130
    assert torch.load(tmp_path / "moco.pt", weights_only=True)["epoch"] >= 1


@pytest.mark.parametrize("script", METHODS)
def test_ctrl_c_before_the_first_checkpoint(tiny, tmp_path, capfd, monkeypatch, script):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(__import__(script), "train_step", interrupt)
    process = call(capfd, tmp_path, f"{script}.py", "--data-dir", tiny, *RUN)
    assert one_line(process, 130) == "stopped: nothing is saved yet\n"
    assert not list(tmp_path.iterdir())


def test_existing_files_are_not_replaced(tiny, tmp_path, capfd):
    for name in ("byol.pt", "byol.csv", "views.png"):
        path = tmp_path / name
        path.write_bytes(b"old")
        options = ["--data-dir", tiny, *RUN, "--preview", "views.png"]
        line = one_line(call(capfd, tmp_path, "byol.py", *options))
        assert f"{name} exists: go on with --resume or replace it with --overwrite" in line
        assert path.read_bytes() == b"old"
        path.unlink()


OTHER = {
    "lr": ["--lr", "0.3"],
    "epochs": ["--epochs", "3"],
    "batch_size": ["--batch-size", "32"],
    "seed": ["--seed", "1"],
    "momentum": ["--momentum", "0.9"],
    "weight_decay": ["--weight-decay", "0"],
    "hidden_dim": ["--hidden-dim", "64"],
    "warmup_epochs": ["--warmup-epochs", "0"],
    "max_steps": ["--max-steps", "7"],
    "backbone": ["--backbone", "resnet18"],
}


@pytest.mark.parametrize("name", OTHER)
def test_options_that_differ_are_named(good, tiny, capfd, name):
    before = good.read_bytes()
    options = ["--data-dir", tiny, *RUN, "--resume", *OTHER[name]]
    line = one_line(call(capfd, good.parent, "byol.py", *options))
    saved = torch.load(good, weights_only=True)["args"][name]
    assert f"byol.pt was made with {{'{name}': {saved!r}}}: --resume needs the same" in line
    assert good.read_bytes() == before


@pytest.mark.parametrize("script", ["simclr", "moco", "simsiam"])
def test_checkpoint_of_another_method_is_named(good, tiny, tmp_path, capfd, script):
    options = ["--data-dir", tiny, *RUN, "--resume", good]
    line = one_line(call(capfd, tmp_path, f"{script}.py", *options))
    assert "byol.pt was made with {" in line and "'method': 'byol'" in line
    assert not list(tmp_path.iterdir())


def spoil(saved, kind):
    model = saved["model"]
    if kind.startswith("no "):
        del saved[kind.removeprefix("no ")]
    elif kind == "a target weight is missing":
        del model["target.0.0.weight"]
    elif kind == "a weight too many":
        model["target.99.weight"] = torch.ones(3)
    elif kind == "another shape":
        model["projector.0.weight"] = torch.ones(3, 3)
    elif kind == "not finite":
        model["predictor.0.weight"][0] = float("inf")
    elif kind == "another optimizer":
        saved["optimizer"]["param_groups"].pop()
    elif kind == "another generator":
        saved["rng"] = saved["rng"][:100]
    elif kind == "format":
        saved["format"] = 2


SPOILT = {
    "no model": "'model'",
    "no optimizer": "'optimizer'",
    "no rng": "'rng'",
    "no metrics": "'metrics'",
    "no step": "'step'",
    "no args": "'args'",
    "no dataset": "'dataset'",
    "a target weight is missing": "target.0.0.weight",
    "a weight too many": "target.99.weight",
    "another shape": "projector.0.weight",
    "not finite": "predictor.0.weight",
    "another optimizer": "param",
    "another generator": "is not whole",
    "format": "format 2",
}


@pytest.mark.parametrize("kind", SPOILT)
def test_spoilt_checkpoint_is_not_resumed(good, tiny, tmp_path, capfd, kind):
    saved = torch.load(good, weights_only=True)
    spoil(saved, kind)
    torch.save(saved, tmp_path / "byol.pt")
    before = (tmp_path / "byol.pt").read_bytes()
    line = one_line(call(capfd, tmp_path, "byol.py", "--data-dir", tiny, *RUN, "--resume"))
    assert "byol.pt" in line and SPOILT[kind] in line
    assert (tmp_path / "byol.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["byol.pt"]


def test_resume_from_another_file_replaces_none(good, tiny, tmp_path, capfd):
    (tmp_path / "new.pt").write_bytes(b"another run")
    options = ["--data-dir", tiny, *RUN, "--resume", good, "--out", "new.pt"]
    assert "new.pt exists" in one_line(call(capfd, tmp_path, "byol.py", *options))
    assert (tmp_path / "new.pt").read_bytes() == b"another run"


@pytest.mark.parametrize("name", ["byol.pt", "./byol.pt"])
def test_resume_keeps_a_picture_and_a_finished_run_says_so(good, tiny, tmp_path, capfd, name):
    shutil.copy(good, tmp_path / "byol.pt")
    (tmp_path / "mine.png").write_bytes(b"a picture of mine")
    options = ["--data-dir", tiny, *RUN, "--resume", name, "--preview", "mine.png"]
    process = call(capfd, tmp_path, "byol.py", *options)
    assert process.returncode == 0 and process.stdout.startswith("epoch 2 "), process.stderr
    assert (tmp_path / "mine.png").read_bytes() == b"a picture of mine"
    before = (tmp_path / "byol.pt").read_bytes()
    process = call(capfd, tmp_path, "byol.py", *options)
    assert process.returncode == 0, process.stderr
    assert process.stdout == f"{name} has all of its 10 steps: nothing is left to do\n"
    assert (tmp_path / "byol.pt").read_bytes() == before


def test_preview_replaces_a_picture_only_if_told_to(tiny, tmp_path, capfd):
    (tmp_path / "mine.png").write_bytes(b"a picture of mine")
    options = ["--data-dir", tiny, *RUN, "--max-steps", "1", "--preview", "mine.png"]
    assert "mine.png exists" in one_line(call(capfd, tmp_path, "byol.py", *options))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.png"]
    assert call(capfd, tmp_path, "byol.py", *options, "--overwrite").returncode == 0
    assert (tmp_path / "mine.png").read_bytes().startswith(b"\x89PNG")


def test_other_images_are_not_resumed(good, tmp_path, capfd):
    data = write_fashion_mnist(tmp_path / "data", 200, 20)
    options = ["--data-dir", data, *RUN, "--resume", good, "--out", "new.pt"]
    line = one_line(call(capfd, tmp_path, "byol.py", *options))
    assert "was made with {'n_images': 320}" in line


def test_resume_from_another_file(good, tiny, tmp_path, capfd):
    options = ["--data-dir", tiny, *RUN, "--resume", good, "--out", "new.pt"]
    process = call(capfd, tmp_path, "byol.py", *options)
    assert process.returncode == 0 and process.stdout.startswith("epoch 2 "), process.stderr
    assert torch.load(tmp_path / "new.pt", weights_only=True)["epoch"] == 2
    assert torch.load(good, weights_only=True)["epoch"] == 1


def test_same_seed_gives_the_same_curves(tiny, tmp_path, capfd):
    tables = []
    for name in ("a.pt", "b.pt"):
        options = ["--data-dir", tiny, *RUN, "--out", name]
        assert call(capfd, tmp_path, "moco.py", *options).returncode == 0
        text = (tmp_path / name).with_suffix(".csv").read_text()
        tables.append([re.sub(r",[^,]+,[^,]+$", "", line) for line in text.splitlines()])
    assert tables[0] == tables[1] and len(tables[0]) == 3 and tables[0][1].count(",") == 5
