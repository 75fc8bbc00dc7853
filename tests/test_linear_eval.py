"""The evaluation: features, probe, neighbours, and files that must not be believed."""

import csv
import json
import math
import os
import pickle
import re
import subprocess
import sys
import time
from itertools import pairwise
from unittest.mock import Mock

import common
import linear_eval
import pytest
import torch
from conftest import ROOT, call, train, write_images
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    process = train(folder, tiny, "byol", "--hidden-dim", "32")
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


def table(text):
    """Map the name of each row to its list of cells, and give the titles of the columns."""
    head, *lines = text.split("\n\n")[1].splitlines()
    rows = [re.split(r" {2,}", line) for line in lines]
    return {row[0]: row[1:] for row in rows}, re.split(r" {2,}", head)[1:]


def test_table_and_csv_say_what_the_functions_say(checkpoint, tiny, tmp_path, monkeypatch):
    """The numbers in the table are the means of the lines in the file."""
    path, data = tmp_path / "scores.csv", common.load_dataset("fashion-mnist", tiny)
    labels = torch.cat([1 + torch.arange(250) % 7, data.train_labels[250:]])
    truth = data.test_labels.clamp(max=8)  # so that there is no image of the last class
    data = data._replace(train_labels=labels, test_labels=truth)  # not all scores are 100
    monkeypatch.setattr(common, "load_dataset", lambda *_: data)
    options = ["--weights", "byol.pt", "--labels", "all", 20, "--trials", 2, "--csv", path]
    begun = time.perf_counter()
    process = evaluate(checkpoint.parent, tiny, *options)
    passed = time.perf_counter() - begun
    assert process.returncode == 0, process.stderr
    assert "Always guessing Trouser gives 10.00." in process.stdout
    rows, titles = table(process.stdout)
    assert titles == ["20 labels", "320 labels", "kNN", "balanced"]
    text = path.read_text()
    lines = list(csv.DictReader(text.splitlines()))
    assert [line["row"] for line in lines] == [name for name in rows for _ in range(3)]
    assert sum(float(line["seconds"]) for line in lines) < passed
    assert list(rows) == [*UNTRAINED, "byol.pt"]
    for name, (few, every, knn, _) in rows.items():
        cells = [line for line in lines if line["row"] == name]
        drawn = [(cell["labels"], cell["draw"]) for cell in cells]
        assert drawn == [("20", "0"), ("20", "1"), ("320", "")]
        first, second, last = (float(cell["accuracy"]) for cell in cells)
        assert few == f"{(first + second) / 2:.2f} ± {abs(first - second) / 2**0.5:.2f}"
        assert every == f"{last:.2f}" and knn == f"{float(cells[2]['knn']):.2f}"
        assert all(float(cell["seconds"]) > 0 and float(cell["knn"]) > 0 for cell in cells)

    encoder, saved = linear_eval.load_encoder(checkpoint)
    assert saved["args"]["mean"] == data.mean.tolist()
    x = (data.test_images[:9] / 255 - data.mean) / data.std
    test = linear_eval.extract_features(encoder, data.test_images)
    expected = F.normalize(encoder[-1](x).detach(), dim=1)  # an image's do not depend on the others
    torch.testing.assert_close(test[:9], expected, rtol=1e-4, atol=1e-5)
    features = linear_eval.extract_features(encoder, data.train_images)
    layer, c = linear_eval.linear_probe(features, labels, 10)
    knn = linear_eval.knn_accuracy(features, labels, test, truth)
    guesses = layer(test).argmax(dim=1)
    balanced = sum(linear_eval.percent(guesses[truth == i], i) for i in range(9)) / 9
    scores = [f"{x:.2f}" for x in (linear_eval.percent(guesses, truth), knn, balanced)]
    assert rows["byol.pt"][1:] == scores and lines[-1]["c"] == str(c)

    assert json.loads(lines[6]["options"]) == saved["args"]
    seconds = sum(row["seconds"] for row in saved["metrics"])
    assert float(lines[6]["training_seconds"]) == pytest.approx(seconds, abs=0.06)
    own = [lines[6][key] for key in ("checkpoint", "method", "epochs", "seed", "scored", "dataset")]
    assert own == ["byol.pt", "byol", "2", "0", "test", "fashion-mnist"]
    of_none = ("checkpoint", "method", "epochs", "training_seconds", "options")
    assert [lines[0][key] for key in of_none] == [""] * 5 and lines[0]["seed"] == "0"
    assert lines[0]["dataset"] == "fashion-mnist" and lines[0]["torch"] == torch.__version__
    assert lines[0]["threads"] == str(torch.get_num_threads()) and lines[0]["device"]
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
    _, *lines = path.read_text().splitlines()  # and what it had measured is there
    assert [line.split(",")[0] for line in lines] == [*UNTRAINED, "byol.pt"] * 2
    assert all(",validation 100,220,," in line for line in lines)


