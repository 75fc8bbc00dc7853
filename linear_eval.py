"""What did it learn? Freeze the backbone of a checkpoint and see how well it tells classes apart.

    python linear_eval.py --weights byol.pt
    python linear_eval.py --weights simclr.pt moco.pt --labels 100 1000 all --csv scores.csv

Every image goes once through the frozen backbone, which gives its features. A linear classifier and
a vote of the nearest neighbours learn from the features of labelled training images, and are scored
on those of the test images. Two rows stand above every result: the raw pixels, and the same
backbone with random weights, never trained. Only what a result adds to those was learnt.
N images, F features, K classes.
"""

import argparse
import csv
import json
import platform
import re
import statistics
import sys
import time
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.metrics import classification_report, confusion_matrix, recall_score
from torch import nn
from torchvision.transforms import v2
from tqdm import tqdm

from common import DataError, build_backbone, load_dataset
from simclr import augment

CANDIDATES = (3, 10, 30, 100, 1000)  # for C: the larger, the weaker the penalty on the weights
# Training with labels: 3,000 steps, or 30 epochs where that is more. Chosen on held-out images.
STEPS, EPOCHS, BATCH_SIZE, LR = 3000, 30, 128, 0.03
FINETUNE_LR = 0.001  # of a pretrained backbone: with few labels a higher rate undoes its training
COLUMNS = (  # of --csv: a line tells of the table's cell, the checkpoint's training, the machine
    "row checkpoint method dataset scored labels draw accuracy knn c seconds epochs seed "
    "training_seconds options device threads torch"
).split()


def normalized(network, mean, std):
    """Return `network` with a layer before it that takes uint8 images (N, C, H, W)."""
    scale = v2.ToDtype(torch.float32, scale=True)
    return nn.Sequential(scale, v2.Normalize(mean, std), network).eval()


def load_encoder(path):
    """Return (encoder, checkpoint): uint8 images to features, and all that a script saved.

    Only the backbone is rebuilt. Raises DataError unless it is whole and its weights are finite.
    """
    try:
        checkpoint = torch.load(path, "cpu", weights_only=True)  # a file must not run code
        args, model = checkpoint["args"], checkpoint["model"]
        _ = checkpoint["metrics"], args["method"], args["dataset"]
        backbone = build_backbone(args["backbone"], args["images"][1], args["images"][3])
        weights = {k[9:]: model[k] for k in model if k.startswith("backbone.")}
        backbone.load_state_dict(weights)
        encoder = normalized(backbone, args["mean"], args["std"])
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # a damaged file can fail in any way
        raise DataError(f"{path} is damaged, or none of the training scripts wrote it") from error
    if not all(value.isfinite().all() for value in weights.values()):
        raise DataError(f"{path} has weights that are not finite: train again, at a lower --lr")
    return encoder, checkpoint


@torch.no_grad()
def apply(network, images):
    """Return what a network makes of uint8 images (N, C, H, W) on its device, 500 at a time."""
    return torch.cat([network(x) for x in tqdm(images.split(500), leave=False, disable=None)])


def extract_features(encoder, images):
    """Return the features (N, F) float32, each of length 1, of uint8 images (N, C, H, W)."""
    return F.normalize(apply(encoder, images), dim=1)


def knn_accuracy(train, train_labels, test, test_labels, k=200, temperature=0.1):
    """Return the accuracy in percent of a vote among the k nearest training features (N, F).

    Features have length 1. A neighbour's vote weighs exp(cosine / temperature) (InstDisc, Wu et al.
    2018, section 3.4, with 0.07).
    """
    guesses = []
    for x in test.split(500):
        cosines, nearest = (x @ train.T).topk(min(k, len(train)), dim=1)  # (500, k)
        votes = F.one_hot(train_labels[nearest]) * (cosines / temperature).exp()[:, :, None]
        guesses.append(votes.sum(dim=1).argmax(dim=1))
    return percent(torch.cat(guesses), test_labels)


def percent(guesses, labels):
    """Return the accuracy in percent."""
    return 100 * (guesses == labels).double().mean().item()


