"""Short runs on the real Fashion-MNIST: what is learnt is more than random weights give."""

import common
import linear_eval
import pytest
import simsiam
import torch
import torch.nn.functional as F
from torch import nn


@pytest.fixture(scope="module")
def two_threads():
    """Real images are worth a thread per core."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def probe(fashion_mnist, two_threads):
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
    torch.manual_seed(0)
    return probe(common.build_backbone("convnet", 1, 28))


def train_some(name, data, n, out, patch, **changes):
    """Train on the first n images for an epoch; return the encoder and the checkpoint."""
    script = __import__(name)
    some = data._replace(train_images=data.train_images[:n], train_labels=data.train_labels[:n])
    patch.setattr(script, "load_dataset", lambda *args: some)
    for key, value in dict(knn_accuracy=lambda *args: 0.0, **changes).items():
        patch.setattr(script, key, value)
    script.train(script.parse_args(["--epochs", "1", "--device", "cpu", "--out", str(out)]))
    return linear_eval.load_encoder(out)


def test_two_hundred_steps_beat_random_weights(
    fashion_mnist, probe, random_init, tmp_path, monkeypatch
):
    encoder, _ = train_some("simclr", fashion_mnist, 25_600, tmp_path / "a.pt", monkeypatch)
    assert probe(encoder) > random_init + 0.5


def without_stop_gradient(p, z):
    return -F.cosine_similarity(p, z, dim=1).mean()


class OntoAPoint(simsiam.SimSiam):
    """SimSiam without the BatchNorm that ends its projector: that keeps embeddings on a line."""

    def __init__(self, *args):
        super().__init__(*args)
        self.projector[4] = nn.Identity()


def test_simsiam_collapses_without_stop_gradient(fashion_mnist, two_threads, tmp_path, monkeypatch):
    """The loss looks better than with the stop-gradient, and all embeddings become one point."""
    rows = []
    for i, loss in enumerate((simsiam.negative_cosine, without_stop_gradient)):
        changes = dict(negative_cosine=loss, SimSiam=OntoAPoint)
        out = tmp_path / f"{i}.pt"
        _, saved = train_some("simsiam", fashion_mnist, 7_680, out, monkeypatch, **changes)
        rows.append(saved["metrics"][-1])
    assert rows[1]["loss"] < rows[0]["loss"] - 0.1  # it would call the collapse a success
    assert rows[0]["z_std"] > 0.7 and rows[1]["z_std"] < 0.5  # means over the epoch
