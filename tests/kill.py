"""Kill real runs with SIGKILL and resume them: each must end in the state of a run never stopped.

    python tests/kill.py --kills 30

Kills at random moments, and kills just before and just after each file is moved into place. After
each kill the checkpoint must be whole and the csv without a torn line. Prints a line per run.
"""

import argparse
import csv
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from conftest import METHODS, write_fashion_mnist

torch.set_num_threads(1)  # a fork does not take OpenMP's threads along, and would wait for them
RUN = ["--epochs", "4", "--batch-size", "128", "--knn-every", "2", "--out", "run.pt"]
FREE = ("images_per_second", "seconds")  # what no two runs share


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
        resume = ["--resume"] if Path("run.pt").exists() else ["--overwrite"]
        __import__(method).main(["--data-dir", str(data), *RUN, *resume])
        os._exit(0)
    except BaseException as error:
        print(f"{method}: {error!r}", file=sys.stderr)
        os._exit(1)


def state(folder):
    """All that a finished run left, as one comparable list."""
    saved = torch.load(folder / "run.pt", weights_only=True)
    rows = [[v for k, v in row.items() if k not in FREE] for row in saved["metrics"]]
    table = [[v for k, v in row.items() if k not in FREE] for row in read_csv(folder)]
    assert table == [[str(v) for v in row] for row in rows], "csv and checkpoint differ"
    momenta = [x["momentum_buffer"] for x in saved["optimizer"]["state"].values()]
    tensors = [*saved["model"].values(), *momenta, saved["rng"]]
    groups = [[v for k, v in g.items()] for g in saved["optimizer"]["param_groups"]]
    return [t.numpy().tobytes() for t in tensors] + [repr((rows, groups, saved["step"]))]


def read_csv(folder):
    text = (folder / "run.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    assert text.endswith("\n") and all(None not in row.values() for row in rows), "torn line"
    assert [row["epoch"] for row in rows] == [str(i + 1) for i in range(len(rows))]
    return rows


def check_whole(folder):
    """After a kill: what is there is whole. An epoch may be in the csv and not yet in the .pt."""
    if (folder / "run.pt").exists():
        saved = torch.load(folder / "run.pt", weights_only=True)
        assert len(read_csv(folder)) - saved["epoch"] in (0, 1)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as base:
        base, whole, seconds = Path(base), {}, {}
        data = write_fashion_mnist(base / "data")
        for method in METHODS:
            folder = base / method
            folder.mkdir()
            begun = time.monotonic()
            assert os.waitpid(start(folder, method, data), 0)[1] == 0
            seconds[method], whole[method] = time.monotonic() - begun, state(folder)

        points = [(n, after) for n in (1, 2, 3, 4) for after in (False, True)]
        cases = [(METHODS[i % 4], [point]) for i, point in enumerate(points)]
        killed, run = 0, 0
        while cases or killed < args.kills:
            method, deaths = cases.pop() if cases else (METHODS[run % 4], None)
            run += 1
            folder = base / f"{run}"
            folder.mkdir()
            here = 0
            while True:
                if deaths is not None:  # one death at a known moment, then a free run
                    child = start(folder, method, data, deaths.pop() if deaths else None)
                else:
                    child = start(folder, method, data)
                    if killed < args.kills:
                        time.sleep(random.uniform(0, seconds[method]))
                        os.kill(child, signal.SIGKILL)
                status = os.waitpid(child, 0)[1]
                if status == 0:
                    break
                assert os.WIFSIGNALED(status), "the run failed by itself"
                here += 1
                killed += deaths is None
                check_whole(folder)
            assert state(folder) == whole[method], f"{method} ended differently"
            kind = "random moments" if deaths is None else "a move of a file"
            print(f"{method}: killed {here} times at {kind}, ended the same", flush=True)
        print(f"{killed} kills at random moments, {len(points)} at moves of files: all the same")


if __name__ == "__main__":
    main()
