"""Data sets and backbones: what is loaded, and what is said when it cannot be."""

import gzip
import pickle
import urllib.error
from unittest.mock import Mock

import common
import pytest
import sklearn.datasets
import torch
import torchvision
from conftest import write_fashion_mnist, write_idx, write_images
from PIL import Image

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def test_fashion_mnist_is_real(fashion_mnist):
    data = fashion_mnist
    assert data.train_images.shape[1:] == data.test_images.shape[1:] == (1, 28, 28)
    assert data.train_images.dtype == torch.uint8 and data.train_labels.dtype == torch.int64
    assert data.train_labels.bincount().tolist() == [6000] * 10
    assert data.test_labels.bincount().tolist() == [1000] * 10
    assert torch.cat([data.mean, data.std]).tolist() == pytest.approx([0.286, 0.353], abs=2e-3)
    assert data.train_labels[:3].tolist() == [9, 0, 0]  # the first three: a boot, two T-shirts
    assert data.classes[9] == "Ankle boot" and len(data.classes) == 10


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("below", ["", "FashionMNIST/raw"])
@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_fashion_mnist_from_data_dir(tmp_path, packed, below, share):
    """Whole files are read, before Debian's package, and one that is cut short is named."""
    for path in sorted(write_fashion_mnist(tmp_path / below, 20, 10).iterdir()):
        if packed:  # as Debian does it
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    data = common.load_dataset("fashion-mnist", tmp_path)
    assert data.train_images.shape == (20, 1, 28, 28) and data.test_labels.shape == (10,)
    assert data.train_labels.tolist() == [i % 10 for i in range(20)]
    assert data.train_images[3, 0, 10, 2:].min() >= 150  # the bright row of class 3

    path = tmp_path / below / (f"{IMAGES}.gz" if packed else IMAGES)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(common.DataError, match=f"{path} is damaged: delete it and get it again"):
        common.load_dataset("fashion-mnist", tmp_path)


@pytest.mark.parametrize("labels", [torch.arange(20) + 7, torch.zeros(19), torch.zeros(20, 28, 28)])
def test_files_that_do_not_match_are_named(tmp_path, labels):
    folder = write_fashion_mnist(tmp_path, 20, 10)
    write_idx(folder / LABELS, labels.byte())
    with pytest.raises(common.DataError, match=f"{folder} has other files than Fashion-MNIST's"):
        common.load_dataset("fashion-mnist", folder)


def test_nothing_to_load_says_what_to_do(tmp_path, monkeypatch):
    """No Debian package and no network."""
    no_network = Mock(side_effect=urllib.error.URLError("no network"))
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setattr(common, "DEBIAN_FASHION_MNIST", common.Path("no-such-folder"))
    write_fashion_mnist(tmp_path / "one", 1, 1)
    for name, data_dir, size, words in (
        ("fashion-mnist", tmp_path, 0, f"{IMAGES}, {LABELS}, .* into {tmp_path}, .* 'apt-get"),
        ("fashion-mnist", tmp_path / "one", 0, ": 1 training images, at least 2 are needed"),
        (str(tmp_path / "one"), tmp_path, 0, "one holds no images, but 4 files other than .jpg, "),
        ("cifar10", tmp_path, 0, f"cifar10 is not in {tmp_path} .*no network.*: put its archive"),
        ("digits", tmp_path, -1, "--image-size -1: take 1 or more"),
    ):
        with pytest.raises(common.DataError, match=words):  # a dot is no line break: one line
            common.load_dataset(name, data_dir, size)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
