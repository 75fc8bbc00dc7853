"""The evaluation: features, probe, neighbours, and files that must not be believed."""

import pickle
import re
import subprocess
import sys

import byol
import common
import linear_eval
import pytest
import torch
import torchvision
from conftest import call
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "byol.pt"
    argv = ["--data-dir", tiny, "--epochs", 1, "--batch-size", 160, "--device", "cpu"]
    byol.train(byol.parse_args([*map(str, argv), "--out", str(path)]))
    return path


def evaluate(folder, tiny, *options):
    """Run linear_eval.py on the tiny images, on the CPU."""
    return call(folder, "linear_eval.py", "--data-dir", tiny, "--device", "cpu", *options)


def clusters(n, dim=20, n_classes=4, seed=0, spread=1.5):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(n_classes, dim, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(n) % n_classes
    return centers[labels] + spread * torch.randn(n, dim, generator=generator), labels


def accuracy(predictions, labels):
    return 100 * (predictions == labels).double().mean().item()


def table(text):
    """Map the name of each row to its list of words, and give the titles of the columns."""
    lines = text.splitlines()
    head = next(i for i, line in enumerate(lines) if "macro-F1    kNN" in line)
    end = lines.index("", head)
    rows = [re.split(r" {2,}", line) for line in lines[head + 1 : end]]
    return {row[0].strip(): row[1:] for row in rows if len(row) > 4}, lines[head].split()


def test_program_prints_three_rows(checkpoint, tiny):
    process = evaluate(checkpoint.parent, tiny, "--weights", "byol.pt")
    assert process.returncode == 0, process.stderr
    rows, titles = table(process.stdout)
    assert list(rows) == ["raw pixels", "random init", "byol.pt"]
    assert titles == ["320", "labels", "macro-F1", "kNN", "C", "s"]
    assert "100 test images" in process.stdout
    assert "weights and buffers of every frozen backbone are as they were" in process.stdout
    # What the row says is what the functions say.
    encoder, _ = linear_eval.load_encoder(checkpoint)
    data = common.load_dataset("fashion-mnist", tiny)
    train, test = (
        linear_eval.extract_features(encoder, images, data.mean, data.std)
        for images in (data.train_images, data.test_images)
    )
    predictions, strength = linear_eval.linear_probe(train, data.train_labels, test, 10)
    knn = linear_eval.knn_accuracy(train, data.train_labels, test, data.test_labels)
    found = " ".join(rows["byol.pt"]).split()
    assert found[0] == f"{accuracy(predictions, data.test_labels):.2f}"
    assert found[2:4] == [f"{knn:.2f}", str(strength)]


def test_several_budgets_checkpoints_and_pictures(checkpoint, tiny, tmp_path):
    (checkpoint.parent / "second.pt").write_bytes(checkpoint.read_bytes())
    options = ["--weights", "byol.pt", "second.pt", "--labels", "all", "20"]
    options += ["--trials", "2", "--plot", tmp_path / "new" / "pictures"]
    process = evaluate(checkpoint.parent, tiny, *options)
    assert process.returncode == 0, process.stderr
    rows, titles = table(process.stdout)
    assert titles[:4] == ["20", "labels", "320", "labels"]
    assert list(rows) == ["raw pixels", "random init", "byol.pt", "second.pt"]
    assert all(["±" in cell for cell in row[:2]] == [True, False] for row in rows.values())
    assert rows["byol.pt"][:4] == rows["second.pt"][:4]
    one = ["confusion", "map", "neighbours"]
    names = {"curves.png", "labels.png", *(f"{x}-{y}.png" for x in one for y in ("byol", "second"))}
    pictures = list((tmp_path / "new" / "pictures").iterdir())
    assert {path.name for path in pictures} == names
    for path in pictures:
        pixels = torchvision.transforms.functional.pil_to_tensor(Image.open(path)).float()
        assert min(pixels.shape[1:]) > 300 and pixels.std() > 10


def run_main(monkeypatch, folder, tiny, *options):
    """Run linear_eval.main in this process, so that parts of it can be replaced."""
    monkeypatch.chdir(folder)
    linear_eval.main(["--data-dir", str(tiny), "--device", "cpu", *options])


def test_mean_and_deviation_of_the_draws(checkpoint, tiny, capsys, monkeypatch):
    data, seen = common.load_dataset("fashion-mnist", tiny), []

    def probe(train, labels, test, n_classes, progress):
        seen.append(labels)
        correct = 40 + 10 * (len(seen) % 3)  # percent, of these 100 images
        return torch.where(torch.arange(100) < correct, data.test_labels, -1), 1

    monkeypatch.setattr(linear_eval, "linear_probe", probe)
    run_main(monkeypatch, checkpoint.parent, tiny, "--weights", "byol.pt", "--labels", "30")
    rows, _ = table(capsys.readouterr().out)
    assert [row[0] for row in rows.values()] == ["50.00 ± 10.00"] * 3
    assert len(seen) == 9 and all(labels.bincount().tolist() == [3] * 10 for labels in seen)


def test_different_backbones_are_not_compared(checkpoint, tiny, tmp_path):
    saved = torch.load(checkpoint, weights_only=True)
    model = {
        f"backbone.{k}": v for k, v in common.build_backbone("resnet18", 1).state_dict().items()
    }
    args = saved["args"] | {"backbone": "resnet18"}
    torch.save(saved | {"args": args, "model": model}, tmp_path / "other.pt")
    process = evaluate(tmp_path, tiny, "--weights", checkpoint, "other.pt")
    assert process.returncode == 2 and "other.pt has backbone resnet18" in process.stderr


def test_baselines_and_finetuning(checkpoint, tiny, capsys, monkeypatch):
    calls = []
    original = linear_eval.train_with_labels

    def watched(backbone, images, labels, *rest):
        weights = {k: v.clone() for k, v in backbone.state_dict().items()}
        calls.append((weights, images, labels, rest[3]))
        return original(backbone, images, labels, *rest)

    monkeypatch.setattr(linear_eval, "train_with_labels", watched)
    monkeypatch.setattr(linear_eval, "STEPS", 4)
    options = ["--weights", "byol.pt", "--labels", "20", "--trials", "2"]
    run_main(monkeypatch, checkpoint.parent, tiny, *options, "--baselines", "--finetune")
    rows, _ = table(capsys.readouterr().out)
    assert list(rows)[3:] == ["labels only", "byol.pt fine-tuned"]
    data = common.load_dataset("fashion-mnist", tiny)
    encoder, _ = linear_eval.load_encoder(checkpoint)
    for i, (weights, images, labels, lr) in enumerate(calls):
        drawn = linear_eval.draw_labels(data.train_labels, 20, seed=i % 2)
        assert torch.equal(images, data.train_images[drawn])  # these labels and no more
        assert torch.equal(labels, data.train_labels[drawn])
        pretrained = all(torch.equal(v, weights[k]) for k, v in encoder.state_dict().items())
        assert pretrained == (i >= 2)
        assert lr == (linear_eval.FINETUNE_LR if pretrained else linear_eval.SCRATCH_LR)
    assert len(calls) == 4


def test_train_with_labels_learns(tiny, monkeypatch):
    monkeypatch.setattr(linear_eval, "STEPS", 60)
    data = common.load_dataset("fashion-mnist", tiny)
    torch.manual_seed(0)
    backbone = common.build_backbone("convnet", 1, 28)
    before = [p.clone() for p in backbone.parameters()]
    drawn = linear_eval.draw_labels(data.train_labels, 100, 0)
    images, labels = data.train_images[drawn], data.train_labels[drawn]
    model = linear_eval.train_with_labels(backbone, images, labels, 10, data.mean, data.std, 0.1, 0)
    assert model[0] is backbone  # trained itself, not a copy
    assert all(not torch.equal(p, q) for p, q in zip(backbone.parameters(), before, strict=True))
    logits = linear_eval.extract_features(model, data.test_images, data.mean, data.std)
    assert accuracy(logits.argmax(dim=1), data.test_labels) > 50


def test_report_agrees_with_the_table(checkpoint, tiny):
    text = evaluate(checkpoint.parent, tiny, "--weights", "byol.pt", "--report").stdout
    matrix = re.findall(r"^ ?\[+([ \d]+)\]+$", text, re.MULTILINE)
    matrix = torch.tensor([[int(n) for n in row.split()] for row in matrix])
    assert matrix.shape == (10, 10) and matrix.sum(dim=1).tolist() == [10] * 10
    row = next(line for line in text.splitlines() if line.startswith("byol.pt"))
    assert float(row.split()[1]) == matrix.diag().sum().item()  # of 100 test images
    for name in ("Ankle boot", "precision", "recall", "f1-score"):
        assert name in text


EXPORTED = """
import sys, torch
sys.path = [p for p in sys.path if "site-packages" in p or "python3" in p]
program, images = torch.export.load("encoder.pt").module(), torch.load("images.pt")
torch.save([program(images[:1]), program(images)], "features.pt")
"""


def test_exported_convnet_runs_without_this_code(checkpoint, tiny, tmp_path):
    options = ["--weights", checkpoint, "--export", "encoder.pt"]
    process = evaluate(tmp_path, tiny, *options)
    assert process.returncode == 0 and "takes (N, 1, 28, 28) float32" in process.stdout
    data = common.load_dataset("fashion-mnist", tiny)
    torch.save((data.test_images[:7].float() / 255 - data.mean) / data.std, tmp_path / "images.pt")
    subprocess.run([sys.executable, "-I", "-c", EXPORTED], cwd=tmp_path, check=True)
    one, seven = torch.load(tmp_path / "features.pt")
    encoder, _ = linear_eval.load_encoder(checkpoint)
    expected = linear_eval.extract_features(encoder, data.test_images[:7], data.mean, data.std)
    torch.testing.assert_close(seven, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one, expected[:1], rtol=1e-4, atol=1e-5)
    again = evaluate(tmp_path, tiny, *options)
    assert again.returncode == 2 and "a folder and no file there yet" in again.stderr


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
    model, args = saved["model"], saved["args"]
    if kind == "half":
        path.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("these are not weights\n")
    elif kind == "folder":
        path.mkdir()
    elif kind == "state dict":
        torch.save(common.build_backbone("resnet18", 3).state_dict(), path)
    elif kind == "tensor":
        torch.save(torch.ones(3), path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Payload()))
    elif kind == "torch pickle":
        torch.save({"args": args, "model": Payload()}, path)
    elif kind.startswith("no "):
        torch.save({k: v for k, v in saved.items() if k != kind[3:]}, path)
    elif kind == "missing weight":
        torch.save(
            saved | {"model": {k: v for k, v in model.items() if k[-8:] != "0.weight"}}, path
        )
    elif kind == "extra weight":
        torch.save(saved | {"model": model | {"backbone.99.weight": torch.ones(1)}}, path)
    elif kind == "wrong shape":
        torch.save(saved | {"model": model | {"backbone.0.weight": torch.ones(1)}}, path)
    elif kind == "other backbone":
        torch.save(saved | {"args": args | {"backbone": "resnet18"}}, path)
    elif kind == "not finite":
        model["backbone.0.weight"][0] = float("nan")
        torch.save(saved, path)


