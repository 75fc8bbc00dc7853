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
from sklearn.metrics import classification_report, confusion_matrix, f1_score
from torch import nn
from torchvision.transforms import v2
from tqdm import tqdm

import byol
import moco
import simclr
import simsiam
from common import DataError, build_backbone, load_dataset

STRENGTHS = (3, 10, 30, 100, 300, 1000)  # candidates for C: the larger, the weaker the penalty
# Training with labels: 3,000 steps, or ten epochs where that is more. Chosen on held-out images.
STEPS, BATCH_SIZE, LR = 3000, 128, 0.03
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


def fit_logistic(x, labels, n_classes, strength, iterations=60):
    """Minimise C * sum of cross-entropies + ||W||^2 / 2; return W (K, F) and b (K,).

    scikit-learn's LogisticRegression(C=C) has the same minimum. L-BFGS gets there fast if all
    directions curve alike, so it works on V = W / scale. With features x (N, F) that are
    uncorrelated, such as principal components, one scale for each feature is enough.
    """
    n = len(x)
    scale = (x.square().mean(dim=0) / n_classes + 1 / (strength * n)).rsqrt()  # (F,)
    v = torch.zeros(n_classes, x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(n_classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [v, bias], max_iter=iterations, tolerance_grad=1e-4, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        weight = v * scale
        value = F.cross_entropy(F.linear(x, weight, bias), labels)
        value = value + weight.square().sum() / (2 * strength * n)
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
    correct = dict.fromkeys(STRENGTHS, 0)
    for i, held_out in enumerate(folds):
        fitted = torch.cat(folds[:i] + folds[i + 1 :])
        for strength in STRENGTHS:
            weight, bias = fit_logistic(train[fitted], labels[fitted], n_classes, strength, 20)
            guesses = F.linear(train[held_out], weight, bias).argmax(dim=1)
            correct[strength] += (guesses == labels[held_out]).sum().item()
    best = max(correct, key=correct.get)
    weight, bias = fit_logistic(train, labels, n_classes, best)
    return F.linear(test, weight, bias).argmax(dim=1), best


def train_with_labels(encoder, images, labels, n_classes, seed):
    """Train an encoder and a linear layer on uint8 images (N, C, H, W); return the two as one.

    With random weights it shows what labels alone give, with pretrained ones it is fine-tuning.
    The method's own SGD, with Nesterov momentum; bf16 on a GPU that has it, as in training.
    """
    scale, normalize, backbone = encoder
    device, size = images.device.type, min(BATCH_SIZE, len(images))
    steps = max(STEPS, 10 * len(images) // size)
    torch.manual_seed(seed)
    head = nn.Linear(backbone.feature_dim, n_classes)
    nn.init.zeros_(head.weight)  # so that the first gradients do not shake a pretrained backbone
    model = nn.Sequential(backbone, head).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), LR, 0.9, weight_decay=5e-4, nesterov=True)
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
    program = torch.export.export(encoder, (images[:2].cpu(),), dynamic_shapes=(any_number,))
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
    axes.imshow(image.permute(1, 2, 0).cpu(), cmap="gray", vmin=0, vmax=255, **options)
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
    figure, axes = panels(3 + 2.5 * len(metrics), 7, 3, len(metrics))
    for column, (name, rows) in enumerate(metrics.items()):
        for box, key in zip(axes[:, column], titles, strict=True):
            shown = [row for row in rows if key in row]  # kNN is not taken in every epoch
            box.plot([row["epoch"] for row in shown], [row[key] for row in shown], marker=".")
            box.set(title=name, xlabel="epoch", ylabel=titles[key], xlim=(0, len(rows) + 1))
            box.grid(alpha=0.3)
            if key != "loss":  # losses of different methods cannot be compared
                box.sharey(axes[1 if key == "knn" else 2][0])
        axes[2][column].set_ylim(0, 1.1)
    figure.savefig(path)


def plot_map(features, images, labels, classes, path):
    """Draw a t-SNE map for each entry of `features`: coloured points, or pictures if no classes."""
    figure, [axes] = panels(6.5 * len(features), 6, 1, len(features))
    for box, (name, values) in zip(axes, features.items(), strict=True):
        tsne = TSNE(perplexity=min(30, math.ceil(len(values) / 4)), random_state=0)
        points = tsne.fit_transform(values.cpu().numpy())
        for k, label in enumerate(classes[:10]):  # there are ten colours
            box.scatter(*points[(labels == k).cpu().numpy()].T, s=8, color=f"C{k}", label=label)
        if not classes:
            size = np.ptp(points, axis=0).max() / 60
            for image, (x, y) in zip(images, points, strict=True):
                show(box, image, extent=(x - size, x + size, y - size, y + size))
            low, high = points.min(axis=0) - size, points.max(axis=0) + size
            box.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
        box.set(title=f"{name}: t-SNE of the features", xticks=[], yticks=[])
    if classes:
        axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), markerscale=3)
    figure.savefig(path)


