"""The datasets and the backbones that the four methods share.

Images stay uint8 tensors in memory, so that a training script can put them on its device once and
draw a batch by indexing. N images, C channels, H rows, W columns.
"""

import gzip
import hashlib
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.transforms import functional
from tqdm import tqdm

DATASETS = ("fashion-mnist", "cifar10", "cifar100", "stl10")
BACKBONES = ("convnet", "resnet18", "resnet50")
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_FILES = tuple(
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)
FASHION_MNIST_CLASSES = tuple(
    "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(",")
)


class DataError(ValueError):
    """The data or its place is wrong; the message says what to do. The programs print it alone."""


class Dataset(NamedTuple):
    """Images (N, C, H, W) uint8; labels (N,) int64, -1 where there is none.

    `mean` and `std` (C,) float32 are those of the training images / 255, to four decimals.
    """

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    classes: tuple


def load_dataset(name, data_dir, image_size=32, device="cpu"):
    """Load a dataset into the memory of `device`.

    `name` is one of DATASETS or a folder that holds `train/<class>/*` and `test/<class>/*`, whose
    images are resized to `image_size` pixels. `data_dir` is where the files of the named datasets
    are, or are downloaded to. Raises DataError, naming the file and the remedy, when something is
    missing, cut short or not an image.
    """
    if name == "fashion-mnist":
        train_images, train_labels, test_images, test_labels, classes = load_fashion_mnist(
            Path(data_dir)
        )
    elif name in DATASETS:
        train_images, train_labels, test_images, test_labels, classes = load_torchvision(
            name, data_dir
        )
    elif Path(name).is_dir():
        train_images, train_labels, test_images, test_labels, classes = load_folder(
            Path(name), image_size
        )
    else:
        raise DataError(
            f"--dataset {name} is neither one of {', '.join(DATASETS)} nor an existing folder"
        )
    sample = (
        train_images[:: max(1, len(train_images) // 20_000)].float() / 255
    )  # enough for three digits
    mean, std = sample.mean(dim=(0, 2, 3)), sample.std(dim=(0, 2, 3)).clamp_min(1 / 255)
    tensors = (
        train_images,
        train_labels,
        test_images,
        test_labels,
        mean.round(decimals=4),
        std.round(decimals=4),
    )
    return Dataset(*(x.to(device) for x in tensors), tuple(classes))


def load_fashion_mnist(data_dir):
    """Read the four IDX files from `data_dir`, Debian's package or torchvision's download."""
    downloaded = data_dir / "FashionMNIST" / "raw"
    folders = (data_dir, downloaded, DEBIAN_FASHION_MNIST)
    folder = next((folder for folder in folders if find_idx(folder, FASHION_MNIST_FILES[0])), None)
    if folder is None:
        try:
            torchvision.datasets.FashionMNIST(data_dir, download=True)
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"Fashion-MNIST is not in {data_dir} and could not be downloaded "
                f"({' '.join(str(error).split())}): on Debian or Ubuntu run "
                f"'apt-get install dataset-fashion-mnist', elsewhere put "
                f"{', '.join(FASHION_MNIST_FILES)} (plain or .gz) into {data_dir}"
            ) from error
        folder = downloaded
    tensors = []
    for file in FASHION_MNIST_FILES:
        path = find_idx(folder, file)
        if path is None:
            raise DataError(
                f"{folder} holds only a part of Fashion-MNIST: {file} (plain or .gz) is missing"
            )
        tensors.append(read_idx(path))
    train_images, train_labels, test_images, test_labels = tensors
    for images, labels in ((train_images, train_labels), (test_images, test_labels)):
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise DataError(
                f"{folder}: {tuple(images.shape)} images do not match {tuple(labels.shape)} labels"
            )
        if labels.max() >= len(FASHION_MNIST_CLASSES):
            raise DataError(f"{folder} has a label {labels.max()}: Fashion-MNIST's are 0 to 9")
    return (
        train_images[:, None],
        train_labels.long(),
        test_images[:, None],
        test_labels.long(),
        FASHION_MNIST_CLASSES,
    )


def find_idx(folder, file):
    """The path of `file` in `folder`, plain or gzipped, or None."""
    return next((path for path in (folder / file, folder / f"{file}.gz") if path.is_file()), None)


def read_idx(path):
    """Read one IDX file of unsigned bytes, plain or gzipped, as a uint8 tensor.

    torchvision's own reader knows only unpacked files; this one reads Debian's packed ones where
    they lie. The header is two zero bytes, the type (8 is unsigned byte), the number of dimensions,
    then each as a big-endian int32. Raises ValueError unless exactly the promised number of bytes
    follows.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, gzip.zlib.error) as error:
        raise DataError(
            f"{path} is cut short or damaged ({error}): delete it and get it again"
        ) from error
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise DataError(f"{path} is not an IDX file of bytes: delete it and get it again")
    header = 4 + 4 * data[3]
    shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, header, 4)]
    if len(data) != header + math.prod(shape):
        raise DataError(
            f"{path} is cut short or damaged: {len(data)} bytes where its header promises "
            f"{header + math.prod(shape)}; delete it and get it again"
        )
    return torch.frombuffer(bytearray(data[header:]), dtype=torch.uint8).reshape(shape)


def load_torchvision(name, data_dir):
    """Load cifar10, cifar100 or stl10 with torchvision, which downloads them and checks the MD5."""
    try:
        if name == "stl10":  # its 100,000 unlabelled images are there to be learnt from
            train = torchvision.datasets.STL10(data_dir, split="train+unlabeled", download=True)
            test = torchvision.datasets.STL10(data_dir, split="test", download=True)
        else:
            kind = {
                "cifar10": torchvision.datasets.CIFAR10,
                "cifar100": torchvision.datasets.CIFAR100,
            }[name]
            train, test = kind(data_dir, train=True, download=True), kind(data_dir, train=False)
    except (OSError, RuntimeError, EOFError) as error:
        raise DataError(
            f"{name} is not whole in {data_dir} and could not be downloaded "
            f"({' '.join(str(error).split())}): put the archive that torchvision reads into "
            f"{data_dir}, or pass a folder of images to --dataset"
        ) from error
    if name == "stl10":
        tensors = [
            torch.from_numpy(array) for part in (train, test) for array in (part.data, part.labels)
        ]
    else:  # torchvision holds CIFAR as (N, H, W, C) and lists of labels
        tensors = []
        for part in (train, test):
            tensors += [
                torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(),
                torch.tensor(part.targets),
            ]
    return tensors[0], tensors[1].long(), tensors[2], tensors[3].long(), train.classes


def load_folder(folder, image_size):
    """Decode `train/<class>/*` and `test/<class>/*` once, as RGB, image_size x image_size."""

    def visible(path):
        return sorted(x for x in path.iterdir() if x.name[0] != ".") if path.is_dir() else []

    classes = [path.name for path in visible(folder / "train") if path.is_dir()]
    if len(classes) < 2:
        raise DataError(
            f"{folder} needs two classes or more as train/<class>/ folders, it has {len(classes)}"
        )
    for path in visible(folder / "test"):
        if path.is_dir() and path.name not in classes:
            raise DataError(f"{path} has no counterpart in {folder}/train")
    paths, labels = {"train": [], "test": []}, {"train": [], "test": []}
    for split in paths:
        for label, name in enumerate(classes):
            found = [path for path in visible(folder / split / name) if path.is_file()]
            if not found:
                raise DataError(
                    f"{folder / split / name} holds no images: a class needs them in train and test"
                )
            paths[split] += found
            labels[split] += [label] * len(found)
    files = paths["train"] + paths["test"]
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's: each holds the images
    needed, memory = processes * 3 * image_size**2 * len(files), physical_memory()
    if needed > memory / 2:
        raise DataError(
            f"{folder}: {len(files):,} images of {image_size} pixels take {needed / 1e9:.2f} GB, "
            f"over half of the {memory / 1e9:.2f} GB of memory: lower --image-size or use fewer"
        )
    images = decode_images(files, image_size, folder / f".decoded-{image_size}.pt")
    train, test = images.split([len(paths["train"]), len(paths["test"])])
    return train, torch.tensor(labels["train"]), test, torch.tensor(labels["test"]), classes


def physical_memory():
    """Bytes of memory that this machine has, or infinity where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # Windows
        return math.inf


def decode_images(paths, image_size, cache):
    """Decode files to (n, 3, image_size, image_size) uint8 on all cores, or read them from `cache`.

    The cache is written beside the images. It counts only as long as every file has the name, the
    size and the time of change that it had then.
    """
    state = [
        (str(p.relative_to(cache.parent)), p.stat().st_size, p.stat().st_mtime_ns) for p in paths
    ]
    key = hashlib.sha256(repr(state).encode()).hexdigest()
    try:
        saved = torch.load(cache, weights_only=True)
        if saved["key"] == key and saved["images"].shape == (len(paths), 3, image_size, image_size):
            return saved["images"]
    except Exception:  # none yet, or a damaged one, which can fail in any way: decode again
        pass
    images = torch.empty(len(paths), 3, image_size, image_size, dtype=torch.uint8)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # PIL decodes outside Python's lock
        decoded = pool.map(lambda path: decode_image(path, image_size), paths)
        for i, image in enumerate(
            tqdm(decoded, "decoding", len(paths), unit=" images", disable=None)
        ):
            images[i] = image
    try:
        torch.save({"key": key, "images": images}, f"{cache}.tmp")
        os.replace(f"{cache}.tmp", cache)
    except (OSError, RuntimeError):  # a full or read-only disk: then it is decoded each time
        Path(f"{cache}.tmp").unlink(missing_ok=True)
    return images


def decode_image(path, image_size):
    """Decode one file to (3, image_size, image_size) uint8: resize the shorter side, crop."""
    try:
        with Image.open(path) as image:
            if image.mode == "F":
                raise ValueError("it holds fractions: save it with 8 or 16 bits")
            if image.mode.startswith("I") and image.getextrema()[1] > 255:
                # 16 bits: keep the upper eight, where PIL would clip
                image = image.point(lambda value: value / 256).convert("L")
            image = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path} is not an image that can be decoded ({error}): mend or remove it"
        ) from error
    if image.size != (image_size, image_size):
        image = functional.center_crop(functional.resize(image, image_size), image_size)
    return functional.pil_to_tensor(image)


