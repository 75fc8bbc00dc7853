"""The benchmark and the pictures, and pictures of images that are not as one expects."""

import csv
import warnings

import numpy as np
import pictures
import pytest
import torch
from common import Dataset
from conftest import call, train, write_fashion_mnist, write_images
from PIL import Image


KINDS = "map", "neighbours", "views"


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """A folder with two checkpoints whose names differ by / and - alone, and photos of one."""
    folder = tmp_path_factory.mktemp("pictures")
    assert train(folder, tiny, "byol", "--out", "a/b.pt").returncode == 0
    assert train(folder, tiny, "simclr", "--out", "a-b.pt").returncode == 0
    write_images(folder / "photos", 30)
    options = ["--dataset", "photos", "--epochs", 1, "--batch-size", 20, "--device", "cpu"]
    assert call(folder, "simclr.py", *options).returncode == 0
    options = ["--data-dir", tiny, "--labels", 20, "all", "--trials", 2, "--device", "cpu"]
    process = call(folder, "linear_eval.py", "--weights", "a/b.pt", *options, "--csv", "s.csv")
    assert process.returncode == 0, process.stderr
    return folder


def draw(folder, data, *options):
    return call(folder, "tools/pictures.py", "--data-dir", data, *options)


def check(folder, names):
    """The pictures are there, no others, and not empty."""
    assert {path.name for path in folder.iterdir()} == names
    for path in folder.iterdir():
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert min(pixels.shape[:2]) > 200 and pixels.std() > 10


def test_pictures_of_two_checkpoints(runs, tiny, tmp_path):
    weights = ["--weights", "a/b.pt", "a-b.pt", "--csv", "s.csv"]
    process = draw(runs, tiny, *weights, "--out", tmp_path / "new" / "pictures")
    assert process.returncode == 0, process.stderr
    names = {f"{kind}-{name}.png" for kind in KINDS for name in ("a-b", "a-b-2")}
    check(tmp_path / "new" / "pictures", names | {"curves.png", "labels-fashion-mnist-test.png"})


def test_pictures_of_images_without_labels(runs, tmp_path):
    process = draw(runs, "data", "--weights", "simclr.pt", "--out", tmp_path)
    assert process.returncode == 0, process.stderr
    names = {f"{kind}-simclr.png" for kind in KINDS}
    check(tmp_path, names | {"curves.png"})


@pytest.mark.parametrize("n", [1, 3, 4])
def test_few_photos(runs, tmp_path, n):
    write_images(tmp_path / "few", n)
    options = ["--weights", "simclr.pt", "--dataset", tmp_path / "few", "--out", tmp_path / "out"]
    process = draw(runs, tmp_path, *options)
    assert (process.returncode == 0) == (n == 4), process.stderr
    assert n == 4 or f"{2 if n == 1 else 4} are needed" in process.stderr


def test_no_image_is_its_own_neighbour(monkeypatch):
    """Without test images, eight of nine images are the neighbours of the ninth."""
    drawn, images = [], torch.randint(0, 256, (9, 1, 4, 4), dtype=torch.uint8)
    data = Dataset(images, torch.full((9,), -1), images[:0], torch.empty(0), ())
    monkeypatch.setattr(pictures, "draw_grid", lambda shown, *_: drawn.append(shown))
    encoder = pictures.normalized(torch.nn.Flatten(), [0.0], [1.0])
    pictures.draw_neighbours_of(encoder, data, None)
    assert torch.equal(drawn[0][:, 0], images)
    assert all(len(row.unique(dim=0)) == 9 for row in drawn[0])


