"""What did it learn? Freeze the backbone of a checkpoint and see how well it tells classes.

    python linear_eval.py --weights byol.pt                  # all labels
    python linear_eval.py --weights byol.pt --labels 1000    # 100 images of each of ten classes

Every image goes through the frozen backbone once; all the rest works on the features. A linear
classifier (multinomial logistic regression) and a k-nearest-neighbour vote are fitted to training
features and scored on test features. Two rows stand beside every result: the raw pixels, and the
same backbone with random weights, never trained. Only what a result adds to those was learnt.

N images, D features, K classes.
"""

import argparse
import pickle
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import build_backbone, load_dataset

FORMAT = 1  # of the checkpoints that can be read
STRENGTHS = (3, 10, 30, 100, 300, 1000)  # C, the candidates for the classifier's regularisation


def load_encoder(path):
    """Rebuild the backbone that a training script saved; return (encoder, checkpoint).

    The file is read with weights_only=True, so that it cannot run code. Raises ValueError, with
    the path and the reason, unless it is a whole checkpoint in which every weight of the backbone
    is there, has the right shape and is finite; FileNotFoundError if there is none.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: train first or correct the path") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder: name the checkpoint in it") from None
    except OSError:
        raise
    except Exception as error:  # a damaged file can fail in any way that unpickling can
        reason = "is damaged, cut short or no PyTorch file"
        if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error).lower():
            reason = "would run code on loading, or holds more than tensors and numbers"
        raise ValueError(f"{path} {reason}: name a checkpoint of these scripts") from error
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise ValueError(f"{path} was not written by these training scripts: name one that was")
    if checkpoint["format"] != FORMAT:
        raise ValueError(f"{path} has format {checkpoint['format']}, this program reads {FORMAT}")
    prefix = "backbone."
    try:
        encoder = build_backbone(
            checkpoint["backbone"], checkpoint["in_channels"], checkpoint["image_size"]
        )
        weights = {
            name.removeprefix(prefix): value
            for name, value in checkpoint["model"].items()
            if name.startswith(prefix)
        }
        encoder.load_state_dict(weights)  # strict: a key too many or too few is an error
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} does not hold a whole backbone: {reason}") from error
    broken = [name for name, value in weights.items() if not value.isfinite().all()]
    if broken:
        raise ValueError(f"{path} has values in {broken[0]} that are not finite: train it again")
    return encoder.eval(), checkpoint


@torch.no_grad()
def extract_features(encoder, images, mean, std, progress=None):
    """Return the features (N, D) float32 of uint8 images (N, C, H, W), on the device of `mean`.

    `mean` and `std` (C,) normalise images / 255. The encoder is put into eval mode meanwhile, so
    BatchNorm uses its running statistics and the features of an image depend on no other image.
    `progress` is the title of a progress bar.
    """
    device, mean, std = mean.device, mean.view(-1, 1, 1), std.view(-1, 1, 1)
    was_training = encoder.training
    encoder.eval()
    features, done = None, 0
    batches = images.split(500)
    for batch in tqdm(batches, progress, disable=None if progress else True, leave=False):
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
    al. 2018, section 3.4). Images with the label -1 have no vote; k is at most their number.
    """
    labelled = train_labels >= 0
    if not labelled.all():
        train_features, train_labels = train_features[labelled], train_labels[labelled]
    device, k = train_features.device, min(k, len(train_labels))
    train_labels, test_labels = train_labels.to(device), test_labels.to(device)
    norms = train_features.norm(dim=1).clamp_min(1e-12)  # a normalised copy would double the memory
    correct = torch.zeros((), dtype=torch.int64, device=device)
    batches = list(zip(test_features.split(250), test_labels.split(250), strict=True))
    for features, labels in tqdm(
        batches, progress, disable=None if progress else True, leave=False
    ):
        cosines = (F.normalize(features, dim=1) @ train_features.T).div_(norms)  # (250, n)
        nearest, indices = cosines.topk(k, dim=1)
        votes = torch.zeros(len(features), int(train_labels.max()) + 1, device=device)
        votes.scatter_add_(1, train_labels[indices], (nearest / temperature).exp())
        correct += (votes.argmax(dim=1) == labels).sum()
    return 100 * correct.item() / len(test_labels)