def test_csv_that_cannot_be_written(checkpoint, tiny, tmp_path):
    """A file of another kind stays as it is. A traceback would be of no help."""
    path = tmp_path / "notes.csv"
    path.write_bytes(b"caf\xe9\n")  # no UTF-8
    options = ["--weights", "byol.pt", "--labels", 20, "--csv"]
    process = evaluate(checkpoint.parent, tiny, *options, path)
    assert process.returncode == 1 and path.read_bytes() == b"caf\xe9\n"
    assert process.stderr == f"--csv {path} has other columns: name another file\n"
    process = evaluate(checkpoint.parent, tiny, *options, tmp_path)
    assert process.returncode == 1 and re.fullmatch(rf".*{tmp_path}.*\n", process.stderr)


def test_ctrl_c_ends_in_one_word(checkpoint, tiny, monkeypatch):
    monkeypatch.setattr(common, "load_dataset", Mock(side_effect=KeyboardInterrupt))
    process = evaluate(checkpoint.parent, tiny, "--weights", "byol.pt")
    assert (process.returncode, process.stderr) == (1, "stopped\n")


def test_draws_of_labels(checkpoint, tiny, capsys, monkeypatch):
    """Balanced, of other images for each draw and seed; mean and deviation are theirs."""
    data, seen = common.load_dataset("fashion-mnist", tiny), []

    def probe(features, labels, n_classes):
        seen.append((features, labels))
        correct = (30, 40, 80)[len(seen) % 3]  # percent, of these 100 images
        answers = torch.where(torch.arange(100) < correct, data.test_labels, 9 - data.test_labels)
        return lambda test: F.one_hot(answers), 1

    monkeypatch.setattr(linear_eval, "linear_probe", probe)
    monkeypatch.setattr(linear_eval, "knn_accuracy", lambda *_: (10, 20, 60)[len(seen) % 3])
    for seed in (0, 1):
        options = ["--weights", "byol.pt", "--labels", "30", "--seed", seed]
        run_main(checkpoint.parent, tiny, *options)
        rows, _ = table(capsys.readouterr().out)
        assert list(rows.values()) == [["50.00 ± 26.46", "30.00"]] * 3
    assert len(seen) == 18 and all(y.bincount().tolist() == [3] * 10 for _, y in seen)
    pixels = [train for train, _ in seen[:3] + seen[9:12]]  # three draws of either seed
    assert not any(torch.equal(a, b) for i, a in enumerate(pixels) for b in pixels[:i])
    seen.clear()  # all images can be drawn in one way only
    run_main(checkpoint.parent, tiny, "--weights", "byol.pt", "--labels", 320, "all")
    rows, titles = table(capsys.readouterr().out)
    assert titles[:2] == ["320 labels", "kNN"] and len(seen) == 3


