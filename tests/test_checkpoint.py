"""Checkpoints, --resume, kills, Ctrl-C, and everything that is refused in one line."""

import importlib
import runpy
import shutil
import signal
import subprocess
import sys

import byol
import pytest
import simsiam
import torch
from conftest import METHODS, ROOT, train, write_fashion_mnist


def load(path):
    return torch.load(path, weights_only=True)


def refused(process, *words):
    """One line on stderr after argparse's usage, a status that is not 0, nothing trained."""
    *usage, line = process.stderr.strip().splitlines()
    assert process.returncode != 0 and "Traceback" not in process.stderr, process.stderr
    assert not usage or usage[0].startswith("usage: "), process.stderr
    assert "epoch 1" not in process.stdout
    for word in words:
        assert word in line, line


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The folder of two finished epochs of each script, and what the programs printed."""
    folder, printed = tmp_path_factory.mktemp("whole"), {}
    for name in METHODS:
        process = train(folder, tiny, name)
        assert process.returncode == 0 and process.stderr == "", process.stderr
        printed[name] = process.stdout
    return folder, printed


@pytest.fixture(scope="module")
def half(tiny, tmp_path_factory):
    """The folder of runs of two epochs that stopped after one, as if killed."""
    folder = tmp_path_factory.mktemp("half")
    for name in METHODS:
        script = importlib.import_module(name)

        def save_and_stop(*args, save=script.save):
            save(*args)
            raise SystemExit

        fixed = ["--data-dir", str(tiny), "--epochs", "2", "--batch-size", "64", "--device", "cpu"]
        with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, "save", save_and_stop)
            script.train(script.parse_args([*fixed, "--out", str(folder / f"{name}.pt")]))
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_a_run_prints_its_set_up_and_a_line_per_epoch(whole, name):
    folder, printed = whole
    first, *epochs = printed[name].strip().splitlines()
    assert first == "device cpu, bf16 False, processes 1"
    assert [line.split()[:3] for line in epochs] == [["epoch", str(i), "loss"] for i in (1, 2)]
    rows = load(folder / f"{name}.pt")["metrics"]
    for line, row in zip(epochs, rows, strict=True):
        assert line == "  ".join(f"{key} {value:.5g}" for key, value in row.items())
    assert list(rows[1]) == ["epoch", "loss", "z_std", "seconds", "knn"]
    assert rows[1]["knn"] > 20 and 0 < rows[1]["z_std"] < 1.5 and rows[1]["seconds"] > 0


@pytest.mark.parametrize("name", METHODS)
def test_what_a_checkpoint_holds(whole, name):
    saved = load(whole[0] / f"{name}.pt")
    assert set(saved) == {"args", "code", "metrics", "model", "optimizer"}
    assert saved["code"] == (ROOT / f"{name}.py").read_text()
    assert saved["args"]["method"] == name and saved["args"]["images"] == [320, 1, 28, 28]
    assert not list(whole[0].glob("*.tmp"))


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_ends_as_if_never_stopped(whole, half, tiny, tmp_path, name):
    shutil.copy(half / f"{name}.pt", tmp_path)
    assert len(load(tmp_path / f"{name}.pt")["metrics"]) == 1
    process = train(tmp_path, tiny, name, "--resume")
    assert process.returncode == 0 and process.stdout.splitlines()[1].startswith("epoch 2 ")
    found, expected = load(tmp_path / f"{name}.pt"), load(whole[0] / f"{name}.pt")
    for key, value in expected["model"].items():  # queue, pointer and statistics too
        assert torch.equal(found["model"][key], value), key
    for i, value in expected["optimizer"]["state"].items():
        other = found["optimizer"]["state"][i]
        assert torch.equal(other["momentum_buffer"], value["momentum_buffer"])
    for key in ("epoch", "loss", "z_std", "knn"):
        assert found["metrics"][1][key] == expected["metrics"][1][key]


def test_a_run_may_be_resumed_elsewhere(half, tiny, tmp_path):
    """Under another name, with the data in another folder: the same run."""
    shutil.copy(half / "moco.pt", tmp_path / "renamed.pt")
    shutil.copytree(tiny, tmp_path / "data")
    process = train(tmp_path, tmp_path / "data", "moco", "--resume", "--out", "renamed.pt")
    assert process.returncode == 0, process.stderr
    assert len(load(tmp_path / "renamed.pt")["metrics"]) == 2


def test_resuming_a_finished_run_changes_nothing(whole, tiny, tmp_path):
    shutil.copy(whole[0] / "byol.pt", tmp_path)
    before = (tmp_path / "byol.pt").read_bytes()
    process = train(tmp_path, tiny, "byol", "--resume")
    assert process.returncode == 0 and "epoch" not in process.stdout
    assert (tmp_path / "byol.pt").read_bytes() == before


OTHER = [("--lr", "0.7", "0.3"), ("--epochs", "3", "2"), ("--batch-size", "32", "64")]
OTHER += [("--seed", "1", "0"), ("--tau", "0.9", "0.99"), ("--hidden-dim", "64", "512")]


@pytest.mark.parametrize("option, new, old", OTHER)
def test_resume_needs_the_same_options(half, tiny, option, new, old):
    before = (half / "byol.pt").read_bytes()
    name = option[2:].replace("-", "_")
    refused(
        train(half, tiny, "byol", "--resume", option, new), "byol.pt", f"{name} {old}, not {new}"
    )
    assert (half / "byol.pt").read_bytes() == before


def test_resume_needs_as_many_images_and_the_same_method(half, tmp_path):
    data = write_fashion_mnist(tmp_path / "data", 200, 20)
    refused(
        train(half, data, "byol", "--resume"),
        "byol.pt",
        "images [320, 1, 28, 28], not [200, 1, 28, 28]",
    )
    process = train(half, data, "simclr", "--resume", "--out", "byol.pt")
    refused(process, "byol.pt has ")
    data = write_fashion_mnist(tmp_path / "same", 320, 20)
    shutil.copy(half / "simclr.pt", tmp_path / "copy.pt")
    saved = load(tmp_path / "copy.pt")
    saved["args"]["method"] = "simclr_variant"
    torch.save(saved, tmp_path / "copy.pt")
    process = train(tmp_path, data, "simclr", "--resume", "--out", "copy.pt")
    refused(process, "method simclr_variant")


@pytest.mark.parametrize("name", METHODS)
def test_no_file_is_replaced_unasked(tiny, tmp_path, name):
    (tmp_path / "old.pt").write_bytes(b"old")
    refused(train(tmp_path, tiny, name, "--out", "old.pt"), "old.pt", "--resume")
    assert (tmp_path / "old.pt").read_bytes() == b"old"
    refused(train(tmp_path, tiny, name, "--resume"), f"{name}.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["old.pt"]


def test_a_folder_for_the_checkpoint_is_made(tiny, tmp_path):
    process = train(tmp_path, tiny, "simclr", "--epochs", "1", "--out", "runs/first/a.pt")
    assert process.returncode == 0 and (tmp_path / "runs/first/a.pt").exists()


def test_killed_runs_end_as_if_never_killed():
    command = [sys.executable, ROOT / "tests" / "kill.py", "--kills", "2", "--methods", "moco"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "tests")
    assert process.returncode == 0, process.stderr
    assert "2 kills at random moments, 2 at moves of files: all the same" in process.stdout


def test_ctrl_c_says_how_to_go_on(tiny, tmp_path):
    options = ["--data-dir", tiny, "--device", "cpu", "--epochs", "100000", "--batch-size", "64"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "moco.py", *options],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores interrupts, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not process.stdout.readline().startswith("epoch 1 "):
        pass
    for _ in range(10):  # Python drops an interrupt that falls into a callback of its own
        process.send_signal(signal.SIGINT)
        try:
            error = process.communicate(timeout=6)[1]
            break
        except subprocess.TimeoutExpired:
            continue
    assert error.count("\n") == 1 and "--resume" in error and process.returncode == 1
    assert len(load(tmp_path / "moco.pt")["metrics"]) >= 1


@pytest.mark.parametrize("name", METHODS)
def test_a_loss_that_is_not_finite_ends_the_run_before_the_good_checkpoint(
    half, tiny, tmp_path, name, monkeypatch
):
    shutil.copy(half / f"{name}.pt", tmp_path)
    before = (tmp_path / f"{name}.pt").read_bytes()
    script = importlib.import_module(name)
    monkeypatch.setattr(script, "spread", lambda z: z.mean())
    monkeypatch.setattr(script, "augment", lambda x, **view: x * float("nan"))
    fixed = ["--data-dir", tiny, "--epochs", "2", "--batch-size", "64", "--device", "cpu"]
    args = script.parse_args([*map(str, fixed), "--resume", "--out", str(tmp_path / f"{name}.pt")])
    with pytest.raises(SystemExit, match="the loss became nan in epoch 2: lower --lr"):
        script.train(args)
    assert (tmp_path / f"{name}.pt").read_bytes() == before


def test_a_bug_keeps_its_traceback(tiny, tmp_path, monkeypatch):
    """A learner who breaks a line sees where: only errors of data and options are one line."""
    code = (ROOT / "simsiam.py").read_text().replace("p1, p2, z1, z2 = replica", "p1, p2 = replica")
    (tmp_path / "broken.py").write_text(code)
    options = ["--data-dir", str(tiny), "--device", "cpu", "--batch-size", "64"]
    monkeypatch.setattr(sys, "argv", ["broken.py", *options])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="too many values to unpack"):
        runpy.run_path("broken.py", run_name="__main__")


OPTIONS = [
    (METHODS, ["--epochs", "0"], "--epochs 0"),
    (METHODS, ["--epochs", "ten"], "'ten'"),
    (METHODS, ["--batch-size", "1"], "--batch-size 1"),
    (METHODS, ["--batch-size", "321"], "--batch-size 321: use a multiple of 1 up to 320"),
    (METHODS, ["--lr", "nan"], "--lr nan"),
    (METHODS, ["--lr", "-0.1"], "--lr -0.1"),
    (METHODS, ["--seed", "-1"], "--seed -1"),
    (METHODS, ["--device", "tpu"], "'tpu'"),
    (METHODS, ["--dataset", "no-such-folder"], "--dataset no-such-folder is neither"),
    (METHODS, ["--no-such-option"], "--no-such-option"),
    (["simclr", "moco"], ["--temperature", "0"], "--temperature 0.0"),
    (["moco"], ["--momentum", "1.5"], "--momentum 1.5 is not from 0 to 1"),
    (["moco"], ["--queue-size", "0"], "--queue-size 0"),
    (["byol"], ["--tau", "-0.1"], "--tau -0.1 is not from 0 to 1"),
]


@pytest.mark.parametrize("names, options, words", OPTIONS)
def test_bad_options_are_refused(tiny, tmp_path, names, options, words):
    for name in names:
        refused(train(tmp_path, tiny, name, *options), words)
        assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named(tiny, tmp_path):
    refused(train(tmp_path, tiny, "byol", "--device", "cuda"), "--device", "'cuda'")


@pytest.mark.parametrize(
    "size, world, words", [(63, 2, "63: use a multiple of 2 up to 320"), (64, 2, None)]
)
def test_processes_must_divide_the_batch(tiny, tmp_path, monkeypatch, size, world, words):
    monkeypatch.setattr(byol, "join_processes", lambda args: (0, world))
    monkeypatch.setattr(byol, "load", lambda *_: pytest.fail("it went on"))
    (tmp_path / "byol.pt").touch()
    argv = ["--data-dir", tiny, "--batch-size", size, "--device", "cpu", "--resume"]
    args = byol.parse_args([*map(str, argv), "--out", str(tmp_path / "byol.pt")])
    with pytest.raises(SystemExit if words else pytest.fail.Exception, match=words or "went on"):
        byol.train(args)


def test_images_without_labels_are_trained_on(tiny, tmp_path, monkeypatch):
    """Then there is nothing to ask neighbours about."""
    load_dataset = simsiam.load_dataset

    def unlabelled(*args):
        data = load_dataset(*args)
        return data._replace(train_labels=torch.full_like(data.train_labels, -1), classes=())

    monkeypatch.setattr(simsiam, "load_dataset", unlabelled)
    argv = ["--data-dir", tiny, "--epochs", "1", "--batch-size", "64", "--device", "cpu"]
    simsiam.train(simsiam.parse_args([*map(str, argv), "--out", str(tmp_path / "a.pt")]))
    assert "knn" not in load(tmp_path / "a.pt")["metrics"][0]
