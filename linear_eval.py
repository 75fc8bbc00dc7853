"""What did it learn? Freeze the backbone of a checkpoint and see how well it tells classes apart.

    python linear_eval.py --weights byol.pt
    python linear_eval.py --weights simclr.pt moco.pt --labels 100 1000 all --plot pictures

Every image goes once through the frozen backbone, which gives its features. A linear classifier and
a vote of the nearest neighbours learn from the features of labelled training images, and are scored
on those of the test images. Two rows stand above every result: the raw pixels, and the same
backbone with random weights, never trained. Only what a result adds to those was learnt.
N images, F features, K classes.
"""

import argparse
import math
import os
import statistics
import sys
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from sklearn.metrics import classification_report, confusion_matrix
from torch import nn
from torchvision.transforms import v2
from tqdm import tqdm

import byol
import moco
import simclr
import simsiam
from common import DataError, build_backbone, load_dataset

CANDIDATES = (3, 10, 30, 100, 300, 1000)  # candidates for C: the larger, the weaker the penalty
# Training with labels: 3,000 steps, or 30 epochs where that is more. Chosen on held-out images.
STEPS, EPOCHS, BATCH_SIZE, LR = 3000, 30, 128, 0.03
FINETUNE_LR = 0.001  # of a pretrained backbone: with few labels a higher rate undoes its training
SCRIPTS = {"simclr": simclr, "moco": moco, "byol": byol, "simsiam": simsiam}


def normalized(network, mean, std):
    """Return `network` with a layer before it that takes uint8 images (N, C, H, W)."""
    scale = v2.ToDtype(torch.float32, scale=True)
    return nn.Sequential(scale, v2.Normalize(mean, std), network).eval()


def load_encoder(path):
    """Return (encoder, checkpoint): uint8 images to features, and all that a script saved.

    Only the backbone is rebuilt, so the script need not be there. weights_only=True keeps the file
    from running code. Raises DataError unless the backbone is whole and its weights are finite.
    """
    if not Path(path).exists():
        raise DataError(f"{path} does not exist")
    try:
        checkpoint = torch.load(path, "cpu", weights_only=True)
        trained, model = checkpoint["args"], checkpoint["model"]
        backbone = build_backbone(trained["backbone"], trained["images"][1], trained["images"][3])
        prefix = "backbone."
        saved = {k.removeprefix(prefix): v for k, v in model.items() if k.startswith(prefix)}
        backbone.load_state_dict(saved)
        if not all(value.isfinite().all() for value in saved.values()):
            raise ValueError("a weight is not finite")
        _ = checkpoint["metrics"], trained["method"], trained["dataset"]
        return normalized(backbone, trained["mean"], trained["std"]), checkpoint
    except Exception as error:  # a damaged file can fail in any way
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} is not a checkpoint of these scripts: {reason}") from error


@torch.no_grad()
def extract_features(encoder, images, indices):
    """Return the features (N, F) float32 of images[indices], uint8."""
    batches = tqdm(indices.split(500), "features", leave=False, disable=None)
    return torch.cat([encoder(images[batch]) for batch in batches])


def knn_accuracy(train, train_labels, test, test_labels, k=200, temperature=0.1):
    """Return the accuracy in percent of a vote among the k nearest training features (N, F).

    Nearness is the cosine, and a neighbour's vote weighs exp(cosine / temperature) (InstDisc, Wu et
    al. 2018, section 3.4, with 0.07).
    """
    train, correct = F.normalize(train, dim=1), 0
    for x, labels in zip(test.split(500), test_labels.split(500), strict=True):
        cosines, nearest = (F.normalize(x, dim=1) @ train.T).topk(min(k, len(train)), dim=1)
        weights = (cosines / temperature).exp()
        votes = weights.new_zeros(len(x), int(train_labels.max()) + 1)
        votes.scatter_add_(1, train_labels[nearest], weights)
        correct += (votes.argmax(dim=1) == labels).sum().item()
    return 100 * correct / len(test)


