"""What did it learn? Freeze the backbone of a checkpoint and see how well it tells classes apart.

    python linear_eval.py --weights byol.pt
    python linear_eval.py --weights simclr.pt moco.pt --labels 100 1000 all --plot pictures

Every image goes through the frozen backbone once; all the rest works on the features. A linear
classifier (multinomial logistic regression) and a k-nearest-neighbour vote are fitted to training
features and scored on test features. Two rows stand beside every result: the raw pixels, and the
same backbone with random weights, never trained. Only what a result adds to those was learnt.
--baselines adds the same backbone trained from scratch with the labels that the others get, and
--finetune the pretrained backbone trained on with them. N images, D features, K classes.
"""

import argparse
import io
import math
import os
import pickle
import statistics
import time
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common import DataError, build_backbone, load_dataset
from simclr import VIEW_1, augment

STRENGTHS = (3, 10, 30, 100, 300, 1000)  # candidates for C: the larger, the weaker the penalty
# Training with labels: 3,000 steps, or ten epochs where that is more. Chosen on held-out images.
STEPS, BATCH_SIZE, SCRATCH_LR, FINETUNE_LR = 3000, 128, 0.03, 0.03


def load_encoder(path):
    """Rebuild the backbone that a training script saved; return (encoder, checkpoint).

    The file is read with weights_only=True, so that it cannot run code. Raises DataError, with the
    path and the reason, unless the file has a whole backbone, of the right shapes and all finite.
    """
    try:
        checkpoint = torch.load(path, "cpu", weights_only=True)
        _, channels, _, size = checkpoint["args"]["images"]
        encoder = build_backbone(checkpoint["args"]["backbone"], channels, size)
        prefix = "backbone."
        weights = {
            k.removeprefix(prefix): v
            for k, v in checkpoint["model"].items()
            if k.startswith(prefix)
        }
        encoder.load_state_dict(weights)  # strict: a key too many or too few is an error
        if not all(value.isfinite().all() for value in weights.values()):
            raise ValueError("it has weights that are not finite")
        checkpoint["args"]["dataset"], checkpoint["metrics"]
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: name a checkpoint, or train one first") from error
    except (
        AttributeError,
        EOFError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
        pickle.UnpicklingError,
    ) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} is not a whole checkpoint of these scripts: {reason}") from error
    return encoder.eval(), checkpoint


def progress_bar(items, title):
    """Show `items` under a progress bar on a terminal, if there is a title."""
    return tqdm(items, title, disable=None if title else True, leave=False)


@torch.no_grad()
def extract_features(encoder, images, mean, std, progress=None):
    """Return the features (N, D) float32 of uint8 images (N, C, H, W), on the device of `mean`.

    `mean` and `std` (C,) normalise images / 255; `progress` is the title of a progress bar. In eval
    mode, BatchNorm uses running statistics: the features of an image depend on no other image.
    """
    device, mean, std = mean.device, mean.view(-1, 1, 1), std.view(-1, 1, 1)
    was_training = encoder.training
    encoder.eval()
    features, done = None, 0
    for batch in progress_bar(images.split(500), progress):
        some = encoder((batch.to(device).float() / 255 - mean) / std).float()
        if features is None:  # filled in place: joining a list would need twice the memory
            features = some.new_empty(len(images), some.shape[1])
        features[done : done + len(some)] = some
        done += len(some)
    encoder.train(was_training)
    return features


