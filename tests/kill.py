"""Kill real runs with SIGKILL and resume them: each must end in the state of a run never stopped.

    python tests/kill.py --kills 30

Kills at random moments, and kills just before and just after a checkpoint is moved into place.
Prints a line per run.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from conftest import METHODS, write_fashion_mnist

RUN = ["--epochs", "3", "--batch-size", "64", "--device", "cpu", "--out", "run.pt"]


def start(folder, method, data, die_at=None):
    """Fork a child that trains in `folder`; `die_at` = (n, after): it dies at its n-th move."""
    child = os.fork()
    if child:
        return child
    os.chdir(folder)
    moves, replace = [], os.replace

    def fatal(source, target):
        moves.append(target)
        if len(moves) == die_at[0] and not die_at[1]:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if len(moves) == die_at[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    if die_at:
        os.replace = fatal
    sys.stdout = open(os.devnull, "w")
    try:
        script = __import__(method)
        resume = ["--resume"] if Path("run.pt").exists() else []
        script.train(script.parse_args(["--data-dir", str(data), *RUN, *resume]))
        os._exit(0)
    except BaseException as error:
        print(f"{method}: {error!r}", file=sys.stderr)
        os._exit(1)


def state(folder):
    """All that a finished run left, but for the seconds and --resume itself, as bytes."""
    saved = torch.load(folder / "run.pt", weights_only=True)
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in saved["metrics"]]
    args = {k: v for k, v in saved["args"].items() if k != "resume"}
    momenta = [x["momentum_buffer"] for x in saved["optimizer"]["state"].values()]
    tensors = [x.numpy().tobytes() for x in [*saved["model"].values(), *momenta]]
    return [*tensors, repr((rows, args, saved["optimizer"]["param_groups"], saved["code"]))]


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
            folder = base / method
            folder.mkdir()
            begun = time.monotonic()
            assert os.waitpid(start(folder, method, data), 0)[1] == 0
            seconds[method], whole[method] = time.monotonic() - begun, state(folder)

        points = [(2, False), (2, True)]
        cases = [(method, point) for method in args.methods for point in points]
        moves = len(cases)
        killed, runs = 0, 0
        while cases or killed < args.kills:
            method, point = cases.pop() if cases else (random.choice(args.methods), None)
            runs += 1
            folder = base / f"{runs}"
            folder.mkdir()
            here = 0
            while True:
                child = start(folder, method, data, point if not here else None)
                if point is None and killed < args.kills:
                    time.sleep(random.uniform(0, seconds[method]))
                    os.kill(child, signal.SIGKILL)
                status = os.waitpid(child, 0)[1]
                if status == 0:
                    break
                assert os.WIFSIGNALED(status), "the run failed by itself"
                here += 1
                killed += point is None
                if (folder / "run.pt").exists():  # what is there is whole
                    torch.load(folder / "run.pt", weights_only=True)
            assert state(folder) == whole[method], f"{method} ended differently"
            kind = "random moments" if point is None else "the move of a file"
            print(f"{method}: killed {here} times at {kind}, ended the same", flush=True)
        print(f"{killed} kills at random moments, {moves} at moves of files: all the same")


if __name__ == "__main__":
    main()