BAD = ["half", "empty", "text", "folder", "state dict", "tensor", "pickle", "torch pickle"]
BAD += ["no model", "no args", "no metrics", "missing weight", "extra weight", "wrong shape"]
BAD += ["other backbone", "not finite"]


@pytest.mark.parametrize("kind", [*BAD, "missing"])
def test_bad_weights_are_refused_in_one_line(checkpoint, tiny, tmp_path, kind):
    bad_weights(kind, tmp_path / "bad.pt", checkpoint)
    process = evaluate(tmp_path, tiny, "--weights", "bad.pt")
    assert process.returncode == 2 and process.stdout == ""
    words = "does not exist" if kind == "missing" else "is not a whole checkpoint of these scripts"
    assert process.stderr.startswith(f"linear_eval.py: error: bad.pt {words}")
    assert process.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "labels, words",
    [("0", "got 0"), ("7", "not a multiple"), ("330", "needs 33 images"), ("many", "got many")],
)
def test_bad_label_budgets_are_refused(checkpoint, tiny, labels, words):
    process = evaluate(checkpoint.parent, tiny, "--weights", "byol.pt", "--labels", labels)
    assert process.returncode == 2 and words in process.stderr
    assert process.stderr.count("\n") == 1


def test_a_folder_that_moved_is_named_with_dataset(tiny, tmp_path):
    for split, count in (("train", 8), ("test", 4)):
        for label in range(2):
            (tmp_path / "old" / split / str(label)).mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", (16, 16), (60 + 100 * label + i, 0, 0))
                image.save(tmp_path / "old" / split / str(label) / f"{i}.png")
    options = ["--dataset", "old", "--image-size", "16", "--epochs", "1", "--device", "cpu"]
    assert call(tmp_path, "byol.py", *options, "--batch-size", "8").returncode == 0
    (tmp_path / "old").rename(tmp_path / "new")
    process = evaluate(tmp_path, tiny, "--weights", "byol.pt")
    assert process.returncode == 2 and "--dataset old is neither" in process.stderr
    process = evaluate(tmp_path, tiny, "--weights", "byol.pt", "--dataset", "new")
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("new, convnet, 8 test images.")
    assert re.search(r"^raw pixels +100\.00", process.stdout, re.M)  # bright against dark
    process = evaluate(tmp_path, tiny, "--weights", "byol.pt", "--dataset", "fashion-mnist")
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert "images of (1, 28, 28), byol.pt takes (3, 16, 16)" in process.stderr


