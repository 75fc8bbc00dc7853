"""What did it learn? Freeze the backbone of a checkpoint and see how well it tells classes apart.

    python linear_eval.py --weights byol.pt
    python linear_eval.py --weights simclr.pt moco.pt --labels 100 1000 all --csv scores.csv

Linear evaluation: a frozen backbone turns each image into features. A linear classifier and a vote
of nearest neighbours, too simple to learn much themselves, are fitted to those of labelled training
images and scored on the test images. The first two rows are for comparison: raw pixels, and random
weights. Only what a checkpoint adds to these was learnt. N images, F features, K classes.
"""

import argparse
import csv
import json
import statistics
import sys
import time
from copy import deepcopy

import torch
import torch.nn.functional as F
from sklearn.metrics import classification_report, confusion_matrix, recall_score
from torch import nn
from torchvision.transforms import v2
from tqdm import tqdm

from common import DataError, build_backbone, load_dataset
from simclr import augment

CANDIDATES = (0.01, 0.03, 0.1, 0.3, 1, 3)  # for C: the larger, the weaker the penalty on weights
STEPS, EPOCHS, BATCH_SIZE, LR = 3000, 30, 128, 0.03  # STEPS, or EPOCHS if they take longer
FINETUNE_LR = 0.001  # of a pretrained backbone: with few labels a higher rate undoes its training


def load_encoder(path):
    """Return the encoder, from uint8 images to features, and the whole checkpoint of a script."""
    try:
        checkpoint = torch.load(path, "cpu", weights_only=True)  # a file must not run code
        args, model, _ = checkpoint["args"], checkpoint["model"], checkpoint["metrics"]
        backbone = build_backbone(args["backbone"], args["images"][1], args["images"][3])
        weights = {k[9:]: model[k] for k in model if k.startswith("backbone.")}
        backbone.load_state_dict(weights)
        if not all(value.isfinite().all() for value in weights.values()):
            raise DataError(f"{path} has weights that are not finite: train again, at a lower --lr")
        return normalized(backbone, args["mean"], args["std"]), checkpoint
    except Exception as error:  # a damaged file can fail in any way
        raise DataError(f"{path} is missing, damaged, unfinished or of another program") from error


def normalized(network, mean, std):
    """Return `network` with layers before it that take uint8 images (N, C, H, W)."""
    scale = v2.ToDtype(torch.float32, scale=True)
    return nn.Sequential(scale, v2.Normalize(mean, std), network).eval()


@torch.no_grad()
def apply(network, images):
    """Return what a network makes of uint8 images (N, C, H, W) on its device, 500 at a time."""
    return torch.cat([network(x) for x in tqdm(images.split(500), leave=False, disable=None)])


def extract_features(encoder, images):
    """Return the features (N, F) float32, each of length 1, of uint8 images (N, C, H, W)."""
    return F.normalize(apply(encoder, images), dim=1)


