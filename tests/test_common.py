"""Data sets and backbones: what is loaded, and what is said when it cannot be."""

import gzip
import pickle
import shutil
import urllib.error

import common
import pytest
import torch
import torchvision
from conftest import write_fashion_mnist
from PIL import Image


@pytest.fixture
def offline(monkeypatch):
    """No Debian package and no network."""

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(common, "DEBIAN_FASHION_MNIST", common.Path("no-such-folder"))
    monkeypatch.setattr("urllib.request.urlopen", refuse)


def image_folder(folder, classes=("cat", "dog"), n=3, size=(20, 20)):
    for split in ("train", "test"):
        for label, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for i in range(n):
                image = Image.new("RGB", size, (40 * label + i, 100, 200))
                image.save(folder / split / name / f"{i}.png")
    return folder


def test_fashion_mnist_is_real(fashion_mnist):
    data = fashion_mnist
    assert data.train_images.shape == (60_000, 1, 28, 28)
    assert data.test_images.shape == (10_000, 1, 28, 28)
    assert data.train_images.dtype == torch.uint8 and data.train_labels.dtype == torch.int64
    assert data.train_labels.bincount().tolist() == [6000] * 10
    assert data.test_labels.bincount().tolist() == [1000] * 10
    assert data.mean.item() == pytest.approx(0.2860, abs=2e-3)  # the figures that all quote
    assert data.std.item() == pytest.approx(0.3530, abs=2e-3)
    assert data.train_labels[:3].tolist() == [9, 0, 0]  # the first three: a boot, two T-shirts
    assert len(data.classes) == 10


@pytest.mark.parametrize("packed, below", [(False, ""), (True, ""), (True, "FashionMNIST/raw")])
def test_fashion_mnist_from_data_dir(tmp_path, packed, below):
    folder = write_fashion_mnist(tmp_path / below, 20, 10)
    if packed:
        for path in list(folder.glob("*ubyte")):
            (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    data = common.load_dataset("fashion-mnist", tmp_path)  # before Debian's package
    assert data.train_images.shape == (20, 1, 28, 28) and data.test_labels.shape == (10,)
    assert data.train_labels.tolist() == [i % 10 for i in range(20)]
    assert data.train_images[3, 0, 10, 2:].min() >= 150  # the bright row of class 3


def test_nothing_to_load_says_what_to_do(tmp_path, offline):
    with pytest.raises(common.DataError, match="apt-get install dataset-fashion-mnist") as error:
        common.load_dataset("fashion-mnist", tmp_path)
    assert "train-images-idx3-ubyte" in str(error.value) and str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_truncated_file_is_named(tmp_path, packed, share):
    path = write_fashion_mnist(tmp_path, 20, 10) / "train-images-idx3-ubyte"
    data = gzip.compress(path.read_bytes()) if packed else path.read_bytes()
    path.unlink()
    path = tmp_path / f"{path.name}{'.gz' if packed else ''}"
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(common.DataError, match="delete it and get it again") as error:
        common.load_dataset("fashion-mnist", tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda images, labels: labels.unlink(), "train-labels-idx1-ubyte .* is missing"),
        (lambda images, labels: shutil.copy(images, labels), "do not match"),
        (
            lambda images, labels: labels.write_bytes(labels.read_bytes()[:-1] + bytes([26])),
            "label 26",
        ),
    ],
)
def test_wrong_files_are_named(tmp_path, spoil, words):
    write_fashion_mnist(tmp_path, 20, 10)
    spoil(*(tmp_path / f"train-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")))
    with pytest.raises(common.DataError, match=words):
        common.load_dataset("fashion-mnist", tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_files(tmp_path, monkeypatch, name):
    """Small files in CIFAR's format, under the names that torchvision looks for."""
    kind = getattr(torchvision.datasets, name.upper())
    base = tmp_path / kind.base_folder
    base.mkdir()
    pixels = torch.arange(10 * 3072).remainder(251).to(torch.uint8).view(10, 3072)
    for i, (file, _) in enumerate(kind.train_list + kind.test_list):
        fine = "labels" if name == "cifar10" else "fine_labels"
        batch = {"data": (pixels + i).numpy(), fine: list(range(10))}
        (base / file).write_bytes(pickle.dumps(batch))
    meta = pickle.dumps({kind.meta["key"]: [f"class {i}" for i in range(10)]})
    (base / kind.meta["filename"]).write_bytes(meta)
    for parts in ("train_list", "test_list"):  # their MD5 is not that of the real files
        monkeypatch.setattr(kind, parts, [[file, None] for file, _ in getattr(kind, parts)])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": None})
    data = common.load_dataset(name, tmp_path)
    assert data.train_images.shape == (10 * len(kind.train_list), 3, 32, 32)
    assert data.test_images.shape == (10, 3, 32, 32) and data.train_images.dtype == torch.uint8
    assert data.train_labels[:10].tolist() == list(range(10))
    assert torch.equal(data.train_images[:10], pixels.view(10, 3, 32, 32))  # channels first


def test_stl10_files(tmp_path, monkeypatch):
    kind = torchvision.datasets.STL10
    base = tmp_path / kind.base_folder
    base.mkdir()
    for name, n in (("train", 10), ("test", 10), ("unlabeled", 5)):
        pixels = torch.zeros(n, 3, 96, 96, dtype=torch.uint8)
        pixels[:, 0, 0, 1] = 7  # STL stores columns first: row 1, column 0 of the picture
        (base / f"{name}_X.bin").write_bytes(pixels.numpy().tobytes())
        if name != "unlabeled":
            (base / f"{name}_y.bin").write_bytes(bytes(i + 1 for i in range(10)))
    (base / "class_names.txt").write_text("\n".join(f"c{i}" for i in range(10)))
    for parts in ("train_list", "test_list"):
        monkeypatch.setattr(kind, parts, [[file, None] for file, _ in getattr(kind, parts)])
    data = common.load_dataset("stl10", tmp_path)
    assert data.train_images.shape == (15, 3, 96, 96)
    assert data.train_labels.tolist() == [*range(10), *[-1] * 5]
    assert data.test_labels.tolist() == list(range(10))
    assert data.train_images[0, 0, 1, 0] == 7


def test_failed_download_is_one_sentence(tmp_path, offline):
    with pytest.raises(common.DataError, match="cifar10 is not whole in .* no network"):
        common.load_dataset("cifar10", tmp_path)


def test_folder(tmp_path):
    folder = image_folder(tmp_path, ("cat", "dog", "élan 2"), size=(16, 16))
    pixels = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / "train/cat/0.png")
    (folder / "train" / "dog" / ".DS_Store").write_bytes(b"x")  # hidden files do not count
    data = common.load_dataset(str(folder), "data", 16)
    assert data.train_images.shape == (9, 3, 16, 16) and data.train_images.dtype == torch.uint8
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert data.classes == ("cat", "dog", "élan 2")
    assert data.train_images[4, :, 8, 8].tolist() == [41, 100, 200]
    assert torch.equal(data.train_images[0], pixels)  # of their own size, they stay as they are


