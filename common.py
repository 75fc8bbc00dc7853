"""The datasets and the backbones that the four methods share.

Images stay uint8 tensors, so that a training script can put them on its device once and draw a
batch by indexing. n images, C channels, H rows, W columns.
"""

import gzip
import hashlib
import os
import struct
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

DATASETS = ("fashion-mnist", "cifar10", "cifar100", "stl10", "digits")
BACKBONES = ("convnet", "vit", "resnet18", "resnet50")
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
IMAGE_SUFFIXES = (*IMG_EXTENSIONS, ".jfif", ".gif")
HIDDEN = (".", "__MACOSX", "@eaDir", "$RECYCLE.BIN")  # what systems put beside the images


class DataError(SystemExit):
    """The data or its place is wrong. Python prints the message, what to do, and ends."""


class Dataset(NamedTuple):
    """Images (n, C, H, W) uint8; labels (n,) int64, -1 where there is none.

    `paths` are those of a folder's images, training before test, relative to the folder. `mean`
    and `std` (C,) float32 are those of the training images / 255, to four decimals.
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
    option("--image-size", type=int, help="pixels; a folder's default is 32")
    option("--backbone", choices=BACKBONES, default="convnet")


def load_dataset(name, data_dir, image_size=None, device="cpu"):
    """Load one of DATASETS, or the images of a folder, into the memory of `device`.

    Images get `image_size` pixels a side. Without it, a folder's and the digits get 32, and the
    others stay as they are. Files are looked for in `data_dir`, and downloaded or decoded into it.
    Raises DataError, naming the file and the remedy, when something is missing or damaged.
    """
    if name == "fashion-mnist":
        data = load_fashion_mnist(Path(data_dir))
    elif name == "digits":
        data, image_size = load_digits(), image_size or 32
    elif name in DATASETS:
        data = load_torchvision(name, data_dir)
    elif Path(name).is_dir():
        data = load_folder(Path(name), Path(data_dir), image_size or 32)
    else:
        raise DataError(
            f"--dataset {name} is neither one of {', '.join(DATASETS)} nor an existing folder"
        )
    if image_size not in (None, data.train_images.shape[3]):
        train_images, test_images = (
            torch.cat([resize(part, [image_size, image_size]) for part in images.split(1000)])
            for images in (data.train_images, data.test_images)
        )
        data = data._replace(train_images=train_images, test_images=test_images)

    # Images as floats take four times the memory, so go through them in parts.
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
                f"Fashion-MNIST is not in {data_dir} and could not be downloaded "
                f"({' '.join(str(error).split())}): on Debian or Ubuntu run 'apt-get install "
                f"dataset-fashion-mnist', elsewhere put {', '.join(FASHION_MNIST_FILES)} (plain "
                f"or .gz) into {data_dir}, or use --dataset digits, which needs no download"
            ) from error
    a, b, c, d = (read_idx(find(file)) for file in FASHION_MNIST_FILES)
    for images, labels in ((a, b), (c, d)):
        if images.ndim != 3 or labels.shape != images.shape[:1] or labels.max() > 9:
            raise DataError(
                f"{find(FASHION_MNIST_FILES[0]).parent}: images {tuple(images.shape)} and labels "
                f"{tuple(labels.shape)} up to {labels.max()} are not Fashion-MNIST: get them again"
            )
    classes = torchvision.datasets.FashionMNIST.classes
    return Dataset(a[:, None], b.long(), c[:, None], d.long(), tuple(classes))


def read_idx(path):
    """Read an IDX file of bytes, plain or gzipped; torchvision's own reader knows only plain ones.

    Two zero bytes, the type (8: bytes), the number of dimensions, each of them as a big-endian
    int32, the data.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        shape = struct.unpack_from(f">{data[3]}I", data, offset=4)
        pixels = bytearray(data[4 + 4 * len(shape) :])
        return torch.frombuffer(pixels, dtype=torch.uint8).reshape(shape)
    except (EOFError, IndexError, OSError, RuntimeError, ValueError, struct.error, zlib.error) as e:
        raise DataError(f"{path} is cut short or damaged: delete it and get it again") from e


def load_digits():
    """Load scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; the last 400 are the test."""
    import sklearn.datasets  # here, as nothing else needs scikit-learn

    digits = sklearn.datasets.load_digits()
    images = torch.from_numpy(digits.images * 255 / 16).to(torch.uint8)[:, None]
    labels = torch.from_numpy(digits.target).long()
    classes = tuple(map(str, range(10)))
    return Dataset(images[:-400], labels[:-400], images[-400:], labels[-400:], classes)