def plot_neighbours(rows, classes, path):
    """Draw rows of (images, labels): the first is the query, the others are its neighbours."""
    figure, axes = panels(7.5, 8.4, len(rows), len(rows[0][0]))
    for (images, labels), boxes in zip(rows, axes, strict=True):
        for image, label, box in zip(images, labels, boxes, strict=True):
            show(box, image)
            if classes and label != labels[0]:
                box.set_xlabel(classes[label], color="C3", fontsize=7, labelpad=1)
                box.spines[:].set(color="C3", linewidth=4)
        if classes:
            boxes[0].set_ylabel(classes[labels[0]], rotation=0, ha="right")
    axes[0][0].set_title("query")
    axes[0][len(rows[0][0]) // 2].set_title(
        "nearest training images" + ", red: another class" * bool(classes)
    )
    figure.savefig(path)


def plot_views(script, images, path):
    """Draw a row for each uint8 image: itself, and three times the two views that a method sees."""
    figure, axes = panels(7, 8.4, len(images), 7)
    torch.manual_seed(0)
    x = images / 255
    views = [x, *(script.augment(x, **view) for view in (script.VIEW_1, script.VIEW_2) * 3)]
    for column, (title, view) in enumerate(
        zip(["image", *["view 1", "view 2"] * 3], views, strict=True)
    ):
        for image, box in zip((255 * view).byte(), axes[:, column], strict=True):
            show(box, image)
        axes[0][column].set_title(title)
    figure.savefig(path)


def parse_args(argv=None):
    """Read the command line, or `argv`."""
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=form)
    option, devices = parser.add_argument, ["cpu", "cuda"][: 1 + torch.cuda.is_available()]
    option("--weights", nargs="+", required=True, metavar="PT", help="checkpoints")
    option("--labels", nargs="+", default=["all"], metavar="N", help="numbers of labels, or all")
    option("--trials", type=int, default=3, help="draws of N labels: mean ± deviation")
    option("--validation", type=int, metavar="N", help="score on N training images, not the test")
    option("--baselines", action="store_true", help="add the network trained on the labels alone")
    option("--finetune", action="store_true", help="add the networks trained on with the labels")
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
    """Return n of the training images, their labels, and the indices of the other ones.

    Of a dataset with classes, only images that have a label count.
    """
    indices = (data.train_labels >= (0 if data.classes else -1)).nonzero().flatten()
    if n >= len(indices):
        raise DataError(f"--validation {n}: choose less than the {len(indices)} training images")
    indices = indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))]
    return data.train_images[indices[:n]], data.train_labels[indices[:n]], indices[n:].sort().values


def print_row(name, results, test_labels, knn, begun):
    """Print a row of the table; return {number of labels: accuracies in percent}.

    `results` maps a number of labels to [(predictions, C) of each draw].
    """
    scores = {
        n: [100 * (guesses == test_labels).double().mean().item() for guesses, _ in draws]
        for n, draws in results.items()
    }
    for x in scores.values():
        deviation = f" ± {statistics.stdev(x):.2f}" if len(x) > 1 else ""
        name += f"{f'{statistics.mean(x):.2f}{deviation}':>15}"
    guesses, strength = results[max(results)][-1]
    f1 = 100 * f1_score(test_labels.cpu(), guesses.cpu(), average="macro")
    seconds = time.perf_counter() - begun
    print(f"{name}{f1:>10.2f}{knn:>7}{strength:>6}{seconds:>5.0f}", flush=True)
    return scores


