"""Several processes (gloo, on the CPU) do what one does with the whole batch."""

import argparse
import shutil
import subprocess
import sys

import plumbing
import pytest
import torch
from conftest import METHODS, ROOT

OPTIONS = ["--batch-size", "64", "--knn-every", "0", "--epochs", "2", "--warmup-epochs", "0",
           "--weight-decay", "0", "--device", "cpu"]  # fmt: skip


def start(world, methods, steps, folder, *options):
    """Run tests/processes.py as `world` processes; return the finished program."""
    command = [sys.executable]
    if world > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", world]
    command += [ROOT / "tests/processes.py", methods, steps, folder, *OPTIONS, *options]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=folder)


@pytest.fixture(scope="module")
def after(tmp_path_factory, tiny):
    """A folder with what all methods leave after 1 and after 4 steps, as 1, 2 and 4 processes."""
    folder = tmp_path_factory.mktemp("steps")
    for world in (1, 2, 4):
        process = start(world, ",".join(METHODS), "1,4", folder, "--data-dir", tiny)
        assert process.returncode == 0, process.stderr
        assert process.stdout.count("epoch 1  step") == 8  # one process prints
    return folder


def load(folder, name):
    return torch.load(folder / f"{name}.pt", weights_only=True)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", METHODS)
def test_one_step_has_the_same_loss_and_gradients(name, world, after):
    one, many = (load(after, f"{name}-1-{n}") for n in (1, world))
    for key in ("loss", "z_std"):
        assert many["metrics"][0][key] == pytest.approx(one["metrics"][0][key], abs=1e-6)
    # After the first step without weight decay, the momentum buffer is the gradient.
    for i, state in one["optimizer"]["state"].items():
        gradient, other = (s["momentum_buffer"] for s in (state, many["optimizer"]["state"][i]))
        assert gradient.abs().max() > 1e-5
        torch.testing.assert_close(other, gradient, atol=1e-6, rtol=1e-5)
    assert torch.equal(one["rng"], many["rng"])


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", METHODS)
def test_several_steps_end_in_the_same_weights(name, world, after):
    one = load(after, f"{name}-4-1-0")
    ranks = [load(after, f"{name}-4-{world}-{rank}") for rank in range(world)]
    for key, value in one.items():  # the averaged networks, the queue and its pointer too
        torch.testing.assert_close(ranks[0][key], value, atol=1e-5, rtol=1e-4)
        for rank in ranks[1:]:
            assert torch.equal(rank[key], ranks[0][key])


def test_one_process_writes(after):
    assert not [*after.glob("*.tmp"), *after.glob("*.trial")]
    for name in METHODS:
        assert len((after / f"{name}-4-4.csv").read_text().splitlines()) == 2


def test_resume_with_another_number_of_processes(tiny, tmp_path):
    """As long as the whole batch is the same size, it makes no difference how many share it."""
    options = ["--data-dir", tiny, "--epochs", "2"]
    process = start(1, "moco", "10", tmp_path, *options)
    assert process.returncode == 0, process.stderr
    (tmp_path / "moco-10-1.pt").rename(tmp_path / "whole.pt")
    process = start(2, "moco", "0", tmp_path, *options, "--max-steps", "10")
    assert process.returncode != 0 and load(tmp_path, "moco-0-2")["epoch"] == 1
    shutil.copy(tmp_path / "moco-0-2.pt", tmp_path / "started.pt")
    process = start(1, "moco", "10", tmp_path, *options, "--resume", "started.pt", "--overwrite")
    assert process.returncode == 0, process.stderr
    resumed = load(tmp_path, "moco-10-1")
    assert [row["epoch"] for row in resumed["metrics"]] == [1, 2]
    for key, value in load(tmp_path, "whole")["model"].items():
        torch.testing.assert_close(resumed["model"][key], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "device, size, words",
    [("cpu", 63, "--batch-size 63 is no multiple of 2 processes"), ("mps", 64, "--device mps")],
)
def test_what_processes_cannot_share_is_refused(device, size, words, monkeypatch):
    monkeypatch.setattr(plumbing, "WORLD", 2)
    with pytest.raises(ValueError, match=words):
        plumbing.join_processes(argparse.Namespace(batch_size=size, device=device))


def test_keys_are_encoded_in_mixed_batches(tmp_path):
    """ShuffleBN: each process's batch of keys has images of every process, each key comes back."""
    code = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch, plumbing, moco
from types import SimpleNamespace
args = SimpleNamespace(batch_size=8, device="cpu", hidden_dim=1, projection_dim=1, queue_size=16,
                       mlp=False, temperature=1.0, momentum=1.0, symmetric=False)
plumbing.join_processes(args)
class Seen(torch.nn.Module):  # what goes in comes out, as two features
    def forward(self, x):
        self.x = x.flatten()
        return torch.stack([x.flatten().cos(), x.flatten().sin()], dim=1)
class Query(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(1))
    def forward(self, x):
        return self.w * torch.stack([x.flatten().cos(), x.flatten().sin()], dim=1)
parts = dict(backbone=Query(), projector=torch.nn.Identity(), key_encoder=Seen())
model = torch.nn.ModuleDict(parts)
model.register_buffer("queue", torch.zeros(16, 2))
model.register_buffer("pointer", torch.tensor(0))
moco.ema_update = lambda *a: None
x = (torch.arange(8.) / 10).view(8, 1, 1, 1).chunk(plumbing.WORLD)[plumbing.RANK]
sgd = torch.optim.SGD([dict(params=model["backbone"].parameters(), name="backbone")], 0.1)
loss, q = moco.train_step(model, sgd, x, x, 0, args)
whole = torch.arange(8.) / 10
assert torch.allclose(model.queue[:8], torch.stack([whole.cos(), whole.sin()], dim=1)), model.queue
seen = (10 * model["key_encoder"].x).round().int().tolist()
own = (10 * x.flatten()).round().int().tolist()
assert len(seen) == 4 and len(set(seen) & set(own)) == 2, (seen, own)
# the positive is the own image's key, at similarity 1; the 16 of the queue were zeros
assert abs(loss.item() - torch.tensor(1 + 16 / torch.e).log().item()) < 1e-5, loss
"""
    (tmp_path / "keys.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", tmp_path / "keys.py", ROOT]  # fmt: skip
    process = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
