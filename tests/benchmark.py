"""How fast is a training step, and what is it spent on? Run by hand: python tests/benchmark.py

For each method: the whole step as main() does it, its data part alone (index, augment, normalise)
and its compute part alone (train_step on views that are there already: forward of all networks,
backward, optimizer, EMA). The three are timed in turns, so that a machine whose speed wanders
treats them alike; the medians are printed.
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

METHODS = [name for name in ("simclr", "moco", "byol", "simsiam") if (ROOT / f"{name}.py").exists()]


def timed(device, function):
    """Seconds that the function takes on the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def measure(method, data, rounds, options):
    """Return images/s of end to end, data alone and compute alone, and the peak memory in MB."""
    script = importlib.import_module(method)
    args = script.parse_args(options)
    device, n = args.device, args.batch_size
    images = data.train_images.to(device)
    mean, std = (x.to(device).view(-1, 1, 1) for x in (data.mean, data.std))
    generator = torch.Generator(device).manual_seed(0)
    backbone = build_backbone(args.backbone, images.shape[1], images.shape[3])
    model = script.build_model(backbone, args).to(device)
    trained = [p for name in script.TRAINED for p in model[name].parameters()]
    optimizer = torch.optim.SGD(
        [dict(params=trained, name="all")], 0.01, momentum=0.9, weight_decay=5e-4
    )

    def make_views():
        indices = torch.randint(len(images), (n,), generator=generator, device=device)
        batch = images[indices].float() / 255
        return [
            (script.augment(batch, **view, generator=generator) - mean) / std
            for view in (script.VIEW_1, script.VIEW_2)
        ]

    def step(views):
        loss, z = script.train_step(model, optimizer, *views, 0.5, args)
        return loss + script.z_std(z)

    views = make_views()
    parts = {
        "end to end": lambda: step(make_views()),
        "data": make_views,
        "compute": lambda: step(views),
    }
    times = {name: [] for name in parts}
    for i in range(rounds + 3):
        for name, part in parts.items():
            seconds = timed(device, part)
            if i >= 3:  # the first ones warm up
                times[name].append(seconds)
    if device == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**20
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {name: n / statistics.median(values) for name, values in times.items()}, memory


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30, help="steps that are timed")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--data-dir", default="data")
    args, options = parser.parse_known_args()  # the rest goes to the scripts: --batch-size 256
    data = load_dataset("fashion-mnist", args.data_dir)
    print(f"images/s, PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'':<10}{'end to end':>12}{'data':>10}{'compute':>10}{'time ratio':>12}{'peak MB':>9}")
    for method in args.methods:
        speed, memory = measure(method, data, args.rounds, options)
        ratio = speed["compute"] / speed["end to end"]
        print(
            f"{method:<10}{speed['end to end']:>12,.0f}{speed['data']:>10,.0f}"
            f"{speed['compute']:>10,.0f}{ratio:>12.2f}{memory:>9,.0f}",
            flush=True,
        )
    print("time ratio: end to end / compute. peak MB: of the process so far, or of the GPU.")


if __name__ == "__main__":
    main()
