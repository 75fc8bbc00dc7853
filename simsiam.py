"""SimSiam: Exploring Simple Siamese Representation Learning (Chen and He 2020, arXiv 2011.10566).

One network sees two random views of an image, cropped and recoloured. A predictor takes the
embedding of one view and predicts that of the other, which gets no gradient. There are no
negatives, no queue and no averaged network. If all embeddings were equal, a collapse, the
prediction would be perfect; predictor and stop-gradient keep training away from that. Why they do
is not settled: section 5 of the paper sees two steps in turn, as in k-means. One sets a target for
each image, the other trains the network towards it.

    python simsiam.py --epochs 10                # Fashion-MNIST, 5 minutes, one CPU core
    python linear_eval.py --weights simsiam.pt   # 90.3% (random network: 88.0%)

N images in a batch, D dimensions of an embedding. x is a view, h = backbone(x) its features,
z = projector(h), p = predictor(z). (The paper calls projector and backbone f, the predictor h.)

Unlike the paper: a small convnet, not ResNet-50; batches of 128, not 512; a rate of 0.4 per 256
images, not 0.05, with a warm-up; smaller heads; two layers in the projector, weight decay 5e-4, no
blur, as on its CIFAR-10; crops from 0.3, not 0.2; jitter in a fixed order, hue by rotating RGB.
"""

import argparse
import atexit
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.v2.functional import normalize, rgb_to_grayscale
from tqdm import tqdm

from common import add_options, build_backbone, load_dataset


class SimSiam(nn.Module):
    """One network, and a predictor on top of it."""

    def __init__(self, backbone, projection_dim, bottleneck_dim):
        super().__init__()
        self.backbone = backbone
        self.projector = nn.Sequential(
            nn.Linear(backbone.feature_dim, projection_dim, bias=False),  # BatchNorm has a bias
            nn.BatchNorm1d(projection_dim),
            nn.ReLU(inplace=True),
            nn.Linear(projection_dim, projection_dim, bias=False),
            nn.BatchNorm1d(projection_dim, affine=False),  # no scale or shift, as the authors
        )
        self.predictor = nn.Sequential(
            nn.Linear(projection_dim, bottleneck_dim, bias=False),
            nn.BatchNorm1d(bottleneck_dim),
            nn.ReLU(inplace=True),
            nn.Linear(bottleneck_dim, projection_dim),  # no BatchNorm: unstable with it (4.4)
        )

    def forward(self, x1, x2):
        """Return predictions p1, p2 and embeddings z1, z2 (N, D) of two views (N, C, H, W)."""
        z1, z2 = self.projector(self.backbone(x1)), self.projector(self.backbone(x2))
        p1, p2 = self.predictor(z1), self.predictor(z2)
        return p1.float(), p2.float(), z1.float(), z2.float()  # bf16 is too coarse for a loss


def negative_cosine(p, z):
    """Return the mean of -cos(p, z) over the rows of p and z, (N, D): -1 to 1 (Eq. 1)."""
    z = z.detach()  # stop-gradient: a target must not move to meet its prediction (Eq. 3)
    return -F.cosine_similarity(p, z, dim=1).mean()


