"""The evaluation: features, probe, neighbours, and files that must not be believed."""

import pickle

import byol
import common
import linear_eval
import pytest
import torch
from conftest import call, run
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "byol.pt"
    argv = ["--data-dir", tiny, "--max-steps", "2", "--batch-size", "32", "--out", path]
    byol.main([*map(str, argv), "--knn-every", "0"])
    return path


def clusters(n, dim=20, n_classes=4, seed=0, spread=1.5):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(n_classes, dim, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(n) % n_classes
    return centers[labels] + spread * torch.randn(n, dim, generator=generator), labels


def accuracy(predictions, labels):
    return 100 * (predictions == labels).double().mean().item()


def test_program_prints_three_rows(checkpoint, tiny):
    process = run(checkpoint.parent, "linear_eval.py", "--weights", "byol.pt", "--data-dir", tiny)
    assert process.returncode == 0, process.stderr
    rows = process.stdout.splitlines()
    names = ("raw pixels", "random init", "byol.pt")
    found = [next(row for row in rows if row.startswith(name)) for name in names]
    assert all(row.count("%") == 2 for row in found)
    assert "320 labelled training images, 100 test images" in process.stdout
    assert "weights and buffers of the backbone are as they were" in process.stdout


def test_program_with_few_labels(checkpoint, tiny, capfd):
    options = ["--weights", "byol.pt", "--data-dir", tiny, "--labels", "20"]
    first, again = (call(capfd, checkpoint.parent, "linear_eval.py", *options) for _ in range(2))
    assert "20 labelled training images" in first.stdout, first.stderr
    cut = [[line[:58] for line in p.stdout.splitlines()] for p in (first, again)]  # not the seconds
    assert cut[0] == cut[1]


def test_load_encoder_is_exact(checkpoint):
    encoder, saved = linear_eval.load_encoder(checkpoint)
    assert not encoder.training
    state = encoder.state_dict()
    expected = {k: v for k, v in saved["model"].items() if k.startswith("backbone.")}
    assert len(state) == len(expected)
    assert all(torch.equal(state[k.removeprefix("backbone.")], v) for k, v in expected.items())


class Payload:
    """A pickle that would run code when it is loaded."""

    def __reduce__(self):
        return print, ("the payload ran",)


def bad_weights(kind, path, good):
    saved = torch.load(good, weights_only=True)
    model = saved["model"]
    if kind == "truncated":
        path.write_bytes(good.read_bytes()[:-1000])
    elif kind == "half":
        path.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("these are not weights\n")
    elif kind == "state dict":
        torch.save(common.build_backbone("resnet18", 3).state_dict(), path)
    elif kind == "tensor":
        torch.save(torch.ones(3), path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Payload()))
    elif kind == "torch pickle":
        torch.save({"format": 1, "model": Payload()}, path)
    elif kind == "format":
        torch.save(saved | {"format": 99}, path)
    elif kind == "no model":
        torch.save({k: v for k, v in saved.items() if k != "model"}, path)
    elif kind == "missing weight":
        saved["model"] = {k: v for k, v in model.items() if k != "backbone.0.weight"}
        torch.save(saved, path)
    elif kind == "extra weight":
        torch.save(saved | {"model": model | {"backbone.99.weight": torch.ones(1)}}, path)
    elif kind == "wrong shape":
        torch.save(saved | {"model": model | {"backbone.0.weight": torch.ones(1)}}, path)
    elif kind == "other backbone":
        torch.save(saved | {"backbone": "resnet18"}, path)
    elif kind == "not finite":
        model["backbone.0.weight"][0] = float("nan")
        torch.save(saved, path)
    elif kind == "folder":
        path.mkdir()


BAD = {
    "missing": "does not exist",
    "folder": "is a folder",
    "truncated": "is damaged, cut short or no PyTorch file",
    "half": "is damaged, cut short or no PyTorch file",
    "empty": "is damaged, cut short or no PyTorch file",
    "text": "is damaged, cut short or no PyTorch file",
    "state dict": "was not written by these training scripts",
    "tensor": "was not written by these training scripts",
    "pickle": "would run code",
    "torch pickle": "would run code",
    "format": "has format 99",
    "no model": "does not hold a whole backbone",
    "missing weight": "does not hold a whole backbone",
    "extra weight": "does not hold a whole backbone",
    "wrong shape": "does not hold a whole backbone",
    "other backbone": "does not hold a whole backbone",
    "not finite": "not finite",
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_weights_are_refused_in_one_line(checkpoint, tiny, tmp_path, kind, capfd):
    path = tmp_path / "bad.pt"
    bad_weights(kind, path, checkpoint)
    process = call(capfd, tmp_path, "linear_eval.py", "--weights", "bad.pt", "--data-dir", tiny)
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.startswith("linear_eval.py: error: bad.pt")
    assert BAD[kind] in process.stderr and process.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "labels, words",
    [("0", "got 0"), ("7", "not a multiple"), ("330", "needs 33 images"), ("many", "invalid")],
)
def test_bad_label_budgets_are_refused(checkpoint, tiny, labels, words, capfd):
    options = ["--weights", "byol.pt", "--data-dir", tiny, "--labels", labels]
    process = call(capfd, checkpoint.parent, "linear_eval.py", *options)
    assert process.returncode == 2 and words in process.stderr
    assert process.stderr.count("\n") == 1


