"""BYOL, Bootstrap Your Own Latent (Grill et al. 2020, https://arxiv.org/abs/2006.07733), whole.

An online network sees one random view of an image and predicts what a second network, the target,
makes of another view. Nothing trains the target: it is a running mean of the online network's past
weights. Slowly moving answers teach the online network, which in turn makes the answers better. No
image is ever pushed away from another. What keeps all embeddings from becoming one point is the
predictor, which only the online side has, with the stop-gradient on the target's side.

Eq. 2 is the loss, Eq. 1 the target. N batch, D projection; h = backbone(x), z = projector(h),
p = predictor(z) of the online networks, t = target(x). The two views' losses add up: 0 to 8.
    python byol.py --epochs 10                # 6.5 minutes on two EPYC (Zen 3) cores
    python linear_eval.py --weights byol.pt   # 90.7% linear (3 seeds), random init 88.1%
Unlike the paper: SGD, not LARS, as the batch is 512, not 4,096; small heads, no blur, and tau from
0.99, as the images are small and the runs short; mild crops, chosen on held-out training images.
"""

# === shared: imports ===
import argparse
import io
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.v2.functional import rgb_to_grayscale
from torchvision.utils import save_image
from tqdm import tqdm

from common import BACKBONES, DATASETS, build_backbone, load_dataset
from linear_eval import extract_features, knn_accuracy, load_encoder
from plumbing import (RANK, WORLD, average_gradients, check_outputs, check_room, gather,
                      join_processes, pick_device, sync_batchnorm, within, write)
# === method: constants ===
from copy import deepcopy  # for the network that is a running mean
METHOD, LR = "byol", 0.15  # learning rate for 256 images a step
SYNC_BATCHNORM = True  # over the GPUs, if there are several
TRAINED = ("backbone", "projector", "predictor")  # what the optimizer moves: not the target
# The views of BYOL's appendix B, with milder crops and no blur, which 28 pixels cannot spare.
VIEW_1 = dict(crop_scale=(0.3, 1.0), jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.2,
              hue=0.1, grayscale=0.2, solarize=0.0)
VIEW_2 = VIEW_1 | dict(solarize=0.2)  # the asymmetry
# === shared: options ===
# --augment says what to keep; these settings switch the rest off. The mirror always stays.
WITHOUT = {"crop+color": {}, "crop": dict(jitter=0, grayscale=0, solarize=0),
           "color": dict(crop_scale=(1, 1))}
WITHOUT["none"] = WITHOUT["crop"] | WITHOUT["color"]