def train(args):
    """Train, and save a checkpoint after each epoch."""
    rank, world = join_processes(args)
    data = load_dataset(args.dataset, args.data_dir, args.image_size, args.device)
    images = data.train_images  # (n, C, H, W) uint8, all on the device
    args.images, args.mean, args.std = list(images.shape), data.mean.tolist(), data.std.tolist()
    n, size = len(images), args.batch_size
    if size % world or not 2 * world <= size <= n:
        sys.exit(f"--batch-size {size}: take {2 * world} to {n}, divisible by {world}")
    steps = n // size  # of an epoch; a last, smaller batch is left out
    if rank == 0:
        print(f"{args.device}, bf16 {args.bf16}, processes {world}, steps {steps * args.epochs:,}")

    torch.manual_seed(args.seed)
    backbone = build_backbone(args.backbone, images.shape[1], images.shape[3])
    model = SimSiam(backbone, args.projection_dim, args.bottleneck_dim).to(args.device)
    encoder = [*backbone.parameters(), *model.projector.parameters()]
    groups = [dict(params=encoder), dict(params=model.predictor.parameters())]
    peak_lr = args.lr * size / 256
    optimizer = torch.optim.SGD(groups, peak_lr, momentum=0.9, weight_decay=5e-4)
    metrics = load(args, model, optimizer) if args.resume else []
    if rank == 0 and not args.resume:  # take the name, so that no other run can
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        open(args.out, "x").close()
    if world > 1 and args.device == "cuda":  # BatchNorm over the whole batch
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    replica = nn.parallel.DistributedDataParallel(model) if world > 1 else model

    for epoch in range(len(metrics), args.epochs):
        torch.manual_seed(hash((args.seed, epoch)))  # so that --resume repeats the draws
        order = torch.randperm(n, device=args.device)  # the same in all processes
        torch.manual_seed(hash((args.seed, epoch, rank)))  # the views differ
        bar = tqdm(order.split(size)[:steps], f"epoch {epoch + 1}", leave=False, disable=None)
        sums, begun = torch.zeros(2, device=args.device), time.perf_counter()

        for step, batch in enumerate(bar):
            done = (epoch + (step + 0.5) / steps) / args.epochs  # of the run: 0 to 1, at mid-step
            rise = min(1, 10 * done)  # warm-up: linear, for the first tenth of the run
            fall = (1 + math.cos(math.pi * max(0, done - 0.1) / 0.9)) / 2  # then half a cosine
            optimizer.param_groups[0]["lr"] = peak_lr * rise * fall
            optimizer.param_groups[1]["lr"] = peak_lr * rise  # predictor: keeps up with z (4.2)

            x = images[batch.chunk(world)[rank]] / 255  # (N, C, H, W)
            x1 = normalize(augment(x), data.mean, data.std)
            x2 = normalize(augment(x), data.mean, data.std)
            with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
                p1, p2, z1, z2 = replica(x1, x2)
            loss = (negative_cosine(p1, z2) + negative_cosine(p2, z1)) / 2  # both ways

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            sums += torch.stack([loss.detach(), spread(z1)])  # no .item(): it waits for the GPU

        loss, z_std = (sums / steps).tolist()  # of this process's images
        row = dict(epoch=epoch + 1, loss=loss, z_std=z_std, seconds=time.perf_counter() - begun)
        metrics.append(row)
        if rank == 0:
            if len(data.classes) > 1 and (epoch % 5 == 4 or epoch + 1 == args.epochs):
                row["knn"] = knn_accuracy(backbone, data)
            save(args, model, optimizer, metrics)
            print("  ".join(f"{key} {value:.5g}" for key, value in row.items()), flush=True)


def augment(x):
    """Return a random view of each image of x (N, C, H, W), values 0 to 1."""

    def uniform(low, high):  # one number for each image
        return torch.empty(len(x), 1, 1, 1, device=x.device).uniform_(low, high)

    x = random_resized_crop(x, smallest=0.3)
    x = torch.where(uniform(0, 1) < 0.5, x.flip(3), x)  # half are mirrored
    y = (x * uniform(0.6, 1.4)).clamp_(0, 1)  # brightness
    grey = rgb_to_grayscale(y).mean(dim=(1, 2, 3), keepdim=True)
    y = torch.lerp(grey, y, uniform(0.6, 1.4)).clamp_(0, 1)  # contrast
    if x.shape[1] == 3:
        y = torch.lerp(rgb_to_grayscale(y), y, uniform(0.6, 1.4)).clamp_(0, 1)  # saturation
        grey, turn = y.mean(dim=1, keepdim=True), 2 * math.pi * uniform(-0.1, 0.1)
        across = (y.roll(1, dims=1) - y.roll(2, dims=1)) / math.sqrt(3)  # y - grey, turned by 90°
        y = (grey + turn.cos() * (y - grey) + turn.sin() * across).clamp_(0, 1)  # hue: turns RGB
    x = torch.where(uniform(0, 1) < 0.8, y, x)  # one in five keeps its colours
    return torch.where(uniform(0, 1) < 0.2, rgb_to_grayscale(x), x)  # one in five is grey


def random_resized_crop(x, smallest):
    """Stretch a random box of each image of x (N, C, H, W) to H x W, as torchvision does."""
    area = torch.empty(10, len(x), device=x.device).uniform_(smallest, 1)
    ratio = torch.empty_like(area).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    sizes = torch.stack([area * ratio, area / ratio], dim=2).sqrt()  # width, height: (10, N, 2)
    first = (sizes <= 1).all(dim=2).int().argmax(dim=0)  # of ten boxes, the first that fits (N,)
    size = sizes[first, torch.arange(len(x), device=x.device)]  # (N, 2)
    center = (1 - size) * torch.empty_like(size).uniform_(-1, 1)  # the edges are at -1 and 1
    theta = torch.cat([size.diag_embed(), center[:, :, None]], dim=2)  # (N, 2, 3)
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def spread(z):
    """Return z_std of z (N, D): 0 after a collapse, about 1 for random directions."""
    return F.normalize(z.detach(), dim=1).std(dim=0).mean() * z.shape[1] ** 0.5


