"""The evaluation: features, probe, neighbours, and files that must not be believed."""

import csv
import json
import math
import os
import pickle
import re
import subprocess
import sys

import common
import linear_eval
import pytest
import torch
from conftest import ROOT, call, train, write_images
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    process = train(folder, tiny, "byol", "--epochs", "1", "--hidden-dim", "32")
    assert process.returncode == 0, process.stderr
    return folder / "byol.pt"


UNTRAINED = ["raw pixels", "random init"]


def evaluate(folder, tiny, *options):
    """Run linear_eval.py on the tiny images, on the CPU."""
    return call(folder, "linear_eval.py", "--data-dir", tiny, "--device", "cpu", *options)


def run_main(folder, tiny, *options):
    """Run linear_eval.main in this process, so that parts of it can be replaced."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        linear_eval.main(["--data-dir", str(tiny), "--device", "cpu", *map(str, options)])


def clusters(n, dim=20, n_classes=4, seed=0, spread=1.5):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(n_classes, dim, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(n) % n_classes
    return centers[labels] + spread * torch.randn(n, dim, generator=generator), labels


def accuracy(predictions, labels):
    return 100 * (predictions == labels).double().mean().item()


def table(text):
    """Map the name of each row to its list of cells, and give the titles of the columns."""
    head, *lines = text.split("\n\n")[1].splitlines()
    rows = [re.split(r" {2,}", line) for line in lines]
    return {row[0]: row[1:] for row in rows}, re.split(r" {2,}", head)[1:]


def test_table_and_csv_say_what_the_functions_say(checkpoint, tiny, tmp_path):
    """The numbers in the table are the means of the lines in the file."""
    path = tmp_path / "scores.csv"
    options = ["--weights", "byol.pt", "--labels", "all", 20, "--trials", 2, "--csv", path]
    process = evaluate(checkpoint.parent, tiny, *options)
    assert process.returncode == 0, process.stderr
    assert "Always guessing T-shirt/top gives 10.00." in process.stdout
    rows, titles = table(process.stdout)
    assert titles == ["20 labels", "320 labels", "kNN"]
    text = path.read_text()
    lines = list(csv.DictReader(text.splitlines()))
    assert [line["row"] for line in lines] == [name for name in rows for _ in range(3)]
    assert list(rows) == ["raw pixels", "random init", "byol.pt"]
    for name, (few, every, knn) in rows.items():
        cells = [line for line in lines if line["row"] == name]
        drawn = [(cell["labels"], cell["draw"]) for cell in cells]
        assert drawn == [("20", "0"), ("20", "1"), ("320", "")]
        first, second, last = (float(cell["accuracy"]) for cell in cells)
        assert few == f"{(first + second) / 2:.2f} ± {abs(first - second) / 2**0.5:.2f}"
        assert every == f"{last:.2f}" and knn == f"{float(cells[2]['knn']):.2f}"
        assert all(float(cell["seconds"]) > 0 and float(cell["knn"]) > 0 for cell in cells)

    encoder, saved = linear_eval.load_encoder(checkpoint)
    data = common.load_dataset("fashion-mnist", tiny)
    assert saved["args"]["mean"] == data.mean.tolist()
    x = (data.test_images / 255 - data.mean) / data.std
    test = linear_eval.extract_features(encoder, data.test_images)
    expected = F.normalize(encoder[-1](x).detach(), dim=1)
    torch.testing.assert_close(test, expected, rtol=1e-4, atol=1e-5)
    features = linear_eval.extract_features(encoder, data.train_images)
    layer, c = linear_eval.linear_probe(features, data.train_labels, 10)
    score = accuracy(layer(test).argmax(dim=1), data.test_labels)
    knn = linear_eval.knn_accuracy(features, data.train_labels, test, data.test_labels)
    assert rows["byol.pt"][1:] == [f"{score:.2f}", f"{knn:.2f}"] and lines[-1]["c"] == str(c)

    assert json.loads(lines[6]["options"]) == saved["args"]
    seconds = sum(row["seconds"] for row in saved["metrics"])
    assert float(lines[6]["training_seconds"]) == pytest.approx(seconds, abs=0.06)
    own = [lines[6][key] for key in ("checkpoint", "method", "epochs", "seed", "scored", "dataset")]
    assert own == ["byol.pt", "byol", "1", "0", "test", "fashion-mnist"]
    of_none = ("checkpoint", "method", "epochs", "training_seconds", "options")
    assert [lines[0][key] for key in of_none] == [""] * 5 and lines[0]["seed"] == "0"
    assert lines[0]["torch"] == torch.__version__ and lines[0]["device"]
    assert lines[0]["threads"] == str(torch.get_num_threads())
    assert text.startswith(
        "row,checkpoint,method,dataset,scored,labels,draw,accuracy,knn,c,seconds,epochs,seed,"
        "training_seconds,options,device,threads,torch\n"
    )


def test_csv_keeps_what_it_has(checkpoint, tiny, tmp_path, monkeypatch):
    path = tmp_path / "scores.csv"
    monkeypatch.setattr(linear_eval, "CANDIDATES", (10,))
    monkeypatch.setattr(linear_eval, "train_with_labels", None)  # ends the program at that row
    options = ["--weights", "byol.pt", "--validation", 100, "--baselines", "--csv"]
    for _ in range(2):
        with pytest.raises(TypeError):
            run_main(checkpoint.parent, tiny, *options, path)
    first, *lines = path.read_text().splitlines()  # and what it had measured is there
    assert first.startswith("row,")
    assert [line.split(",")[0] for line in lines] == [*UNTRAINED, "byol.pt"] * 2
    assert all(",validation 100,220,," in line for line in lines)


def test_csv_that_cannot_be_written(checkpoint, tiny, tmp_path):
    """A file of another kind stays as it is. A traceback would be of no help."""
    path = tmp_path / "notes.csv"
    path.write_text("mine\n")
    options = ["--weights", "byol.pt", "--labels", 20, "--csv"]
    process = evaluate(checkpoint.parent, tiny, *options, path)
    assert process.returncode == 1 and path.read_text() == "mine\n"
    assert process.stderr == f"--csv {path} has other columns: name another file\n"
    process = evaluate(checkpoint.parent, tiny, *options, tmp_path)
    assert process.returncode == 1 and process.stderr.count("\n") == 1
    assert str(tmp_path) in process.stderr


def test_ctrl_c_ends_in_one_word(checkpoint, tiny, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "load_dataset", stop)
    process = evaluate(checkpoint.parent, tiny, "--weights", "byol.pt")
    assert (process.returncode, process.stderr) == (1, "stopped\n")


def test_draws_of_labels(checkpoint, tiny, capsys, monkeypatch):
    """Balanced, of other images for each draw and seed; mean and deviation are theirs."""
    data, seen = common.load_dataset("fashion-mnist", tiny), []

    def probe(features, labels, n_classes):
        seen.append((features, labels))
        correct = 40 + 10 * (len(seen) % 3)  # percent, of these 100 images
        answers = torch.where(torch.arange(100) < correct, data.test_labels, 9 - data.test_labels)
        return lambda test: F.one_hot(answers), 1

    monkeypatch.setattr(linear_eval, "linear_probe", probe)
    for seed in (0, 1):
        options = ["--weights", "byol.pt", "--labels", "30", "--seed", seed]
        run_main(checkpoint.parent, tiny, *options)
        rows, _ = table(capsys.readouterr().out)
        assert [row[0] for row in rows.values()] == ["50.00 ± 10.00"] * 3
    assert len(seen) == 18 and all(y.bincount().tolist() == [3] * 10 for _, y in seen)
    pixels = [train for train, _ in seen[:3] + seen[9:12]]  # three draws of either seed
    assert not any(torch.equal(a, b) for i, a in enumerate(pixels) for b in pixels[:i])
    known = torch.arange(100, 200)
    drawn = linear_eval.draw_labels(data.train_labels, known, 50, data.classes, seed=0)
    assert data.train_labels[drawn].bincount().tolist() == [5] * 10
    assert len(drawn.unique()) == 50 and set(drawn.tolist()) <= set(known.tolist())
    again = linear_eval.draw_labels(data.train_labels, known, 50, data.classes, seed=0)
    assert torch.equal(drawn, again)

    seen.clear()  # all images can be drawn in one way only
    run_main(checkpoint.parent, tiny, "--weights", "byol.pt", "--labels", 320, "all")
    rows, titles = table(capsys.readouterr().out)
    assert titles[:2] == ["320 labels", "kNN"] and len(seen) == 3


def test_validation_leaves_the_test_set_alone(checkpoint, tiny, capsys, monkeypatch):
    """The images scored on are training images, no classifier gets them, and no test image."""
    load, calls = linear_eval.load_dataset, []

    def without_test(*args):
        return load(*args)._replace(test_images=None, test_labels=None)

    def extract(encoder, images):
        calls.append(images)
        return torch.randn(len(images), 8)

    monkeypatch.setattr(linear_eval, "load_dataset", without_test)
    monkeypatch.setattr(linear_eval, "extract_features", extract)
    run_main(checkpoint.parent, tiny, "--weights", "byol.pt", "--validation", 60)
    assert "on 60 images" in capsys.readouterr().out
    scored, fitted = ({tuple(x.tolist()) for x in part[:, 0, 0, :2]} for part in calls[:2])
    assert len(fitted) == 260 and len(scored) == 60 and not fitted & scored


def test_baselines_and_finetuning(checkpoint, tiny, capsys, monkeypatch):
    calls, original = [], linear_eval.train_with_labels

    def watched(encoder, images, labels, n_classes, seed, backbone_lr):
        calls.append((encoder[-1][0].weight.clone(), images, labels, backbone_lr))
        return original(encoder, images, labels, n_classes, seed, backbone_lr)

    monkeypatch.setattr(linear_eval, "train_with_labels", watched)
    monkeypatch.setattr(linear_eval, "STEPS", 4)
    options = ["--weights", "byol.pt", "--labels", 20, "--trials", 2, "--baselines", "--finetune"]
    run_main(checkpoint.parent, tiny, *options)
    rows, _ = table(capsys.readouterr().out)
    assert list(rows)[3:] == ["labels only", "byol.pt fine-tuned"]
    data = common.load_dataset("fashion-mnist", tiny)
    encoder, _ = linear_eval.load_encoder(checkpoint)
    for i, (weight, images, labels, backbone_lr) in enumerate(calls):
        known = torch.arange(320)
        drawn = linear_eval.draw_labels(data.train_labels, known, 20, data.classes, seed=i % 2)
        assert torch.equal(images, data.train_images[drawn])  # these labels and no more
        assert torch.equal(labels, data.train_labels[drawn])
        pretrained = torch.equal(weight, encoder[-1][0].weight)  # each time from the start
        assert pretrained == (i >= 2) and backbone_lr == (0.001 if pretrained else 0.03)
    assert len(calls) == 4


def test_train_with_labels_learns(tiny, monkeypatch):
    monkeypatch.setattr(linear_eval, "STEPS", 60)
    monkeypatch.setattr(linear_eval, "LR", 0.1)
    data = common.load_dataset("fashion-mnist", tiny)
    torch.manual_seed(0)
    backbone = common.build_backbone("convnet", 1, 28)
    encoder = linear_eval.normalized(backbone, data.mean.tolist(), data.std.tolist())
    images, labels = data.train_images[:100], data.train_labels[:100]
    network = linear_eval.train_with_labels(encoder, images, labels, 10, 0, 0.1)
    pairs = zip(network[-1][0].parameters(), backbone.parameters(), strict=True)
    assert all(not torch.equal(p, q) for p, q in pairs)  # all of the copy is trained
    logits = linear_eval.apply(network, data.test_images)
    assert accuracy(logits.argmax(dim=1), data.test_labels) > 50


def test_settings_of_training_with_labels(tiny, monkeypatch):
    """The rows "labels only" and "fine-tuned" are as good as these settings make them."""
    optimizers, rates, views, losses = [], [], [], []

    class Watched(torch.optim.SGD):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            backbone, head = (group["params"] for group in self.param_groups)
            optimizers.append((self, len(backbone), [p.detach().clone() for p in head]))

        def step(self):
            rates.append([group["lr"] for group in self.param_groups])
            return super().step()

    def watch(calls, function):
        def watched(*args, **options):
            calls.append((args[0], options))
            return function(*args, **options)

        return watched

    monkeypatch.setattr(torch.optim, "SGD", Watched)
    monkeypatch.setattr(linear_eval, "augment", watch(views, linear_eval.augment))
    monkeypatch.setattr(F, "cross_entropy", watch(losses, F.cross_entropy))
    assert (linear_eval.STEPS, linear_eval.BATCH_SIZE) == (3000, 128)
    monkeypatch.setattr(linear_eval, "STEPS", 20)
    data = common.load_dataset("fashion-mnist", tiny)
    backbone = common.build_backbone("convnet", 1, 28)
    encoder = linear_eval.normalized(backbone, data.mean.tolist(), data.std.tolist())
    normalized = []
    encoder[1].register_forward_hook(lambda *call: normalized.append(1))
    for n, steps in ((60, 30), (20, 30), (320, 75)):  # 30 epochs of batches of up to 128
        rates.clear()
        images, labels = data.train_images[:n], data.train_labels[:n]
        linear_eval.train_with_labels(encoder, images, labels, 10, 0, 0.005)
        assert len(rates) == steps
        for peak, found in zip((0.005, 0.03), zip(*rates, strict=True), strict=True):
            expected = [peak * (1 + math.cos(math.pi * i / steps)) / 2 for i in range(steps)]
            assert found == pytest.approx(expected)
    for optimizer, in_backbone, head in optimizers:
        for group in optimizer.param_groups:
            settings = group["momentum"], group["weight_decay"], group["nesterov"]
            assert settings == (0.9, 5e-4, True)
        assert in_backbone == len(list(backbone.parameters()))
        assert head[0].shape[0] == 10 and not head[0].any()  # the linear layer starts at zero
    assert all(options == dict(label_smoothing=0.1) for _, options in losses)
    assert len(views) == len(losses) == len(normalized) == 135
    first, second = views[0][0], views[1][0]  # 60 images, in another order each epoch
    assert not torch.equal(first, second)
    assert torch.equal(first.sum(dim=(1, 2, 3)).sort()[0], second.sum(dim=(1, 2, 3)).sort()[0])
    first, second = ({x.numpy().tobytes() for x in batch} for batch, _ in views[60:62])
    assert len(first) == len(second) == 128 and not first & second  # of 320: no image twice


def brute_force_knn(train, train_labels, test, test_labels, k, temperature):
    correct = 0
    for query, label in zip(test.double(), test_labels, strict=True):
        cosines = [float(query @ x / (query.norm() * x.norm())) for x in train.double()]
        nearest = sorted(range(len(cosines)), key=lambda i: -cosines[i])[:k]
        votes = [0.0] * 4
        for i in nearest:
            votes[train_labels[i]] += 2.718281828459045 ** (cosines[i] / temperature)
        correct += votes.index(max(votes)) == int(label)
    return 100 * correct / len(test_labels)


@pytest.mark.parametrize("options", [(1, 0.1), (20, 0.5), (500, 0.1), ()])
def test_knn_equals_brute_force(options):
    train, train_labels = clusters(250)
    test, test_labels = clusters(90, seed=1)
    units = F.normalize(train, dim=1), train_labels, F.normalize(test, dim=1), test_labels
    found = linear_eval.knn_accuracy(*units, *options)
    expected = brute_force_knn(train, train_labels, test, test_labels, *(options or (200, 0.1)))
    assert found == pytest.approx(expected, abs=1e-9) and 30 < found < 100


@pytest.mark.parametrize("n_classes, factor", [(2, 2), (4, 1)])
def test_fit_finds_the_minimum_of_logistic_regression(n_classes, factor):
    """Of scikit-learn's, as the docstring says. Also where features are correlated."""
    features, labels = clusters(300, n_classes=n_classes)
    features[:, 0], features[:, 1] = 3 * features[:, 0], features[:, 2] + features[:, 1] / 5
    for c in (0.1, 1.0):
        layer = linear_eval.fit(features, labels, n_classes, c)
        reference = LogisticRegression(C=factor * c, max_iter=5000, tol=1e-10)
        expected = reference.fit(features, labels).decision_function(features)
        logits = layer(features).detach()
        if n_classes == 2:  # there it is the difference of the two
            logits = logits[:, 1] - logits[:, 0]
        else:
            logits = logits - logits.mean(dim=1, keepdim=True)
        torch.testing.assert_close(logits, torch.tensor(expected).float(), atol=0.02, rtol=0)


