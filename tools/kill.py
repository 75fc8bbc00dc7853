"""Kill real runs with SIGKILL and resume them: each must end in the state of a run never stopped.

    python tools/kill.py --kills 30

Kills at random moments, and kills just before and just after a checkpoint is moved into place.
Prints a line per run.
"""

import argparse
import hashlib
import importlib
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import METHODS, write_fashion_mnist  # noqa: E402

RUN = ["--epochs", "3", "--batch-size", "160", "--device", "cpu", "--out", "run.pt"]


def start(folder, method, data, when=None):
    """Fork a child that trains in `folder`, and dies "before" or "after" its second move."""
    child = os.fork()
    if child:
        return child

    def fatal(*paths, moves=[], replace=os.replace):  # noqa: B006
        moves.append(paths)
        if len(moves) < 2 or when == "after":
            replace(*paths)
        if len(moves) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = fatal if when else os.replace
    os.chdir(folder)
    sys.stdout = open(os.devnull, "w")
    try:
        script = importlib.import_module(method)
        resume = ["--resume"] if Path("run.pt").exists() else []
        script.train(script.parse_args(["--data-dir", str(data), *RUN, *resume]))
        os._exit(0)
    except BaseException as error:
        print(f"{method}: {error!r}", file=sys.stderr)
        os._exit(1)


def state(path):
    """All that a finished run left, as short texts, but for its seconds, places and --resume."""
    saved, free = torch.load(path, weights_only=True), ("out", "data_dir", "resume", "seconds")
    states = saved["optimizer"]["state"]
    tensors = saved["model"] | {i: state["momentum_buffer"] for i, state in states.items()}
    found = {k: hashlib.sha256(x.numpy().tobytes()).hexdigest() for k, x in tensors.items()}
    for i, part in enumerate([saved["args"], *saved["metrics"]]):
        found[f"part {i}"] = {k: v for k, v in part.items() if k not in free}
    return found | dict(groups=saved["optimizer"]["param_groups"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    args = parser.parse_args()
    random.seed(0)
    with tempfile.TemporaryDirectory() as base:
        data, whole, seconds = write_fashion_mnist(Path(base, "data")), {}, {}
        for method in args.methods:
            folder, begun = Path(tempfile.mkdtemp(dir=base)), time.monotonic()
            assert os.waitpid(start(folder, method, data), 0)[1] == 0
            seconds[method] = time.monotonic() - begun
            whole[method] = state(folder / "run.pt")

        cases = [(method, when) for method in args.methods for when in ("before", "after")]
        kills = {"random moments": 0, "moves of files": 0}
        while cases or kills["random moments"] < args.kills:
            method, when = cases.pop() if cases else (random.choice(args.methods), None)
            kind = "moves of files" if when else "random moments"
            folder, here = Path(tempfile.mkdtemp(dir=base)), 0
            while True:
                child = start(folder, method, data, None if here else when)
                if not when and kills[kind] < args.kills:
                    time.sleep(random.uniform(0, seconds[method]))
                    os.kill(child, signal.SIGKILL)
                status = os.waitpid(child, 0)[1]
                if status == 0:
                    break
                assert os.WIFSIGNALED(status), "the run failed by itself"
                here, kills[kind] = here + 1, kills[kind] + 1
                path = folder / "run.pt"
                if path.exists() and path.stat().st_size:  # empty before the first epoch's end
                    torch.load(path, weights_only=True)
            assert state(folder / "run.pt") == whole[method], f"{method} ended differently"
            print(f"{method}: killed {here} times at {kind}, ended the same", flush=True)
        at_random, at_moves = kills.values()
        print(f"{at_random} kills at random moments, {at_moves} at moves of files: all the same")


if __name__ == "__main__":
    main()
