"""Kill real runs with SIGKILL and resume them: each must end in the state of a run never stopped.

    python tests/kill.py --kills 30

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
from conftest import METHODS, write_fashion_mnist

RUN = ["--epochs", "3", "--batch-size", "160", "--device", "cpu", "--out", "run.pt"]


def start(folder, method, data, when=None):
    """Fork a child that trains in `folder`, and dies "before" or "after" its second move."""
    child = os.fork()
    if child:
        return child
    os.chdir(folder)
    moves, replace = [], os.replace

    def fatal(*paths):
        moves.append(paths)
        if len(moves) < 2 or when == "after":
            replace(*paths)
        if len(moves) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    if when:
        os.replace = fatal
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
    saved = torch.load(path, weights_only=True)
    tensors = saved["model"] | {
        f"momentum {i}": x["momentum_buffer"] for i, x in saved["optimizer"]["state"].items()
    }
    found = {k: hashlib.sha256(x.numpy().tobytes()).hexdigest() for k, x in tensors.items()}
    args = {k: v for k, v in saved["args"].items() if k not in ("out", "data_dir", "resume")}
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in saved["metrics"]]
    groups = saved["optimizer"]["param_groups"]
    return found | dict(args=args, code=saved["code"], metrics=rows, groups=groups)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    args = parser.parse_args()
    random.seed(0)
    with tempfile.TemporaryDirectory() as base:
        base, whole, seconds = Path(base), {}, {}
        data = write_fashion_mnist(base / "data")
        for method in args.methods:
            (base / method).mkdir()
            begun = time.monotonic()
            assert os.waitpid(start(base / method, method, data), 0)[1] == 0
            seconds[method] = time.monotonic() - begun
            whole[method] = state(base / method / "run.pt")

        cases = [(method, when) for method in args.methods for when in ("before", "after")]
        at_random, at_moves, runs = 0, 0, 0
        while cases or at_random < args.kills:
            method, when = cases.pop() if cases else (random.choice(args.methods), None)
            runs += 1
            folder, here = base / f"{runs}", 0
            folder.mkdir()
            while True:
                child = start(folder, method, data, when if here == 0 else None)
                if not when and at_random + here < args.kills:
                    time.sleep(random.uniform(0, seconds[method]))
                    os.kill(child, signal.SIGKILL)
                status = os.waitpid(child, 0)[1]
                if status == 0:
                    break
                assert os.WIFSIGNALED(status), "the run failed by itself"
                here += 1
                if (folder / "run.pt").exists():  # what is there is whole
                    torch.load(folder / "run.pt", weights_only=True)
            assert state(folder / "run.pt") == whole[method], f"{method} ended differently"
            at_random, at_moves = at_random + here * (not when), at_moves + here * bool(when)
            kind = "the move of a file" if when else "random moments"
            print(f"{method}: killed {here} times at {kind}, ended the same", flush=True)
        print(f"{at_random} kills at random moments, {at_moves} at moves of files: all the same")


if __name__ == "__main__":
    main()