@pytest.mark.parametrize("strong", [True, False])
def test_the_best_strength_is_chosen(strong):
    """Strong: labels that are partly wrong, many useless features. Weak: a small difference of two
    large features is all that tells the classes apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(1200) % 2
    x = torch.randn(1200, 100 if strong else 4, generator=generator)
    noise = torch.randn(1200, generator=generator)
    if strong:
        x[:, 0] += 4 * labels - 2
        given = torch.where(noise < -0.8, 1 - labels, labels)
    else:
        x[:, 1], given = x[:, 0] + 0.06 * labels + 0.02 * noise, labels
    train, test = F.normalize(x[:400], dim=1), F.normalize(x[400:], dim=1)
    layer, best = linear_eval.linear_probe(train, given[:400], 2)
    scores = {}
    for c in linear_eval.CANDIDATES:
        model = LogisticRegression(C=200 * c, max_iter=5000, tol=1e-8).fit(train, given[:400])
        scores[c] = 100 * model.score(test, labels[400:])
    assert scores[best] > max(scores.values()) - 0.4 > min(scores.values()) + 2
    found = accuracy(layer(test).argmax(dim=1), labels[400:])
    assert found == pytest.approx(scores[best], abs=0.3)


def test_features_of_too_few_dimensions_give_a_number():
    """Equal images, features that are dead or copies, hardly any images: no error, and chance."""
    labels = torch.arange(60) % 3
    for features in (
        torch.zeros(60, 5),
        F.normalize(torch.ones(60, 100), dim=1),
        labels[:, None].repeat(1, 70).float(),
    ):
        layer, _ = linear_eval.linear_probe(features, labels, 3)
        assert accuracy(layer(features).argmax(dim=1), labels) >= 100 / 3 - 1e-6
    layer, _ = linear_eval.linear_probe(torch.eye(2), torch.tensor([2, 0]), 3)
    assert layer(torch.eye(2)).argmax(dim=1).tolist() == [2, 0]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of images without labels, one with uneven classes, and a checkpoint of the first."""
    folder = tmp_path_factory.mktemp("photos")
    write_images(folder / "photos" / "a", 40)
    for name, n in (("cat", 6), ("dog", 15)):
        write_images(folder / "pets" / "train" / name, n)
    write_images(folder / "pets" / "unlabelled", 5)
    options = ["--dataset", "photos", "--epochs", 1, "--batch-size", 20, "--device", "cpu"]
    process = call(folder, "simclr.py", *options)
    assert process.returncode == 0 and "no kNN" in process.stdout, process.stderr
    assert "knn" not in torch.load(folder / "simclr.pt", weights_only=True)["metrics"][0]
    return folder