def fit(layer, features, labels, c, steps=100):
    """Fit a linear layer: minimise C * sum of cross-entropies + ||W||^2 / 2.

    scikit-learn's LogisticRegression(C=c) has the same minimum. For two classes it has one row of
    weights where the layer has two, so there it is LogisticRegression(C=2 * c).
    """
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        penalty = layer.weight.square().sum() / (2 * c * len(features))
        value = F.cross_entropy(layer(features), labels) + penalty
        value.backward()
        return value

    optimizer.step(loss)


def linear_probe(features, labels, n_classes):
    """Return an nn.Linear that classifies features, and the C that it was fitted with.

    features: (N, F), each of length 1, as `extract_features` gives them; labels: (N,) int64, 0 to
    n_classes - 1. The layer takes features of any image to logits (N, K), whose softmax are
    probabilities. C is the candidate that is best on images held out: a fifth of 10,000, or each
    fifth in turn if there are few.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:10_000]
    folds = order.chunk(5)
    layers, correct = {}, dict.fromkeys(CANDIDATES, 0)
    for held_out in folds if len(labels) <= 2000 else folds[:1]:
        rest = order[~torch.isin(order, held_out)]
        layer = nn.Linear(features.shape[1], n_classes, device=features.device)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        for c in CANDIDATES:  # each fit starts where the one before has ended
            fit(layer, features[rest], labels[rest], c, steps=40)
            guesses = layer(features[held_out]).argmax(dim=1)
            correct[c] += (guesses == labels[held_out]).sum().item()
            layers[c] = deepcopy(layer)
    best = max(CANDIDATES, key=correct.get)
    fit(layers[best], features, labels, best)
    return layers[best].requires_grad_(False), best


def train_with_labels(encoder, images, labels, n_classes, seed=0, backbone_lr=FINETUNE_LR):
    """Return a network from uint8 images (N, C, H, W) to logits (N, K), trained with labels (N,).

    It is a copy of the encoder and a linear layer that starts at zero. Random weights show what
    labels alone give; with pretrained ones it is fine-tuning. SGD with Nesterov momentum.
    """
    scale, normalize, backbone = deepcopy(encoder)
    device, size = images.device.type, min(BATCH_SIZE, len(images))
    steps = max(STEPS, EPOCHS * len(images) // size)
    torch.manual_seed(seed)
    head = nn.Linear(backbone.feature_dim, n_classes)
    nn.init.zeros_(head.weight)  # so that the first gradients do not shake a pretrained backbone
    model = nn.Sequential(backbone, head).to(device).train()
    groups = [dict(params=backbone.parameters(), lr=backbone_lr), dict(params=head.parameters())]
    optimizer = torch.optim.SGD(groups, LR, 0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    bf16 = device == "cuda" and torch.cuda.is_bf16_supported(False)

    order = torch.empty(0, dtype=torch.int64, device=device)
    for _ in tqdm(range(steps), "training", leave=False, disable=None):
        if len(order) < size:
            order = torch.randperm(len(images), device=device)
        batch, order = order[:size], order[size:]
        x = normalize(augment(scale(images[batch])))
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), labels[batch], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return nn.Sequential(scale, normalize, model).eval()


def draw_labels(labels, indices, budget, classes, seed):
    """Draw `budget` of the `indices`, equally many of each of `classes`; return them sorted."""
    if budget == len(indices):
        return indices
    each, rest = divmod(budget, len(classes))
    if rest or not each:
        raise DataError(f"--labels {budget} is not a multiple of the {len(classes)} classes")
    generator, drawn = torch.Generator().manual_seed(seed), []
    for label, name in enumerate(classes):
        of_class = indices[labels[indices] == label]
        if len(of_class) < each:
            raise DataError(f"--labels {budget}: {name} has {len(of_class)} images, not {each}")
        drawn.append(of_class[torch.randperm(len(of_class), generator=generator)[:each]])
    return torch.cat(drawn).sort().values


def open_csv(path):
    """Return a csv.DictWriter that appends to a file. Raises DataError if it has other columns."""
    try:
        file = open(path, "a+", buffering=1, encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"--csv {path} cannot be written: {error.strerror}") from error
    file.seek(0)
    header, writer = file.readline().strip(), csv.DictWriter(file, COLUMNS, lineterminator="\n")
    if not header:
        writer.writeheader()
    elif header != ",".join(COLUMNS):
        raise DataError(f"--csv {path} has other columns than these scores: choose another file")
    return writer


def describe(checkpoint, device):
    """Return the columns of --csv on this machine and, if given, a checkpoint's training."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = [*re.findall("model name.*: (.*)", cpu), platform.processor()][0]
    name = torch.cuda.get_device_name() if device == "cuda" else name
    cell = dict(device=name, threads=torch.get_num_threads(), torch=torch.__version__)
    if checkpoint:
        args, metrics = checkpoint["args"], checkpoint["metrics"]
        cell |= dict(method=args["method"], seed=args["seed"], options=json.dumps(args))
        seconds = sum(row["seconds"] for row in metrics)
        cell |= dict(epochs=len(metrics), training_seconds=round(seconds, 1))
    return cell


