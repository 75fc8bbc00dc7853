"""Train each method without BatchNorm, alone or under torchrun, and keep what each process has.

    python -m torch.distributed.run --nproc-per-node 2 tests/processes.py FOLDER OPTIONS ...

A part of a batch has other statistics than the whole, so with BatchNorm several processes differ
from one; without it, they must not. Each process draws its own views, so here they are fixed: the
image and its mirror image.
"""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch import nn  # noqa: E402

nn.BatchNorm1d = nn.BatchNorm2d = nn.Identity  # before any network is built

import common  # noqa: E402
import simclr  # noqa: E402

CLASSES = {"simclr": "SimCLR", "moco": "MoCo", "byol": "BYOL", "simsiam": "SimSiam"}


def run(name, steps, place, folder, options):
    """Train a method for some steps of 64 images; save its weights, and two draws of its views."""
    script, models, draws = importlib.import_module(name), [], []
    method = getattr(script, CLASSES[name])

    def build(*args):
        models.append(method(*args))
        return models[-1]

    def views(x, **view):
        draws.append((x[:, 0, 0, :2].clone(), torch.rand(3)))
        return x if len(draws) % 2 else x.flip(3)

    def first_images(*args):
        data, n = common.load_dataset(*args), 64 * steps
        return data._replace(train_images=data.train_images[:n], train_labels=data.train_labels[:n])

    setattr(script, CLASSES[name], build)
    script.augment, script.load_dataset = views, first_images
    script.join_processes, script.knn_accuracy = lambda args: place, lambda *args: 0.0
    own = ["--queue-size", "100"] if name == "moco" else []
    out = f"{folder}/{name}-{steps}-{place[1]}"
    script.train(script.parse_args([*options, *own, "--out", f"{out}.pt"]))
    setattr(script, CLASSES[name], method)
    torch.save((models[-1].state_dict(), draws[:1]), f"{out}-{place[0]}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, *options = sys.argv[1:]
    place = simclr.join_processes(simclr.parse_args([*options, "--out", f"{folder}/none.pt"]))
    for name in CLASSES:
        for steps in (1, 4):
            run(name, steps, place, folder, options)
