"""Images per second of the training scripts, measured on whole epochs of their own `train`.

    python tools/benchmark.py
    python tools/benchmark.py --methods byol --batch-size 512 --backbone resnet18

Options that are not listed by --help go to the scripts. Nothing else should run on the machine.
"end to end" is the training as it is. "compute" is the same without augmentation: both views are
the batch itself. Their ratio is what the views cost. The first epoch of a run warms up and is left
out; the runs of both kinds alternate, and each number is the median of its epochs.
"""

import argparse
import contextlib
import importlib
import io
import math
import statistics
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402

METHODS = ("simclr", "moco", "byol", "simsiam")


def epochs(method, data, options, augment=True):
    """Train for three epochs; return the images per second of the second and the third."""
    script = importlib.import_module(method)
    other = dict(load_dataset=lambda *args: data, knn_accuracy=lambda *args: 0.0)
    if not augment:
        other["augment"] = lambda x, **view: x
    with tempfile.TemporaryDirectory() as folder, mock.patch.multiple(script, **other):
        args = script.parse_args(["--epochs", "3", "--out", f"{folder}/run.pt", *options])
        with contextlib.redirect_stdout(io.StringIO()):
            script.train(args)
        rows = torch.load(args.out, "cpu", weights_only=True)["metrics"]
    images = len(data.train_images) // args.batch_size * args.batch_size
    return [images / row["seconds"] for row in rows[1:]]


def peak_memory():
    """Return the most memory, in bytes, that this process has had so far; nan on Windows."""
    try:
        import resource
    except ImportError:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main():
    """Print a table of the methods, and one of batch sizes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--images", type=int, default=6400, help="in the training set")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    args, options = parser.parse_known_args()
    chosen = importlib.import_module(args.methods[0]).parse_args(options)
    data = common.load_dataset(chosen.dataset, chosen.data_dir, chosen.image_size, chosen.device)
    images, labels = data.train_images[: args.images], data.train_labels[: args.images]
    data = data._replace(train_images=images, train_labels=labels)
    gpu = chosen.device == "cuda"
    where = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} threads"
    print(f"PyTorch {torch.__version__}, {where}, {chosen.backbone}, batches of", end=" ")
    print(f"{chosen.batch_size}, bf16 {chosen.bf16}. Images per second:\n")
    print(f"{'':<10}{'end to end':>12}{'compute':>10}{'time ratio':>12}{'peak MB':>9}")
    for method in args.methods:
        whole, compute = [], []
        for _ in range(args.rounds):
            whole += epochs(method, data, options)
            compute += epochs(method, data, options, augment=False)
        whole, compute = statistics.median(whole), statistics.median(compute)
        memory = torch.cuda.max_memory_allocated() if gpu else peak_memory()
        ratio = compute / whole
        print(f"{method:<10}{whole:>12,.0f}{compute:>10,.0f}{ratio:>12.2f}{memory / 2**20:>9,.0f}")
    print("\ntime ratio: of an epoch end to end to one of compute. peak MB: so far.")

    print(f"\n{args.methods[0]}, by batch size:")
    for size in (x for x in (64, 128, 256, 512) if x <= len(data.train_images)):
        found = epochs(args.methods[0], data, [*options, "--batch-size", str(size)])
        print(f"{size:>10}{statistics.median(found):>12,.0f}", flush=True)


if __name__ == "__main__":
    main()
