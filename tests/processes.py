"""Train without BatchNorm, alone or under torchrun, and keep what each process ended with.

    python -m torch.distributed.run --nproc-per-node 2 tests/processes.py byol,moco 1,4 FOLDER ...

trains BYOL and MoCo for 1 and for 4 steps. A share of a batch has other statistics than the whole,
so with BatchNorm several processes would differ from one; without it, they must not. 0 steps: stop,
as if killed, after the first epoch.
"""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch import nn  # noqa: E402

nn.BatchNorm1d = nn.BatchNorm2d = nn.Identity  # before any network is built
import plumbing  # noqa: E402

torch.set_num_threads(1)
methods, steps, folder, *options = sys.argv[1:]
for i, run in enumerate(
    (name, n) for name in methods.split(",") for n in map(int, steps.split(","))
):
    name, n = run
    script, built = importlib.import_module(name), []

    def build_model(*args, build=script.build_model, built=built):
        built.append(build(*args))
        return built[-1]

    def save_and_stop(*args, save=script.save):
        save(*args)
        raise SystemExit(1)

    script.build_model = build_model
    script.save = script.save if n else save_and_stop
    if i > 0:  # they have met already
        script.join_processes = lambda args: None
    own = ["--queue-size", "100"] if name == "moco" else []
    own += ["--max-steps", str(n)] if n else []
    stem = f"{folder}/{name}-{n}-{plumbing.WORLD}"
    script.main([*options, *own, "--out", f"{stem}.pt"])
    torch.save(built[-1].state_dict(), f"{stem}-{plumbing.RANK}.pt")