def linear_probe(features, labels, n_classes):
    """Return an nn.Linear fitted to features (N, F) of length 1 and labels (N,), and its C.

    C is the best of CANDIDATES on held-out images: five parts in turn, or all but 5,000 of many.
    """
    x = 10 * (features - features.mean(dim=0))  # now 60 steps do, instead of hundreds
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = order.chunk(5) if len(order) <= 2000 else [order[min(5000, len(order) * 4 // 5) :]]
    correct = dict.fromkeys(CANDIDATES, 0)
    for held_out in parts:
        rest = order[~torch.isin(order, held_out)]
        for c in CANDIDATES:
            layer = fit(x[rest], labels[rest], n_classes, c)
            correct[c] += (layer(x[held_out]).argmax(dim=1) == labels[held_out]).sum().item()
    best = max(CANDIDATES, key=correct.get)
    layer = fit(x, labels, n_classes, best)
    layer.weight *= 10
    layer.bias -= layer.weight @ features.mean(dim=0)  # now it takes the features as they are
    return layer, best


def fit(x, labels, n_classes, c):
    """Minimise C * sum of cross-entropies + ||W||^2 / 2, as scikit-learn's LogisticRegression(C=c).

    With two classes scikit-learn has one row of weights, the layer two: theirs is then C=2 * c.
    """
    layer = nn.Linear(x.shape[1], n_classes, device=x.device)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(layer(x), labels) + layer.weight.square().sum() / (2 * c * len(x))
        value.backward()
        return value

    optimizer.step(loss)
    return layer.requires_grad_(False)


def knn_accuracy(train, train_labels, test, test_labels, k=200, temperature=0.1):
    """Return the accuracy in percent of a vote among the k nearest training features (N, F).

    Features have length 1. A vote weighs exp(cosine / temperature) (InstDisc, Wu et al. 2018, 3.4).
    """
    guesses = []
    for x in test.split(500):
        cosines, nearest = (x @ train.T).topk(min(k, len(train)), dim=1)  # (500, k)
        votes = x.new_zeros(len(x), train_labels.max() + 1)  # (500, K)
        votes.scatter_add_(1, train_labels[nearest], (cosines / temperature).exp())
        guesses.append(votes.argmax(dim=1))
    return percent(torch.cat(guesses), test_labels)


def percent(guesses, labels):
    """Return the accuracy in percent."""
    return 100 * (guesses == labels).double().mean().item()


def train_with_labels(encoder, images, labels, n_classes, seed=0, backbone_lr=FINETUNE_LR):
    """Return a network from uint8 images (N, C, H, W) to logits (N, K), trained with labels (N,).

    It is a copy of the encoder and a linear layer. From random weights, pass backbone_lr=LR.
    """
    scale, normalize, backbone = deepcopy(encoder)
    size = min(BATCH_SIZE, len(images))
    steps, per_epoch = max(STEPS, EPOCHS * len(images) // size), len(images) // size
    torch.manual_seed(seed)
    head = nn.Linear(backbone.feature_dim, n_classes)
    nn.init.zeros_(head.weight)  # so that the first gradients do not shake a pretrained backbone
    model = nn.Sequential(backbone, head).to(images.device).train()
    groups = [dict(params=backbone.parameters(), lr=backbone_lr), dict(params=head.parameters())]
    optimizer = torch.optim.SGD(groups, LR, 0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    for step in tqdm(range(steps), "training", leave=False, disable=None):
        if step % per_epoch == 0:
            batches = torch.randperm(len(images), device=images.device).split(size)
        batch = batches[step % per_epoch]
        logits = model(normalize(augment(scale(images[batch]))))
        loss = F.cross_entropy(logits, labels[batch], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return nn.Sequential(scale, normalize, model).eval()


def draw_labels(labels, indices, budget, classes, seed):
    """Draw `budget` of the `indices`, equally many of each of `classes`; return them sorted."""
    groups = [indices[labels[indices] == label] for label in range(len(classes))]
    fewest, rare = min(zip(map(len, groups), classes, strict=True))
    most = len(classes) * fewest
    if budget not in range(len(classes), most + 1, len(classes)):
        why = f"{rare} has {fewest} to draw from"
        raise DataError(f"--labels {budget}: take a multiple of {len(classes)} up to {most}: {why}")
    generator, each = torch.Generator().manual_seed(seed), budget // len(classes)
    drawn = [group[torch.randperm(len(group), generator=generator)[:each]] for group in groups]
    return torch.cat(drawn).sort().values


def load(args):
    """Return rows (name, encoder, checkpoint, rate or None), the data, what to learn from."""
    loaded = {path: load_encoder(path) for path in args.weights}
    first = loaded[args.weights[0]][1]["args"]
    args.dataset = args.dataset or first["dataset"]
    data = load_dataset(args.dataset, args.data_dir, first["images"][3], args.device)
    shape = list(data.train_images.shape[1:])
    for path, (_, checkpoint) in loaded.items():
        backbone, images = checkpoint["args"]["backbone"], checkpoint["args"]["images"]
        if backbone != first["backbone"] or images[1:] != shape:
            raise DataError(f"{path} has {backbone} {images[1:]}, not {first['backbone']} {shape}")

    known = (data.train_labels >= 0).nonzero().flatten()
    if args.validation:  # hold the same images out each time
        known = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(0))]
        scored, known = known[: args.validation], known[args.validation :].sort().values
        images, labels = data.train_images[scored], data.train_labels[scored]
        data = data._replace(test_images=images, test_labels=labels)
    if len(known) < 2 or not len(data.test_labels):
        numbers = f"{len(known)} images with labels to learn from, {len(data.test_labels)} to score"
        raise DataError(f"{args.dataset} has {numbers}: see --validation in docs/guide.md")
    moments = data.mean.tolist(), data.std.tolist()
    torch.manual_seed(args.seed)
    random_init = normalized(build_backbone(first["backbone"], *shape[:2]), *moments)
    rows = [("raw pixels", normalized(nn.Flatten(), *moments), None, None)]
    rows += [("random init", random_init, None, None)]
    rows += [(path, *loaded[path], None) for path in loaded]
    rows += [("labels only", random_init, None, LR)] * args.baselines
    rows += [(f"{path} fine-tuned", *loaded[path], FINETUNE_LR) for path in loaded if args.finetune]
    return rows, data, known


def append(args, row, checkpoint, cell):
    """Append a line to --csv: a cell of the table, its checkpoint's training, the machine."""
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    trained, epochs = (checkpoint["args"], checkpoint["metrics"]) if checkpoint else ({}, [])
    line = dict(row=row, checkpoint=row.removesuffix(" fine-tuned") if checkpoint else "")
    line |= dict(method=trained.get("method"), dataset=args.dataset)
    line |= dict(scored=f"validation {args.validation}" if args.validation else "test") | cell
    line |= dict(epochs=len(epochs) or "", seed=trained.get("seed", args.seed))
    line["training_seconds"] = round(sum(epoch["seconds"] for epoch in epochs), 1) or ""
    line["options"] = json.dumps(trained) if trained else ""
    line |= dict(device=device, threads=torch.get_num_threads(), torch=torch.__version__)
    with open(args.csv, "a+", encoding="utf-8", errors="surrogateescape", newline="") as file:
        file.seek(0)
        header, found = ",".join(line), file.readline().rstrip()
        if found not in ("", header):
            raise DataError(f"--csv {args.csv} has other columns: name another file")
        file.write("" if found else header + "\n")
        csv.DictWriter(file, line, lineterminator="\n").writerow(line)


def parse_args(argv=None):
    """Read the command line, or `argv`."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    option, device = parser.add_argument, "cuda" if torch.cuda.is_available() else "cpu"
    option("--weights", nargs="+", required=True, metavar="PT", help="checkpoints")
    option("--labels", nargs="+", default=["all"], metavar="N", help="numbers of labels, or all")
    option("--trials", type=int, default=3, help="draws of N labels: mean and deviation")
    option("--validation", type=int, default=0, metavar="N", help="test on N training images")
    option("--baselines", action="store_true", help="add the network trained on labels alone")
    option("--finetune", action="store_true", help="add the networks fine-tuned on the labels")
    option("--report", action="store_true", help="scores and confusions (rows: true classes)")
    option("--csv", metavar="FILE", help="append a line for each draw")
    option("--seed", type=int, default=0, help="of the draws, and of weights that start random")
    option("--dataset", help="as in training; unset: the one of the first checkpoint")
    option("--data-dir", default="data", help="downloads, decoded images")
    option("--device", choices=sorted({device, "cpu"}), default=device)
    args = parser.parse_args(argv)
    valid = all(n == "all" or n.isdecimal() for n in args.labels)
    if not valid or args.trials < 1 or args.validation < 0:
        parser.error("--labels are numbers or all, --trials is 1 or more, --validation 0 or more")
    return args


def main(argv=None):
    """Print a table of how well pixels, random features and learnt features tell classes apart."""
    args = parse_args(argv)
    rows, data, known = load(args)
    truth, classes, numbers = data.test_labels, data.classes, range(len(data.classes))
    draws, last = {}, {}  # number of labels: {seed: indices of the images}; row: its last guesses
    for n in sorted({len(known) if n == "all" else int(n) for n in args.labels}):
        seeds = range(10_000 * args.seed, 10_000 * args.seed + args.trials)
        draws[n] = {"": known}  # all of them can be drawn in one way only
        if n != len(known):
            draws[n] = {x: draw_labels(data.train_labels, known, n, classes, x) for x in seeds}

    commonest, width = data.train_labels[known].mode().values, max(len(row[0]) for row in rows)
    uneven = len(truth.bincount(minlength=len(classes)).unique()) > 1
    titles = [f"{n:,} labels" for n in draws] + ["kNN"] + ["balanced"] * uneven
    print(f"{args.dataset}: accuracy in percent on {len(truth):,} images.")
    print(f"Always guessing {classes[commonest]} gives {percent(commonest, truth):.2f}.\n")
    print(" " * width + "".join(f"{title:>15}" for title in titles))
    for name, encoder, checkpoint, rate in rows:
        encoder, cells, begun = encoder.to(args.device), [], time.perf_counter()
        test = None if rate else extract_features(encoder, data.test_images)
        for n, drawn in draws.items():
            scores, votes = [], []
            for seed, indices in drawn.items():
                images, labels = data.train_images[indices], data.train_labels[indices]
                if rate:
                    new = train_with_labels(encoder, images, labels, len(classes), args.seed, rate)
                    guesses, c, knn = apply(new, data.test_images).argmax(dim=1), "", ""
                else:
                    train = extract_features(encoder, images)
                    layer, c = linear_probe(train, labels, len(classes))
                    guesses, knn = layer(test).argmax(1), knn_accuracy(train, labels, test, truth)
                scores, votes = [*scores, percent(guesses, truth)], [*votes, knn]
                if args.csv:
                    cell = dict(labels=n, draw=seed, accuracy=scores[-1], knn=knn, c=c)
                    append(args, name, checkpoint, cell | dict(seconds=time.perf_counter() - begun))
                begun = time.perf_counter()
            deviation = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
            cells.append(f"{statistics.mean(scores):.2f}{deviation}")
        last[name] = truth.cpu(), guesses.cpu()
        cells.append("-" if rate else f"{statistics.mean(votes):.2f}")
        if uneven:
            recall = recall_score(*last[name], labels=truth.unique().cpu(), average="macro")
            cells.append(f"{100 * recall:.2f}")
        print(f"{name:<{width}}" + "".join(f"{cell:>15}" for cell in cells), flush=True)
    for name, pair in last.items() if args.report else ():
        print(f"\n{name}, {n:,} labels\n{confusion_matrix(*pair, labels=numbers)}")
        print(classification_report(*pair, labels=numbers, target_names=classes, zero_division=0))


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # not every terminal has the sign ±
    try:
        main()
    except (OSError, KeyboardInterrupt) as error:
        sys.exit(str(error) or "stopped")
