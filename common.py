"""The datasets and the backbones that the four methods share.

Images stay uint8, so that all fit on a GPU: n images, C channels, H rows, W columns.
"""

import gzip
import hashlib
import os
from collections import Counter
from contextlib import suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

DATASETS = ("fashion-mnist", "cifar10", "cifar100", "stl10", "digits")
BACKBONES = ("convnet", "vit", "resnet18", "resnet50")
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
IDX = ("images-idx3-ubyte", "labels-idx1-ubyte")
FASHION_MNIST_FILES = [f"{part}-{kind}" for part in ("train", "t10k") for kind in IDX]
IMAGE_SUFFIXES = (*torchvision.datasets.folder.IMG_EXTENSIONS, ".jfif", ".gif")
HIDDEN = (".", "__MACOSX", "@eaDir", "$RECYCLE.BIN")  # what systems put beside the images


class DataError(SystemExit):
    """The data or its place is wrong. Python prints the message, what to do, and ends."""


class Dataset(NamedTuple):
    """Images (n, C, H, W) uint8; labels (n,) int64, -1 where there is none.

    `paths` are those of a folder's images, training before test, relative to the folder. `mean`
    and `std` (C,) float32, to four decimals, are of at least 20,000 training images / 255, or all.
    """

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: tuple
    paths: tuple = ()
    mean: torch.Tensor = None
    std: torch.Tensor = None


def add_options(parser):
    """Add the options of `load_dataset` and `build_backbone` to an argparse parser."""
    option = parser.add_argument
    option("--dataset", default="fashion-mnist", help=f"{', '.join(DATASETS)} or a folder")
    option("--data-dir", default="data", help="downloads, decoded images")
    option("--image-size", type=int, default=0, help="pixels; 0: as is, 32 for folders, digits")
    option("--backbone", choices=BACKBONES, default="convnet")


def load_dataset(name, data_dir, image_size=0, device="cpu"):
    """Load one of DATASETS, or the images of a folder, into the memory of `device`.

    Images get `image_size` pixels a side. With 0 or None, those of a folder and the digits get 32,
    and others stay as they are. Downloads and decoded images are kept in `data_dir`.
    """
    if image_size and image_size < 0:
        raise DataError(f"--image-size {image_size}: take 1 or more pixels, or 0 for the default")
    if name == "fashion-mnist":
        data = load_fashion_mnist(Path(data_dir))
    elif name == "digits":
        data, image_size = load_digits(), image_size or 32
    elif name in DATASETS:
        data = load_torchvision(name, data_dir)
    elif Path(name).is_dir():
        data = load_folder(Path(name), Path(data_dir), image_size or 32)
    else:
        raise DataError(f"--dataset {name} is neither a folder nor one of {', '.join(DATASETS)}")
    if len(data.train_images) < 2:
        raise DataError(f"{name}: {len(data.train_images)} training images, at least 2 are needed")
    if image_size and image_size != data.train_images.shape[3]:
        train_images, test_images = (
            torch.cat([resize(part, [image_size, image_size]) for part in images.split(1000)])
            for images in (data.train_images, data.test_images)
        )
        data = data._replace(train_images=train_images, test_images=test_images)

    # Images as floats take four times the memory: take every n-th of many, in parts.
    parts = data.train_images[:: max(1, len(data.train_images) // 20_000)].split(500)
    mean = torch.cat([(part / 255).mean(dim=(2, 3)) for part in parts]).mean(dim=0)
    square = torch.cat([(part / 255).square().mean(dim=(2, 3)) for part in parts]).mean(dim=0)
    std = (square - mean.square()).sqrt().clamp_min(1 / 255)
    data = data._replace(mean=mean.round(decimals=4), std=std.round(decimals=4))
    return Dataset(*(x.to(device) if torch.is_tensor(x) else x for x in data))


def load_fashion_mnist(data_dir):
    """Read the four IDX files from `data_dir`, torchvision's download, or Debian's package."""

    def find(file):
        folders = data_dir, data_dir / "FashionMNIST" / "raw", DEBIAN_FASHION_MNIST
        paths = [folder / name for folder in folders for name in (file, f"{file}.gz")]
        return next((path for path in paths if path.is_file()), None)

    if not all(map(find, FASHION_MNIST_FILES)):
        try:
            torchvision.datasets.FashionMNIST(data_dir, download=True)
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"Fashion-MNIST cannot be downloaded ({' '.join(str(error).split())}): put "
                f"{', '.join(FASHION_MNIST_FILES)} (plain or .gz) into {data_dir}, on Debian or "
                "Ubuntu run 'apt-get install dataset-fashion-mnist', or take --dataset digits"
            ) from error
    parts = []
    for path in map(find, FASHION_MNIST_FILES):
        try:
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            sizes = np.frombuffer(data, ">u4", count=data[3], offset=4).tolist()
            pixels = torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=4 + 4 * len(sizes))
            parts.append(pixels.view(sizes))
        except Exception as error:  # a damaged file can fail in any way
            raise DataError(f"{path} is damaged: delete it and get it again") from error
    a, b, c, d = parts
    for images, labels in ((a, b), (c, d)):
        if images.shape != (*labels.shape, 28, 28) or (labels > 9).any():
            raise DataError(f"{path.parent} has other files than Fashion-MNIST's: get them again")
    classes = torchvision.datasets.FashionMNIST.classes
    return Dataset(a[:, None], b.long(), c[:, None], d.long(), tuple(classes))


