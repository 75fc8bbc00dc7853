"""MoCo v2: Momentum Contrast (He et al. 2019, Chen et al. 2020, arXiv 1911.05722, 2003.04297).

A query, made from one view of an image, must find its key, made from the other view, among
thousands of negatives: keys of other images, which a queue keeps. If all keys were alike, it could
not. The key encoder is a slow average of the query encoder, so old keys stay comparable.

    python moco.py --epochs 10                # 4 minutes, one CPU core
    python linear_eval.py --weights moco.pt   # 91.1% (random: 88.1%)

N images in a batch, D dimensions, K keys in the queue, q a query, k its key.

Unlike the papers: K 4,096, temperature 0.1, momentum 0.99, a smaller head, warm-up, more weight
decay, no blur, no shuffled BatchNorm; a fixed order of colour changes, and hue by rotating RGB.
"""

import argparse
import atexit
import math
import os
import sys
import time
from copy import deepcopy
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.v2.functional import normalize, rgb_to_grayscale
from tqdm import tqdm

from common import BACKBONES, DATASETS, DataError, build_backbone, load_dataset

# area: of a crop, as a fraction. mirror, grayscale: probabilities.
# jitter: largest change of brightness, contrast, saturation, hue.
VIEW_1 = dict(area=(0.2, 1), mirror=0.5, jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.2)
VIEW_2 = VIEW_1


class MoCo(nn.Module):
    """A query encoder, its running average the key encoder, and a queue of keys."""

    def __init__(self, backbone, hidden_dim, projection_dim, queue_size):
        super().__init__()
        self.backbone = backbone
        self.projector = nn.Sequential(
            nn.Linear(backbone.feature_dim, hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, projection_dim),
        )
        # The key encoder starts as a copy. It gets no gradient, so SGD skips it.
        self.key_encoder = deepcopy(nn.Sequential(backbone, self.projector)).requires_grad_(False)
        queue = F.normalize(torch.randn(queue_size, projection_dim), dim=1)
        self.register_buffer("queue", queue)  # (K, D): random at first

    def forward(self, x1, x2):
        """Return queries q of x1 and keys k of x2 (N, D), for two views (N, C, H, W)."""
        q = self.projector(self.backbone(x1))
        with torch.no_grad():  # stop-gradient: only the query encoder learns
            k = self.key_encoder(x2)
        return F.normalize(q.float(), dim=1), F.normalize(k.float(), dim=1)

    @torch.no_grad()
    def update_key_encoder(self, momentum):
        """Move the key encoder: theta_k = m * theta_k + (1 - m) * theta_q (Eq. 2)."""
        encoder = nn.Sequential(self.backbone, self.projector)
        # Weights only: BatchNorm keeps its own running statistics.
        for key, query in zip(self.key_encoder.parameters(), encoder.parameters(), strict=True):
            key.lerp_(query, 1 - momentum)

    @torch.no_grad()
    def enqueue(self, keys):
        """Append keys (N, D) to the queue (K, D), and drop the oldest."""
        if dist.is_initialized():  # of all processes
            parts = [torch.empty_like(keys) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, keys)
            keys = torch.cat(parts)
        self.queue.copy_(torch.cat([self.queue, keys])[-len(self.queue) :])


def info_nce(q, k, queue, temperature):
    """Return the cross-entropy of query q picking key k out of k and the queue (Eq. 1).

    q, k: (N, D), queue: (K, D), rows of length 1. After a collapse: log(K + 1).
    """
    positive = (q * k).sum(dim=1, keepdim=True)  # (N, 1)
    logits = torch.cat([positive, q @ queue.T], dim=1) / temperature  # (N, 1 + K)
    labels = torch.zeros(len(q), dtype=torch.long, device=q.device)  # key k is in column 0
    return F.cross_entropy(logits, labels)