def test_torchvision_files(tmp_path, monkeypatch, name):
    """Small files in torchvision's formats, under the names that it looks for."""
    kind, size = getattr(torchvision.datasets, name.upper()), 96 if name == "stl10" else 32
    base = tmp_path / kind.base_folder
    base.mkdir()
    pixels = torch.arange(10 * 3 * size**2).remainder(251).byte().view(10, 3, size, size)
    if name == "stl10":
        for part in ("train", "unlabeled", "test"):
            columns_first = (pixels + (part == "test")).transpose(2, 3).contiguous()
            (base / f"{part}_X.bin").write_bytes(columns_first.numpy().tobytes())
            (base / f"{part}_y.bin").write_bytes(bytes(range(1, 11)))
        (base / "class_names.txt").write_text("cat\ndog")
    else:
        for file, _ in kind.train_list + kind.test_list:
            batch = {"data": (pixels + ("test" in file)).view(10, -1).numpy()}
            batch["labels" if name == "cifar10" else "fine_labels"] = [*range(10)]
            (base / file).write_bytes(pickle.dumps(batch))
        meta = {kind.meta["key"]: ["cat", "dog"]}
        (base / kind.meta["filename"]).write_bytes(pickle.dumps(meta))
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)  # their MD5 is another
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    data = common.load_dataset(name, tmp_path, None)
    labels = [*range(10)]
    expected = {"cifar10": labels * 5, "cifar100": labels, "stl10": labels + [-1] * 10}[name]
    assert data.train_labels.tolist() == expected and data.test_labels.tolist() == labels
    assert torch.equal(data.train_images, pixels.repeat(len(expected) // 10, 1, 1, 1))
    assert torch.equal(data.test_images, pixels + 1) and data.classes == ("cat", "dog")
    assert common.load_dataset(name, tmp_path, 8).test_images.shape == (10, 3, 8, 8)


def test_digits():
    """The last 400 are for the test."""
    data, theirs = (
        common.load_dataset("digits", "no-such-folder", 8),
        sklearn.datasets.load_digits(),
    )
    assert len(data.train_images) == 1397 and data.classes == tuple("0123456789")
    assert [*data.train_labels, *data.test_labels] == theirs.target.tolist()
    images = torch.cat([data.train_images, data.test_images])
    assert (images[:, 0] / 255 * 16).round().equal(torch.from_numpy(theirs.images).float())
    large = common.load_dataset("digits", "no-such-folder")
    assert large.train_images.shape[2:] == large.test_images.shape[2:] == (32, 32)


@pytest.mark.parametrize("size", [12, 40])
def test_image_size_equals_pillow(tiny, size):
    """Bilinear, smoothed where it gets smaller, so that no pixel is left out."""
    images = common.load_dataset("fashion-mnist", tiny).test_images
    data = common.load_dataset("fashion-mnist", tiny, size)
    for image, found in zip(images, data.test_images, strict=True):
        expected = Image.fromarray(image[0].numpy()).resize((size, size), Image.Resampling.BILINEAR)
        pixels = torch.frombuffer(bytearray(expected.tobytes()), dtype=torch.uint8)
        assert (found.flatten().int() - pixels.int()).abs().max() <= 1
    assert data.train_images.shape == (320, 1, size, size)


def test_mean_and_std(tmp_path):
    """Each channel's own, of the training images, whatever their number."""
    write_images(tmp_path / "photos", 1203, channels=(90, 0, 255))
    data = common.load_dataset(str(tmp_path / "photos"), tmp_path, 8)
    std, mean = torch.std_mean(data.train_images.double() / 255, dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(data.mean.double(), mean, atol=6e-5, rtol=0)
    torch.testing.assert_close(data.std.double(), std.clamp_min(1 / 255), atol=6e-5, rtol=0)
    assert data.std.dtype == torch.float32 and data.std[1] > 0  # of equal pixels


def test_mean_and_std_of_many_images(monkeypatch):
    """They are of every n-th: the first would not do, as these get ever brighter."""
    images = (torch.arange(50_000) // 200).byte().view(-1, 1, 1, 1)
    labels = torch.zeros(50_000, dtype=torch.int64)
    data = common.Dataset(images, labels, images, labels, ("a", "b"))
    monkeypatch.setattr(common, "load_digits", lambda: data)
    data = common.load_dataset("digits", "no-such-folder", 1)
    assert data.mean.item() == pytest.approx((images / 255).mean().item(), abs=2e-4)
    assert data.std.item() == pytest.approx((images / 255).std().item(), abs=2e-4)


def test_convnet():
    """Three convolutions, each at half the size of the one before, then BatchNorm and ReLU."""
    *layers, flatten = common.build_backbone("convnet", 3, 32)
    kinds = [torch.nn.Conv2d, torch.nn.BatchNorm2d, torch.nn.ReLU] * 3
    assert [type(layer) for layer in layers] == kinds and type(flatten) is torch.nn.Flatten
    convolutions = [(c.in_channels, c.out_channels, c.kernel_size, c.stride) for c in layers[::3]]
    sizes = [(3, 32), (32, 64), (64, 128)]
    assert convolutions == [(*size, (3, 3), (2, 2)) for size in sizes]


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
        layers = backbone.encoder.layers
        assert (len(layers), layers[0].num_heads, layers[0].mlp[0].out_features) == (2, 2, 128)
        with pytest.raises(common.DataError, match=f"--image-size {size + 2}: .* multiple of 4"):
            common.build_backbone(name, channels, size + 2)
    if name.startswith("resnet"):
        stem = backbone.conv1.kernel_size, backbone.conv1.stride
        assert stem == (((3, 3), (1, 1)) if size <= 64 else ((7, 7), (2, 2)))
        assert isinstance(backbone.maxpool, torch.nn.Identity) == (size <= 64)