def fit_logistic(features, labels, n_classes, strength):
    """Minimise strength * sum of cross-entropies + ||W||^2 / 2; return W (K, D) and b (K,).

    That is scikit-learn's LogisticRegression(C=strength). L-BFGS runs in coordinates in which the
    curvature at W = 0 is the identity, which takes a fifth of the iterations.
    """
    n, dim = features.shape
    decay = 1 / (strength * n)
    curvature = features.T @ features / (n * n_classes)
    curvature.diagonal().add_(decay)
    to_weight = torch.linalg.inv(torch.linalg.cholesky(curvature))  # (D, D)
    coordinates = torch.zeros(n_classes, dim, device=features.device, requires_grad=True)
    bias = torch.zeros(n_classes, device=features.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [coordinates, bias], max_iter=60, tolerance_grad=1e-4, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        weight = coordinates @ to_weight
        loss = F.cross_entropy(F.linear(features, weight, bias), labels)
        loss = loss + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (coordinates @ to_weight).detach(), bias.detach()


def linear_probe(train_features, train_labels, test_features, n_classes, progress=None):
    """Fit a linear classifier and return its predictions (N,) int64 and the strength C it took.

    Features are scaled to length 1 and centred. C is the candidate with the best accuracy on parts
    of the training set held out for that: five folds of up to 2,000 images, one of 10,000 of more.
    No test label is seen, no random number drawn but for a fixed shuffle.
    """
    train = F.normalize(train_features, dim=1)
    center = train.mean(dim=0)
    train -= center
    test = F.normalize(test_features, dim=1) - center
    if len(train) < train.shape[1]:  # the solution lies in the span of the images: turn into it
        basis = torch.linalg.qr(train.T).Q
        train, test = train @ basis, test @ basis
    labels = train_labels.to(train.device)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    order = order.to(train.device)
    if len(order) <= 2000:
        folds = [
            (torch.cat([*order.chunk(5)[:i], *order.chunk(5)[i + 1 :]]), order.chunk(5)[i])
            for i in range(len(order.chunk(5)))
        ]
    else:
        held_out = min(10_000, len(order) // 5)
        folds = [(order[held_out : held_out + 10_000], order[:held_out])]
    correct = dict.fromkeys(STRENGTHS, 0)
    for strength in tqdm(STRENGTHS, progress, disable=None if progress else True, leave=False):
        for fitted, held_out in folds:
            weight, bias = fit_logistic(train[fitted], labels[fitted], n_classes, strength)
            guesses = F.linear(train[held_out], weight, bias).argmax(dim=1)
            correct[strength] += (guesses == labels[held_out]).sum().item()
    strength = max(STRENGTHS, key=correct.get)
    weight, bias = fit_logistic(train, labels, n_classes, strength)
    return F.linear(test, weight, bias).argmax(dim=1).cpu(), strength


def draw_labels(labels, budget, seed):
    """Return indices of `budget` images, equally many of each class, drawn with `seed`.

    Raises ValueError where the budget is no multiple of the number of classes or a class has too
    few images.
    """
    classes = labels[labels >= 0].unique()
    if budget % len(classes):
        raise ValueError(f"--labels {budget} is not a multiple of the {len(classes)} classes")
    generator = torch.Generator().manual_seed(seed)
    indices = []
    for label in classes:
        images = (labels == label).nonzero().flatten()
        if len(images) < budget // len(classes):
            raise ValueError(
                f"--labels {budget} needs {budget // len(classes)} images of class {label}, "
                f"the training set has {len(images)}"
            )
        drawn = torch.randperm(len(images), generator=generator)[: budget // len(classes)]
        indices.append(images[drawn])
    return torch.cat(indices)


def label_budget(text):
    """Argparse type of --labels: a whole number from 2, or "all" as None."""
    if text == "all":
        return None
    if int(text) < 2:
        raise argparse.ArgumentTypeError(f"must be 'all' or at least 2, got {text}")
    return int(text)


def parse_args(argv=None):
    """Read the command line, or the list of strings `argv`."""
    parser = argparse.ArgumentParser(
        "linear_eval.py",
        usage=argparse.SUPPRESS,
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--weights", required=True, help="checkpoint of simclr.py, moco.py, byol.py or simsiam.py")
    add("--labels", type=label_budget, default="all", help="labelled images to learn from, or all")
    add("--seed", type=int, default=0, help="of the labels drawn and the random backbone")
    add("--data-dir", default="data", help="folder that has, or gets, a named dataset's files")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto: cuda, cpu")
    args = parser.parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if not torch.get_device_module(args.device).is_available():
        parser.error(f"--device {args.device}: PyTorch finds none here, use --device cpu")
    return args


def main(argv=None):
    """Print a table of how well pixels, random features and learnt features tell the classes."""
    from sklearn.metrics import accuracy_score, f1_score  # training scripts need not load these

    args = parse_args(argv)
    encoder, checkpoint = load_encoder(args.weights)
    data = load_dataset(checkpoint["dataset"], args.data_dir, checkpoint["image_size"])
    labelled = (data.train_labels >= 0).nonzero().flatten()
    if args.labels is not None:
        labelled = draw_labels(data.train_labels, args.labels, args.seed)
    train_images, train_labels = data.train_images[labelled], data.train_labels[labelled]

    mean, std = data.mean.to(args.device), data.std.to(args.device)
    torch.manual_seed(args.seed)
    untrained = build_backbone(
        checkpoint["backbone"], checkpoint["in_channels"], checkpoint["image_size"]
    )
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    print(
        f"{checkpoint['method']}, {checkpoint['backbone']}, {checkpoint['epoch']} epochs on "
        f"{checkpoint['dataset']}; {len(labelled):,} labelled training images, "
        f"{len(data.test_images):,} test images\n\n"
        f"{'features':<20}{'dim':>6}{'linear top-1':>14}{'macro-F1':>10}{'kNN':>8}{'C':>6}{'s':>6}"
    )
    for name, network in (
        ("raw pixels", torch.nn.Flatten()),
        ("random init", untrained),
        (args.weights, encoder),
    ):
        begun = time.perf_counter()
        network.to(args.device)
        train, test = (
            extract_features(network, images, mean, std, f"{name}: features")
            for images in (train_images, data.test_images)
        )
        knn = knn_accuracy(train, train_labels, test, data.test_labels, progress=f"{name}: kNN")
        linear, strength = linear_probe(
            train, train_labels, test, len(data.classes), f"{name}: choosing C"
        )
        top1 = 100 * accuracy_score(data.test_labels, linear)
        f1 = 100 * f1_score(data.test_labels, linear, average="macro")
        print(
            f"{name:<20}{train.shape[1]:>6}{top1:>13.2f}%{f1:>10.2f}{knn:>7.2f}%{strength:>6}"
            f"{time.perf_counter() - begun:>6.0f}",
            flush=True,
        )
    changed = [n for n, value in encoder.state_dict().items() if not value.cpu().equal(before[n])]
    if changed:
        raise ValueError(f"{changed[0]} changed during the evaluation: the backbone was not frozen")
    print(f"\nAll {len(before)} weights and buffers of the backbone are as they were.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        argparse.ArgumentParser().exit(130, "stopped\n")
    except (ValueError, OSError) as error:
        argparse.ArgumentParser().exit(2, f"linear_eval.py: error: {error}\n")