def train(args):
    """Train, and save a checkpoint after each epoch."""
    rank, world = join_processes(args)
    data = load_dataset(args.dataset, args.data_dir, args.image_size, args.device)
    images = data.train_images  # (n, C, H, W) uint8, all on the device
    args.images = list(images.shape)
    args.mean, args.std = data.mean.tolist(), data.std.tolist()
    steps_per_epoch = len(images) // args.batch_size  # a last, smaller batch is left out
    total_steps = args.epochs * steps_per_epoch
    if args.batch_size % world or args.batch_size > len(images):
        sys.exit(f"--batch-size {args.batch_size}: use a multiple of {world} up to {len(images)}")

    torch.manual_seed(args.seed)
    backbone = build_backbone(args.backbone, images.shape[1], images.shape[3])
    model = MoCo(backbone, args.hidden_dim, args.projection_dim, args.queue_size).to(args.device)
    peak_lr = args.lr * args.batch_size / 256
    optimizer = torch.optim.SGD(model.parameters(), peak_lr, momentum=0.9, weight_decay=5e-4)
    metrics = load(args, model, optimizer) if args.resume else []
    if world > 1 and args.device == "cuda":  # BatchNorm over the whole batch
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    replica = nn.parallel.DistributedDataParallel(model) if world > 1 else model

    for epoch in range(len(metrics), args.epochs):
        seed = 10_000 * args.seed + epoch  # --resume repeats the draws
        torch.manual_seed(seed)
        order = torch.randperm(len(images), device=args.device)  # the same in all processes
        torch.manual_seed(seed + 1_000_000 * (rank + 1))  # the views differ
        batches = order.split(args.batch_size)[:steps_per_epoch]
        bar = tqdm(batches, f"epoch {epoch + 1}", leave=False, disable=rank > 0 or None)
        sums, begun = torch.zeros(2, device=args.device), time.perf_counter()

        for step, batch in enumerate(bar, start=epoch * steps_per_epoch):
            # The rate rises linearly for a tenth of the run, then falls along half a cosine.
            rise = min(1, 10 * (step + 1) / total_steps)
            fall = max(0, step / total_steps - 0.1) / 0.9
            for group in optimizer.param_groups:
                group["lr"] = peak_lr * rise * (1 + math.cos(math.pi * fall)) / 2

            x = images[batch.chunk(world)[rank]] / 255  # (N, C, H, W)
            x1 = normalize(augment(x, **VIEW_1), data.mean, data.std)
            x2 = normalize(augment(x, **VIEW_2), data.mean, data.std)
            with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
                q, k = replica(x1, x2)
            loss = info_nce(q, k, model.queue, args.temperature)

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.update_key_encoder(args.momentum)
            model.enqueue(k)  # last, so that k is not its own negative

            sums += torch.stack([loss.detach(), spread(q)])
            if step % 20 == 0 and not bar.disable:  # rarely: it waits for the GPU
                bar.set_postfix(loss=loss.item())

        if world > 1:
            dist.all_reduce(sums)
        loss, z_std = (sums / steps_per_epoch / world).tolist()
        if not math.isfinite(loss):
            sys.exit(f"the loss became {loss} in epoch {epoch + 1}: lower --lr")
        row = dict(epoch=epoch + 1, loss=loss, z_std=z_std, seconds=time.perf_counter() - begun)
        metrics.append(row)
        if rank == 0:
            if data.classes and (epoch % 5 == 4 or epoch + 1 == args.epochs):
                row["knn"] = knn_accuracy(backbone, data)
            save(args, model, optimizer, metrics)
            print("  ".join(f"{key} {value:.5g}" for key, value in row.items()), flush=True)


def augment(x, area, mirror, jitter, grayscale, solarize=0.0):
    """Return a random view of each image of x (N, C, H, W), values 0 to 1."""

    def uniform(low, high):  # one number for each image
        return torch.empty(len(x), 1, 1, 1, device=x.device).uniform_(low, high)

    x = random_resized_crop(x, area)
    x = torch.where(uniform(0, 1) < mirror, x.flip(3), x)
    brightness, contrast, saturation, hue = jitter
    y = (x * uniform(1 - brightness, 1 + brightness)).clamp(0, 1)
    mean = rgb_to_grayscale(y).mean(dim=(1, 2, 3), keepdim=True)
    y = torch.lerp(mean, y, uniform(1 - contrast, 1 + contrast)).clamp(0, 1)
    if x.shape[1] == 3:
        y = torch.lerp(rgb_to_grayscale(y), y, uniform(1 - saturation, 1 + saturation)).clamp(0, 1)
        y = turn_hue(y, uniform(-hue, hue)).clamp(0, 1)
    x = torch.where(uniform(0, 1) < 0.8, y, x)  # one in five skips the jitter
    x = torch.where(uniform(0, 1) < grayscale, rgb_to_grayscale(x), x)
    return torch.where((uniform(0, 1) < solarize) & (x >= 0.5), 1 - x, x)


def random_resized_crop(x, area):
    """Cut a random box out of each of x (N, C, H, W), and stretch it to H x W."""
    draws = torch.rand(4, len(x), device=x.device)
    area = area[0] + (area[1] - area[0]) * draws[0]
    limit = (-area.log()).clamp(max=math.log(4 / 3))  # 4:3, or less to fit in
    ratio = ((2 * draws[1] - 1) * limit).exp()
    size = torch.stack([area * ratio, area / ratio], dim=1).sqrt()  # (N, 2)
    center = (1 - size) * (2 * draws[2:].T - 1)  # edges: -1 and 1
    theta = torch.cat([torch.diag_embed(size), center[:, :, None]], dim=2)  # (N, 2, 3)
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def turn_hue(x, turn):
    """Turn the hue of x (N, 3, H, W) by `turn` (N, 1, 1, 1); 1 is a full turn."""
    cos, sin = (2 * math.pi * turn).cos(), (2 * math.pi * turn).sin() / math.sqrt(3)
    mean = x.mean(dim=1, keepdim=True)
    return mean + cos * (x - mean) + sin * (x.roll(1, dims=1) - x.roll(2, dims=1))