def load_digits():
    """Load scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; the last 400 are the test."""
    import sklearn.datasets  # here, as training on other images does not need scikit-learn

    digits = sklearn.datasets.load_digits()
    images = torch.from_numpy(digits.images * 255 / 16).to(torch.uint8)[:, None]
    labels = torch.from_numpy(digits.target).long()
    return Dataset(images[:-400], labels[:-400], images[-400:], labels[-400:], tuple("0123456789"))


def load_torchvision(name, data_dir):
    """Load cifar10, cifar100 or stl10 with torchvision, which downloads them and checks the MD5."""
    stl10 = name == "stl10"
    kind = getattr(torchvision.datasets, name.upper())
    parts = ("train+unlabeled", "test") if stl10 else (True, False)  # unlabelled: to learn from
    try:
        train, test = (kind(data_dir, part, download=True) for part in parts)
    except (OSError, RuntimeError, EOFError) as error:
        raise DataError(f"{name} is not in {data_dir} ({error}): put its archive there") from error
    tensors = []
    for part in (train, test):
        images = torch.from_numpy(part.data)  # (n, H, W, C), but STL-10's are (n, C, H, W)
        images = images if stl10 else images.permute(0, 3, 1, 2).contiguous()
        labels = torch.as_tensor(part.labels if stl10 else part.targets)
        tensors += [images, labels.long()]
    return Dataset(*tensors, tuple(train.classes))


def load_folder(folder, data_dir, image_size):
    """Load the images below a folder, as RGB, scaled and cut to squares of `image_size` pixels.

    Those below `train/<class>` have labels, those below `test/<class>` are the test images, and
    those in `unlabelled` are trained on too. With fewer than two classes, all are, without labels.
    """
    images, ignored = list_images(folder)
    if not images:
        raise DataError(f"{folder} holds no images, but {', '.join(ignored) or 'nothing else'}")

    places = [(name, *f"{name}/".split("/")[:2]) for name in images]
    classes = sorted({x for name, part, x in places if part == "train" and name.count("/") > 1})
    labels = {name: label for label, name in enumerate(classes)}
    train = [(name, labels[x]) for name, part, x in places if part == "train" and x in labels]
    train += [(name, -1) for name, part, _ in places if part == "unlabelled"]
    test = [(name, labels[x]) for name, part, x in places if part == "test" and x in labels]
    if len(classes) < 2:
        print(f"no kNN: it takes two folders train/CLASS, found: {', '.join(classes) or 'none'}")
        train, test, classes = [(name, -1) for name in images], [], []

    n = len(train)
    names, labels = zip(*train, *test, strict=True)
    print(
        f"{folder}: {n:,} training images ({n - labels.count(-1):,} with a label), "
        f"{len(test):,} test images, {len(classes)} classes in {', '.join(by_folder(names))}"
    )
    ignored = by_folder(set(images).difference(names)) + ignored
    print(f"ignored: {', '.join(ignored) or 'nothing'}")
    images = read_images(folder.resolve(), names, data_dir, image_size)
    labels = torch.tensor(labels)
    return Dataset(images[:n], labels[:n], images[n:], labels[n:], tuple(classes), names)


def list_images(folder):
    """Return the sorted names of the images below a folder, links followed, and what else is."""
    found, errors = [], []
    for root, dirs, files in os.walk(folder, followlinks=True, onerror=errors.append):
        root = Path(root)
        seen = {path.resolve() for path in (root, *root.parents)}
        dirs[:] = [x for x in dirs if not x.startswith(HIDDEN) and (root / x).resolve() not in seen]
        below = root.relative_to(folder)
        found += [(below / x).as_posix() for x in files if not x.startswith(HIDDEN)]
    images = sorted(name for name in found if name.lower().endswith(IMAGE_SUFFIXES))
    if len(found) > len(images):
        errors.append(f"{len(found) - len(images):,} files other than {', '.join(IMAGE_SUFFIXES)}")
    return images, [str(error) for error in errors]


