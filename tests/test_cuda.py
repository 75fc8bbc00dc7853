"""What only a GPU can show; skipped where there is none."""

import importlib
import math

import pytest
import torch
from conftest import METHODS, call, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.parametrize("bf16", ["--bf16", "--no-bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_two_epochs_on_a_gpu(name, bf16, tiny, tmp_path):
    process = train(tmp_path, tiny, name, "--device", "cuda", bf16)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith(f"cuda, bf16 {bf16 == '--bf16'}, processes 1")
    last = torch.load(tmp_path / f"{name}.pt", weights_only=True)["metrics"][-1]
    assert math.isfinite(last["loss"]) and 0 < last["z_std"] < 1.5 and last["knn"] > 10
    options = ["--weights", f"{name}.pt", "--data-dir", tiny, "--device", "cuda"]
    process = call(tmp_path, "linear_eval.py", *options)
    assert process.returncode == 0 and f"{name}.pt" in process.stdout, process.stderr


@pytest.mark.parametrize("first, second", [("cuda", "cpu"), ("cpu", "cuda")])
@pytest.mark.parametrize("name", METHODS)
def test_a_run_goes_on_between_devices(name, first, second, tiny, tmp_path, monkeypatch):
    script = importlib.import_module(name)
    fixed = ["--data-dir", str(tiny), "--epochs", "2", "--batch-size", "64"]
    fixed += ["--out", str(tmp_path / "run.pt")]

    def save_and_stop(*args, save=script.save):
        save(*args)
        raise SystemExit

    with pytest.raises(SystemExit), monkeypatch.context() as patch:
        patch.setattr(script, "save", save_and_stop)
        script.train(script.parse_args([*fixed, "--device", first]))
    script.train(script.parse_args([*fixed, "--device", second, "--resume"]))
    assert len(torch.load(tmp_path / "run.pt", weights_only=True)["metrics"]) == 2


@pytest.mark.parametrize("name", METHODS)
def test_a_step_waits_for_nothing(name, tiny, tmp_path, monkeypatch):
    """No copy from or to the host, and no wait, between the first step of an epoch and its end."""
    script, calls = importlib.import_module(name), []

    def augment(*args, original=script.augment, **view):
        calls.append(0)
        torch.cuda.set_sync_debug_mode("error" if len(calls) > 2 else "default")
        return original(*args, **view)

    def spread(z, original=script.spread):
        value = original(z)
        torch.cuda.set_sync_debug_mode("default")
        return value

    monkeypatch.setattr(script, "augment", augment)
    monkeypatch.setattr(script, "spread", spread)
    options = ["--data-dir", tiny, "--device", "cuda", "--epochs", 1, "--batch-size", 64]
    try:
        script.train(script.parse_args([*map(str, options), "--out", str(tmp_path / "run.pt")]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