@torch.no_grad()
def knn_accuracy(backbone, data, k=20):
    """Return the percentage of images whose k nearest others vote for the right class."""
    known = (data.train_labels >= 0).nonzero().flatten()
    known = known[:: math.ceil(len(known) / 10_000)]  # at most 10,000, as all are compared
    images, labels = data.train_images[known], data.train_labels[known]
    backbone.eval()  # BatchNorm uses its running statistics
    h = [backbone(normalize(x / 255, data.mean, data.std)) for x in images.split(500)]
    backbone.train()
    h = F.normalize(torch.cat(h), dim=1)  # (images, features)
    cosines = (h @ h.T).fill_diagonal_(-math.inf)  # no image has a vote on itself
    nearest = cosines.topk(min(k, len(h) - 1), dim=1).indices  # (images, k)
    votes = labels[nearest].mode(dim=1).values
    return 100 * (votes == labels).float().mean().item()


def join_processes(args):
    """Return this process's rank and the number of processes: 0 and 1 without torchrun."""
    rank, world = 0, 1
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cudnn.benchmark = True
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun started this
        dist.init_process_group()
        atexit.register(dist.destroy_process_group)
        rank, world = dist.get_rank(), dist.get_world_size()
    return rank, world


def save(args, model, optimizer, metrics):
    """Write a checkpoint under another name, then rename it: a crash spares the old one."""
    loss, weights = metrics[-1]["loss"], model.state_dict()
    if not math.isfinite(loss) or not all(x.isfinite().all() for x in weights.values()):
        sys.exit(f"epoch {len(metrics)}: loss {loss:.3g} or a weight is not finite: lower --lr")
    state = dict(model=weights, optimizer=optimizer.state_dict())
    try:
        torch.save(dict(args=vars(args), metrics=metrics, **state), f"{args.out}.tmp")
        os.replace(f"{args.out}.tmp", args.out)
    except (OSError, RuntimeError):
        Path(f"{args.out}.tmp").unlink(missing_ok=True)
        sys.exit(f"{args.out}.tmp cannot be written: is the disk full?")


def load(args, model, optimizer):
    """Restore what `save` wrote, and return the metrics so far."""
    try:
        if not os.path.getsize(args.out):  # the first epoch was not finished
            return []
        saved = torch.load(args.out, "cpu", weights_only=True)
        options, metrics = dict(saved["args"]), saved["metrics"]
    except Exception as error:  # a damaged file can fail in any way
        sys.exit(f"--resume: {args.out} cannot be read as a checkpoint ({type(error).__name__})")
    for name, value in options.items():
        may_differ = name in ("out", "data_dir", "device", "bf16", "resume")
        if not may_differ and value != vars(args).get(name):
            sys.exit(f"--resume: {args.out} has {name} {value}, not {vars(args).get(name)}")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    print(f"{args.out} has {len(metrics)} of {args.epochs} epochs")
    return metrics


def parse_args(argv=None):
    """Read the command line, or `argv`."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    option, device = parser.add_argument, "cuda" if torch.cuda.is_available() else "cpu"
    option("--projection-dim", type=int, default=512, help="D; paper: 2048")
    option("--bottleneck-dim", type=int, default=128, help="hidden, in the predictor; paper: 512")
    option("--lr", type=float, default=0.4, help="peak rate per 256 images; paper: 0.05")
    option("--epochs", type=int, default=100, help="to train")
    option("--batch-size", type=int, default=128, help="of all processes")
    option("--seed", type=int, default=0, help="of weights, order and views")
    add_options(parser)  # of the dataset and the backbone
    option("--device", choices=sorted({device, "cpu"}), default=device)
    option("--bf16", action=argparse.BooleanOptionalAction, help="unset: if a GPU has it")
    option("--out", default=f"{Path(__file__).stem}.pt", help="the checkpoint")
    option("--resume", action="store_true", help="go on with the run in --out")
    args = parser.parse_args(argv, argparse.Namespace(method=Path(__file__).stem))
    if args.bf16 is None:
        args.bf16 = args.device == "cuda" and torch.cuda.is_bf16_supported(False)  # in hardware
    if min(args.projection_dim, args.bottleneck_dim, args.lr, args.epochs) <= 0:
        parser.error("--projection-dim, --bottleneck-dim, --lr and --epochs must be above 0")
    return args


if __name__ == "__main__":
    try:
        train(parse_args())
    except (OSError, KeyboardInterrupt) as error:
        sys.exit(f"{str(error) or 'stopped'} (--resume goes on with the run in --out)")