@torch.no_grad()
def knn_accuracy(
    train_features, train_labels, test_features, test_labels, k=200, temperature=0.1, progress=None
):
    """Return the accuracy in percent of a vote among the k nearest training features (N, D).

    Nearness is the cosine; a neighbour's vote weighs exp(cosine / temperature) (InstDisc, Wu et
    al. 2018, section 3.4, with 0.07). Images with the label -1 have no vote; k is cut to the rest.
    """
    labelled = train_labels >= 0
    if not labelled.all():
        train_features, train_labels = train_features[labelled], train_labels[labelled]
    device, k = train_features.device, min(k, len(train_labels))
    train_labels, test_labels = train_labels.to(device), test_labels.to(device)
    norms = train_features.norm(dim=1).clamp_min(1e-12)  # a normalised copy would double the memory
    correct = torch.zeros((), dtype=torch.int64, device=device)
    batches = list(zip(test_features.split(250), test_labels.split(250), strict=True))
    for features, labels in progress_bar(batches, progress):
        cosines = (F.normalize(features, dim=1) @ train_features.T).div_(norms)  # (250, n)
        nearest, indices = cosines.topk(k, dim=1)
        votes = torch.zeros(len(features), int(train_labels.max()) + 1, device=device)
        votes.scatter_add_(1, train_labels[indices], (nearest / temperature).exp())
        correct += (votes.argmax(dim=1) == labels).sum()
    return 100 * correct.item() / len(test_labels)