def by_folder(names):
    """Say how many images lie in which of the outermost folders, the five fullest first."""
    counts = Counter(os.path.dirname(name).split("/")[0] or "." for name in names)
    said = [f"{folder}/ ({n:,} images)" for folder, n in counts.most_common(5)]
    return said + ["and more"] if len(counts) > 5 else said


def read_images(folder, names, data_dir, image_size):
    """Return images (n, 3, image_size, image_size), mapped into memory: they need not fit there."""
    key = hashlib.sha256()
    paths = [folder / name for name in names]
    for path in paths:
        with suppress(OSError), path.open("rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            key.update(os.fsencode(f"{path} {status.st_size} {status.st_mtime_ns}"))
            file.seek(status.st_size // 2)  # many files begin alike
            key.update(file.read(1024))
    cache = data_dir / f"{folder.name}-{image_size}-{key.hexdigest()[:16]}.uint8"
    shape = torch.Size([len(names), 3, image_size, image_size])
    if not cache.is_file() or cache.stat().st_size != shape.numel():
        decode_images(paths, image_size, cache)
    return torch.from_file(str(cache), size=shape.numel(), dtype=torch.uint8).view(shape)


def decode_images(paths, image_size, cache):
    """Decode files on all cores into the file `cache`: (n, 3, image_size, image_size) uint8."""
    bad, faint = [], []

    def decode(path):
        try:
            image = decode_image(path, image_size)
        except Exception as error:  # a damaged file can make a decoder raise anything
            bad.append(f"{path} ({str(error) or type(error).__name__})")
            return b""
        if all(high - low < 16 for low, high in image.getextrema()):
            faint.append(path)
        return b"".join(channel.tobytes() for channel in image.split())

    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=cache.parent) as place, ThreadPool() as pool:
            decoded = pool.imap(decode, paths, chunksize=16)
            with open(f"{place}/images", "wb") as file:
                file.writelines(tqdm(decoded, "decoding", len(paths), leave=False, disable=None))
            if bad:
                five = "; ".join(sorted(bad)[:5])
                raise DataError(f"{len(bad)} images cannot be decoded, repair or remove: {five}")
            os.replace(file.name, cache)
    except OSError as error:
        raise DataError(f"cannot write {cache} ({error}): choose another --data-dir") from error
    if faint:
        print(f"warning: {len(faint):,} images like {min(faint)} have few greys: scale all alike")


def decode_image(path, image_size):
    """Return an image file as a PIL image, RGB, upright, of `image_size` x `image_size` pixels."""
    with Image.open(path) as image:
        image.draft("RGB", (2 * image_size, 2 * image_size))  # large JPEGs at less detail
        image.load()
        image.getexif()  # remembers the orientation
        image.info.pop("exif", None)  # exif_transpose would write it back, and sometimes cannot
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("F", "I")):
        values = np.asarray(image)
        if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65_535:
            raise ValueError("it holds no integers from 0 to 65,535: save it with 16 bits")
        white = values == image.info.get("transparency", -1)
        image = Image.fromarray(np.where(white, 255, values // 256).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return ImageOps.fit(image.convert("RGB"), (image_size, image_size))


def build_backbone(name, in_channels, image_size=32):
    """Build an encoder of random weights, (N, in_channels, H, W) to (N, feature_dim), in floats."""
    if name == "convnet":  # for a laptop's CPU
        layers = []
        for before, after in ((in_channels, 32), (32, 64), (64, 128)):
            convolution = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        if not 25 <= image_size <= 32:  # those come out as 4 x 4, and pooling takes its time
            layers.append(nn.AdaptiveAvgPool2d(4))
        backbone = nn.Sequential(*layers, nn.Flatten())
        backbone.feature_dim = 128 * 4 * 4
    elif name == "vit":  # for the variants that use AdamW
        if image_size % 4:
            raise DataError(f"--image-size {image_size}: the vit needs a multiple of 4")
        backbone = torchvision.models.VisionTransformer(
            image_size, patch_size=4, num_layers=2, num_heads=2, hidden_dim=64, mlp_dim=128
        )
        backbone.conv_proj = nn.Conv2d(in_channels, 64, 4, stride=4)  # torchvision takes RGB only
        backbone.feature_dim, backbone.heads = 64, nn.Identity()
    else:
        backbone = getattr(torchvision.models, name)()
        if image_size <= 64:  # the stock stem would leave almost nothing (SimCLR, appendix B.9)
            backbone.conv1 = nn.Conv2d(in_channels, 64, 3, stride=1, padding=1, bias=False)
            backbone.maxpool = nn.Identity()
        elif in_channels != 3:
            backbone.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        backbone.feature_dim, backbone.fc = backbone.fc.in_features, nn.Identity()
    return backbone.to(memory_format=torch.channels_last)  # faster on CPUs, and on GPUs in bf16
