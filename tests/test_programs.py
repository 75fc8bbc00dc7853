"""The programs as a user runs them: files left behind, resuming, refusals, help."""

import csv
import re

import byol
import linear_eval
import pytest
import torch
from conftest import ROOT, call, run

SCRIPTS = ["byol", "simclr", "moco", "simsiam"]
TRIAL = ["--epochs", "2", "--batch-size", "64", "--knn-every", "1"]


def train(folder, tiny, script, *options):
    """Run a script as a program of its own."""
    return run(folder, f"{script}.py", "--data-dir", tiny, *TRIAL, *options)


@pytest.fixture
def train_here(capfd, tiny):
    """Run a script in this process."""

    def start(folder, script, *options):
        return call(capfd, folder, f"{script}.py", "--data-dir", tiny, *TRIAL, *options)

    return start


def error_line(process):
    """The one line of a refusal: status 2, no traceback."""
    assert process.returncode == 2, process.stderr
    lines = process.stderr.strip().splitlines()
    assert len(lines) == 1, process.stderr
    return lines[0]


@pytest.fixture(scope="module", params=SCRIPTS)
def trained(request, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    process = train(folder, tiny, request.param, "--preview", "views.png")
    assert process.returncode == 0, process.stderr
    return request.param, folder, process


def test_run_leaves_checkpoint_and_curves(trained):
    name, folder, process = trained
    assert sorted(p.name for p in folder.iterdir()) == [f"{name}.csv", f"{name}.pt", "views.png"]
    rows = list(csv.DictReader(open(folder / f"{name}.csv")))
    assert list(rows[0]) == "epoch step loss lr z_std knn images_per_second seconds".split()
    assert [row["step"] for row in rows] == ["5", "10"]
    assert all(float(row["knn"]) > 10 and float(row["z_std"]) > 0 for row in rows)
    lines = process.stdout.strip().splitlines()
    assert len(lines) == 2 and lines[1].startswith("epoch 2  step 10  loss ")
    checkpoint = torch.load(folder / f"{name}.pt", weights_only=True)
    assert checkpoint["format"] == 1 and checkpoint["method"] == name
    assert checkpoint["epoch"] == 2 and checkpoint["step"] == 10
    assert [str(row["loss"]) for row in checkpoint["metrics"]] == [row["loss"] for row in rows]


def test_learning_rate_warms_up_then_falls(trained):
    name, folder, _ = trained
    peak = torch.load(folder / f"{name}.pt", weights_only=True)["args"]["lr"] * 64 / 256
    first, last = (float(r["lr"]) for r in csv.DictReader(open(folder / f"{name}.csv")))
    assert first == pytest.approx(peak * (1 + torch.cos(torch.tensor(0.4 * torch.pi)).item()) / 2)
    assert last == pytest.approx(peak * (1 + torch.cos(torch.tensor(0.9 * torch.pi)).item()) / 2)


def test_weight_decay_spares_biases_and_batchnorm(trained):
    name, folder, _ = trained
    checkpoint = torch.load(folder / f"{name}.pt", weights_only=True)
    groups, state = checkpoint["optimizer"]["param_groups"], checkpoint["optimizer"]["state"]
    for group in groups:
        dims = {state[i]["momentum_buffer"].ndim for i in group["params"]}
        assert dims and (min(dims) > 1 if group["weight_decay"] else max(dims) == 1)
    assert {group["weight_decay"] for group in groups} == {0.0, checkpoint["args"]["weight_decay"]}


def test_same_seed_gives_the_same_run(trained, train_here, tmp_path):
    name, folder, _ = trained
    assert train_here(tmp_path, name).returncode == 0  # without the preview: it changes nothing
    first, again = (torch.load(f / f"{name}.pt", weights_only=True) for f in (folder, tmp_path))
    assert all(torch.equal(first["model"][key], again["model"][key]) for key in first["model"])
    other = train_here(tmp_path, name, "--seed", "1", "--out", "other.pt")
    assert other.returncode == 0
    model = torch.load(tmp_path / "other.pt", weights_only=True)["model"]
    assert not torch.equal(model["backbone.0.weight"], first["model"]["backbone.0.weight"])


def test_resume_is_exact(trained, tiny, train_here, tmp_path, monkeypatch):
    """A run that dies in its second epoch goes on to the same bytes."""
    name, folder, _ = trained
    script = __import__(name)
    step, calls = script.train_step, []

    def die(*args):
        calls.append(1)
        if len(calls) == 8:
            raise OSError("pulled the plug")
        return step(*args)

    monkeypatch.setattr(script, "train_step", die)
    out = tmp_path / f"{name}.pt"
    argv = ["--data-dir", str(tiny), *TRIAL, "--out", str(out)]
    with pytest.raises(OSError, match="pulled the plug"):
        script.main(argv)
    assert torch.load(out, weights_only=True)["epoch"] == 1
    monkeypatch.undo()
    process = train_here(tmp_path, name, "--out", out, "--resume")
    assert process.returncode == 0, process.stderr
    whole, pieces = (torch.load(f / f"{name}.pt", weights_only=True) for f in (folder, tmp_path))
    assert all(torch.equal(whole["model"][key], pieces["model"][key]) for key in whole["model"])
    assert torch.equal(whole["rng"], pieces["rng"])
    for one, other in zip(whole["metrics"], pieces["metrics"], strict=True):
        assert all(one[k] == other[k] for k in one if k not in ("images_per_second", "seconds"))
    momenta = [c["optimizer"]["state"].values() for c in (whole, pieces)]
    for one, other in zip(*momenta, strict=True):
        assert torch.equal(one["momentum_buffer"], other["momentum_buffer"])


def test_existing_checkpoint_is_not_replaced(trained, train_here):
    name, folder, _ = trained
    before = (folder / f"{name}.pt").read_bytes()
    line = error_line(train_here(folder, name))
    assert f"{name}.pt exists" in line and "--resume" in line and "--overwrite" in line
    assert (folder / f"{name}.pt").read_bytes() == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_max_steps_ends_early(train_here, tmp_path, script):
    process = train_here(tmp_path, script, "--max-steps", "2")
    assert process.returncode == 0, process.stderr
    checkpoint = torch.load(tmp_path / f"{script}.pt", weights_only=True)
    assert checkpoint["step"] == 2
    assert linear_eval.load_encoder(tmp_path / f"{script}.pt")[1]["step"] == 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_divergence_keeps_the_old_checkpoint(tiny, tmp_path, script, monkeypatch):
    out = tmp_path / "old.pt"
    out.write_bytes(b"old")
    module = __import__(script)
    monkeypatch.setattr(
        module, "train_step", lambda *_: (torch.tensor(float("nan")), torch.ones(4, 2))
    )
    with pytest.raises(ValueError, match="loss nan in epoch 1 at learning rate .*lower --lr"):
        module.main(["--data-dir", str(tiny), *TRIAL, "--out", str(out), "--overwrite"])
    assert out.read_bytes() == b"old"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_device_is_refused(tiny, tmp_path):
    process = train(tmp_path, tiny, "byol", "--device", "cuda")  # as a program, for once
    assert "--device cuda" in error_line(process)


@pytest.mark.parametrize("script", [*SCRIPTS, "linear_eval"])
def test_help_explains_every_option(script, capfd):
    process = call(capfd, ROOT, f"{script}.py", "--help")
    assert process.returncode == 0
    source = (ROOT / f"{script}.py").read_text()
    options = re.findall(r'\badd\(\s*"(--[a-z-]+)"', source)
    assert len(options) >= 5
    for option in options:
        assert re.search(rf"{option}\b.*\n?.*\w+", process.stdout), option
    assert "(default: " in process.stdout


@pytest.mark.parametrize("script", [*SCRIPTS, "linear_eval"])
def test_every_option_is_read(script):
    source = (ROOT / f"{script}.py").read_text()
    for option in re.findall(r'\badd\(\s*"--([a-z-]+)"', source):
        assert f"args.{option.replace('-', '_')}" in source, f"--{option} is read nowhere"


def test_z_std():
    z = torch.randn(4000, 32)
    assert byol.z_std(z).item() == pytest.approx(1, abs=0.02)
    assert byol.z_std(torch.ones(10, 4)).item() == pytest.approx(0, abs=1e-6)
    assert byol.z_std(1000 * z).item() == pytest.approx(byol.z_std(z).item(), rel=1e-5)


def test_knn_leaves_out_images_without_a_label(tiny, tmp_path, monkeypatch):
    """STL-10 has 100,000 such images, with the label -1, among the training images."""
    data, banks = byol.load_dataset("fashion-mnist", tiny), []
    data.train_labels[::3] = -1
    monkeypatch.setattr(byol, "load_dataset", lambda *_: data)
    monkeypatch.setattr(byol, "knn_accuracy", lambda *args: banks.append(args) or 12.5)
    byol.main([*TRIAL, "--epochs", "1", "--out", str(tmp_path / "byol.pt")])
    [(features, labels, queries, _)] = banks
    assert labels.tolist() == [n for n in data.train_labels.tolist() if n >= 0]
    assert len(features) == len(labels) == 213 and len(queries) == 100