@pytest.mark.parametrize("kind", ["CMYK", "P", "RGBA", "L", "1", "I;16", "wide"])
def test_odd_images_load_as_what_they_show(tmp_path, kind):
    folder = image_folder(tmp_path)
    image = Image.new("RGB", (20, 20), (255, 255, 255))
    image.paste((0, 0, 0), (0, 0, 10, 20))  # left half black, right half white
    if kind == "I;16":
        grey = torch.frombuffer(bytearray(image.convert("L").tobytes()), dtype=torch.uint8)
        wide = (grey.int() * 257).to(torch.uint16).view(20, 20)
        Image.fromarray(wide.numpy()).save(folder / "train" / "cat" / "!first.png")
    elif kind == "wide":
        image.resize((20, 90)).save(folder / "train" / "cat" / "!first.png")
    else:
        image.convert(kind).save(folder / "train" / "cat" / "!first.tiff")
    first = common.load_dataset(str(folder), "data", 20).train_images[0].float()
    assert first[:, :, 2:8].mean() < 12 and first[:, :, 12:18].mean() > 243


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda f: shutil.rmtree(f / "train" / "dog"), "two classes or more"),
        (lambda f: shutil.rmtree(f / "test" / "dog"), "holds no images"),
        (lambda f: (f / "test" / "bird").mkdir(), "no counterpart"),
        (lambda f: (f / "train/cat/1.png").write_bytes(b""), "1.png is not an image"),
        (lambda f: (f / "train/cat/notes.txt").write_text("hello"), "notes.txt is not an image"),
        (lambda f: (shutil.rmtree(f), f.write_text("x")), "nor an existing folder"),
    ],
)
def test_broken_folder_is_named(tmp_path, break_it, message):
    folder = image_folder(tmp_path / "images")
    break_it(folder)
    with pytest.raises(common.DataError, match=message):
        common.load_dataset(str(folder), "data")


def test_decoded_images_are_cached(tmp_path, monkeypatch):
    folder, decode, decoded = image_folder(tmp_path), common.decode_image, []

    def load(size=16):
        decoded.clear()
        return common.load_dataset(str(folder), "data", size).train_images

    monkeypatch.setattr(common, "decode_image", lambda *x: decoded.append(x) or decode(*x))
    first = load()
    assert len(decoded) == 12
    assert torch.equal(load(), first) and not decoded
    assert load(8).shape == (6, 3, 8, 8) and len(decoded) == 12  # another size
    Image.new("RGB", (20, 20), (1, 2, 3)).save(folder / "train/cat/0.png")  # another content
    assert load()[0, :, 8, 8].tolist() == [1, 2, 3] and len(decoded) == 12
    (folder / "train/dog/1.png").rename(folder / "train/dog/7.png")
    assert len(load()) == 6 and len(decoded) == 12
    (folder / ".decoded-16.pt").write_bytes(b"no cache")
    assert load().shape == (6, 3, 16, 16) and len(decoded) == 12


def test_folder_that_does_not_fit_is_refused_before_decoding(tmp_path, monkeypatch):
    folder = image_folder(tmp_path)
    monkeypatch.setattr(common, "physical_memory", lambda: 2 * 12 * 3 * 16**2)
    assert len(common.load_dataset(str(folder), "data", 16).train_images) == 6
    monkeypatch.setattr(common, "decode_image", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(common.DataError, match="12 images of 17 pixels take .* lower --image-size"):
        common.load_dataset(str(folder), "data", 17)


@pytest.mark.parametrize("size", [8, 24, 28, 32, 64, 96])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", common.BACKBONES)
def test_backbone_shapes(name, channels, size):
    backbone = common.build_backbone(name, channels, size).eval()
    expected = {"convnet": 2048, "resnet18": 512, "resnet50": 2048}[name]
    with torch.no_grad():
        assert backbone(torch.rand(2, channels, size, size)).shape == (2, expected)
    assert backbone.feature_dim == expected
    weights = [p for p in backbone.parameters() if p.ndim == 4]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    if name != "convnet":
        assert backbone.conv1.stride == ((1, 1) if size <= 64 else (2, 2))
        assert isinstance(backbone.maxpool, torch.nn.Identity) == (size <= 64)