def main(argv=None):
    """Print a table of how well pixels, random features and learnt features tell classes apart."""
    args = parse_args(argv)
    loaded = {path: load_encoder(path) for path in args.weights}
    encoder, checkpoint = loaded[args.weights[0]]
    trained = checkpoint["args"]
    _, channels, _, size = trained["images"]
    for path, (_, other) in loaded.items():
        if other["args"]["images"][1:] != trained["images"][1:]:
            raise DataError(f"{path} takes images of another size than {args.weights[0]}")
        if other["args"]["backbone"] != trained["backbone"]:
            raise DataError(f"{path} has another backbone than {args.weights[0]}")
    dataset = args.dataset or trained["dataset"]
    data = load_dataset(dataset, args.data_dir, size, args.device)
    images, labels, classes = data.train_images, data.train_labels, data.classes
    if images.shape[1] != channels:
        raise DataError(f"{dataset} has {images.shape[1]} channels, {args.weights[0]} {channels}")
    if args.export:
        return export(encoder, images, args.export)
    if args.embed:
        return embed(encoder.to(args.device), data, args.embed)

    test_images, test_labels = data.test_images, data.test_labels
    known = (labels >= 0).nonzero().flatten()
    if args.validation or not classes:  # pictures need no more than 500 queries
        n = args.validation or min(500, len(images) // 2)
        test_images, test_labels, known = hold_out(data, n)
    if not classes and not args.plot:
        raise DataError(f"{dataset} has no labels: pass --plot, --embed or a labelled --dataset")
    if len(test_images) == 0:
        raise DataError(f"{dataset} has no test images: hold some out with --validation N")
    draws = {}
    for budget in sorted(int(n) for n in args.labels if n != "all"):
        seeds = range(10_000 * args.seed, 10_000 * args.seed + args.trials)
        draws[budget] = [draw_labels(labels, known, budget, seed) for seed in seeds]
    if "all" in args.labels:
        draws[len(known)] = [known]
    used = torch.cat([indices for some in draws.values() for indices in some]).unique()
    most, everything = draws[max(draws)][-1], torch.arange(len(test_images))
    shown = everything[:: math.ceil(len(everything) / 1000)]  # as many as a map can show
    queries = test_labels.argsort(stable=True)[:: math.ceil(len(everything) / 10)]  # of all classes

    torch.manual_seed(args.seed)
    random_init = build_backbone(trained["backbone"], channels, size)
    moments = data.mean.tolist(), data.std.tolist()
    encoders = {"raw pixels": normalized(nn.Flatten(), *moments)}
    encoders |= {"random init": normalized(random_init, *moments)}
    encoders |= {path: encoder for path, (encoder, _) in loaded.items()}
    width = max(map(len, encoders)) + 12 * args.finetune
    if classes:
        print(f"{dataset}, {trained['backbone']}, {len(everything):,} images to score on. Accuracy")
        print(f"in percent; macro-F1, kNN and C: last draw of {len(most):,} labels.\n")
        columns = "".join(f"{f'{n:,} labels':>15}" for n in draws)
        print(f"{'':<{width}}{columns}  macro-F1    kNN     C    s")

    scores, features, neighbours = {}, {}, {}
    for name, encoder in encoders.items():
        begun = time.perf_counter()
        train = extract_features(encoder.to(args.device), images, used)
        test = extract_features(encoder, test_images, everything)
        bank = train[torch.searchsorted(used, most)]
        if classes:
            knn = f"{knn_accuracy(bank, labels[most], test, test_labels):.2f}"
            results = {}
            for n, some in draws.items():
                rows = [torch.searchsorted(used, indices) for indices in some]
                results[n] = [
                    linear_probe(train[i], labels[used[i]], test, len(classes)) for i in rows
                ]
            scores[name] = print_row(f"{name:<{width}}", results, test_labels, knn, begun)
            if name in loaded and args.report:
                guesses = results[max(draws)][-1][0].cpu()
                print(classification_report(test_labels.cpu(), guesses, target_names=classes))
                print("rows: classes, columns: predictions")
                print(confusion_matrix(test_labels.cpu(), guesses))
        if args.plot and name != "raw pixels":
            cosines = F.normalize(test[queries], dim=1) @ F.normalize(bank, dim=1).T
            neighbours[name] = most[cosines.topk(min(8, len(most))).indices]  # (10, 8)
            features[name] = test[shown]

    starts = {"labels only": encoders["random init"]} if args.baselines and classes else {}
    if args.finetune and classes:
        starts |= {f"{path} fine-tuned": encoders[path] for path in loaded}
    for name, start in starts.items():
        begun, results = time.perf_counter(), {}
        for n, some in draws.items():
            results[n] = []
            for i, seed in zip(some, range(args.seed, args.seed + len(some)), strict=True):
                network = deepcopy(start)
                network = train_with_labels(network, images[i], labels[i], len(classes), seed)
                logits = extract_features(network, test_images, everything)
                results[n].append((logits.argmax(dim=1), "-"))
        scores[name] = print_row(f"{name:<{width}}", results, test_labels, "-", begun)

    if args.plot:
        folder = Path(args.plot)
        folder.mkdir(parents=True, exist_ok=True)
        if classes:
            plot_labels(scores, folder / "labels.png")
        plot_curves(
            {path: saved["metrics"] for path, (_, saved) in loaded.items()}, folder / "curves.png"
        )
        for path, (_, saved) in loaded.items():
            stem = "-".join(Path(path).with_suffix("").parts).strip("/-")
            maps = {name: features[name] for name in ("random init", path)}
            plot_map(
                maps, test_images[shown], test_labels[shown], classes, folder / f"map-{stem}.png"
            )
            rows = [
                (
                    torch.cat([test_images[[query]], images[found]]),
                    torch.cat([test_labels[[query]], labels[found]]).tolist(),
                )
                for query, found in zip(queries.tolist(), neighbours[path], strict=True)
            ]
            plot_neighbours(rows, classes, folder / f"neighbours-{stem}.png")
            script = SCRIPTS.get(saved["args"]["method"], simclr)
            plot_views(script, test_images[queries], folder / f"views-{stem}.png")


if __name__ == "__main__":
    try:
        main()
    except (DataError, OSError, KeyboardInterrupt) as error:
        sys.exit(str(error) or "stopped")