def test_features_do_not_depend_on_the_batch(tiny):
    data = common.load_dataset("fashion-mnist", tiny)
    encoder = common.build_backbone("convnet", 1)
    encoder(torch.rand(50, 1, 28, 28))  # running statistics that are not the initial ones
    together = linear_eval.extract_features(encoder, data.train_images[:40], data.mean, data.std)
    assert encoder.training  # as it was before
    for part in (slice(0, 1), slice(7, 29), slice(39, 40)):
        alone = linear_eval.extract_features(encoder, data.train_images[part], data.mean, data.std)
        torch.testing.assert_close(alone, together[part], rtol=1e-4, atol=1e-5)


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
    solutions = linear_eval.fit_logistic(features, labels, 4, (0.1, 1.0))
    for (weight, bias), strength in zip(solutions, (0.1, 1.0), strict=True):
        reference = LogisticRegression(C=strength, max_iter=5000, tol=1e-10).fit(features, labels)
        expected = torch.tensor(reference.coef_).float()
        torch.testing.assert_close(weight - weight.mean(0), expected, atol=2e-2, rtol=0)
        assert bias.shape == (4,)


def test_draw_labels_is_balanced_and_seeded():
    labels = torch.cat([torch.arange(200) % 10, -torch.ones(50).long()])
    drawn = linear_eval.draw_labels(labels, 50, seed=0)
    assert labels[drawn].bincount().tolist() == [5] * 10 and len(drawn.unique()) == 50
    assert torch.equal(drawn, linear_eval.draw_labels(labels, 50, seed=0))
    assert not torch.equal(drawn, linear_eval.draw_labels(labels, 50, seed=1))