def spread(z):
    """Return z_std of z (N, D): about 1 for random rows, 0 for equal ones; on a line up to 1."""
    return F.normalize(z.detach(), dim=1).std(dim=0).mean() * z.shape[1] ** 0.5


@torch.no_grad()
def knn_accuracy(backbone, data, k=20):
    """Return the accuracy in percent of a vote of k neighbours. No test image is used."""
    labelled = (data.train_labels >= 0).nonzero().flatten()
    torch.manual_seed(0)  # the same images each time: a fifth are queries, the rest vote
    some = labelled[torch.randperm(len(labelled), device=labelled.device)[:25_000]]
    images, labels, n = data.train_images[some], data.train_labels[some], len(some) // 5
    backbone.eval()  # BatchNorm uses its running statistics
    h = [backbone(normalize(x / 255, data.mean, data.std)) for x in images.split(500)]
    backbone.train()
    h = F.normalize(torch.cat(h), dim=1)  # (images, features)
    nearest = (h[:n] @ h[n:].T).topk(min(k, len(h) - n), dim=1).indices  # (n, k)
    votes = labels[n:][nearest].mode(dim=1).values
    return 100 * (votes == labels[:n]).float().mean().item()


def join_processes(args):
    """Return this process's rank and the number of processes: 0 and 1 without torchrun."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    if world > 1:
        dist.init_process_group()
        atexit.register(dist.destroy_process_group)
    if rank == 0:
        print(f"device {args.device}, bf16 {args.bf16}, processes {world}")
    return rank, world


def save(args, model, optimizer, metrics):
    """Write a checkpoint, then rename it: a crash spares the old one."""
    checkpoint = dict(args=vars(args), code=CODE, metrics=metrics)
    checkpoint |= dict(model=model.state_dict(), optimizer=optimizer.state_dict())
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, f"{args.out}.tmp")
    os.replace(f"{args.out}.tmp", args.out)


def load(args, model, optimizer):
    """Restore what `save` wrote, and return the metrics so far."""
    saved = torch.load(args.out, "cpu", weights_only=True)
    may_differ = "out", "data_dir", "device", "bf16", "resume"
    for name, value in saved["args"].items():
        if name not in may_differ and value != vars(args).get(name):
            sys.exit(f"--resume: {args.out} has {name} {value}, not {vars(args).get(name)}")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["metrics"]


def parse_args(argv=None):
    """Read the command line, or `argv`."""
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=form)
    option, devices = parser.add_argument, ["cpu", "cuda"][: 1 + torch.cuda.is_available()]
    option("--hidden-dim", type=int, default=512, help="of the projector; paper: 2048")
    option("--projection-dim", type=int, default=128, help="D")
    option("--queue-size", type=int, default=4096, help="K; paper: 65536")
    option("--momentum", type=float, default=0.99, help="of the key encoder; paper: 0.999")
    option("--temperature", type=float, default=0.1, help="paper: 0.2")
    option("--lr", type=float, default=0.3, help="peak rate per 256 images")
    option("--epochs", type=int, default=100, help="to train")
    option("--batch-size", type=int, default=128, help="of all processes")
    option("--seed", type=int, default=0)
    option("--dataset", default="fashion-mnist", help=f"{', '.join(DATASETS)} or a folder")
    option("--data-dir", default="data", help="downloads, decoded images")
    option("--image-size", type=int, help="pixels; a folder's default is 32")
    option("--backbone", choices=BACKBONES, default="convnet")
    option("--device", choices=devices, default=devices[-1])
    option("--bf16", action=argparse.BooleanOptionalAction, help="unset: if the GPU has it")
    option("--out", default=f"{Path(__file__).stem}.pt", help="the checkpoint")
    option("--resume", action="store_true", help="go on with the run in --out")
    args = parser.parse_args(argv, argparse.Namespace(method=Path(__file__).stem))
    if args.bf16 is None:
        args.bf16 = args.device == "cuda" and torch.cuda.is_bf16_supported(False)
    ranges = dict(seed=(0, 1e6), epochs=(1, 1e6), batch_size=(2, 1e6), momentum=(0, 1))
    for name, value in vars(args).items():
        low, high = ranges.get(name, (1e-6, 1e6))
        if type(value) in (int, float) and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} {value} is not from {low:g} to {high:g}")
    if args.resume != os.path.exists(args.out):
        problem = "does not exist" if args.resume else "exists: pass --resume or another --out"
        parser.error(f"--out {args.out} {problem}")
    return args


CODE = Path(__file__).read_text()

if __name__ == "__main__":
    try:
        train(parse_args())
    except (DataError, KeyboardInterrupt) as error:
        sys.exit(str(error) or "stopped: --resume goes on from the last whole epoch")