def parse_args(argv=None):
    """Read the command line, or `argv`."""
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=form)
    option, devices = parser.add_argument, ["cpu", "cuda"][: 1 + torch.cuda.is_available()]
    option("--weights", nargs="+", required=True, metavar="PT", help="checkpoints")
    option("--labels", nargs="+", default=["all"], metavar="N", help="numbers of labels, or all")
    option("--trials", type=int, default=3, help="draws of N labels: mean and deviation")
    option("--validation", type=int, default=0, metavar="N", help="score on N training images")
    option("--baselines", action="store_true", help="add the network trained on labels alone")
    option("--finetune", action="store_true", help="add the networks fine-tuned on the labels")
    option("--report", action="store_true", help="print scores and confusions by class")
    option("--csv", metavar="FILE", help="append a line for each draw of labels")
    option("--seed", type=int, default=0, help="of the labels drawn and the random backbone")
    option("--dataset", help="as in training; unset: the one of the first checkpoint")
    option("--data-dir", default="data", help="downloads, decoded images")
    option("--device", choices=devices, default=devices[-1])
    args = parser.parse_args(argv)
    for n in args.labels:
        if n != "all" and not n.isdecimal():
            parser.error(f"--labels {n} is neither 'all' nor a number")
    if args.trials < 1 or args.validation < 0:
        parser.error(f"--trials {args.trials} or --validation {args.validation} is too low")
    return args