def fit_logistic(features, labels, n_classes, strengths, iterations=60, progress=None):
    """Minimise C * sum of cross-entropies + ||W||^2 / 2 for each C in `strengths`.

    Returns a list of W (K, D) and b (K,), as scikit-learn's LogisticRegression(C=C) finds them.
    L-BFGS starts from the solution for the C before, and runs in coordinates in which the
    curvature at W = 0 is about the identity: that takes a fifth of the iterations.
    """
    n, dim = features.shape
    curvature = features.T @ features / (n * n_classes)
    curvature.diagonal().add_(1 / (strengths[len(strengths) // 2] * n))  # of the middle C
    to_weight = torch.linalg.inv(torch.linalg.cholesky(curvature))  # (D, D): W = coordinates @ it
    coordinates = torch.zeros(n_classes, dim, device=features.device, requires_grad=True)
    bias = torch.zeros(n_classes, device=features.device, requires_grad=True)
    solutions = []
    for strength in progress_bar(strengths, progress):
        optimizer = torch.optim.LBFGS(
            [coordinates, bias],
            max_iter=iterations,
            tolerance_grad=1e-4,
            line_search_fn="strong_wolfe",
        )

        def closure(optimizer=optimizer, decay=1 / (strength * n)):
            optimizer.zero_grad()
            weight = coordinates @ to_weight
            loss = F.cross_entropy(F.linear(features, weight, bias), labels)
            loss = loss + decay / 2 * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        solutions.append(((coordinates @ to_weight).detach(), bias.detach().clone()))
    return solutions


def linear_probe(train_features, train_labels, test_features, n_classes, progress=None):
    """Fit a linear classifier and return its predictions (N,) int64 and the strength C it took.

    Features are scaled to length 1 and centred. C is the candidate with the best accuracy on parts
    of the training set held out for that: five folds of up to 2,000 images, one fold of more, in
    which 20,000 at most are fitted and 10,000 scored. (C is counted per image, so the best one
    hardly depends on how many there are.) No test label is seen.
    """
    train = F.normalize(train_features, dim=1)
    center = train.mean(dim=0)
    train -= center
    test = F.normalize(test_features, dim=1) - center
    if len(train) < train.shape[1]:  # the solution lies in the span of the images: turn into it
        basis = torch.linalg.qr(train.T).Q
        train, test = train @ basis, test @ basis
    labels = train_labels.to(train.device)
    parts = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).chunk(5)
    correct = [0] * len(STRENGTHS)
    for i in range(len(parts) if len(labels) <= 2000 else 1):
        held_out, fitted = parts[i][:10_000], torch.cat(parts[:i] + parts[i + 1 :])[:20_000]
        fits = fit_logistic(train[fitted], labels[fitted], n_classes, STRENGTHS, 20, progress)
        for j, (weight, bias) in enumerate(fits):
            guesses = F.linear(train[held_out], weight, bias).argmax(dim=1)
            correct[j] += (guesses == labels[held_out]).sum().item()
    strength = STRENGTHS[correct.index(max(correct))]
    [(weight, bias)] = fit_logistic(train, labels, n_classes, [strength], progress=progress)
    return F.linear(test, weight, bias).argmax(dim=1).cpu(), strength


def train_with_labels(backbone, images, labels, n_classes, mean, std, lr, seed, progress=None):
    """Train `backbone` and a linear layer on uint8 images (N, C, H, W); return the two as one.

    SGD with momentum on augmented images, cosine learning rate, STEPS steps or ten epochs. It is
    the baseline for what labels alone give, and the fine-tuning of a pretrained backbone.
    """
    device, size = mean.device, min(BATCH_SIZE, len(images))
    steps = max(STEPS, 10 * len(images) // size)
    torch.manual_seed(seed)
    images, labels = images.to(device), labels.to(device)
    mean, std = mean.view(-1, 1, 1), std.view(-1, 1, 1)
    head = nn.Linear(backbone.feature_dim, n_classes)
    nn.init.zeros_(head.weight)  # so that the first gradients do not shake a pretrained backbone
    model = nn.Sequential(backbone, head).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr, 0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.empty(0, dtype=torch.int64, device=device)
    for _ in progress_bar(range(steps), progress):
        if len(order) < size:
            order = torch.randperm(len(images), device=device)
        batch, order = order[:size], order[size:]
        views = augment(images[batch] / 255, **VIEW_1)
        loss = F.cross_entropy(model((views - mean) / std), labels[batch], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def draw_labels(labels, budget, seed):
    """Return sorted indices of `budget` images, equally many of each class, drawn with `seed`.

    Raises DataError if the classes do not divide the budget or a class has too few images.
    """
    classes = labels[labels >= 0].unique()
    if budget % len(classes):
        raise DataError(f"--labels {budget} is not a multiple of the {len(classes)} classes")
    generator = torch.Generator().manual_seed(seed)
    indices, each = [], budget // len(classes)
    for label in classes:
        images = (labels == label).nonzero().flatten()
        if len(images) < each:
            raise DataError(
                f"--labels {budget} needs {each} images of class {label}, "
                f"the training set has {len(images)}"
            )
        indices.append(images[torch.randperm(len(images), generator=generator)[:each]])
    return torch.cat(indices).sort().values


def export(encoder, checkpoint, data, path):
    """Write the bare backbone so that it runs without this code, and print what to feed it.

    A ResNet becomes a state dict for torchvision's model of that name, a convnet a torch.export
    program, of which only the number of images is left open.
    """
    encoder, buffer = encoder.cpu().to(memory_format=torch.contiguous_format), io.BytesIO()
    if checkpoint["args"]["backbone"] == "convnet":
        example, free = data.test_images[:2].float(), {0: torch.export.Dim("N")}
        program = torch.export.export(encoder, (example,), dynamic_shapes=(free,))
        torch.export.save(program, buffer)
    else:
        torch.save(encoder.state_dict(), buffer)
    Path(path).write_bytes(buffer.getvalue())
    mean, std = ([round(x, 4) for x in values.tolist()] for values in (data.mean, data.std))
    shape = ", ".join(map(str, data.test_images.shape[1:]))
    print(f"{path}: takes (N, {shape}) float32, (image / 255 - {mean}) / {std} per channel")


def plot(folder, scores, curves, features, step, guesses, nearest, queries, data):
    """Save the pictures as PNG files in `folder`.

    `scores` maps a row of the table to {number of labels: accuracies}, `curves` a checkpoint to its
    metrics. Of random init and each checkpoint, `features` are those of each `step`-th test image,
    `guesses` (N,) the classes predicted for all, `nearest` (10, 8) the indices of the training
    images nearest to the test images `queries` (10,).
    """
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE
    from sklearn.metrics import ConfusionMatrixDisplay

    def new(width, height, rows=1, columns=1):
        figure = Figure((width, height), dpi=80, layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False)

    figure, [[axes]] = new(8, 5)
    for i, (name, values) in enumerate(scores.items()):
        mean = [statistics.mean(accuracies) for accuracies in values.values()]
        spread = [statistics.stdev(x) if len(x) > 1 else 0 for x in values.values()]
        axes.errorbar(
            list(values),
            mean,
            spread,
            capsize=3,
            label=name,
            marker="ov^sDPX*"[i % 8],
            linestyle="-" if i > 1 else "--",
        )  # not learnt: --
    axes.set(
        title="Test accuracy by number of labels (bars: deviation of draws)",
        xscale="log",
        xlabel="labelled training images",
        ylabel="test accuracy (%)",
    )
    axes.set_xticks(list(values), [f"{n:,}" for n in values])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "labels.png")
    titles = {"loss": "training loss", "knn": "kNN accuracy (%)", "z_std": "z_std (0: one point)"}
    figure, panels = new(3 + 2.5 * len(curves), 7, 3, len(curves))
    for column, (name, rows) in enumerate(curves.items()):
        panels[1][column].sharey(panels[1][0])  # before it is drawn on, so that all are in range
        for axes, key in zip(panels[:, column], titles, strict=True):
            shown = [row for row in rows if key in row]  # kNN is not taken in every epoch
            axes.plot([row["epoch"] for row in shown], [row[key] for row in shown], marker=".")
            axes.set(title=name, xlabel="epoch", ylabel=titles[key], xlim=(0, len(rows) + 1))
            axes.grid(alpha=0.3)
        panels[2][column].set_ylim(0, 1.1)
    figure.savefig(folder / "curves.png")
    tsne = TSNE(perplexity=min(30, math.ceil(len(data.test_labels) / step / 4)), random_state=0)
    maps = {
        name: tsne.fit_transform(some.numpy())
        for name, some in progress_bar(features.items(), "t-SNE")
    }
    for name in curves:
        stem = "-".join(Path(name).with_suffix("").parts).strip("/-")
        figure, [panels] = new(13, 6, 1, 2)
        for axes, title in zip(panels, ("random init", name), strict=True):
            for k, label in enumerate(data.classes[:10]):  # there are ten colours
                points = maps[title][data.test_labels[::step] == k]
                axes.scatter(*points.T, s=8, color=f"C{k}", label=label)
            axes.set(
                title=f"{title}: t-SNE of the features of test images",
                xticks=[],
                yticks=[],
                xlabel="t-SNE 1 (no unit)",
                ylabel="t-SNE 2 (no unit)",
            )
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), markerscale=3)
        figure.savefig(folder / f"map-{stem}.png")
        figure, [[axes]] = new(8, 7)
        ConfusionMatrixDisplay.from_predictions(
            data.test_labels,
            guesses[name],
            normalize="true",
            values_format=".0%",
            ax=axes,
            display_labels=data.classes,
            include_values=len(data.classes) <= 20,
            cmap="Blues",
            xticks_rotation=45,
            im_kw=dict(vmin=0, vmax=1),
        )
        axes.set_title(f"{name}: classes of the test images, as the linear classifier sees them")
        figure.savefig(folder / f"confusion-{stem}.png")
        figure, panels = new(7.5, 8.4, len(queries), 9)
        for query, found, row in zip(queries, nearest[name], panels, strict=True):
            for i, box in enumerate(row[: len(found) + 1]):
                image = data.train_images[found[i - 1]] if i else data.test_images[query]
                label = data.train_labels[found[i - 1]] if i else data.test_labels[query]
                box.imshow(image.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)
                box.set(xticks=[], yticks=[])
                if label != data.test_labels[query]:
                    box.set_xlabel(data.classes[label], color="C3", fontsize=7, labelpad=1)
                    box.spines[:].set(color="C3", linewidth=4)
            row[0].set_ylabel(data.classes[data.test_labels[query]], rotation=0, ha="right")
        panels[0][0].set_title("query")
        panels[0][4].set_title("the eight nearest labelled images (red: another class)")
        figure.suptitle(f"{name}: nearest neighbours by cosine of the features")
        figure.savefig(folder / f"neighbours-{stem}.png")


def label_budget(text):
    """Argparse type of --labels: "all" or a whole number from 2."""
    if text != "all" and (not text.isdecimal() or int(text) < 2):
        raise argparse.ArgumentTypeError(f"must be 'all' or at least 2, got {text}")
    return text if text == "all" else int(text)


def parse_args(argv=None):
    """Read the command line, or the list of strings `argv`."""
    parser = argparse.ArgumentParser(
        "linear_eval.py",
        argparse.SUPPRESS,
        __doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--weights", nargs="+", required=True, metavar="PT", help="checkpoints of the four scripts")
    add(
        "--labels",
        nargs="+",
        type=label_budget,
        default=["all"],
        metavar="N",
        help="label budgets, a column each: multiples of the classes, or all",
    )
    add("--trials", type=int, default=3, help="draws of a budget but all: mean ± deviation")
    add("--baselines", action="store_true", help="add the backbone trained on the labels alone")
    add("--finetune", action="store_true", help="add the backbones trained on with the labels")
    add("--report", action="store_true", help="print precision, recall, F1 and confusion by class")
    add("--plot", metavar="FOLDER", help="save pictures of scores, curves, features, neighbours")
    add("--export", metavar="PT", help="save the bare backbone for use without this code")
    add("--seed", type=int, default=0, help="of the labels drawn and the random backbone")
    add("--dataset", help="as in training; unset: what the first of --weights was trained on")
    add("--data-dir", default="data", help="folder that has, or gets, a named dataset's files")
    devices = ["cpu", "cuda"][: 1 + torch.cuda.is_available()]
    add("--device", choices=devices, default=devices[-1])
    args = parser.parse_args(argv)
    if args.export and (
        len(args.weights) > 1
        or os.path.exists(args.export)
        or not os.path.isdir(os.path.dirname(args.export) or ".")
    ):
        parser.error(f"--export {args.export} needs one --weights, a folder and no file there yet")
    if args.export and args.dataset:
        parser.error("--export prints the mean and std of the training data: leave out --dataset")
    if args.trials < 1:
        parser.error(f"--trials {args.trials}: choose 1 or more")
    return args


def main(argv=None):
    """Print a table of how well pixels, random features and learnt features tell classes apart."""
    from sklearn.metrics import classification_report, confusion_matrix, f1_score

    args = parse_args(argv)
    loaded = {path: load_encoder(path) for path in args.weights}
    checkpoint = loaded[args.weights[0]][1]
    trained = checkpoint["args"]
    for path, (_, other) in loaded.items():
        for key in ("dataset", "images", "backbone"):
            if other["args"][key] != trained[key]:
                raise DataError(
                    f"{path} has {key} {other['args'][key]}, {args.weights[0]} "
                    f"{trained[key]}: compare them in separate runs"
                )
    if args.plot:
        Path(args.plot).mkdir(parents=True, exist_ok=True)
    shape = trained["backbone"], trained["images"][1], trained["images"][3]
    dataset = args.dataset or trained["dataset"]
    data = load_dataset(dataset, args.data_dir, shape[2])
    if data.train_images.shape[1:] != (shape[1], shape[2], shape[2]):
        raise DataError(
            f"{dataset} has images of {tuple(data.train_images.shape[1:])}, "
            f"{args.weights[0]} takes {(shape[1], shape[2], shape[2])}"
        )
    mean, std = data.mean.to(args.device), data.std.to(args.device)
    n_classes, everything = len(data.classes), (data.train_labels >= 0).nonzero().flatten()
    draws = {
        budget: [
            draw_labels(data.train_labels, budget, args.seed + trial)
            for trial in range(args.trials)
        ]
        for budget in sorted(n for n in args.labels if n != "all")
    }
    if "all" in args.labels:
        draws[len(everything)] = [everything]
    most = max(draws)
    used = torch.cat([indices for trials in draws.values() for indices in trials]).unique()
    step = math.ceil(len(data.test_labels) / 1000)  # as many points as a map can show
    queries = data.test_labels.argsort(stable=True)[:: math.ceil(len(data.test_labels) / 10)]

    torch.manual_seed(args.seed)
    frozen = {"raw pixels": nn.Flatten(), "random init": build_backbone(*shape)}  # always h
    frozen |= {path: encoder for path, (encoder, _) in loaded.items()}
    before = {path: deepcopy(encoder.state_dict()) for path, (encoder, _) in loaded.items()}
    tasks = [(name, network, 0) for name, network in frozen.items()]  # learning rate 0: a probe
    tasks += [("labels only", build_backbone(*shape), SCRATCH_LR)][: args.baselines]
    tasks += [(f"{path} fine-tuned", frozen[path], FINETUNE_LR) for path in loaded if args.finetune]
    width = max(len(name) for name, *_ in tasks) + 1
    print(
        f"{dataset}, {shape[0]}, {len(data.test_images):,} test images. Accuracy in percent; "
        f"macro-F1, kNN, C: last draw of {most:,}.\n\n{'':<{width}}"
        + "".join(f"{f'{n:,} labels':>15}" for n in draws)
        + "  macro-F1    kNN     C    s"
    )
    scores, features, guesses, nearest = {}, {}, {}, {}
    for name, network, lr in tasks:
        begun, scores[name], strength, knn = time.perf_counter(), {}, "-", "-"
        if not lr:
            network.to(args.device)
            train, test = (
                extract_features(network, images, mean, std, f"{name}: features")
                for images in (data.train_images[used], data.test_images)
            )

            def of(indices, train=train):  # features of these training images, not copied if all
                rows = torch.searchsorted(used, indices)
                return train if len(rows) == len(train) else train[rows]

            bank, labels = of(draws[most][-1]), data.train_labels[draws[most][-1]]
            knn = knn_accuracy(bank, labels, test, data.test_labels, progress=f"{name}: kNN")
            knn = f"{knn:.2f}"
        for n, trials in draws.items():
            scores[name][n] = []
            for trial, indices in enumerate(trials):
                labels, title = data.train_labels[indices], f"{name}: {n:,} labels ({trial + 1})"
                if lr:
                    model = train_with_labels(
                        deepcopy(network),
                        data.train_images[indices],
                        labels,
                        n_classes,
                        mean,
                        std,
                        lr,
                        args.seed + trial,
                        title,
                    )
                    logits = extract_features(model, data.test_images, mean, std)  # (N, K)
                    predicted = logits.argmax(dim=1).cpu()
                else:
                    predicted, strength = linear_probe(of(indices), labels, test, n_classes, title)
                correct = (predicted == data.test_labels).double().mean().item()
                scores[name][n].append(100 * correct)
        cells = [
            f"{statistics.mean(x):.2f} ± {statistics.stdev(x):.2f}" if len(x) > 1 else f"{x[0]:.2f}"
            for x in scores[name].values()
        ]
        f1 = 100 * f1_score(data.test_labels, predicted, average="macro")
        print(
            f"{name:<{width}}" + "".join(f"{cell:>15}" for cell in cells),
            f"{f1:>9.2f}{knn:>7}{strength:>6}{time.perf_counter() - begun:>5.0f}",
            flush=True,
        )
        if name in loaded and args.report:
            print(
                classification_report(data.test_labels, predicted, target_names=data.classes),
                "rows: true classes, columns: predictions",
                confusion_matrix(data.test_labels, predicted),
                sep="\n",
                flush=True,
            )
        if args.plot and not lr and name != "raw pixels":
            cosines = F.normalize(test[queries], dim=1) @ bank.T / bank.norm(dim=1).clamp_min(1e-12)
            nearest[name] = draws[most][-1][cosines.topk(min(8, most)).indices.cpu()]  # (10, 8)
            features[name], guesses[name] = test[::step].cpu(), predicted
    for path, (encoder, _) in loaded.items():
        for key, value in encoder.state_dict().items():
            if not value.cpu().equal(before[path][key]):
                raise DataError(f"{path}: {key} changed during the evaluation, it was not frozen")
    print("\nThe weights and buffers of every frozen backbone are as they were.")
    if args.plot:
        curves = {path: checkpoint["metrics"] for path, (_, checkpoint) in loaded.items()}
        plot(Path(args.plot), scores, curves, features, step, guesses, nearest, queries, data)
    if args.export:
        export(encoder, checkpoint, data, args.export)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        argparse.ArgumentParser().exit(130, "stopped\n")
    except (DataError, OSError, torch.OutOfMemoryError) as error:
        argparse.ArgumentParser().exit(2, f"linear_eval.py: error: {error}\n")