def test_validation_leaves_the_test_set_alone(checkpoint, tiny, capsys, monkeypatch):
    """The images scored on are training images, no classifier gets them, and no test image."""
    data = common.load_dataset("fashion-mnist", tiny)._replace(test_images=None, test_labels=None)
    extract = Mock(side_effect=lambda encoder, images: torch.ones(len(images), 1))
    monkeypatch.setattr(linear_eval, "load_dataset", lambda *_: data)
    monkeypatch.setattr(linear_eval, "extract_features", extract)
    runs = []
    for seed in (0, 1):
        options = ["--weights", "byol.pt", "--labels", 30, "all", "--trials", 1]
        run_main(checkpoint.parent, tiny, *options, "--validation", 60, "--seed", seed)
        assert "on 60 images" in capsys.readouterr().out
        pixels = [images[:, 0, 0, :2].long() for (_, images), _ in extract.call_args_list[-3:]]
        runs.append([(16 * x[:, 0] + x[:, 1]).tolist() for x in pixels])
    (scored, drawn, rest), (again, _, _) = runs
    assert scored == again and len(scored) == 60  # the same ones with any seed
    assert rest == sorted(set(range(320)) - set(scored)) and scored != list(range(60))
    assert drawn == sorted(set(drawn) & set(rest)) and len(drawn) == 30