@pytest.mark.parametrize(
    "options, words",
    [
        ([], "photos has 0 images with labels to learn from, 0 to score"),
        (["--validation", 5], "photos has 0 images with labels to learn from, 0 to score"),
        (["--dataset", "pets"], "pets has 21 images with labels to learn from, 0 to score"),
        (["--dataset", "pets", "--validation", 20], "pets has 1 images with labels"),
        (
            ["--dataset", "pets", "--validation", 15, "--labels", 3],
            "--labels 3: take a multiple of 2 up to ",
        ),
        (
            ["--dataset", "pets", "--validation", 8, "--labels", 12],
            "to 10: cat has 5 to draw from",
        ),
    ],
)
def test_images_that_cannot_be_scored(photos, options, words):
    process = evaluate(photos, "data", "--weights", "simclr.pt", *options)
    assert process.returncode == 1 and words in process.stderr, process.stderr
    assert process.stderr.count("\n") == 1


def test_uneven_classes(photos, monkeypatch):
    """What guessing gives, balanced accuracy, and a report of a class that is not scored."""
    options = ["--weights", "simclr.pt", "--dataset", "pets", "--validation"]
    process = evaluate(photos, "data", *options, 8, "--report")
    assert process.returncode == 0, process.stderr
    cells = r" +([\d.]+) +[\d.]+ +([\d.]+)$"
    rows = re.findall(rf"^(raw pixels|random init|simclr.pt){cells}", process.stdout, re.M)
    assert len(rows) == 3 and re.search(
        r"^simclr.pt +\d.*\n\nraw pixels, 13 labels\n\[\[", process.stdout, re.M
    )
    matrices = re.findall(r"\[\[ ?(\d+) +(\d+)\]\n \[ ?(\d+) +(\d+)\]\]", process.stdout)
    for (_, plain, balanced), matrix in zip(rows, matrices, strict=True):
        a, b, c, d = map(int, matrix)
        assert plain == f"{100 * (a + d) / 8:.2f}"
        assert balanced == f"{50 * (a / (a + b) + d / (c + d)):.2f}"
    assert f"guessing dog gives {100 * (c + d) / 8:.2f}" in process.stdout
    assert "balanced" in process.stdout and "f1-score" in process.stdout
    process = evaluate(photos, "data", *options, 1, "--report")
    assert process.returncode == 0, process.stderr
    assert re.search(r"cat +0.00 +0.00 +0.00 +0\n", process.stdout)