def load_torchvision(name, data_dir):
    """Load cifar10, cifar100 or stl10 with torchvision, which downloads them and checks the MD5."""
    kind = getattr(torchvision.datasets, name.upper())
    options = [dict(train=True), dict(train=False)]
    if name == "stl10":  # its 100,000 unlabelled images are there to be learnt from
        options = [dict(split="train+unlabeled"), dict(split="test")]
    try:
        train, test = (kind(data_dir, **option, download=True) for option in options)
    except (OSError, RuntimeError, EOFError) as error:
        raise DataError(
            f"{name} is incomplete in {data_dir} and could not be downloaded "
            f"({' '.join(str(error).split())}): put the archive that torchvision reads into "
            f"{data_dir}, or pass a folder of images to --dataset"
        ) from error
    tensors = []
    for part in (train, test):
        images = torch.from_numpy(part.data)
        if name != "stl10":  # (n, H, W, C)
            images = images.permute(0, 3, 1, 2).contiguous()
        labels = part.labels if name == "stl10" else part.targets
        tensors += [images, torch.as_tensor(labels).long()]
    return Dataset(*tensors, tuple(train.classes))


def load_folder(folder, data_dir, image_size):
    """Load the images below a folder, as RGB, scaled and cut to squares of `image_size` pixels.

    With two or more folders `train/<class>`, the images in them have labels, those in
    `test/<class>` are the test images, and those in `unlabelled` are trained on too. Otherwise all
    images, wherever they lie, are training images without a label. Prints what it ignores.
    """
    files, ignored = list_files(folder)
    images = [name for name in files if name.lower().endswith(IMAGE_SUFFIXES)]
    places = [name.split("/") for name in images]
    classes = sorted({place[1] for place in places if place[0] == "train" and len(place) > 2})
    labels = {name: label for label, name in enumerate(classes)}
    train, test, unused = [], [], []
    for name, (part, *inside) in zip(images, places, strict=True):
        if len(classes) < 2 or part == "unlabelled":
            train.append((name, -1))
        elif part in ("train", "test") and inside[0] in labels:
            (train if part == "train" else test).append((name, labels[inside[0]]))
        else:
            unused.append(name)

    ignored += by_folder(unused)
    if len(files) > len(images):
        ignored.append(f"{len(files) - len(images):,} files of other types")
    if not train:
        found = ", ".join(ignored) or "nothing"
        raise DataError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)}), but {found}")
    remark = f"{len(classes)} classes"
    if len(classes) == 1:
        remark, classes = f"one class only ({classes[0]}), so no kNN and no linear classifier", []
    elif not classes:
        remark = "no labels (no folders train/CLASS), so no kNN"
    print(f"{folder}: {len(train):,} training images, {len(test):,} test images, {remark}")
    print(f"read: {', '.join(by_folder(name for name, _ in train + test))}")
    if ignored:
        print(f"ignored: {', '.join(ignored)}")

    names, labels = zip(*train, *test, strict=True)
    images = read_images(folder.resolve(), names, data_dir, image_size)
    train_images, test_images = images.split([len(train), len(test)])
    train_labels, test_labels = torch.tensor(labels).split([len(train), len(test)])
    return Dataset(train_images, train_labels, test_images, test_labels, tuple(classes), names)


def list_files(folder):
    """Return the names of all files below a folder, sorted, and those of unreadable folders.

    Links are followed, but not to a folder above them. HIDDEN files and folders are left out.
    """
    files, errors = [], []
    for root, folders, names in os.walk(folder, followlinks=True, onerror=errors.append):
        root = Path(root)
        above = {path.resolve() for path in (root, *root.parents)}
        folders[:] = [name for name in folders if (root / name).resolve() not in above]
        for listed in (folders, names):
            listed[:] = [name for name in listed if not name.startswith(HIDDEN)]
        below = root.relative_to(folder)
        files += [(below / name).as_posix() for name in names]
    return sorted(files), [f"{error.filename} ({error.strerror})" for error in errors]


def by_folder(names):
    """Say how many images lie in which of the outermost folders, the five fullest first."""
    counts = Counter(name.split("/")[0] if "/" in name else "." for name in names)
    said = [f"{folder}/ ({n:,} images)" for folder, n in counts.most_common(5)]
    if len(counts) > 5:
        said.append(f"{len(counts) - 5:,} more folders")
    return said