def test_equal_features_have_no_map(tmp_path, capsys):
    """t-SNE would end the process with a segmentation fault."""
    features = {"dead": torch.ones(40, 8), "alive": torch.rand(40, 8)}
    labels = torch.arange(40) % 2
    pictures.draw_map(features, torch.zeros(40, 1, 9, 9), labels, ("a", "b"), tmp_path / "map.png")
    assert list(features) == ["alive"] and (tmp_path / "map.png").exists()
    assert "dead: (almost) all features are equal" in capsys.readouterr().out
    pictures.draw_map({"dead": torch.ones(40, 8)}, None, labels, (), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_unusual_class_names(tmp_path, capsys, monkeypatch):
    """All classes are in the map and its legend, as they are called, and nothing warns."""
    classes = ("_background_", "$5_$10", "猫", *(f"class {k}" for k in range(9)))
    saved, save, labels = [], pictures.save, torch.arange(48) % 12
    monkeypatch.setattr(pictures, "save", lambda *args: saved.append(args[0]) or save(*args))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = torch.zeros(48, 1, 9, 9)
        pictures.draw_map({"x": torch.rand(48, 8)}, images, labels, classes, tmp_path / "map.png")
    [axes] = saved[0].axes
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == [" _background_", r"\$5_\$10", "猫", *classes[3:]]
    dots = axes.collections
    styles = {(str(x.get_facecolor()), x.get_paths()[0].vertices.tobytes()) for x in dots}
    assert len(styles) == 12 and all(len(x.get_offsets()) == 4 for x in dots)
    assert capsys.readouterr().out.count("the font lacks some characters") == 1


def test_pictures_of_the_documentation(runs, tmp_path):
    base = dict(dataset="CIFAR-10 (JPEG)", scored="test", labels=1000, script="linear_eval")
    base |= dict(backbone="convnet", device="CPU", bf16="")
    rows = [base | dict(kind="random init", row="random init", accuracy=34)]
    for epochs in (10, 100):
        row = dict(kind="linear", row="a.pt", run="simclr", epochs=epochs, accuracy=50)
        rows.append(base | row | dict(training_seconds=60 * epochs, bf16="True"))
    rows.append(rows[1] | dict(bf16="False"))
    rows.append(rows[1] | dict(dataset="Fashion-MNIST"))  # not to be drawn
    with open(tmp_path / "results.csv", "w") as file:
        writer = csv.DictWriter(file, rows[1])
        writer.writeheader()
        writer.writerows(rows)
    options = ["--docs", "--csv", tmp_path / "results.csv", "--out", tmp_path / "docs"]
    (tmp_path / "docs").mkdir()
    process = draw(runs, "data", *options, "--weights", "a/b.pt")  # its images are others
    assert process.returncode == 0, process.stderr
    assert "a/b.pt is left out: it is not of ten epochs" in process.stdout
    names = {"methods.png", "family.png", "accuracy-over-time.png", "labels-cifar10.png"}
    check(tmp_path / "docs", names)


def test_bars_of_four_methods(monkeypatch, tmp_path):
    """Each is the mean over seeds and draws. A length that not all four have is left out."""
    saved, rows = [], []
    monkeypatch.setattr(pictures, "save", lambda figure, path: saved.append(figure))
    for dataset in ("Fashion-MNIST", "CIFAR-10 (JPEG)"):
        base = dict(dataset=dataset, labels="1000", epochs="10")
        rows.append(base | dict(kind="random init", run="", accuracy="34"))
        for i, method in enumerate(pictures.METHODS):
            for accuracy in (50 + i, 60 + i):
                rows.append(base | dict(kind="linear", run=method, accuracy=accuracy))
    rows.append(rows[-1] | dict(epochs="100"))
    pictures.draw_accuracy(rows, tmp_path)
    for axes in saved[0].axes:
        assert axes.lines[0].get_ydata()[0] == 34
        bars = [(bar.get_y(), bar.get_height()) for bar in axes.patches]
        assert bars == [(34, 21), (34, 22), (34, 23), (34, 24)]  # 55 to 58: what is learnt


def test_scores_of_another_kind_are_refused(runs, tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    process = draw(runs, "data", "--csv", tmp_path / "other.csv", "--out", tmp_path)
    assert process.returncode == 1 and "holds no scores" in process.stderr
    assert process.stderr.count("\n") == 1


def test_benchmark(tmp_path):
    data = write_fashion_mnist(tmp_path / "data", n_train=260)
    options = ["--rounds", 1, "--images", 260, "--methods", "simsiam", "--data-dir", data]
    options += ["--bottleneck-dim", 64]  # SimSiam's own
    process = call(tmp_path, "tools/benchmark.py", *options, "--device", "cpu")
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("simsiam") == 2 and "time ratio" in process.stdout
    assert "\n       256 " in process.stdout and "\n       512 " not in process.stdout
