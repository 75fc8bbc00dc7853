"""Short runs on the real Fashion-MNIST: what is learnt is more than random weights give."""

import argparse
import math

import common
import linear_eval
import pytest
import simsiam
import torch

RUN = ["--epochs", "1", "--batch-size", "256", "--knn-every", "0"]


@pytest.fixture(scope="module")
def probe(fashion_mnist):
    """Return a function: an encoder to its accuracy at 1,000 labels, on held-out images."""
    data = fashion_mnist
    drawn = linear_eval.draw_labels(data.train_labels[:50_000], 1000, seed=0)

    def accuracy(encoder):
        train, test = (
            linear_eval.extract_features(encoder, images, data.mean, data.std)
            for images in (data.train_images[drawn], data.train_images[-5000:])
        )
        predictions, _ = linear_eval.linear_probe(train, data.train_labels[drawn], test, 10)
        return 100 * (predictions == data.train_labels[-5000:]).double().mean().item()

    return accuracy


@pytest.fixture(scope="module")
def random_init(probe):
    accuracies = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        accuracies.append(probe(common.build_backbone("convnet", 1, 28)))
    return sum(accuracies) / 2


@pytest.mark.parametrize("name", ["simclr", "moco", "byol"])  # SimSiam needs more than one
def test_one_epoch_beats_random_weights(name, probe, random_init, tmp_path):
    out = tmp_path / "short.pt"
    __import__(name).main([*RUN, "--out", str(out)])
    learnt = probe(linear_eval.load_encoder(out)[0])
    assert learnt > random_init + 0.5


def effective_rank(z):
    """exp(entropy) of the shares that the principal axes of z (N, D) have in its variance."""
    spread = torch.linalg.svdvals(z - z.mean(dim=0)).square()
    share = spread / spread.sum()
    return math.exp(-(share * share.clamp_min(1e-12).log()).sum())


def test_simsiam_collapses_without_stop_gradient(fashion_mnist, tmp_path):
    """Its embeddings fall onto a line, while the loss looks better than with the stop-gradient.

    Not onto a point: the projector's last BatchNorm has no scale, so each channel keeps its
    variance, and z_std, which looks at channels, stays near 1. It is the rank that shows it.
    """
    images = (
        fashion_mnist.test_images[:1000].float() / 255 - fashion_mnist.mean[:, None, None]
    ) / (fashion_mnist.std[:, None, None])
    ranks, losses = [], []
    for option in ("--stop-grad", "--no-stop-grad"):
        out = tmp_path / f"{option}.pt"
        simsiam.main(
            [*RUN, "--max-steps", "120", "--warmup-epochs", "0", option, "--out", str(out)]
        )
        saved = torch.load(out, weights_only=True)
        args = argparse.Namespace(**saved["args"])
        model = simsiam.build_model(common.build_backbone("convnet", 1, 28), args)
        model.load_state_dict(saved["model"])
        model.eval()
        with torch.no_grad():
            z = model["projector"](model["backbone"](images))
        ranks.append(effective_rank(torch.nn.functional.normalize(z, dim=1)))
        losses.append(saved["metrics"][-1]["loss"])
    healthy, collapsed = ranks
    assert healthy > 6 and collapsed < 3
    assert losses[1] < losses[0] - 0.1  # the loss alone would call the collapse a success


def test_z_std_and_knn_show_a_collapse_onto_a_point(fashion_mnist, tmp_path):
    """Without the projector's last BatchNorm nothing keeps the embeddings apart.

    With the stop-gradient the same heads learn. kNN is that of the backbone: the collapsed one is
    worse than random weights.
    """
    spread, knn = [], []
    for option in ("--stop-grad", "--no-stop-grad"):
        out = tmp_path / f"{option}.pt"
        options = ["--max-steps", "120", "--warmup-epochs", "0", "--head-norm", "hidden", option]
        simsiam.main([*RUN, "--knn-every", "1", *options, "--out", str(out)])
        metrics = torch.load(out, weights_only=True)["metrics"][-1]
        spread.append(metrics["z_std"])
        knn.append(metrics["knn"])
    assert spread[0] > 0.5 and spread[1] < 0.3
    assert knn[1] < knn[0] - 2