def build_backbone(name, in_channels, image_size=32):
    """Build an encoder of random weights, (N, in_channels, H, W) to (N, feature_dim), both float.

    - convnet: three stride-2 convolutions of 32, 64 and 128 channels, flattened; other sizes than
      25 to 32 pixels are pooled to 4 x 4 first: 2,048 features. Small enough for a laptop's CPU.
    - resnet18, resnet50: torchvision's, without the classifier. For images of up to 64 pixels the
      first convolution is 3 x 3 with stride 1 and there is no max-pooling (SimCLR, appendix B.9),
      since the stock stem would shrink them to almost nothing.

    The weights are laid out channels_last, which convolutions prefer on CPUs and on GPUs in bf16.
    Raises ValueError for another name.
    """
    if name == "convnet":
        layers, channels = [], in_channels
        for width in (32, 64, 128):
            layers += [
                nn.Conv2d(channels, width, kernel_size=3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            channels = width
        if not 25 <= image_size <= 32:  # those come out as 4 x 4 by themselves
            layers.append(nn.AdaptiveAvgPool2d(4))
        backbone = nn.Sequential(*layers, nn.Flatten())
        backbone.feature_dim = 4 * 4 * 128
    elif name in BACKBONES:
        backbone = getattr(torchvision.models, name)()
        if image_size <= 64:
            backbone.conv1 = nn.Conv2d(
                in_channels, 64, kernel_size=3, stride=1, padding=1, bias=False
            )
            backbone.maxpool = nn.Identity()
        elif in_channels != 3:
            backbone.conv1 = nn.Conv2d(
                in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False
            )
        backbone.feature_dim = backbone.fc.in_features
        backbone.fc = nn.Identity()
    else:
        raise ValueError(f"backbone {name} is not one of {', '.join(BACKBONES)}")
    return backbone.to(memory_format=torch.channels_last)