class Payload:
    """A pickle that would run code when it is loaded."""

    def __reduce__(self):
        return print, ("the payload ran",)


BAD = {
    "missing": lambda path, saved: None,
    "empty": lambda path, saved: path.touch(),
    "half": lambda path, saved: torch.save(saved, path) or os.truncate(path, 99_999),
    "folder": lambda path, saved: path.mkdir(),
    "tensor": lambda path, saved: torch.save(torch.ones(3), path),
    "pickle": lambda path, saved: path.write_bytes(pickle.dumps(Payload())),
    "torch pickle": lambda path, saved: torch.save(saved | {"model": Payload()}, path),
    "no metrics": lambda path, saved: saved.pop("metrics") and torch.save(saved, path),
}
WEIGHTS = {
    "missing weight": lambda model: model.pop("backbone.0.weight"),
    "extra weight": lambda model: model.update({"backbone.99.weight": torch.ones(1)}),
    "wrong shape": lambda model: model.update({"backbone.0.weight": torch.ones(1)}),
    "not finite": lambda model: model["backbone.0.weight"].fill_(float("nan")),
}


@pytest.mark.parametrize("kind", [*BAD, *WEIGHTS])
def test_bad_weights_are_refused_in_one_line(checkpoint, tiny, tmp_path, kind):
    saved = torch.load(checkpoint, weights_only=True)
    if kind in WEIGHTS:
        WEIGHTS[kind](saved["model"])
        torch.save(saved, tmp_path / "bad.pt")
    else:
        BAD[kind](tmp_path / "bad.pt", saved)
    process = evaluate(tmp_path, tiny, "--weights", "bad.pt")
    assert process.returncode == 1 and process.stdout == ""
    whole = "is missing, damaged, unfinished or of another program\n"
    reason = "has weights that are not finite: train again" if kind == "not finite" else whole
    assert process.stderr.startswith(f"bad.pt {reason}")
    assert process.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "options, words",
    [
        (["--labels", "0"], "--labels 0: take a multiple of 10 up to 320: "),
        (["--labels", "few"], "--labels are numbers or all"),
        (["--labels", "7"], "--labels 7: take a multiple of 10 up to 320: "),
        (["--labels", "330"], "--labels 330: take a multiple of 10 up to 320: "),
        (["--trials", "0"], "--trials is 1 or more"),
        (["--validation", "-1"], "--validation 0 or more"),
        (["--dataset", "photos"], "byol.pt has convnet [1, 28, 28], not convnet [3, 28, 28]"),
    ],
)
def test_bad_options_are_refused(checkpoint, tiny, options, words):
    write_images(checkpoint.parent / "photos", 3)
    process = evaluate(checkpoint.parent, tiny, "--weights", "byol.pt", *options)
    assert process.returncode != 0 and words in process.stderr.splitlines()[-1]


def test_a_terminal_without_the_sign(checkpoint, tiny):
    """The table is printed all the same, and nothing that was measured is lost."""
    options = ["--weights", "byol.pt", "--labels", "20", "--data-dir", tiny, "--device", "cpu"]
    process = subprocess.run(
        [sys.executable, ROOT / "linear_eval.py", *options],
        cwd=checkpoint.parent,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )
    assert process.returncode == 0, process.stderr
    assert re.search(rb"byol.pt +\d+.\d\d \? \d", process.stdout)