def fit_logistic(x, labels, n_classes, c, iterations=60):
    """Minimise C * sum of cross-entropies + ||W||^2 / 2; return W (K, F) and b (K,).

    scikit-learn's LogisticRegression(C=C) has the same minimum. L-BFGS gets there fast if all
    directions curve alike, so it works on V = W / scale. With features x (N, F) that are
    uncorrelated, such as principal components, one scale for each feature is enough.
    """
    n = len(x)
    scale = (x.square().mean(dim=0) / n_classes + 1 / (c * n)).rsqrt()  # (F,)
    v = torch.zeros(n_classes, x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(n_classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [v, bias], max_iter=iterations, tolerance_grad=1e-4, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        weight = v * scale
        value = F.cross_entropy(F.linear(x, weight, bias), labels)
        value = value + weight.square().sum() / (2 * c * n)
        value.backward()
        return value

    optimizer.step(loss)
    return (v * scale).detach(), bias.detach()


def linear_probe(train, labels, test, n_classes):
    """Fit a linear classifier to `train` (N, F); return its predictions for `test`, and its C.

    Features are scaled to length 1, centred, and turned into principal components. C is the
    candidate with the best accuracy in five-fold cross-validation on up to 10,000 of the images.
    """
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    center = train.mean(dim=0)
    train, test = train - center, test - center
    if len(train) < train.shape[1]:
        axes = torch.linalg.svd(train, full_matrices=False).Vh.T  # (F, N)
    else:
        axes = torch.linalg.eigh(train.T @ train).eigenvectors  # (F, F)
    train, test = train @ axes, test @ axes

    generator = torch.Generator().manual_seed(0)
    folds = torch.randperm(len(train), generator=generator)[:10_000].chunk(5)
    correct = dict.fromkeys(CANDIDATES, 0)
    for i, held_out in enumerate(folds):
        fitted = torch.cat(folds[:i] + folds[i + 1 :])
        for c in CANDIDATES:
            weight, bias = fit_logistic(train[fitted], labels[fitted], n_classes, c, 20)
            guesses = F.linear(train[held_out], weight, bias).argmax(dim=1)
            correct[c] += (guesses == labels[held_out]).sum().item()
    best = max(correct, key=correct.get)
    weight, bias = fit_logistic(train, labels, n_classes, best)
    return F.linear(test, weight, bias).argmax(dim=1), best


def train_with_labels(encoder, images, labels, n_classes, seed, backbone_lr):
    """Train a copy of an encoder, and a linear layer, on uint8 images (N, C, H, W).

    Return the two as one network. Random weights show what labels alone give; with pretrained ones
    it is fine-tuning. The linear layer starts at zero, so its peak rate is LR in both cases.
    SGD as in the methods, with Nesterov momentum; bf16 on a GPU that has it.
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
        x = normalize(simclr.augment(scale(images[batch]), **simclr.VIEW_1))
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), labels[batch], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return nn.Sequential(scale, normalize, model).eval()


def draw_labels(labels, indices, budget, seed):
    """Draw `budget` of the `indices`, equally many of each class; return them sorted.

    Raises DataError if the classes do not divide the budget or a class has too few images.
    """
    classes = labels[indices].unique().tolist()
    if budget % len(classes):
        raise DataError(f"--labels {budget} is not a multiple of the {len(classes)} classes")
    generator, drawn, each = torch.Generator().manual_seed(seed), [], budget // len(classes)
    for label in classes:
        of_class = indices[labels[indices] == label]
        if len(of_class) < each:
            raise DataError(f"--labels {budget}: class {label} has only {len(of_class)} images")
        drawn.append(of_class[torch.randperm(len(of_class), generator=generator)[:each]])
    return torch.cat(drawn).sort().values


def export(encoder, images, path):
    """Save a torch.export program: uint8 images in, features out. It needs none of this code."""
    encoder = encoder.cpu().to(memory_format=torch.contiguous_format)
    any_number = {0: torch.export.Dim("N")}
    example = (images[:2].cpu(),)
    program = torch.export.export(encoder, example, dynamic_shapes=(any_number,), strict=False)
    torch.export.save(program, path)
    print(f"{path}: takes uint8 images (N, {', '.join(map(str, images.shape[1:]))})")


def embed(encoder, data, path):
    """Save `features` (n, F) float32 and `paths` (n,) of all images, training before test."""
    parts = {"train": data.train_images, "test": data.test_images}
    features = [extract_features(encoder, x, torch.arange(len(x))) for x in parts.values()]
    numbers = [f"{part}/{i}" for part, x in parts.items() for i in range(len(x))]
    features = torch.cat(features).cpu().numpy()
    np.savez(path, features=features, paths=np.array(data.paths or numbers))
    print(f"{path}: features {features.shape}, paths")


def panels(width, height, rows=1, columns=1):
    """Return a matplotlib figure of that size in inches, and its axes (rows, columns)."""
    figure = Figure((width, height), dpi=80, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def show(axes, image, **options):
    """Draw one uint8 image (C, H, W)."""
    axes.imshow(image.permute(1, 2, 0).cpu().numpy(), cmap="gray", vmin=0, vmax=255, **options)
    axes.set(xticks=[], yticks=[])


def plot_labels(scores, path):
    """Draw accuracy by number of labels: `scores` maps a row to {number: accuracies}."""
    figure, [[axes]] = panels(8, 5)
    for i, (name, values) in enumerate(scores.items()):
        mean = [statistics.mean(x) for x in values.values()]
        deviation = [statistics.stdev(x) if len(x) > 1 else 0 for x in values.values()]
        style = dict(marker="ov^sDPX*"[i % 8], linestyle="-" if i > 1 else "--")  # --: not learnt
        axes.errorbar(list(values), mean, deviation, capsize=3, label=name, **style)
    axes.set(title="Test accuracy by number of labels (bars: deviation of draws)", xscale="log")
    axes.set(xlabel="labelled training images", ylabel="test accuracy (%)")
    axes.set_xticks(list(values), [f"{n:,}" for n in values])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def plot_curves(metrics, path):
    """Draw loss, kNN accuracy and z_std by epoch: `metrics` maps a checkpoint to its rows."""
    titles = {"loss": "training loss", "knn": "kNN accuracy (%)", "z_std": "z_std (0: one point)"}
    if not any("knn" in row for rows in metrics.values() for row in rows):
        del titles["knn"]  # the images had no labels
    figure, axes = panels(3 + 2.5 * len(metrics), 7, len(titles), len(metrics))
    for column, (name, rows) in enumerate(metrics.items()):
        for key, boxes in zip(titles, axes, strict=True):
            if key != "loss":  # losses of different methods cannot be compared
                boxes[column].sharey(boxes[0])
            shown = [row for row in rows if key in row]  # kNN is not taken in every epoch
            x, y = [row["epoch"] for row in shown], [row[key] for row in shown]
            boxes[column].plot(x, y, marker=".")
            boxes[column].set(title=name, xlabel="epoch", ylabel=titles[key])
            boxes[column].grid(alpha=0.3)
    figure.savefig(path)


def plot_map(features, images, labels, classes, path):
    """Draw a t-SNE map for each entry of `features`: coloured points, or pictures if no classes."""
    figure, [axes] = panels(8 * len(features), 8, 1, len(features))
    for box, (name, values) in zip(axes, features.items(), strict=True):
        tsne = TSNE(perplexity=min(30, math.ceil(len(values) / 4)), random_state=0)
        points = tsne.fit_transform(values.cpu().numpy())
        for k, label in enumerate(classes[:10]):  # there are ten colours
            box.scatter(*points[(labels == k).cpu().numpy()].T, s=12, color=f"C{k}", label=label)
        if not classes:
            half = np.ptp(points, axis=0).max() / 2
            (x, y), size = points.min(axis=0) + np.ptp(points, axis=0) / 2, half / 30
            for image, (left, low) in zip(images, points, strict=True):
                show(box, image, extent=(left - size, left + size, low - size, low + size))
            half += size
            box.set(xlim=(x - half, x + half), ylim=(y - half, y + half))
        box.set(title=f"{name}: t-SNE of the features", xticks=[], yticks=[])
    if classes:
        axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), markerscale=3)
    figure.savefig(path)


def plot_grid(images, titles, path, labels=None, classes=()):
    """Draw uint8 images (rows, columns, C, H, W); in red frames those of another class than the
    first in their row, by `labels` (rows, columns)."""
    figure, axes = panels(8.4, 8.4, *images.shape[:2])
    for row, boxes in enumerate(axes):
        for column, box in enumerate(boxes):
            show(box, images[row, column])
            if classes and labels[row, column] != labels[row, 0]:
                box.set_xlabel(classes[labels[row, column]], color="C3", fontsize=7, labelpad=1)
                box.spines[:].set(color="C3", linewidth=4)
        if classes:
            boxes[0].set_ylabel(classes[labels[row, 0]], rotation=0, ha="right")
    for box, title in zip(axes[0], titles, strict=True):
        box.set_title(title, fontsize=9)
    figure.savefig(path)


def draw_pictures(loaded, random_init, data, known, folder):
    """Draw for each checkpoint a map of test images, the nearest of `known` to ten, and views."""
    count, labels = len(data.test_labels), data.test_labels
    shown = torch.arange(count)[:: math.ceil(count / 1000)]
    queries = labels.argsort(stable=True)[:: math.ceil(count / 10)]  # of all classes
    for path, (encoder, checkpoint) in loaded.items():
        stem = "-".join(Path(path).with_suffix("").parts).strip("/-")
        maps = {"random init": random_init, path: encoder}
        maps = {key: extract_features(net, data.test_images, shown) for key, net in maps.items()}
        images = data.test_images[shown]
        plot_map(maps, images, labels[shown], data.classes, folder / f"map-{stem}.png")

        bank = F.normalize(extract_features(encoder, data.train_images, known), dim=1)
        features = F.normalize(extract_features(encoder, data.test_images, queries), dim=1)
        nearest = known[(features @ bank.T).topk(min(8, len(known))).indices]  # (10, 8)
        images = torch.cat([data.test_images[queries, None], data.train_images[nearest]], dim=1)
        found = torch.cat([labels[queries, None], data.train_labels[nearest]], dim=1)
        titles = ["query", *map(str, range(1, images.shape[1]))]
        plot_grid(images, titles, folder / f"neighbours-{stem}.png", found, data.classes)

        script = SCRIPTS.get(checkpoint["args"]["method"], simclr)
        torch.manual_seed(0)
        x, views = data.test_images[queries] / 255, (script.VIEW_1, script.VIEW_2) * 3
        images = torch.stack([x, *(script.augment(x, **view) for view in views)], dim=1)
        titles = ["image", *["view 1", "view 2"] * 3]
        plot_grid((255 * images).byte(), titles, folder / f"views-{stem}.png")


def parse_args(argv=None):
    """Read the command line, or `argv`."""
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=form)
    option, devices = parser.add_argument, ["cpu", "cuda"][: 1 + torch.cuda.is_available()]
    option("--weights", nargs="+", required=True, metavar="PT", help="checkpoints")
    option("--labels", nargs="+", default=["all"], metavar="N", help="numbers of labels, or all")
    option("--trials", type=int, default=3, help="draws of N labels: mean ± deviation")
    option("--validation", type=int, metavar="N", help="score on N training images, not the test")
    option("--baselines", action="store_true", help="add the network trained on labels alone")
    option("--finetune", action="store_true", help="add the networks fine-tuned on the labels")
    option("--report", action="store_true", help="print scores and confusions by class")
    option("--plot", metavar="FOLDER", help="draw pictures")
    option("--embed", metavar="NPZ", help="only save the features and the path of each image")
    option("--export", metavar="PT2", help="only save the backbone for use without this code")
    option("--seed", type=int, default=0, help="of the labels drawn and the random backbone")
    option("--dataset", help="as in training; unset: the one of the first checkpoint")
    option("--data-dir", default="data", help="downloads, decoded images")
    option("--device", choices=devices, default=devices[-1])
    args = parser.parse_args(argv)
    for budget in args.labels:
        if budget != "all" and not (budget.isdecimal() and int(budget) >= 2):
            parser.error(f"--labels {budget} is neither 'all' nor a number from 2")
    for name in ("trials", "validation"):
        if vars(args)[name] is not None and vars(args)[name] < 1:
            parser.error(f"--{name} {vars(args)[name]} is not at least 1")
    for path in (args.embed, args.export):
        if path and (len(args.weights) > 1 or os.path.exists(path)):
            parser.error(f"{path} must not exist yet, and takes one of --weights")
    return args


def hold_out(data, n):
    """Return the data with n training images as its test images, and the indices of the others.

    Of a dataset with classes, only images that have a label count.
    """
    known = (data.train_labels >= (0 if data.classes else -1)).nonzero().flatten()
    if n >= len(known):
        raise DataError(f"--validation {n}: choose fewer than the {len(known)} training images")
    known = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(0))]
    held = dict(test_images=data.train_images[known[:n]], test_labels=data.train_labels[known[:n]])
    return data._replace(**held), known[n:].sort().values


def print_table(rows, frozen, draws, data, report, seed):
    """Evaluate the encoders in `rows`, frozen or trained on; return {row: {labels: accuracies}}.

    `draws` maps a number of labels to the indices (n,) of each draw, the largest number last.
    """
    everything, width = torch.arange(len(data.test_labels)), max(map(len, rows))
    columns = "".join(f"{f'{n:,} labels':>15}" for n in draws)
    print(f"Accuracy in percent on {len(everything):,} images. kNN and C belong to the last draw")
    print(f"of {max(draws):,} labels.\n\n{'':<{width}}{columns}     kNN     C     s")
    scores, last = {name: {} for name in rows}, {}
    for name, encoder in rows.items():
        begun, cells, knn, c = time.perf_counter(), "", "-", "-"
        if name in frozen:
            test = extract_features(encoder, data.test_images, everything)
        for n, some in draws.items():
            scores[name][n] = []
            for indices in some:
                labels = data.train_labels[indices]
                if name in frozen:
                    train = extract_features(encoder, data.train_images, indices)
                    guesses, c = linear_probe(train, labels, test, len(data.classes))
                else:
                    images = data.train_images[indices]
                    lr = LR if name == "labels only" else FINETUNE_LR
                    net = train_with_labels(encoder, images, labels, len(data.classes), seed, lr)
                    guesses = extract_features(net, data.test_images, everything).argmax(dim=1)
                correct = (guesses == data.test_labels).double().mean().item()
                scores[name][n].append(100 * correct)
            deviation = f" ± {statistics.stdev(scores[name][n]):.2f}" if len(some) > 1 else ""
            cells += f"{f'{statistics.mean(scores[name][n]):.2f}{deviation}':>15}"
        if name in frozen:
            knn = f"{knn_accuracy(train, labels, test, data.test_labels):.2f}"
        seconds, last[name] = time.perf_counter() - begun, guesses.cpu()
        print(f"{name:<{width}}{cells}{knn:>8}{c:>6}{seconds:>6.0f}", flush=True)
    for name, guesses in last.items() if report else ():
        truth = data.test_labels.cpu()
        print(f"\n{name}\n{classification_report(truth, guesses, target_names=data.classes)}")
        print(f"rows: classes, columns: predictions\n{confusion_matrix(truth, guesses)}")
    return scores


def main(argv=None):
    """Print a table of how well pixels, random features and learnt features tell classes apart."""
    args = parse_args(argv)
    loaded = {path: load_encoder(path) for path in args.weights}
    encoder, checkpoint = loaded[args.weights[0]]
    backbone, (_, *shape) = checkpoint["args"]["backbone"], checkpoint["args"]["images"]
    for path, (_, other) in loaded.items():
        if (other["args"]["backbone"], *other["args"]["images"][1:]) != (backbone, *shape):
            raise DataError(f"{path} and {args.weights[0]} differ in backbone or image size")
    dataset = args.dataset or checkpoint["args"]["dataset"]
    data = load_dataset(dataset, args.data_dir, shape[2], args.device)
    if data.train_images.shape[1] != shape[0]:
        other = data.train_images.shape[1]
        raise DataError(f"{dataset} has {other} channels, but {args.weights[0]} needs {shape[0]}")
    if args.export:
        return export(encoder, data.train_images, args.export)
    if args.embed:
        return embed(encoder.to(args.device), data, args.embed)

    known = (data.train_labels >= 0).nonzero().flatten()
    if args.validation:
        data, known = hold_out(data, args.validation)
    elif not data.classes and args.plot:  # a map has room for 500 pictures
        data, known = hold_out(data, min(500, len(data.train_labels) // 2))
    elif not data.classes:
        raise DataError(
            f"{dataset} has no labels (in folders train/CLASS and test/CLASS): pass --plot or "
            "--embed, or another --dataset"
        )
    elif len(data.test_labels) == 0:
        raise DataError(f"{dataset} has no test images: hold some out with --validation N")

    torch.manual_seed(args.seed)
    random_init = build_backbone(backbone, shape[0], shape[2])
    moments = data.mean.tolist(), data.std.tolist()
    frozen = {"raw pixels": normalized(nn.Flatten(), *moments)}
    frozen["random init"] = normalized(random_init, *moments)
    frozen |= {path: encoder for path, (encoder, _) in loaded.items()}
    rows = {name: network.to(args.device) for name, network in frozen.items()}
    if args.baselines:
        rows["labels only"] = frozen["random init"]
    if args.finetune:
        rows |= {f"{path} fine-tuned": frozen[path] for path in loaded}

    scores, draws = {}, {}  # number of labels: the indices of each draw
    if data.classes:
        for budget in sorted(int(n) for n in args.labels if n != "all"):
            seeds = range(10_000 * args.seed, 10_000 * args.seed + args.trials)
            draws[budget] = [draw_labels(data.train_labels, known, budget, s) for s in seeds]
        if "all" in args.labels:
            draws[len(known)] = [known]
        print(f"{dataset}, {backbone}. ", end="")
        scores = print_table(rows, frozen, draws, data, args.report, args.seed)
    if args.plot:
        folder = Path(args.plot)
        folder.mkdir(parents=True, exist_ok=True)
        if scores:
            plot_labels(scores, folder / "labels.png")
        metrics = {path: checkpoint["metrics"] for path, (_, checkpoint) in loaded.items()}
        plot_curves(metrics, folder / "curves.png")
        draw_pictures(loaded, frozen["random init"], data, known, folder)
        print(f"the pictures are in {folder}")


if __name__ == "__main__":
    try:
        main()
    except (DataError, OSError, KeyboardInterrupt) as error:
        sys.exit(str(error) or "stopped")
