"""Short runs on the real Fashion-MNIST: what is learnt is more than random weights give."""

import common
import linear_eval
import pytest
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
