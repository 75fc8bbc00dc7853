"""Train each method without BatchNorm, alone or under torchrun, and keep what each process has.

    python -m torch.distributed.run --nproc-per-node 2 tests/processes.py STEPS FOLDER OPTIONS ...

A part of a batch has other statistics than the whole, so with BatchNorm several processes differ
from one; without it, they must not. Each process draws its own views, so here they are fixed: the
image and its mirror image.
"""

import importlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch import nn  # noqa: E402

nn.BatchNorm1d = nn.BatchNorm2d = nn.Identity  # before any network is built
CLASSES = {"simclr": "SimCLR", "moco": "MoCo", "byol": "BYOL", "simsiam": "SimSiam"}

torch.set_num_threads(1)
steps, folder, *options = sys.argv[1:]
world, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")
joined = None
for name, title in CLASSES.items():
    script, models, calls = importlib.import_module(name), [], []

    def build(*args, create=getattr(script, title), models=models):  # noqa: B008
        models.append(create(*args))
        return models[-1]

    def views(x, calls=calls, **view):
        calls.append(0)
        return x if len(calls) % 2 else x.flip(3)

    def first_images(*args, load=script.load_dataset):
        data = load(*args)
        n = 64 * int(steps)
        return data._replace(train_images=data.train_images[:n], train_labels=data.train_labels[:n])

    def join(args, original=script.join_processes):
        global joined  # the processes meet once for all methods
        joined = joined or original(args)
        return joined

    setattr(script, title, build)
    script.augment, script.load_dataset, script.join_processes = views, first_images, join
    script.knn_accuracy = lambda *args: 0.0
    own = ["--queue-size", "100"] if name == "moco" else []
    out = f"{folder}/{name}-{steps}-{world}.pt"
    script.train(script.parse_args([*options, *own, "--out", out]))
    torch.save(models[-1].state_dict(), f"{folder}/{name}-{steps}-{world}-{rank}.pt")
