"""Draw what checkpoints have learnt: maps, neighbours, views, training curves, accuracies.

    python tools/pictures.py --weights byol.pt --out pictures
    python tools/pictures.py --weights simclr.pt byol.pt --csv scores.csv --out pictures
    python tools/pictures.py --weights *.pt --docs     # the pictures of docs/

scores.csv is what linear_eval.py --csv has written. --docs draws what docs/results.csv has rows
for, the methods, the family, and, of checkpoints of ten epochs of Fashion-MNIST or CIFAR-10, those
pictures of docs/ that they can show.
"""

import argparse
import csv
import importlib
import math
import statistics
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Patch
from PIL import Image
from sklearn.manifold import TSNE

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import DataError, build_backbone, load_dataset  # noqa: E402
from linear_eval import extract_features, load_encoder, normalized  # noqa: E402

METHODS = {"simclr": "SimCLR", "moco": "MoCo", "byol": "BYOL", "simsiam": "SimSiam"}
MARKERS = "o^sDvP*X<>"  # ten colours and ten markers tell a hundred classes apart
FEWEST = 4  # images that a map or neighbours need


def panels(width, height, rows=1, columns=1):
    """Return a matplotlib figure of that size in inches, and its axes (rows, columns)."""
    figure = Figure((width, height), dpi=80, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def plain(text):
    """Return text that matplotlib shows as it is: no formula between $, and in the legend too."""
    text = str(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def save(figure, path):
    """Write the picture; say once which characters the font lacks."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(path)
    if not any(axes.images for axes in figure.axes):  # 256 colours do, in a third of the bytes
        Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)
    missing = any("missing from" in str(warning.message) for warning in caught)
    print(f"{path}{': the font lacks some characters, boxes stand for them' if missing else ''}")


def show(axes, image, **options):
    """Draw one uint8 image (C, H, W)."""
    axes.imshow(image.permute(1, 2, 0).cpu().numpy(), cmap="gray", vmin=0, vmax=255, **options)
    axes.set(xticks=[], yticks=[])


def draw_labels(scores, path):
    """Draw accuracy by number of labels: `scores` maps a row to {number: accuracies}."""
    figure, [[axes]] = panels(8, 5)
    for i, (name, values) in enumerate(scores.items()):
        numbers = sorted(values)
        mean = [statistics.mean(values[n]) for n in numbers]
        deviation = [statistics.stdev(values[n]) if len(values[n]) > 1 else 0 for n in numbers]
        learnt = name not in ("raw pixels", "random init", "labels only")
        style = dict(marker=MARKERS[i % 10], linestyle="-" if learnt else "--")
        axes.errorbar(numbers, mean, deviation, capsize=3, label=plain(name), **style)
    numbers = sorted({n for values in scores.values() for n in values})
    axes.set(title="Accuracy by number of labels (bars: deviation of draws)", xscale="log")
    axes.set(xlabel="labelled training images", ylabel="accuracy (%)")
    axes.set_xticks(numbers, [f"{n:,}" for n in numbers])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def draw_curves(metrics, path):
    """Draw loss, kNN accuracy and z_std by epoch: `metrics` maps a name to a checkpoint's rows."""
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
            boxes[column].set(title=plain(name), xlabel="epoch", ylabel=titles[key])
            boxes[column].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
            boxes[column].grid(alpha=0.3)
    axes[-1, 0].set_ylim(bottom=0)  # of z_std: how far from a collapse is then in sight
    save(figure, path)


def draw_map(features, images, labels, classes, path):
    """Draw a t-SNE map for each entry of `features`: coloured points, or pictures if no classes.

    t-SNE ends the process where all features are equal, so such an entry is left out.
    """
    for name, values in list(features.items()):
        if len(values.round(decimals=4).unique(dim=0)) < FEWEST:
            print(f"{name}: (almost) all features are equal, so there is no map of them")
            del features[name]
    if not features:
        return
    side = 8 if classes else 12  # inches: pictures need more room than points
    figure, [axes] = panels(side * len(features), side, 1, len(features))
    for box, (name, values) in zip(axes, features.items(), strict=True):
        tsne = TSNE(perplexity=min(30, math.ceil(len(values) / 4)), random_state=0)
        points = tsne.fit_transform(values.cpu().numpy())
        for k, label in enumerate(classes):
            style = dict(color=f"C{k % 10}", marker=MARKERS[k // 10 % 10], label=plain(label))
            box.scatter(*points[(labels == k).cpu().numpy()].T, s=12, **style)
        if not classes:
            points = (points - points.min(axis=0)) / np.ptp(points, axis=0)  # from 0 to 1
            size = 0.3 / len(points) ** 0.5  # half a side: few pictures are large
            for image, (x, y) in zip(images, points, strict=True):
                show(box, image, extent=(x - size, x + size, y - size, y + size))
            limits = -1.3 * size, 1 + 1.3 * size
            box.set(xlim=limits, ylim=limits, facecolor="0.85")  # white images stand out
        box.set(title=f"{plain(name)}: t-SNE of the features", xticks=[], yticks=[])
    if classes:
        columns = math.ceil(len(classes) / 30)
        axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), markerscale=2, ncols=columns)
    save(figure, path)


def draw_grid(images, titles, path, labels=None, classes=()):
    """Draw uint8 images (rows, columns, C, H, W).

    Those of another class than the first in their row, by `labels` (rows, columns), get red frames.
    """
    figure, axes = panels(1 + 0.82 * images.shape[1], 0.5 + 0.8 * len(images), *images.shape[:2])
    for row, boxes in enumerate(axes):
        for column, box in enumerate(boxes):
            show(box, images[row, column])
            if classes and labels[row, column] != labels[row, 0]:
                name = plain(classes[labels[row, column]])
                box.set_xlabel(name, color="C3", fontsize=7, labelpad=1)
                box.spines[:].set(color="C3", linewidth=4)
        if classes:
            boxes[0].set_ylabel(plain(classes[labels[row, 0]]), rotation=0, ha="right")
    for box, title in zip(axes[0], titles, strict=True):
        box.set_title(title, fontsize=9)
    save(figure, path)


def split(data):
    """Return (images, labels, bank, bank labels): those to show, and those to find neighbours in.

    The images shown are test images. Where there are none, both are the training images.
    """
    if len(data.train_labels) < FEWEST:
        raise DataError(f"{len(data.train_labels)} images are too few: {FEWEST} are needed")
    known = (data.train_labels >= (0 if data.classes else -1)).nonzero().flatten()
    bank, bank_labels = data.train_images[known], data.train_labels[known]
    if len(data.test_labels) >= FEWEST:
        return data.test_images, data.test_labels, bank, bank_labels
    return bank, bank_labels, bank, bank_labels


def draw_map_of(encoder, saved, name, data, path):
    """Draw the map of up to 1,000 images, beside that of the same network with random weights."""
    images, labels, *_ = split(data)
    every = math.ceil(len(images) / (1000 if data.classes else 500))  # pictures need more room
    images, labels = images[::every], labels[::every]
    torch.manual_seed(0)
    backbone = build_backbone(saved["args"]["backbone"], images.shape[1], images.shape[3])
    random_init = normalized(backbone, data.mean.tolist(), data.std.tolist())
    networks = {"random init": random_init, name: encoder}
    features = {key: extract_features(network, images) for key, network in networks.items()}
    draw_map(features, images, labels, data.classes, path)


def draw_neighbours_of(encoder, data, path):
    """Draw the images whose features are nearest to those of ten images."""
    images, labels, bank, bank_labels = split(data)
    queries = labels.argsort(stable=True)[:: math.ceil(len(labels) / 10)]  # of all classes
    cosines = extract_features(encoder, images[queries]) @ extract_features(encoder, bank).T
    if bank is images:  # no image is its own neighbour
        cosines[torch.arange(len(queries)), queries] = -math.inf
    nearest = cosines.topk(min(8, len(bank) - 1), dim=1).indices  # (10, 8)
    shown = torch.cat([images[queries, None], bank[nearest]], dim=1)
    found = torch.cat([labels[queries, None], bank_labels[nearest]], dim=1)
    titles = ["query", *map(str, range(1, shown.shape[1]))]
    draw_grid(shown, titles, path, found, data.classes)


def draw_views_of(saved, data, path):
    """Draw ten images and three pairs of views of each, as the script of the checkpoint does."""
    if saved["args"]["method"] not in METHODS:
        return print(f"{path} is not drawn: {saved['args']['method']} is a variant")
    images, labels, *_ = split(data)
    x = images[labels.argsort(stable=True)[:: math.ceil(len(labels) / 10)]] / 255
    method = saved["args"]["method"]
    script = importlib.import_module(method)
    second = dict(solarize=0.2) if method == "byol" else {}  # as byol.train does
    torch.manual_seed(0)
    views = [x]
    for _ in range(3):
        views += [script.augment(x), script.augment(x, **second)]
    titles = ["image", *["view 1", "view 2"] * 3]
    draw_grid((255 * torch.stack(views, dim=1)).byte(), titles, path)


def read_rows(path):
    """Return the lines of a csv file as dictionaries."""
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if "accuracy" not in (reader.fieldnames or ()):
            raise DataError(f"{path} holds no scores that linear_eval.py --csv has written")
        return list(reader)


def scores_of(rows):
    """Return {row: {number of labels: accuracies}} of lines of a csv file."""
    scores = {}
    for row in rows:
        numbers = scores.setdefault(row["row"], {})
        numbers.setdefault(int(row["labels"]), []).append(float(row["accuracy"]))
    return scores


def stems(paths):
    """Return a file name for each path, no two alike."""
    names = {}
    for path in paths:
        name = stem = "-".join(Path(path).with_suffix("").parts).strip("/-.") or "weights"
        number = 2
        while name in names.values():
            name, number = f"{stem}-{number}", number + 1
        names[path] = name
    return names


def draw_all(args, loaded):
    """Draw all that can be drawn of the checkpoints, and of the scores, into a folder."""
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    if args.csv:
        rows = read_rows(args.csv)
        for dataset, scored in dict.fromkeys((row["dataset"], row["scored"]) for row in rows):
            part = [row for row in rows if (row["dataset"], row["scored"]) == (dataset, scored)]
            stem = "-".join([*Path(dataset).parts, *scored.split()]).strip("/-")
            draw_labels(scores_of(part), folder / f"labels-{stem}.png")
    if loaded:
        metrics = {path: saved["metrics"] for path, (_, saved) in loaded.items()}
        draw_curves(metrics, folder / "curves.png")
    for path, stem in stems(loaded).items():
        encoder, saved = loaded[path]
        data = load_dataset(
            args.dataset or saved["args"]["dataset"], args.data_dir, saved["args"]["images"][3]
        )
        draw_views_of(saved, data, folder / f"views-{stem}.png")
        draw_neighbours_of(encoder, data, folder / f"neighbours-{stem}.png")
        draw_map_of(encoder, saved, path, data, folder / f"map-{stem}.png")


FAMILY = {  # name: (year of arXiv, column, height, what it changes in those before, those)
    "CPC": (2018, 0, 4.6, "predicts patches\nfrom other patches", ()),
    "InstDisc": (2018, 0, 2.4, "each image a class,\na bank of features", ()),
    "CMC": (2019, 1, 5.5, "luminance and colour\ninstead of patches", ("CPC",)),
    "InvaSpread": (2019, 1, 3.1, "the batch instead\nof the bank", ("InstDisc",)),
    "MoCo": (2019, 1, 1.1, "a queue instead of\nthe bank, slow keys", ("CPC", "InstDisc")),
    "SimCLR": (2020, 2, 4.3, "two random views,\na nonlinear head", ("CPC", "InvaSpread")),
    "SimCLRv2": (2020, 3, 6.0, "a deeper head, its\nfirst layer is kept", ("SimCLR",)),
    "SupCon": (2020, 3, 5.1, "positives\nby label", ("SimCLR",)),
    "SwAV": (2020, 3, 3.2, "clusters instead\nof negatives", ("SimCLR",)),
    "BYOL": (2020, 3, 1.1, "no negatives,\na predictor", ("MoCo", "SimCLR")),
    "Barlow Twins": (2021, 4, 4.3, "correlations instead\nof negatives", ("SimCLR",)),
    "DINO": (2021, 4, 2.4, "no predictor,\ncentred scores", ("SwAV", "BYOL")),
    "SimSiam": (2020, 4, 1.1, "no second\nnetwork", ("BYOL",)),
    "MoCo v3": (2021, 4, 0.1, "no queue,\na predictor", ("MoCo", "BYOL")),
    "VICReg": (2021, 5, 4.3, "variance and covariance\nof each view", ("Barlow Twins",)),
    "LeJEPA": (2025, 6, 4.3, "all directions\nnormally distributed", ("VICReg",)),
}


def draw_family(path):
    """Draw a box for each method, and an arrow from each to those that it led to."""
    figure, [[axes]] = panels(19, 8)
    arrow = dict(arrowstyle="-|>", color="0.35", lw=1.5, shrinkA=0, shrinkB=0)
    for name, (year, x, y, text, before) in FAMILY.items():
        ours = name in METHODS.values()
        colours = dict(facecolor="#dbe8f6" if ours else "white", edgecolor="C0" if ours else "0.1")
        corners = FancyBboxPatch(
            (x, y), 0.8, 0.7, "round,pad=0.02", linewidth=1.8, mutation_aspect=2, **colours
        )
        axes.add_patch(corners)
        axes.text(x + 0.03, y + 0.55, name, fontsize=12, weight="bold", va="center")
        axes.text(x + 0.78, y + 0.55, year, fontsize=10, color="0.45", ha="right", va="center")
        axes.text(x + 0.4, y + 0.2, text, fontsize=10, ha="center", va="center")
        for other in before:
            _, left, low, *_ = FAMILY[other]
            axes.annotate("", (x - 0.02, y + 0.35), (left + 0.82, low + 0.35), arrowprops=arrow)
    note = "blue: one of the four scripts      white: a diff      In a box: what the method changes"
    axes.text(0, -0.4, f"{note} in those before it. Years are those of arXiv.", fontsize=12)
    axes.set(xlim=(-0.1, 6.95), ylim=(-0.6, 6.8))
    axes.axis("off")
    save(figure, path)


SKETCHES = {  # method: (idea, loss, outputs of the two sides, averaged network, between the sides)
    "SimCLR": (
        "Find the other view\namong the batch.",
        "NT-Xent: $z_1$ finds $z_2$,\nand $z_2$ finds $z_1$",
        ("z_1", "z_2"),
        "",
        "negatives:\nother views\nof the batch",
    ),
    "MoCo": (
        "Find the other view's\nkey among many.",
        "InfoNCE: the query $q$\nfinds its key $k$",
        ("q", "k"),
        "key\nencoder",
        "negatives:\na queue of\n$K$ old keys",
    ),
    "BYOL": (
        "Predict what the average\nmakes of the other view.",
        "2 − 2 cos($p_1$, $t_2$)\n+ 2 − 2 cos($p_2$, $t_1$)",
        ("p_1", "t_2"),
        "target",
        "and with\n$x_1$ and $x_2$\nexchanged",
    ),
    "SimSiam": (
        "Predict the embedding\nof the other view.",
        "− ½ cos($p_1$, $z_2$)\n− ½ cos($p_2$, $z_1$)",
        ("p_1", "z_2"),
        "",
        "and with\n$x_1$ and $x_2$\nexchanged",
    ),
}
BOXES = {  # what is in a box: its style
    "trained": dict(facecolor="#dbe8f6", edgecolor="C0"),
    "running average (EMA)": dict(facecolor="0.93", edgecolor="0.5", linestyle="--"),
    "negatives": dict(facecolor="#ffebeb", edgecolor="C3"),
    "loss": dict(facecolor="#fff6e0", edgecolor="0.1"),
    "data": dict(facecolor="white", edgecolor="0.1"),
}


def draw_methods(path):
    """Draw the four methods side by side, each from an image, at the bottom, up to its loss.

    GitHub shows the picture 850 pixels wide. They are the unit; the picture has two for each.
    """
    figure, [row] = panels(21.25, 12.5, 1, 4)
    left, middle, right = 52, 106, 160

    def write(axes, x, y, text, size=21, **options):
        axes.text(x, y, text, fontsize=size, ha="center", va="center", **options)

    def box(axes, kind, x, y, width, height, text):
        style = dict(boxstyle="round,pad=0,rounding_size=5", linewidth=3, **BOXES[kind])
        corner = x - width / 2, y - height / 2
        axes.add_patch(FancyBboxPatch(corner, width, height, **style))
        write(axes, x, y, text)

    def arrow(axes, start, end, colour="0.1"):
        style = dict(arrowstyle="-|>", color=colour, lw=3, mutation_scale=22, shrinkA=0, shrinkB=0)
        axes.annotate("", end, start, arrowprops=style)

    for axes, name in zip(row, SKETCHES, strict=True):
        idea, loss, outputs, average, between = SKETCHES[name]
        predicts, both = outputs[0] == "p_1", name == "SimCLR"  # both sides have a gradient
        write(axes, middle, 482, name, 30, weight="bold")
        write(axes, middle, 448, idea)
        box(axes, "loss", middle, 398, 182, 46, loss)
        box(axes, "data", middle, 18, 70, 26, "image")

        for x, view, output in zip((left, right), ("x_1", "x_2"), outputs, strict=True):
            outwards = (x - middle) / 54  # -1 or 1
            top = 271 if predicts and x == left else 209  # of the networks
            arrow(axes, (middle, 31), (x, 57))
            box(axes, "data", x, 70, 70, 26, f"view ${view}$")
            for low, high in ((83, 117), (147, 179), (top, 375)):
                arrow(axes, (x, low), (x, high))
            write(axes, x + 13 * outwards, 355, f"${output}$")
            if x == left or both:
                arrow(axes, (x + 46 * outwards, 375), (x + 46 * outwards, 117), "C2")
            else:
                bars = [[x - 10] * 2, [x + 10] * 2], [[262, 269], [268, 275]]
                axes.plot(*bars, color="C3", linewidth=4)
                write(axes, x + 27, 269, "stop", color="C3")

        for y, part in ((132, "backbone"), (194, "projector")):
            if average:
                box(axes, "trained", left, y, 74, 30, part)
                box(axes, "running average (EMA)", right, y, 74, 30, part)
                arrow(axes, (left + 37, y), (right - 37, y), "0.5")
            else:  # one network for both sides
                box(axes, "trained", middle, y, 182, 30, part)
        write(axes, left - 12, 161, "$h$")
        write(axes, middle, 163, "EMA" if average else "", color="0.4")
        write(axes, right + 27, 232, average, color="0.4")

        if predicts:
            arrow(axes, (left, 209), (left, 241))
            write(axes, left - 13, 223, "$z_1$")
            box(axes, "trained", left, 256, 74, 30, "predictor")
            write(axes, middle, 315, between, color="0.4")
        else:
            for x, edge in ((right, 146), (left, 66))[: 1 + both]:
                arrow(axes, (x, 310), (edge, 310), "C3")
            arrow(axes, (middle, 338), (middle, 375), "C3")
            box(axes, "negatives", middle, 310, 80, 56, between)
        axes.set(xlim=(0, 212), ylim=(0, 496))
        axes.axis("off")

    handles = [Patch(label=kind, lw=3, **BOXES[kind]) for kind in list(BOXES)[:2]]
    handles.append(Line2D([], [], color="C2", lw=3, label="gradient"))
    for sign, colour, label in (
        ("$//$", "C3", "stop-gradient"),
        ("$h$", "0.1", "what linear_eval.py evaluates"),
    ):
        style = dict(marker=sign, markersize=17, color=colour, linestyle="")
        handles.append(Line2D([], [], label=label, **style))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=21, frameon=False)
    save(figure, path)


def draw_time(rows, path):
    """Draw accuracy with 1,000 labels against the minutes of training, on CIFAR-10 (JPEG).

    Only runs of the device on which most of them ran are compared.
    """
    rows = [row for row in rows if row["labels"] == "1000" and row["dataset"] == "CIFAR-10 (JPEG)"]
    of_methods = [row for row in rows if row["run"] in METHODS and row["kind"] == "linear"]
    random = [float(row["accuracy"]) for row in rows if row["kind"] == "random init"]
    if not of_methods or not random:
        return print(f"{path}: results.csv has no rows for it")
    device = statistics.mode(row["device"] for row in of_methods)
    figure, [[axes]] = panels(8, 5)
    for i, (method, title) in enumerate(METHODS.items()):
        runs = {}
        for row in of_methods:
            if row["run"] == method and row["device"] == device:
                runs.setdefault(int(row["epochs"]), []).append(row)
        minutes = [
            statistics.mean(float(row["training_seconds"]) / 60 for row in runs[n])
            for n in sorted(runs)
        ]
        mean = [statistics.mean(float(row["accuracy"]) for row in runs[n]) for n in sorted(runs)]
        axes.plot(minutes, mean, marker=MARKERS[i], label=title)
    axes.axhline(statistics.mean(random), color="0.4", linestyle="--", label="random network")
    axes.set(title="CIFAR-10 (JPEG): linear classifier on 1,000 labels", xscale="log")
    epochs = sorted({int(row["epochs"]) for row in of_methods if row["device"] == device})
    minutes = f"minutes for {' and '.join(map(str, epochs))} epochs ({device})"
    axes.set(xlabel=minutes, ylabel="test accuracy (%)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def draw_accuracy(rows, path):
    """Draw what the methods add to a random network on both data sets, labels only as a line.

    Bars of a length are drawn where all four methods have one.
    """
    figure, [panes] = panels(10, 3.6, 1, 2)
    for axes, dataset in zip(panes, ("Fashion-MNIST", "CIFAR-10 (JPEG)"), strict=True):
        part = [row for row in rows if row["dataset"] == dataset and row["labels"] == "1000"]
        for kind, style in (("random init", "--"), ("labels only", ":")):
            values = [float(row["accuracy"]) for row in part if row["kind"] == kind]
            title = {"random init": "random network"}.get(kind, kind)
            if values:
                axes.axhline(statistics.mean(values), color="0.2", linestyle=style, label=title)
        bars = {}
        for row in part:
            if row["kind"] == "linear" and row["run"] in METHODS and row["epochs"] in ("10", "100"):
                runs = bars.setdefault(int(row["epochs"]), {}).setdefault(row["run"], [])
                runs.append(float(row["accuracy"]))
        bars = {epochs: bars[epochs] for epochs in sorted(bars) if len(bars[epochs]) == 4}
        if not bars or not axes.lines:
            return print(f"{path}: results.csv lacks rows of {dataset}")
        random = axes.lines[0].get_ydata()[0]
        for i, (epochs, runs) in enumerate(bars.items()):
            x = [j + 0.4 * i - 0.2 * (len(bars) - 1) for j in range(len(METHODS))]
            means = [statistics.mean(runs[method]) for method in METHODS]
            learnt = [mean - random for mean in means]
            bar = axes.bar(x, learnt, 0.38, random, color=f"C{i}", label=f"{epochs} epochs")
            ground = dict(facecolor="white", edgecolor="none", pad=0.5)  # above the lines
            axes.bar_label(bar, [f"{mean:.1f}" for mean in means], fontsize=8, bbox=ground)
        axes.set_xticks(range(len(METHODS)), METHODS.values())
        lowest = min(line.get_ydata()[0] for line in axes.lines)
        highest = max(bar.get_y() + bar.get_height() for bar in axes.patches)
        axes.set(title=f"{dataset}, 1,000 labels", ylim=(lowest - 2, highest + 3))
    panes[0].set_ylabel("test accuracy (%)")
    figure.legend(*panes[1].get_legend_handles_labels(), loc="outside right center")
    save(figure, path)


def draw_docs(args, loaded):
    """Draw the pictures of docs/: all that there are rows or checkpoints for."""
    docs = Path(args.out)
    draw_methods(docs / "methods.png")
    draw_family(docs / "family.png")
    rows = read_rows(args.csv or ROOT / "docs" / "results.csv")
    rows = [row for row in rows if row["scored"] == "test" and row["script"] == "linear_eval"]
    # Some runs were repeated in float32, to compare; untrained rows have no precision.
    rows = [row for row in rows if row["backbone"] == "convnet"]
    draw_time([row for row in rows if row["bf16"] != "False"], docs / "accuracy-over-time.png")
    rows = [row for row in rows if (row["bf16"], row["epochs"]) != ("True", "10")]  # as tables.py
    draw_accuracy(rows, docs / "accuracy.png")
    for dataset, name in (("CIFAR-10 (JPEG)", "labels-cifar10"), ("Fashion-MNIST", "labels")):
        part = []
        for row in rows:
            ours = row["run"] in METHODS and row["epochs"] == "10" and row["kind"] == "linear"
            if row["dataset"] == dataset and (ours or row["kind"] in ("raw pixels", "random init")):
                part.append(row | dict(row=METHODS[row["run"]] if ours else row["kind"]))
        if any(row["row"] in METHODS.values() for row in part):
            draw_labels(scores_of(part), docs / f"{name}.png")

    fashion, cifar, collapse = {}, {}, {}
    for path, (encoder, saved) in loaded.items():
        method, images = saved["args"]["method"], saved["args"]["images"]
        part = {(60_000, 28): fashion, (50_000, 32): cifar}.get((images[0], images[3]))
        if part is None or len(saved["metrics"]) != 10:
            print(f"{path} is left out: it is not of ten epochs of Fashion-MNIST or CIFAR-10")
            continue
        if method in METHODS:
            part[method] = encoder, saved
        if method in ("simsiam", "simsiam_no_stop_grad", "simsiam_no_stop_grad_no_norm"):
            collapse |= {method: saved["metrics"]} if part is cifar else {}
    if len(fashion) == len(METHODS):
        metrics = {METHODS[m]: fashion[m][1]["metrics"] for m in METHODS}
        draw_curves(metrics, docs / "curves.png")
    if len(collapse) == 3:
        draw_curves(dict(sorted(collapse.items())), docs / "stop-gradient.png")
    for part in (fashion, cifar):
        if "simclr" not in part:
            continue
        encoder, saved = part["simclr"]
        dataset, size = args.dataset or saved["args"]["dataset"], saved["args"]["images"][3]
        data = load_dataset(dataset, args.data_dir, size)
        if part is fashion:
            draw_map_of(encoder, saved, "SimCLR", data, docs / "map-simclr.png")
        else:
            draw_neighbours_of(encoder, data, docs / "neighbours-cifar10.png")
            draw_views_of(saved, data, docs / "views-cifar10.png")


def main(argv=None):
    """Draw into the folder --out."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # not every terminal can show every name
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    option = parser.add_argument
    option("--weights", nargs="+", default=[], metavar="PT", help="checkpoints")
    option("--csv", metavar="FILE", help="what linear_eval.py --csv has written")
    option("--dataset", help="as in training; unset: that of each checkpoint")
    option("--data-dir", default="data", help="downloads, decoded images")
    option("--out", help="a folder; default: pictures, or docs with --docs")
    option("--docs", action="store_true", help="draw the pictures of docs/")
    args = parser.parse_args(argv)
    if not (args.weights or args.csv or args.docs):
        parser.error("nothing to draw: pass --weights, --csv or --docs")
    args.out = args.out or (ROOT / "docs" if args.docs else "pictures")
    loaded = {path: load_encoder(path) for path in args.weights}
    if args.docs:
        draw_docs(args, loaded)
    else:
        draw_all(args, loaded)


if __name__ == "__main__":
    main()
