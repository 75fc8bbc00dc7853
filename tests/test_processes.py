"""Several processes (gloo, on the CPU) do what one does with the whole batch.

A part of a batch has other statistics than the whole, so with BatchNorm several processes differ
from one; without it, they must not. Each process draws its own views, so here they are fixed.
"""

import copy
import importlib
import inspect
import multiprocessing
import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import METHODS, ROOT, common, in_float64
from torch import nn

# Processes are forked from one that has imported these, as that takes seconds.
PRELOAD = ["torch.distributed", "torchvision.transforms.v2", "tqdm", "pytest"]


def run(rank, world, port, name, folder, data_dir, scripts):
    """Train for four epochs of one step, as process `rank` of `world`; keep what it has."""
    sys.path.insert(0, scripts)
    os.environ |= dict(RANK=f"{rank}", WORLD_SIZE=f"{world}", MASTER_PORT=f"{port}")
    os.environ |= dict(MASTER_ADDR="localhost", TORCHELASTIC_RUN_ID="test")  # as torchrun does
    nn.BatchNorm1d = nn.BatchNorm2d = nn.Identity  # before any network is built
    script, models, images, draws, saved = importlib.import_module(name), [], [], [], []
    classes = [value for value in vars(script).values() if inspect.isclass(value)]
    network = [c for c in classes if issubclass(c, nn.Module)][-1]

    def build(*args):
        models.append(network(*args))
        return models[-1]

    def views(x, solarize=0.0):
        images.append(x[:, 0, 0, :2].clone())
        draws.append(torch.rand(3))
        return x if len(draws) % 2 else x.flip(3)

    def first_images(*args):
        data = common.load_dataset(*args)
        x, labels = data.train_images[:64], data.train_labels[:64]
        return data._replace(train_images=x, train_labels=labels)

    def save(args, model, optimizer, metrics):
        saved.append(copy.deepcopy([*optimizer.state.values()]))

    setattr(script, network.__name__, build)
    script.augment, script.load_dataset, script.save = views, first_images, save
    torch.randint = lambda n, size, device: torch.arange(*size) % n  # InstDisc's negatives
    options = ["--data-dir", data_dir, "--batch-size", "64", "--epochs", "4", "--device", "cpu"]
    own = ["--queue-size", "100"] if name == "moco" else []
    with in_float64():
        script.train(script.parse_args([*options, *own, "--out", f"{folder}/{world}.pt"]))
    kept = dict(model=models[0].state_dict(), images=images, draws=draws, saved=saved)
    torch.save(kept, f"{folder}/{name}-{world}-{rank}.pt")
    if world > 1:
        dist.destroy_process_group()  # these processes do nothing at exit


@pytest.fixture(
    scope="module", params=[*METHODS, "moco_v3", "dino", "instdisc", "supcon", "lejepa"]
)
def kept(request, tmp_path_factory, tiny, variants):
    """What `run` kept of one process, and of the first and second of two."""
    folder, name = tmp_path_factory.mktemp("kept"), request.param
    multiprocessing.set_forkserver_preload(PRELOAD)
    for world in (1, 2):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        args = (world, port, name, str(folder), str(tiny), str(variants))
        torch.multiprocessing.start_processes(run, args, world, start_method="forkserver")
    return [torch.load(folder / f"{name}-{who}.pt") for who in ("1-0", "2-0", "2-1")]


def test_one_step_has_the_same_gradients(kept):
    """After the first step, the optimizer has seen one gradient, and the weights' decay."""
    one, first, second = kept
    assert len(one["saved"][0]) >= 5
    torch.testing.assert_close(first["saved"][0], one["saved"][0], atol=1e-9, rtol=1e-9)
    assert [len(x["saved"]) for x in kept] == [4, 4, 0]  # the first of two processes saves


def test_several_steps_end_in_the_same_weights(kept):
    """The averaged networks too, and the queue with its pointer."""
    one, first, second = kept
    torch.testing.assert_close(first["model"], one["model"], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(second["model"], first["model"], atol=0, rtol=0)


def test_processes_draw_other_views_of_other_images(kept):
    one, first, second = kept
    for whole, images, others in zip(*(x["images"] for x in kept), strict=True):
        assert torch.equal(torch.cat([images, others]), whole) and len(images) == 32
    draws = [tuple(x.tolist()) for x in first["draws"] + second["draws"]]
    assert len(set(draws)) == len(draws) >= 8


def test_torchrun(tiny, tmp_path):
    """One process prints and writes. When one fails, as the second does in epoch 2, both end."""
    (tmp_path / "one.py").write_text(f"""
import os, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
from torchvision.transforms.v2 import functional
import common
def normalize(*args, calls=[], original=functional.normalize):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 20:
        raise common.DataError("the second process fails")
    return original(*args)
functional.normalize = normalize
runpy.run_path({str(ROOT / "byol.py")!r}, run_name="__main__")
""")
    command = "-m torch.distributed.run --standalone --nproc-per-node 2 one.py --out run.pt"
    options = "--batch-size 64 --epochs 3 --device cpu --data-dir"
    command = [sys.executable, *command.split(), *options.split(), tiny]
    # The time is limited as processes may wait for each other.
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=200)
    assert process.returncode != 0 and "the second process fails" in process.stderr
    first, line = process.stdout.strip().splitlines()
    assert first == "cpu, bf16 False, processes 2, steps 15" and line.startswith("epoch 1  loss ")
    assert [path.name for path in tmp_path.glob("*.pt*")] == ["run.pt"]
    assert len(torch.load(tmp_path / "run.pt", weights_only=True)["metrics"]) == 1
