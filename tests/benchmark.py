"""How fast is a training step, and what is it spent on? Run by hand: python tests/benchmark.py

For each method: the whole step as main() does it, its data part alone (index, augment, normalise)
and its compute part alone (train_step on views that are there already: forward of all networks,
backward, optimizer, EMA). The three are timed in turns, so that a machine whose speed wanders
treats them alike; the medians are printed. Then the time per image of one method's whole step by
batch size and by number of training images: both should be flat, once a batch fills the machine.
Further options go to the scripts, such as --dataset FOLDER --backbone resnet18 --batch-size 256.
"""

import argparse
import importlib
import resource
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import build_backbone, load_dataset  # noqa: E402

METHODS = ("simclr", "moco", "byol", "simsiam")


def timed(device, function):
    """Seconds that the function takes on the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def prepare(method, images, data, options):
    """Return three functions for one step of a method: end to end, data alone, compute alone."""
    script = importlib.import_module(method)
    args = script.parse_args(options)
    images, n = images.to(args.device), args.batch_size
    mean, std = (x.to(args.device).view(-1, 1, 1) for x in (data.mean, data.std))
    generator = torch.Generator(args.device).manual_seed(0)
    backbone = build_backbone(args.backbone, images.shape[1], images.shape[3])
    model = script.build_model(backbone, args).to(args.device)
    trained = [p for name in script.TRAINED for p in model[name].parameters()]
    optimizer = torch.optim.SGD(
        [dict(params=trained, name="all")], 0.01, momentum=0.9, weight_decay=5e-4
    )
    order = torch.randperm(len(images), generator=generator, device=args.device)

    def make_views():
        start = int(torch.randint(len(images) - n + 1, ()))
        batch = images[order[start : start + n]].float() / 255
        return [
            (script.augment(batch, **view, generator=generator) - mean) / std
            for view in (script.VIEW_1, script.VIEW_2)
        ]

    def step(views):
        loss, z = script.train_step(model, optimizer, *views, 0.5, args)
        return loss + script.z_std(z)

    views = make_views()
    return lambda: step(make_views()), make_views, lambda: step(views)


def medians(device, functions, rounds):
    """Median seconds of each function, all of them timed in turns."""
    times = [[] for _ in functions]
    for i in range(rounds + 3):
        for function, seconds in zip(functions, times, strict=True):
            taken = timed(device, function)
            if i >= 3:  # the first ones warm up
                seconds.append(taken)
    return [statistics.median(seconds) for seconds in times]


def peak_memory(device):
    """MB that the process, or the GPU, has needed at most so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20, help="steps that are timed")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--data-dir", default="data")
    args, options = parser.parse_known_args()
    chosen = importlib.import_module("simclr").parse_args(options)
    device, n = chosen.device, chosen.batch_size
    data = load_dataset(chosen.dataset, args.data_dir, chosen.image_size)
    where = (
        torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    )
    print(f"PyTorch {torch.__version__}, {where}, {chosen.backbone}, batches of {n}. images/s:\n")
    print(f"{'':<10}{'end to end':>12}{'data':>10}{'compute':>10}{'time ratio':>12}{'peak MB':>9}")
    for method in args.methods:
        functions = prepare(method, data.train_images, data, options)
        whole, views, compute = medians(device, functions, args.rounds)
        print(
            f"{method:<10}{n / whole:>12,.0f}{n / views:>10,.0f}{n / compute:>10,.0f}"
            f"{whole / compute:>12.2f}{peak_memory(device):>9,.0f}",
            flush=True,
        )
    print("\ntime ratio: end to end / compute. peak MB: of the process so far, or of the GPU.")

    method, total = args.methods[0], len(data.train_images)
    sizes = [size for size in (64, 128, 256, 512, 1024, 2048) if size <= total]
    functions = [
        prepare(method, data.train_images, data, [*options, "--batch-size", str(size)])[0]
        for size in sizes
    ]
    times = medians(device, functions, args.rounds // 2)
    print(f"\n{method}, by batch size:        " + "".join(f"{size:>9,}" for size in sizes))
    cells = (f"{1e6 * t / size:>9.0f}" for t, size in zip(times, sizes, strict=True))
    print("microseconds per image:     " + "".join(cells), flush=True)

    sets = [
        data.train_images[: total // 10],
        data.train_images,
        data.train_images.repeat(5, 1, 1, 1),
    ]
    functions = [prepare(method, images, data, options)[0] for images in sets]
    times = medians(device, functions, args.rounds // 2)
    print(f"\n{method}, by training images:   " + "".join(f"{len(x):>9,}" for x in sets))
    print("microseconds per image:     " + "".join(f"{1e6 * t / n:>9.0f}" for t in times))


if __name__ == "__main__":
    main()
