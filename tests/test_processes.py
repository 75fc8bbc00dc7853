"""Several processes (gloo, on the CPU) do what one does with the whole batch."""

import re
import subprocess
import sys
import time

import pytest
import torch
from conftest import METHODS, ROOT

OPTIONS = ["--batch-size", "64", "--epochs", "1", "--device", "cpu", "--data-dir"]


def torchrun(world, folder, *command):
    """Start the same program `world` times; return the finished torchrun."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", world]
    command = [sys.executable, *(start if world > 1 else []), *command]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=folder)


@pytest.fixture(scope="module")
def after(tmp_path_factory, tiny):
    """A folder with what all methods leave after 1 and after 4 steps, as 1 and as 2 processes."""
    folder = tmp_path_factory.mktemp("steps")
    for world in (1, 2):
        process = torchrun(world, folder, ROOT / "tests/processes.py", folder, *OPTIONS, tiny)
        assert process.returncode == 0, process.stderr
        assert process.stdout.count("epoch 1  loss") == 8  # one process prints
    return folder


def load(folder, name):
    return torch.load(folder / f"{name}.pt", weights_only=True)


@pytest.mark.parametrize("name", METHODS)
def test_one_step_has_the_same_loss_and_gradients(name, after):
    one, two = (load(after, f"{name}-1-{n}") for n in (1, 2))
    assert two["metrics"][0]["loss"] == pytest.approx(one["metrics"][0]["loss"], rel=1e-6)
    # After the first step, the momentum buffer is the gradient and the weights' decay.
    states = one["optimizer"]["state"]
    assert len(states) > 5
    for i, state in states.items():
        gradient, other = (s["momentum_buffer"] for s in (state, two["optimizer"]["state"][i]))
        torch.testing.assert_close(other, gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_several_steps_end_in_the_same_weights(name, after):
    one = load(after, f"{name}-4-1-0")[0]
    ranks = [load(after, f"{name}-4-2-{rank}")[0] for rank in range(2)]
    for key, value in one.items():  # the averaged networks and the queue too
        torch.testing.assert_close(ranks[0][key], value, atol=1e-5, rtol=1e-4)
        assert torch.equal(ranks[1][key], ranks[0][key])


def test_one_process_writes(after):
    assert not list(after.glob("*.tmp"))
    assert len(list(after.glob("*-2.pt"))) == 8


def test_a_real_run_prints_once_and_its_batch_is_divided(tiny, tmp_path):
    process = torchrun(2, tmp_path, ROOT / "byol.py", *OPTIONS, tiny)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.strip().splitlines()
    assert lines[0] == "device cpu, bf16 False, processes 2" and len(lines) == 2
    assert re.fullmatch(r"epoch 1  loss \S+  z_std \S+  seconds \S+  knn \S+", lines[1])
    assert "Traceback" not in process.stderr


def test_processes_draw_other_views_of_other_images(after):
    (images, draws), (others, other_draws) = (
        load(after, f"byol-1-2-{rank}")[1][0] for rank in range(2)
    )
    assert len(images) == len(others) == 32 and not torch.equal(draws, other_draws)
    assert not {tuple(x) for x in images.tolist()} & {tuple(x) for x in others.tolist()}


def test_a_refusal_of_one_process_ends_all(tiny, tmp_path):
    """One process does not find the data: the other must not wait for it."""
    code = f"""
import sys, os
sys.path.insert(0, {str(ROOT)!r})
import simclr
args = simclr.parse_args(sys.argv[1:])
if os.environ["RANK"] == "1":
    args.dataset = "no-such-folder"
simclr.train(args)
"""
    (tmp_path / "one.py").write_text(code)
    begun = time.monotonic()
    process = torchrun(2, tmp_path, "one.py", *OPTIONS, tiny)
    assert process.returncode != 0 and time.monotonic() - begun < 60
    assert "no-such-folder is neither" in process.stderr and not list(tmp_path.glob("*.pt"))