def test_features_do_not_depend_on_the_batch(tiny):
    data = common.load_dataset("fashion-mnist", tiny)
    encoder = common.build_backbone("convnet", 1)
    encoder(torch.rand(50, 1, 28, 28))  # running statistics that are not the initial ones
    together = linear_eval.extract_features(encoder, data.train_images[:40], data.mean, data.std)
    assert encoder.training  # as it was before
    for part in (slice(0, 1), slice(7, 29), slice(39, 40)):
        alone = linear_eval.extract_features(encoder, data.train_images[part], data.mean, data.std)
        torch.testing.assert_close(alone, together[part], rtol=1e-4, atol=1e-5)


def test_features_leave_weights_and_buffers(tiny):
    data = common.load_dataset("fashion-mnist", tiny)
    encoder = common.build_backbone("convnet", 1).train()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    features = linear_eval.extract_features(encoder, data.train_images, data.mean, data.std)
    assert not features.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def brute_force_knn(train, train_labels, test, test_labels, k, temperature):
    correct = 0
    for query, label in zip(test.double(), test_labels, strict=True):
        cosines = [float(query @ x / (query.norm() * x.norm())) for x in train.double()]
        nearest = sorted(range(len(cosines)), key=lambda i: -cosines[i])[:k]
        votes = {}
        for i in nearest:
            votes[int(train_labels[i])] = votes.get(int(train_labels[i]), 0) + (
                2.718281828459045 ** (cosines[i] / temperature)
            )
        correct += max(votes, key=votes.get) == int(label)
    return 100 * correct / len(test_labels)


@pytest.mark.parametrize("k, temperature", [(1, 0.1), (7, 0.1), (20, 0.5), (500, 0.1)])
def test_knn_equals_brute_force(k, temperature):
    train, train_labels = clusters(150)
    test, test_labels = clusters(90, seed=1)
    found = linear_eval.knn_accuracy(train, train_labels, test, test_labels, k, temperature)
    expected = brute_force_knn(train, train_labels, test, test_labels, k, temperature)
    assert found == pytest.approx(expected, abs=1e-9) and 30 < found < 100


def test_knn_ignores_unlabelled_images():
    train, train_labels = clusters(60)
    test, test_labels = clusters(40, seed=1)
    expected = linear_eval.knn_accuracy(train, train_labels, test, test_labels, 5)
    more, labels = torch.cat([test, train]), torch.cat([-torch.ones(40).long(), train_labels])
    assert linear_eval.knn_accuracy(more, labels, test, test_labels, 5) == expected


@pytest.mark.parametrize("n, dim", [(60, 100), (400, 30), (2400, 20)])
def test_probe_agrees_with_scikit_learn(n, dim):
    train, train_labels = clusters(n, dim, spread=dim**0.5 / 2)
    test, test_labels = clusters(2000, dim, seed=1, spread=dim**0.5 / 2)
    predictions, strength = linear_eval.linear_probe(train, train_labels, test, 4)
    a, b = F.normalize(train, dim=1), F.normalize(test, dim=1)
    reference = LogisticRegression(C=strength, max_iter=5000, tol=1e-8).fit(a, train_labels)
    expected = 100 * reference.score(b.numpy(), test_labels.numpy())
    assert accuracy(predictions, test_labels) == pytest.approx(expected, abs=0.3)
    assert 40 < expected < 99.5


def test_fit_logistic_finds_the_minimum():
    features, labels = clusters(300)
    weight, bias = linear_eval.fit_logistic(features, labels, 4, 1.0)
    reference = LogisticRegression(C=1.0, max_iter=5000, tol=1e-10).fit(features, labels)
    torch.testing.assert_close(
        weight - weight.mean(0), torch.tensor(reference.coef_).float(), atol=2e-2, rtol=0
    )
    assert bias.shape == (4,)


def test_probe_is_deterministic():
    train, labels = clusters(300)
    first, again = (linear_eval.linear_probe(train, labels, train, 4)[0] for _ in range(2))
    assert torch.equal(first, again)


def test_draw_labels_is_balanced_and_seeded():
    labels = torch.cat([torch.arange(200) % 10, -torch.ones(50).long()])
    drawn = linear_eval.draw_labels(labels, 50, seed=0)
    assert labels[drawn].bincount().tolist() == [5] * 10 and len(drawn.unique()) == 50
    assert torch.equal(drawn, linear_eval.draw_labels(labels, 50, seed=0))
    assert not torch.equal(drawn, linear_eval.draw_labels(labels, 50, seed=1))