def read_images(folder, names, data_dir, image_size):
    """Return images (n, 3, image_size, image_size), decoded now or by an earlier run.

    Files are told apart by path, size, time and a little of their content.
    """
    key = hashlib.sha256(os.fsencode(folder))
    for name in names:
        key.update(os.fsencode(name))
        with suppress(OSError), open(f"{folder}/{name}", "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            file.seek(status.st_size // 2)  # many files begin alike
            key.update(repr((status.st_size, status.st_mtime_ns)).encode())
            key.update(file.read(1024))
    cache = data_dir / f"{folder.name}-{image_size}-{key.hexdigest()[:16]}.uint8"
    size = len(names) * 3 * image_size**2
    if not cache.is_file() or cache.stat().st_size != size:
        decode_images([folder / name for name in names], image_size, cache)
    # Mapped into memory: the images need not fit there, and several processes share them.
    images = torch.from_file(str(cache), size=size, dtype=torch.uint8)
    return images.view(-1, 3, image_size, image_size)


def decode_images(paths, image_size, cache):
    """Decode files on all cores into the file `cache`: (n, 3, image_size, image_size) uint8."""
    unfinished, bad, faint = Path(f"{cache}.{os.getpid()}"), [], []

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
        with ThreadPoolExecutor() as pool, unfinished.open("wb") as file:
            decoded = pool.map(decode, paths)
            file.writelines(tqdm(decoded, "decoding", len(paths), leave=False, disable=None))
        if bad:
            first = "; ".join(sorted(bad)[:5])
            raise DataError(f"{len(bad)} images cannot be decoded, repair or remove them: {first}")
        unfinished.replace(cache)
    except OSError as e:
        raise DataError(f"{cache} cannot be written ({e}): choose another --data-dir") from e
    finally:
        if unfinished.exists():
            unfinished.unlink()
    if faint:
        print(
            f"warning: {len(faint):,} images have fewer than 16 grey levels, like {min(faint)}: if "
            "they have 16 bits, scale the values of all images alike, so that they reach 65,535"
        )


def decode_image(path, image_size):
    """Return an image file as a PIL image, RGB, upright, of `image_size` x `image_size` pixels."""
    with Image.open(path) as image:
        image.draft("RGB", (2 * image_size, 2 * image_size))  # large JPEGs at less detail
        image.load()
        image.getexif()  # remembers the orientation
        image.info.pop("exif", None)  # exif_transpose would write it back, and sometimes cannot
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("it holds fractions: save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        values = torch.frombuffer(bytearray(image.convert("I").tobytes()), dtype=torch.int32)
        if values.min() < 0 or values.max() > 65_535:
            raise ValueError("it holds integers outside 0 to 65,535: save it with 16 bits")
        values[values == image.info.get("transparency", -1)] = 65_535  # white
        upper = (values // 256).to(torch.uint8)
        image = Image.frombytes("L", image.size, upper.numpy().tobytes())
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return ImageOps.fit(image.convert("RGB"), (image_size, image_size))


def build_backbone(name, in_channels, image_size=32):
    """Build an encoder of random weights, (N, in_channels, H, W) to (N, feature_dim), both float.

    - convnet: three stride-2 convolutions of 32, 64 and 128 channels, flattened; other sizes than
      25 to 32 pixels are pooled to 4 x 4 first: 2,048 features. Small enough for a laptop's CPU.
    - vit: a small vision transformer, two blocks of width 64 on patches of 4 x 4 pixels: 64
      features, those of the class token. It wants AdamW, which the diffs of DINO and MoCo v3 use.
    - resnet18, resnet50: torchvision's, without the classifier. For images of up to 64 pixels the
      first convolution is 3 x 3 with stride 1 and there is no max-pooling (SimCLR, appendix B.9),
      since the stock stem would shrink them to almost nothing.

    The weights are laid out channels_last, which convolutions prefer on CPUs and on GPUs in bf16.
    Raises ValueError for another name, DataError for images that patches do not fit.
    """
    if name == "convnet":
        layers, channels = [], in_channels
        for width in (32, 64, 128):
            convolution = nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        if not 25 <= image_size <= 32:  # those come out as 4 x 4 by themselves
            layers.append(nn.AdaptiveAvgPool2d(4))
        backbone = nn.Sequential(*layers, nn.Flatten())
        backbone.feature_dim = 128 * 4 * 4
    elif name == "vit":
        if image_size % 4:
            raise DataError(f"--image-size {image_size}: the vit needs a multiple of 4")
        backbone = torchvision.models.VisionTransformer(
            image_size, patch_size=4, num_layers=2, num_heads=2, hidden_dim=64, mlp_dim=128
        )
        backbone.conv_proj = nn.Conv2d(in_channels, 64, 4, stride=4)  # torchvision takes RGB only
        backbone.feature_dim, backbone.heads = 64, nn.Identity()
    elif name in BACKBONES:
        backbone = getattr(torchvision.models, name)()
        if image_size <= 64:
            backbone.conv1 = nn.Conv2d(in_channels, 64, 3, stride=1, padding=1, bias=False)
            backbone.maxpool = nn.Identity()
        elif in_channels != 3:
            backbone.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        backbone.feature_dim = backbone.fc.in_features
        backbone.fc = nn.Identity()
    else:
        raise ValueError(f"backbone {name} is not one of {', '.join(BACKBONES)}")
    return backbone.to(memory_format=torch.channels_last)