def test_rows_and_their_networks(checkpoint, tiny, tmp_path, monkeypatch):
    """The random network is of the kind that was trained, and its weights depend on the seed."""
    saved, vit = torch.load(checkpoint, weights_only=True), common.build_backbone("vit", 1, 28)
    saved["args"]["backbone"] = "vit"
    saved["model"] = {f"backbone.{key}": value for key, value in vit.state_dict().items()}
    for name in ("a.pt", "b.pt"):
        torch.save(saved, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    options = ["--data-dir", str(tiny), "--device", "cpu", "--baselines", "--finetune"]
    options, random = [*options, "--weights", "a.pt", "b.pt", "--seed"], []
    for seed in ("0", "0", "1"):
        rows, data, _ = linear_eval.load(linear_eval.parse_args([*options, seed]))
        random.append(rows[1][1][-1].conv_proj.weight)
    assert torch.equal(random[0], random[1]) and not torch.equal(random[0], random[2])
    tuned = {"labels only": 0.03, "a.pt fine-tuned": 0.001, "b.pt fine-tuned": 0.001}
    assert {row[0]: row[3] for row in rows} == dict.fromkeys([*UNTRAINED, "a.pt", "b.pt"]) | tuned
    x = (data.test_images / 255 - data.mean) / data.std
    pixels, unlearnt, learnt = (encoder(data.test_images) for _, encoder, _, _ in rows[:3])
    torch.testing.assert_close(pixels, x.flatten(1))
    torch.testing.assert_close(unlearnt, rows[1][1][-1](x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(learnt, vit.eval()(x), rtol=1e-4, atol=1e-4)
    process = evaluate(tmp_path, tiny, "--weights", "a.pt", checkpoint)
    assert process.stderr == f"{checkpoint} has convnet [1, 28, 28], not vit [1, 28, 28]\n"


def test_baselines_and_finetuning(checkpoint, tiny, tmp_path, capsys, monkeypatch):
    """They get the images and labels that are drawn, and no more; the table has their scores."""
    data = common.load_dataset("fashion-mnist", tiny)
    train = Mock(return_value=lambda images: F.one_hot(data.test_labels))
    monkeypatch.setattr(linear_eval, "train_with_labels", train)
    options = ["--weights", "byol.pt", "--labels", 20, "--trials", 2, "--baselines", "--finetune"]
    path = tmp_path / "scores.csv"
    run_main(checkpoint.parent, tiny, *options, "--seed", 1, "--csv", path)
    rows, _ = table(capsys.readouterr().out)
    names = ["labels only", "byol.pt fine-tuned"]
    assert list(rows)[3:] == names and all(rows[x] == ["100.00 ± 0.00", "-"] for x in names)
    learnt = linear_eval.load_encoder(checkpoint)[0][-1][0].weight
    for i, ((encoder, images, labels, *numbers), _) in enumerate(train.call_args_list):
        known, seed = torch.arange(320), 10_000 + i % 2
        drawn = linear_eval.draw_labels(data.train_labels, known, 20, data.classes, seed)
        assert torch.equal(images, data.train_images[drawn])
        assert torch.equal(labels, data.train_labels[drawn])
        assert torch.equal(encoder[-1][0].weight, learnt) == (i >= 2)
        assert numbers == [10, 1, 0.001 if i >= 2 else 0.03]  # classes, --seed, rate
    lines = list(csv.DictReader(path.read_text().splitlines()))[-4:]
    own = [(line["checkpoint"], line["accuracy"], line["knn"], line["c"]) for line in lines]
    assert own == [("", "100.0", "", "")] * 2 + [("byol.pt", "100.0", "", "")] * 2


def test_settings_of_training_with_labels(tiny, monkeypatch):
    """The rows "labels only" and "fine-tuned" are as good as these settings make them."""
    rates, heads, normalized = [], [], []

    def before_step(optimizer, *_):
        for group in optimizer.param_groups:
            settings = group["momentum"], group["weight_decay"], group["nesterov"]
            assert settings == (0.9, 5e-4, True)
        rates.append([group["lr"] for group in optimizer.param_groups])
        heads.append(optimizer.param_groups[1]["params"][0].detach().clone())

    augment, loss = Mock(wraps=linear_eval.augment), Mock(wraps=F.cross_entropy)
    monkeypatch.setattr(linear_eval, "augment", augment)
    monkeypatch.setattr(F, "cross_entropy", loss)
    assert (linear_eval.STEPS, linear_eval.BATCH_SIZE) == (3000, 128)
    monkeypatch.setattr(linear_eval, "STEPS", 20)
    data = common.load_dataset("fashion-mnist", tiny)
    backbone = common.build_backbone("convnet", 1, 28)
    encoder = linear_eval.normalized(backbone, data.mean.tolist(), data.std.tolist())
    encoder[1].register_forward_hook(lambda *call: normalized.append(1))
    runs = [(60, 30, dict(seed=1)), (60, 30, dict(seed=1)), (60, 30, dict(seed=2))]
    for n, steps, options in (*runs, (320, 75, dict(backbone_lr=0.1))):  # 30 epochs of up to 128
        rates.clear(), heads.clear()
        images, labels = data.train_images[:n], data.train_labels[:n]
        with register_optimizer_step_pre_hook(before_step):
            network = linear_eval.train_with_labels(encoder, images, labels, 10, **options)
        assert len(rates) == steps
        assert heads[0].shape == (10, 2048) and not heads[0].any()  # it starts at zero
        peaks = options.get("backbone_lr", 0.001), 0.03
        for peak, found in zip(peaks, zip(*rates, strict=True), strict=True):
            expected = [peak * (1 + math.cos(math.pi * i / steps)) / 2 for i in range(steps)]
            assert found == pytest.approx(expected)
    views = [args[0] for args, _ in augment.call_args_list]
    assert all(0 <= x.min() and x.max() <= 1 for x in views)  # normalised afterwards
    numbers = [(255 * (16 * x[:, 0, 0, 0] + x[:, 0, 0, 1])).round().int().tolist() for x in views]
    for batch, ((_, labels), options) in zip(numbers, loss.call_args_list, strict=True):
        assert labels.tolist() == [i % 10 for i in batch] and options == dict(label_smoothing=0.1)
    assert len(numbers) == len(normalized) == 165
    one, again, other, large = (numbers[a:b] for a, b in pairwise((0, 30, 60, 90, 165)))
    assert one == again != other  # as the seed says
    assert one[0] != one[1] and all(sorted(batch) == list(range(60)) for batch in one)
    assert len({*large[0], *large[1]}) == 256 and {*map(len, large)} == {128}  # of 320
    before, after = backbone.state_dict().values(), network[-1][0].state_dict().values()
    assert not any(map(torch.equal, before, after))  # all of the copy is trained
    logits = linear_eval.apply(network, data.test_images)
    torch.testing.assert_close(logits[:9], network(data.test_images[:9]), rtol=1e-4, atol=1e-4)
    assert linear_eval.percent(logits.argmax(dim=1), data.test_labels) > 80


@pytest.mark.parametrize("options", [(1, 0.1), (20, 0.5), (500, 0.1), ()])
def test_knn_equals_brute_force(options):
    train, train_labels = clusters(250)
    test, test_labels = clusters(520, seed=1)
    units = F.normalize(train, dim=1), train_labels, F.normalize(test, dim=1), test_labels
    (k, temperature), correct = options or (200, 0.1), 0
    for query, label in zip(test.double(), test_labels, strict=True):
        cosines = F.cosine_similarity(query, train.double()).tolist()
        votes = [0.0] * 4
        for i in sorted(range(250), key=lambda i: -cosines[i])[:k]:
            votes[train_labels[i]] += math.exp(cosines[i] / temperature)
        correct += votes.index(max(votes)) == label.item()
    found = linear_eval.knn_accuracy(*units, *options)
    assert found == pytest.approx(100 * correct / 520, abs=1e-9) and 30 < found < 100


@pytest.mark.parametrize("n_classes, factor", [(2, 2), (4, 1)])
def test_fit_finds_the_minimum_of_logistic_regression(n_classes, factor):
    """Of scikit-learn's, as the docstring says. Also where one feature is large, two are alike."""
    torch.manual_seed(0)
    features, labels = clusters(300, n_classes=n_classes)
    features[:, 0], features[:, 1] = 3 * features[:, 0], features[:, 2] + features[:, 1] / 5
    for c in (0.1, 1.0):
        layer = linear_eval.fit(features, labels, n_classes, c)
        reference = LogisticRegression(C=factor * c, max_iter=5000, tol=1e-10)
        expected = torch.tensor(reference.fit(features, labels).predict_log_proba(features))
        found = layer(features).log_softmax(dim=1).double()
        torch.testing.assert_close(found, expected, atol=0.03, rtol=0)


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
    found = linear_eval.percent(layer(test).argmax(dim=1), labels[400:])
    assert found == pytest.approx(scores[best], abs=0.3)


@pytest.mark.parametrize("n, sizes", [(2000, [1600] * 5), (2001, [1600]), (7000, [5000])])
def test_fits_that_choose_the_strength(n, sizes, monkeypatch):
    """They leave out images of all classes. The best C is fitted to all images."""
    labels, fits = torch.arange(n) * 4 // n, []

    def fit(x, y, n_classes, c):
        """Return a layer that is right for every image if C is 0.1, else for class 0 only."""
        fits.append((sorted((x[:, 0] / 10 + (n - 1) / 2).round().long().tolist()), c))
        layer = torch.nn.Linear(1, n_classes).requires_grad_(False)
        edges = 10 * (n * torch.arange(n_classes) / 4 - n / 2)
        layer.weight.copy_(torch.arange(n_classes)[:, None] * (c == 0.1))
        layer.bias.copy_(-edges.cumsum(0) + edges[0] if c == 0.1 else -torch.arange(n_classes))
        return layer

    monkeypatch.setattr(linear_eval, "fit", fit)
    layer, best = linear_eval.linear_probe(torch.arange(n)[:, None].float(), labels, 4)
    images, strengths = zip(*fits, strict=True)
    assert best == 0.1 and strengths == (*linear_eval.CANDIDATES * len(sizes), 0.1)
    assert images[-1] == list(range(n))
    assert [len(fitted) for fitted in images[:-1:6]] == sizes
    left_out = [sorted(set(range(n)) - set(fitted)) for fitted in images[:-1:6]]
    assert all(labels[part].bincount().min() > len(part) / 8 for part in left_out)
    assert len(sizes) == 1 or sorted(sum(left_out, [])) == list(range(n))
    found = layer(torch.arange(n)[:, None].float()).argmax(dim=1)  # of features as they are
    assert linear_eval.percent(found, labels) > 99


def test_features_of_too_few_dimensions_give_a_number():
    """Equal images, dead features, copies, hardly any images: chance, the strongest of equals."""
    labels = torch.arange(60) % 3
    copies = labels[:, None].repeat(1, 70).float()
    for features in (torch.zeros(60, 5), torch.full((60, 100), 0.1), copies):
        layer, c = linear_eval.linear_probe(features, labels, 3)
        assert linear_eval.percent(layer(features).argmax(dim=1), labels) >= 100 / 3 - 1e-6
        assert c == min(linear_eval.CANDIDATES)
    layer, _ = linear_eval.linear_probe(torch.eye(2), torch.tensor([2, 0]), 3)
    assert layer(torch.eye(2)).argmax(dim=1).tolist() == [2, 0]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of images without labels, one with uneven classes, and a checkpoint of the first."""
    folder = tmp_path_factory.mktemp("photos")
    write_images(folder / "photos" / "a", 40)
    for name, n in (("cat", 6), ("dog", 15)):
        write_images(folder / "pets" / "train" / name, n)
    write_images(folder / "pets" / "unlabelled", 30)
    options = ["--dataset", "photos", "--image-size", 24, "--epochs", 1, "--batch-size", 20]
    process = call(folder, "simclr.py", *options, "--device", "cpu")
    assert process.returncode == 0 and "no kNN" in process.stdout, process.stderr
    return folder


@pytest.mark.parametrize(
    "options, words",
    [
        (["--validation", 5], "photos has 0 images with labels to learn from, 0 to score"),
        (["--dataset", "pets"], "pets has 21 images with labels to learn from, 0 to score"),
        (["--dataset", "pets", "--validation", 20], "pets has 1 images with labels"),
        (
            ["--dataset", "pets", "--validation", 15, "--labels", 3],
            "3: take a multiple of 2 up to ",
        ),
        (["--dataset", "pets", "--validation", 8, "--labels", 12], "to 10: cat has 5 to draw from"),
    ],
)
def test_images_that_cannot_be_scored(photos, options, words):
    process = evaluate(photos, "data", "--weights", "simclr.pt", *options)
    assert process.returncode == 1 and words in process.stderr, process.stderr
    assert process.stderr.count("\n") == 1


def test_uneven_classes(photos):
    """What guessing gives, balanced accuracy, and a report of a class that is not scored."""
    options = ["--weights", "simclr.pt", "--dataset", "pets", "--validation"]
    process = evaluate(photos, "data", *options, 8, "--report")
    rows, titles = table(process.stdout)  # with no report in between
    assert list(rows) == [*UNTRAINED, "simclr.pt"] and titles[1:] == ["kNN", "balanced"]
    assert "\n\nraw pixels, 13 labels\n[[" in process.stdout
    matrices = re.findall(r"\[\[ ?(\d+) +(\d+)\]\n \[ ?(\d+) +(\d+)\]\]", process.stdout)
    for (plain, _, balanced), matrix in zip(rows.values(), matrices, strict=True):
        a, b, c, d = map(int, matrix)
        found = f"{100 * (a + d) / 8:.2f}", f"{50 * (a / (a + b) + d / (c + d)):.2f}"
        assert (plain, balanced) == found
    assert f"guessing dog gives {100 * (c + d) / 8:.2f}" in process.stdout
    process = evaluate(photos, "data", *options, 1, "--report")
    report = r"\[\[0 0\]\n \[\d \d\]\]\n[^\[]* cat +0.00 +0.00 +0.00 +0\n"
    assert re.search(report, process.stdout), process.stderr


class Payload:
    """A pickle that would run code when it is loaded."""

    def __reduce__(self):
        return print, ("the payload ran",)


def change(weights):
    return lambda path, saved: torch.save(saved | {"model": saved["model"] | weights}, path)


BAD = {
    "missing": lambda path, saved: None,
    "empty": lambda path, saved: path.touch(),
    "half": lambda path, saved: torch.save(saved, path) or os.truncate(path, 99_999),
    "folder": lambda path, saved: path.mkdir(),
    "tensor": lambda path, saved: torch.save(torch.ones(3), path),
    "pickle": lambda path, saved: path.write_bytes(pickle.dumps(Payload())),
    "torch pickle": lambda path, saved: torch.save(saved | {"model": Payload()}, path),
    "no metrics": lambda path, saved: saved.pop("metrics") and torch.save(saved, path),
    "no weights": lambda path, saved: torch.save(saved | {"model": {}}, path),
    "wrong shape": change({"backbone.0.weight": torch.ones(1)}),
    "not finite": change({"backbone.1.bias": torch.full([32], math.nan)}),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_weights_are_refused_in_one_line(checkpoint, tiny, tmp_path, kind):
    BAD[kind](tmp_path / "bad.pt", torch.load(checkpoint, weights_only=True))
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
    command = [sys.executable, ROOT / "linear_eval.py", *options]
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    process = subprocess.run(command, cwd=checkpoint.parent, env=env, capture_output=True)
    assert re.search(rb"byol.pt +\d+.\d\d \? \d", process.stdout), process.stderr