def parse_args(argv=None):
    """Read the command line, or the list of strings `argv`."""
    parser = argparse.ArgumentParser(f"{METHOD}.py", argparse.SUPPRESS, __doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--dataset", default="fashion-mnist", help=f"{', '.join(DATASETS)}, or a folder: README")
    add("--data-dir", default="data", help="folder that has, or gets, a named dataset's files")
    add("--image-size", type=within(8, 1024), default=32, help="pixels, for a folder's images")
    add("--backbone", choices=BACKBONES, help="unset: convnet for fashion-mnist, else resnet18")
    add("--epochs", type=within(1), default=100, help="passes over the training images")
    add("--batch-size", type=within(2), default=512, help="images a step, two views each")
    add("--lr", type=within(1e-9, kind=float), default=LR, help="peak, per 256 of --batch-size")
    add("--weight-decay", type=within(0, kind=float), default=5e-4, help="on weights only")
    add("--warmup-epochs", type=within(0, kind=float), default=1, help="epochs of linear warm-up")
    add("--seed", type=within(0), default=0, help="of weights, order and views")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto: cuda, cpu")
    add("--augment", choices=WITHOUT, default="crop+color", help="what views keep (SimCLR Fig. 5)")
    add("--compile", action="store_true", help="torch.compile the networks: slow start, then fast")
    add("--knn-every", type=within(0), default=5, help="epochs between kNN tests; 0: none")
    add("--max-steps", type=within(1), help="end after so many steps, for good: a trial")
    add("--preview", metavar="PNG", help="first save 16 images with their two views here")
    add("--out", default=f"{METHOD}.pt", help="checkpoint; the curves go beside it, as .csv")
    add("--overwrite", action="store_true", help="replace an --out that is there")
    add("--resume", nargs="?", const="", metavar="PATH", help="go on from PATH or --out")
    # === method: options ===
    add("--momentum", type=within(0, 1, float), default=0.99, help="tau, grows to 1; 0 stays 0")
    add("--predictor", choices=("mlp", "none", "frozen"), default="mlp", help="frozen: not trained")
    add("--head-norm", choices=("hidden", "all", "none"), default="hidden",
        help="BatchNorm in the heads, by default after each MLP's first layer")
    add("--hidden-dim", type=within(1, 16384), default=512, help="of both MLPs; 4096 in BYOL")
    add("--projection-dim", type=within(1, 16384), default=128, help="D; 256 in BYOL")
    # === shared: resolve options ===
    args = parser.parse_args(argv, argparse.Namespace(method=METHOD))  # --resume compares it too
    args.backbone = args.backbone or ("convnet" if args.dataset == "fashion-mnist" else "resnet18")
    args.device = pick_device(parser, args.device)
    return args
# === shared: augment ===
def augment(images, crop_scale, jitter, brightness, contrast, saturation, hue, grayscale, solarize,
            generator=None):
    """Draw a view of each image (N, C, H, W), float in [0, 1] in and out, with draws of its own.
    `crop_scale` is the range of the crop's share of the area; `jitter`, `grayscale` and `solarize`
    are probabilities; the other four are the strengths of torchvision's ColorJitter, in order."""
    n, channels, rows, columns = images.shape
    def uniform(low, high):  # (N, 1, 1, 1): one draw per image
        draws = torch.rand(WORLD * n, 1, 1, 1, generator=generator, device=images.device)
        return low + (high - low) * draws.chunk(WORLD)[RANK]  # of several processes: one's share
    area = uniform(*crop_scale)
    limit = (-area.log()).clamp(max=math.log(4 / 3))  # of |log aspect|: 4/3, less if too wide
    aspect = (limit * uniform(-1, 1)).exp()
    height, width = rows * (area / aspect).sqrt(), columns * (area * aspect).sqrt()
    top, left = uniform(0, 1) * (rows - height), uniform(0, 1) * (columns - width)
    images = resized_crop(images, top, left, height, width, mirror=uniform(0, 1) < 0.5)
    jittered = (uniform(0, 1) < jitter).float()  # 1: change all four, 0: none
    images = (images * (1 + jittered * uniform(-brightness, brightness))).clamp(0, 1)
    mean = rgb_to_grayscale(images).mean(dim=(2, 3), keepdim=True)  # (N, 1, 1, 1)
    images = torch.lerp(mean, images, 1 + jittered * uniform(-contrast, contrast)).clamp(0, 1)
    if channels == 3:
        factor = 1 + jittered * uniform(-saturation, saturation)
        factor = factor * (uniform(0, 1) >= grayscale)  # 0 leaves grey
        images = torch.lerp(rgb_to_grayscale(images), images, factor).clamp(0, 1)
        images = shift_hue(images, jittered * uniform(-hue, hue))
    return torch.where((uniform(0, 1) < solarize) & (images >= 0.5), 1 - images, images)

def resized_crop(images, top, left, height, width, mirror):
    """Resize a box of each image bilinearly to H x W; its place, size, `mirror` are (N, 1, 1, 1).
    A new row mixes two old ones: two matrix products, on a CPU twice as fast as grid_sample."""
    def mixture(start, length, size):  # (N, 1, size, size): share of old pixel j in new pixel i
        pixels = torch.arange(size, device=images.device)
        source = start + (pixels[:, None] + 0.5) * length / size - 0.5  # (N, 1, size, 1)
        source = source.clamp(start, start + (length - 1).clamp(min=0))  # stay inside the box
        return (1 - (source - pixels).abs()).clamp(min=0)  # bilinear: 1 at a pixel, 0 at the next
    rows, columns = mixture(top, height, images.shape[2]), mixture(left, width, images.shape[3])
    return rows @ images @ torch.where(mirror, columns.flip(2), columns).transpose(2, 3)

def shift_hue(images, shift):
    """Turn the hue of RGB images by `shift` (N, 1, 1, 1), -0.5 to 0.5 of the colour circle."""
    red, green, blue = images.split(1, dim=1)
    value = images.amax(dim=1, keepdim=True)
    chroma = value - images.amin(dim=1, keepdim=True)
    safe = chroma.clamp(min=1e-8)  # no 0 / 0 where grey
    hue = torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    hue = torch.where(value == red, (green - blue) / safe, hue) + 6 * shift  # sixths of the circle
    sixths = torch.cat([hue + 5, hue + 3, hue + 1], dim=1) % 6  # of red, green, blue: 0 is
    return value - chroma * torch.minimum(sixths, 4 - sixths).clamp(0, 1)
# === method: networks ===
def mlp(in_dim, hidden_dim, out_dim, norm):
    """Projector or predictor: linear, BatchNorm, ReLU, linear; more BatchNorm in build_model."""
    hidden_norm = nn.Identity() if norm == "none" else nn.BatchNorm1d(hidden_dim)
    bias = norm == "none"  # BatchNorm subtracts the mean, and any bias with it
    return nn.Sequential(nn.Linear(in_dim, hidden_dim, bias=bias), hidden_norm,
                         nn.ReLU(inplace=True), nn.Linear(hidden_dim, out_dim))

def build_model(backbone, args):
    """Return the online networks (theta in the paper) and the target network (xi)."""
    dim = args.projection_dim
    projector = mlp(backbone.feature_dim, args.hidden_dim, dim, args.head_norm)
    predictor = mlp(dim, args.hidden_dim, dim, args.head_norm)
    if args.head_norm == "all":
        projector.append(nn.BatchNorm1d(dim))
        predictor.append(nn.BatchNorm1d(dim))
    if args.predictor == "none":
        predictor = nn.Identity()
    predictor.requires_grad_(args.predictor != "frozen")  # frozen: random weights, never trained
    target = deepcopy(nn.Sequential(backbone, projector))  # equal at first; no predictor
    return nn.ModuleDict({"backbone": backbone, "projector": projector, "predictor": predictor,
                          "target": target})
# === method: loss ===
def regression_loss(p, z):
    """Mean of 2 - 2 cos(p, z), from 0 to 4, z the target's projection (BYOL Eq. 2); (N, D)."""
    return (2 - 2 * F.cosine_similarity(p, z, dim=1)).mean()
# === method: EMA ===
@torch.no_grad()  # the target is a running mean: nothing here is to be differentiated
def ema_update(target, online, momentum):
    """xi = momentum xi + (1 - momentum) theta, in place (BYOL Eq. 1)."""
    # Parameters only: the target's BatchNorm keeps the running statistics of its own batches.
    for xi, theta in zip(target.parameters(), online.parameters(), strict=True):
        xi.lerp_(theta, 1 - momentum)
# === method: step ===
def train_step(model, optimizer, x1, x2, progress, args):
    """Learn from two views (N, C, H, W) at `progress` (0 to 1) in the run; return loss, z1."""
    online = nn.Sequential(model["backbone"], model["projector"])
    with torch.autocast(x1.device.type, torch.bfloat16, enabled=x1.is_cuda):
        z1, z2 = online(x1), online(x2)  # (N, D); apart: BatchNorm takes each view's statistics
        p1, p2 = model["predictor"](z1), model["predictor"](z2)  # (N, D)
        with torch.no_grad():  # stop-gradient: the target moves in ema_update only
            t1, t2 = model["target"](x1), model["target"](x2)  # (N, D)
    # What one view predicts is the embedding of the other view.
    loss = regression_loss(p1.float(), t2.float()) + regression_loss(p2.float(), t1.float())
    optimizer.zero_grad()
    loss.backward()
    average_gradients(optimizer)
    optimizer.step()
    half_cosine = (1 + math.cos(math.pi * progress)) / 2  # from 1 to 0
    momentum = 1 - (1 - args.momentum) * half_cosine if args.momentum else 0  # 0 stays (Table 5a)
    ema_update(model["target"], online, momentum)
    return loss.detach(), z1.detach()
# === shared: monitor and checkpoint ===
def z_std(z):
    """Std of l2-normalised z (N, D) times sqrt(D): 0 is one point, 1 healthy, or else a line."""
    return F.normalize(z.float(), dim=1).std(dim=0).mean() * z.shape[1] ** 0.5

def save(path, checkpoint):
    """Write the metrics as .csv, then the checkpoint, which is what --resume goes by."""
    buffer, log = io.BytesIO(), checkpoint["metrics"]
    torch.save(checkpoint, buffer)
    lines = [",".join(map(str, x)) + "\n" for x in [log[0].keys(), *(row.values() for row in log)]]
    write(path.with_suffix(".csv"), "".join(lines).encode())
    write(path, buffer.getvalue())
# === shared: main ===
def main(argv=None):
    """Train as the command line, or the list `argv`, says."""
    args = parse_args(argv)
    join_processes(args)
    out = Path(args.out)
    check_outputs(out, args)  # an error if a file would be lost
    data = load_dataset(args.dataset, args.data_dir, args.image_size)
    images = data.train_images.to(args.device)  # (n, C, H, W) uint8: all of it stays on the device
    args.n_images = len(images)  # kept with the options, for a --resume with other images
    saved = dict(args={}) if args.resume is None else load_encoder(args.resume or out)[1]
    free = "data_dir compile knn_every preview out overwrite resume".split()  # may differ
    other = {k: v for k, v in saved["args"].items() if k not in free and vars(args).get(k) != v}
    if other:
        raise ValueError(f"{args.resume or out} was made with {other}: --resume needs the same")
    mean, std = (x.to(args.device).view(-1, 1, 1) for x in (data.mean, data.std))
    views = [view | WITHOUT[args.augment] for view in (VIEW_1, VIEW_2)]
    steps_per_epoch = len(images) // args.batch_size  # a last short batch is left out
    if steps_per_epoch == 0:
        raise ValueError(f"--batch-size {args.batch_size} is above the {len(images)} images")
    total_steps, warmup_steps = args.epochs * steps_per_epoch, args.warmup_epochs * steps_per_epoch
    torch.manual_seed(args.seed)  # for the weights
    generator = torch.Generator(args.device).manual_seed(args.seed)  # for the order and the views
    backbone = build_backbone(args.backbone, images.shape[1], images.shape[3])
    model = build_model(backbone, args).to(args.device)
    model = sync_batchnorm(model) if SYNC_BATCHNORM else model
    groups = [dict(params=[p for p in model[name].parameters() if (p.ndim > 1) == is_weight],
                   weight_decay=args.weight_decay if is_weight else 0.0, name=name)
              for name in TRAINED for is_weight in (True, False)]  # biases, BatchNorm: no decay
    peak_lr = args.lr * args.batch_size / 256
    optimizer = torch.optim.SGD(groups, peak_lr, momentum=0.9, fused=args.device == "cuda")
    metrics, begin, stop = [], 0, min(args.max_steps or total_steps, total_steps)
    if args.resume is not None:
        try:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            generator.set_state(saved["rng"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{args.resume or out} is not whole: {error!r}") from error
        metrics, begin = saved["metrics"], saved["step"]
        if begin >= stop and RANK == 0:
            print(f"{args.resume or out} has all of its {stop} steps: nothing is left to do")
    check_room(out, model)  # on the disk: better known now than after an epoch
    for network in model.values() if args.compile else ():
        network.compile()
    if args.preview and RANK == 0 and (args.overwrite or not Path(args.preview).exists()):
        sample, draws = images[:16].float() / 255, torch.Generator(args.device).manual_seed(0)
        rows = [sample] + [augment(sample, **view, generator=draws) for view in views]
        save_image(F.interpolate(torch.cat(rows), scale_factor=3), args.preview, nrow=len(sample))
    bar = tqdm(range(begin, stop), initial=begin, total=stop, unit=" images",
               unit_scale=args.batch_size, disable=RANK > 0 or None)  # None: terminals only
    for step in bar:
        i = step % steps_per_epoch
        if i == 0:  # a new epoch: a new order of the images, and sums of loss and z_std
            order = torch.randperm(len(images), generator=generator, device=args.device)
            sums, begun = torch.zeros(2, device=args.device), time.perf_counter()
        share = order[i * args.batch_size:(i + 1) * args.batch_size].chunk(WORLD)[RANK]
        batch = images[share].float() / 255  # (N, C, H, W); alone, a process has the whole batch
        x1, x2 = [(augment(batch, **view, generator=generator) - mean) / std for view in views]
        lr = peak_lr * (1 + math.cos(math.pi * step / total_steps)) / 2  # half a cosine, to 0
        lr *= min(1, (step + 1) / max(1, warmup_steps))
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss, z = train_step(model, optimizer, x1, x2, step / total_steps, args)
        sums += torch.stack([gather(loss[None]).mean(), z_std(gather(z))])
        if i % 20 == 0 and not bar.disable:  # not at each step: reading waits for the device
            bar.set_postfix(loss=loss.item(), lr=lr)
        if i + 1 < steps_per_epoch and step + 1 < stop:  # neither epoch nor run is over
            continue
        loss, spread = (sums / (i + 1)).tolist()
        seconds, epoch, knn = time.perf_counter() - begun, step // steps_per_epoch + 1, ""
        if not math.isfinite(loss):
            raise ValueError(f"loss {loss} in epoch {epoch} at learning rate {lr:.2g}: lower --lr")
        if RANK > 0:  # the first process measures and saves
            continue
        if args.knn_every and (epoch % args.knn_every == 0 or step + 1 == total_steps):
            known = torch.where(data.train_labels >= 0)[0]  # -1: an image without a label (STL-10)
            some = known[::max(1, len(known) // 20_000)]
            bank, queries = (extract_features(backbone, x, mean, std)
                             for x in (data.train_images[some], data.test_images))
            knn = knn_accuracy(bank, data.train_labels[some], queries, data.test_labels)
        metrics.append(dict(
            epoch=epoch, step=step + 1, loss=loss, lr=lr, z_std=spread, knn=knn,
            images_per_second=(i + 1) * args.batch_size / seconds, seconds=seconds))
        save(out, dict(
            format=1, method=METHOD, backbone=args.backbone, in_channels=images.shape[1],
            image_size=images.shape[3], dataset=args.dataset, args=vars(args), epoch=epoch,
            step=step + 1, model=model.state_dict(), optimizer=optimizer.state_dict(),
            rng=generator.get_state(), metrics=metrics))
        with bar.external_write_mode():
            print("  ".join(f"{k} {v:.6g}" for k, v in metrics[-1].items() if v != ""), flush=True)

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        out = parse_args().out
        hint = f"--resume goes on from {out}" if Path(out).exists() else "nothing is saved yet"
        argparse.ArgumentParser().exit(130, f"stopped: {hint}\n")
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        argparse.ArgumentParser().exit(2, f"{METHOD}.py: error: {error}\n")
