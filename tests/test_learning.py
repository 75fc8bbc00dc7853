"""Short runs on real images: what is learnt is more than random weights give."""

import importlib

import common
import linear_eval
import pytest
import simsiam
import torch
import torch.nn.functional as F
from torch import nn


def train_some(name, data, epochs, out, patch, **changes):
    """Train on the images of `data`; return the encoder and the metrics."""
    script = importlib.import_module(name)
    patch.setattr(script, "load_dataset", lambda *args: data)
    for key, value in dict(knn_accuracy=lambda *args: 0.0, **changes).items():
        patch.setattr(script, key, value)
    script.train(script.parse_args(["--epochs", epochs, "--device", "cpu", "--out", str(out)]))
    encoder, saved = linear_eval.load_encoder(out)
    return encoder, saved["metrics"]


def accuracy(encoder, data, known, scored, n_labels, draws):
    """Return the mean accuracy of a linear probe over some draws of labels."""
    test = linear_eval.extract_features(encoder, data.train_images[scored])
    correct = 0
    for seed in range(draws):
        drawn = linear_eval.draw_labels(data.train_labels, known, n_labels, data.classes, seed)
        train = linear_eval.extract_features(encoder, data.train_images[drawn])
        layer, _ = linear_eval.linear_probe(train, data.train_labels[drawn], 10)
        guesses = layer(test).argmax(dim=1)
        correct += (guesses == data.train_labels[scored]).double().mean().item()
    return 100 * correct / draws


def random_encoder(data):
    torch.manual_seed(0)
    size = data.train_images.shape[3]
    backbone = common.build_backbone("convnet", 1, size)
    return linear_eval.normalized(backbone, data.mean.tolist(), data.std.tolist())


@pytest.fixture(scope="module")
def digits():
    return common.load_dataset("digits", "there-is-no-such-folder")


def test_seconds_on_digits_beat_random_weights(digits, tmp_path, monkeypatch):
    encoder, _ = train_some("simclr", digits, "8", tmp_path / "a.pt", monkeypatch)
    task = digits, torch.arange(1000), torch.arange(1000, 1397), 50, 4
    assert accuracy(encoder, *task) > accuracy(random_encoder(digits), *task) + 1


def test_a_hundred_steps_on_fashion_mnist_beat_random_weights(fashion_mnist, tmp_path, monkeypatch):
    """End to end on the images of the README, by accuracy on images that are held out."""
    some = fashion_mnist._replace(train_images=fashion_mnist.train_images[:12_800])
    encoder, _ = train_some("simclr", some, "1", tmp_path / "a.pt", monkeypatch)
    task = fashion_mnist, torch.arange(50_000), torch.arange(55_000, 60_000), 1000, 1
    assert accuracy(encoder, *task) > accuracy(random_encoder(fashion_mnist), *task) + 0.5


def without_stop_gradient(p, z):
    return -F.cosine_similarity(p, z, dim=1).mean()


class OntoAPoint(simsiam.SimSiam):
    """SimSiam without the BatchNorm that ends its projector: that keeps embeddings on a line."""

    def __init__(self, *args):
        super().__init__(*args)
        self.projector[4] = nn.Identity()


def test_simsiam_collapses_without_stop_gradient(digits, tmp_path, monkeypatch):
    """The loss looks better than with the stop-gradient, and all embeddings become one point."""
    rows = []
    for i, loss in enumerate((simsiam.negative_cosine, without_stop_gradient)):
        changes = dict(negative_cosine=loss, SimSiam=OntoAPoint)
        out = tmp_path / f"{i}.pt"
        rows.append(train_some("simsiam", digits, "5", out, monkeypatch, **changes)[1][-1])
    assert rows[1]["loss"] < rows[0]["loss"] - 0.1  # it would call the collapse a success
    assert rows[0]["z_std"] > 0.7 and rows[1]["z_std"] < 0.4
