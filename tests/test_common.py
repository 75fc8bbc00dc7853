"""Data sets and backbones: what is loaded, and what is said when it cannot be."""

import gzip
import pickle
import urllib.error

import common
import pytest
import torch
import torchvision
from conftest import write_fashion_mnist, write_idx, write_images

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


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
    assert data.classes[9] == "Ankle boot" and len(data.classes) == 10


def pack(path):
    """Compress a file, as Debian does."""
    packed = path.with_name(f"{path.name}.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return packed


@pytest.mark.parametrize("packed, below", [(False, ""), (True, ""), (True, "FashionMNIST/raw")])
def test_fashion_mnist_from_data_dir(tmp_path, packed, below):
    for path in list(write_fashion_mnist(tmp_path / below, 20, 10).iterdir()):
        path = pack(path) if packed else path
    data = common.load_dataset("fashion-mnist", tmp_path)  # before Debian's package
    assert data.train_images.shape == (20, 1, 28, 28) and data.test_labels.shape == (10,)
    assert data.train_labels.tolist() == [i % 10 for i in range(20)]
    assert data.train_images[3, 0, 10, 2:].min() >= 150  # the bright row of class 3


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_truncated_file_is_named(tmp_path, packed, share):
    path = write_fashion_mnist(tmp_path, 20, 10) / IMAGES
    path = pack(path) if packed else path
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(common.DataError, match="delete it and get it again") as error:
        common.load_dataset("fashion-mnist", tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("labels", [torch.arange(20) + 7, torch.zeros(19), torch.zeros(20, 28, 28)])
def test_files_that_do_not_match_are_named(tmp_path, labels):
    folder = write_fashion_mnist(tmp_path, 20, 10)
    write_idx(folder / LABELS, labels.byte())
    with pytest.raises(common.DataError, match=f"{folder} has other files than Fashion-MNIST's"):
        common.load_dataset("fashion-mnist", folder)


def test_nothing_to_load_says_what_to_do(tmp_path, monkeypatch):
    """No Debian package and no network."""

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(common, "DEBIAN_FASHION_MNIST", common.Path("no-such-folder"))
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    write_fashion_mnist(tmp_path / "one", 1, 1)
    for name, data_dir, size, words in (
        ("fashion-mnist", tmp_path, 0, "apt-get install dataset-fashion-mnist"),
        ("fashion-mnist", tmp_path, 0, f"{IMAGES}, {LABELS}, .* into {tmp_path}, .* digits$"),
        ("fashion-mnist", tmp_path / "one", 0, ": 1 training images, at least 2 are needed"),
        ("cifar10", tmp_path, 0, f"cifar10 is not in {tmp_path} .*no network.*: put its archive"),
        ("photos", tmp_path, 0, "photos is neither a folder nor one of fashion-mnist, cifar10"),
        ("digits", tmp_path, -1, "--image-size -1: take 1 or more"),
    ):
        with pytest.raises(common.DataError, match=words):  # a dot is no line break: one line
            common.load_dataset(name, data_dir, size)


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
    assert data.train_labels[:10].tolist() == data.test_labels.tolist() == list(range(10))
    assert torch.equal(data.train_images[:10], pixels.view(10, 3, 32, 32))  # channels first
    assert data.test_images[0, 0, 0, 0] == len(kind.train_list)


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
    data = common.load_dataset("stl10", tmp_path, None)
    assert data.train_images.shape == (15, 3, 96, 96) and data.train_images[0, 0, 1, 0] == 7
    assert data.train_labels.tolist() == [*range(10), *[-1] * 5]
    assert data.test_labels.tolist() == list(range(10))
    assert common.load_dataset("stl10", tmp_path, 32).train_images.shape == (15, 3, 32, 32)


def test_digits():
    data = common.load_dataset("digits", "there-is-no-such-folder")
    assert data.train_images.shape == (1397, 1, 32, 32) and data.test_images.shape[0] == 400
    assert data.train_labels[:4].tolist() == [0, 1, 2, 3] and data.classes == tuple("0123456789")
    small = common.load_dataset("digits", "there-is-no-such-folder", 8).train_images
    assert small[0, 0, 0].tolist() == [0, 0, 79, 207, 143, 15, 0, 0]  # sixteenths: 5, 13, 9, 1


def test_mean_and_std(tmp_path):
    """Each channel's own, of the training images, whatever their number."""
    write_images(tmp_path / "photos", 1203, channels=(90, 120, 255))
    data = common.load_dataset(str(tmp_path / "photos"), tmp_path, 8)
    std, mean = torch.std_mean(data.train_images.double() / 255, dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(data.mean.double(), mean, atol=6e-5, rtol=0)
    torch.testing.assert_close(data.std.double(), std, atol=6e-5, rtol=0)
    assert data.std.dtype == torch.float32 and data.std.min() > 0.01


@pytest.mark.parametrize("size", [8, 28, 64, 96])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", common.BACKBONES)
def test_backbone_shapes(name, channels, size):
    backbone = common.build_backbone(name, channels, size).eval()
    expected = {"convnet": 2048, "vit": 64, "resnet18": 512, "resnet50": 2048}[name]
    with torch.no_grad():
        assert backbone(torch.rand(2, channels, size, size)).shape == (2, expected)
    assert backbone.feature_dim == expected
    weights = [p for p in backbone.parameters() if p.ndim == 4]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    if name == "vit":
        assert backbone.encoder.pos_embedding.shape == (1, 1 + (size // 4) ** 2, 64)
        assert [len(backbone.encoder.layers), backbone.encoder.layers[0].num_heads] == [2, 2]
        assert backbone.encoder.layers[0].mlp[0].out_features == 128
    if name.startswith("resnet"):
        assert backbone.conv1.stride == ((1, 1) if size <= 64 else (2, 2))
        assert isinstance(backbone.maxpool, torch.nn.Identity) == (size <= 64)


def test_vit_takes_whole_patches_only():
    with pytest.raises(common.DataError, match="--image-size 30: .* multiple of 4"):
        common.build_backbone("vit", 1, 30)