def main(argv=None):
    """Print a table of how well pixels, random features and learnt features tell classes apart."""
    args = parse_args(argv)
    loaded = {path: load_encoder(path) for path in args.weights}
    trained = loaded[args.weights[0]][1]["args"]
    name, backbone = args.dataset or trained["dataset"], trained["backbone"]
    data = load_dataset(name, args.data_dir, trained["images"][3], args.device)
    shape = list(data.train_images.shape[1:])
    for path, (_, checkpoint) in loaded.items():
        other, needed = checkpoint["args"]["backbone"], checkpoint["args"]["images"][1:]
        if (other, needed) != (backbone, shape):
            raise DataError(f"{path} is for {other}, {needed}, but this is {backbone}, {shape}")
    if not data.classes:
        raise DataError(f"{name} has no labels to score: docs/guide.md tells what else one can do")

    known = (data.train_labels >= 0).nonzero().flatten()  # what to learn from
    if args.validation > len(known) - 2:
        raise DataError(f"--validation {args.validation}: leave at least 2 of {len(known)} images")
    if args.validation:
        known = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(0))]
        held_out, known = known[: args.validation], known[args.validation :].sort().values
        images, labels = data.train_images[held_out], data.train_labels[held_out]
        data = data._replace(test_images=images, test_labels=labels)
    if not len(data.test_labels):
        raise DataError(f"{name} has no test images: hold some out with --validation N")
    draws = []  # (number of labels, seed, indices of the images), the largest number last
    for n in sorted({len(known) if n == "all" else int(n) for n in args.labels}):
        seeds = range(10_000 * args.seed, 10_000 * args.seed + args.trials)
        for seed in [""] if n == len(known) else seeds:  # all can be drawn in one way only
            drawn = draw_labels(data.train_labels, known, n, data.classes, seed)
            draws.append((n, seed, drawn))

    torch.manual_seed(args.seed)
    moments = data.mean.tolist(), data.std.tolist()
    random_init = normalized(build_backbone(backbone, shape[0], shape[2]), *moments)
    rows = {"raw pixels": (normalized(nn.Flatten(), *moments), None, None)}
    rows["random init"] = random_init, None, None  # encoder, checkpoint, rate if it is trained
    rows |= {path: (*loaded[path], None) for path in loaded}
    if args.baselines:
        rows["labels only"] = random_init, None, LR
    if args.finetune:
        rows |= {f"{path} fine-tuned": (*loaded[path], FINETUNE_LR) for path in loaded}

    truth, classes, most = data.test_labels, data.classes, data.train_labels[known].mode().values
    uneven = len(truth.unique(return_counts=True)[1].unique()) > 1
    width, numbers = max(map(len, rows)), dict.fromkeys(n for n, _, _ in draws)
    titles = "".join(f"{f'{n:,} labels':>15}" for n in numbers) + "     kNN     C     s"
    print(f"{name}, {backbone}. Accuracy in percent on {len(truth):,} images.")
    print(f"Always guessing {classes[most]} gives {percent(most, truth):.2f}.")
    print(f"kNN and C belong to the last draw of {n:,} labels.\n")
    print(f"{'':<{width}}{titles}{'  balanced' * uneven}")
    scored = f"validation {args.validation}" if args.validation else "test"
    writer, reports = open_csv(args.csv) if args.csv else None, []
    for row, (encoder, checkpoint, rate) in rows.items():
        about = dict(row=row, dataset=name, scored=scored) | describe(checkpoint, args.device)
        about["checkpoint"] = row.removesuffix(" fine-tuned") if checkpoint else ""
        begun, seconds, scores, c, knn = time.perf_counter(), [], {n: [] for n in numbers}, "", ""
        encoder = encoder.to(args.device)
        test_h = extract_features(encoder, data.test_images)
        for n, seed, drawn in draws:
            images, labels = data.train_images[drawn], data.train_labels[drawn]
            if rate:
                network = train_with_labels(encoder, images, labels, len(classes), args.seed, rate)
                guesses = apply(network, data.test_images).argmax(dim=1)
            else:
                train_h = extract_features(encoder, images)
                layer, c = linear_probe(train_h, labels, len(classes))
                guesses = layer(test_h).argmax(dim=1)
                knn = knn_accuracy(train_h, labels, test_h, truth) if drawn is draws[-1][2] else ""
            scores[n].append(percent(guesses, truth))
            seconds.append(time.perf_counter() - begun - sum(seconds))
            if writer:
                cell = dict(labels=n, draw=seed, accuracy=round(scores[n][-1], 4), knn=knn, c=c)
                writer.writerow(about | cell | dict(seconds=round(seconds[-1], 2)))
        line = f"{row:<{width}}"
        for values in scores.values():
            deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            line += f"{f'{statistics.mean(values):.2f}{deviation}':>15}"
        pair, every = (truth.cpu(), guesses.cpu()), dict(labels=range(len(classes)))
        balanced = recall_score(*pair, labels=truth.unique().cpu(), average="macro")
        line += f"{f'{knn:.2f}' if c else '-':>8}{c or '-':>6}{sum(seconds):>6.0f}"
        print(line + f"{100 * balanced:>10.2f}" * uneven, flush=True)
        report = classification_report(*pair, **every, target_names=classes, zero_division=0)
        reports += [f"\n{row}", report, "rows: classes, columns: predictions"]
        reports += [str(confusion_matrix(*pair, **every))]
    if args.report:
        print("\n".join(reports))


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # not every terminal has the sign ±
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped")
