"""Bad options, folders and files: one line with value and remedy, status 2, nothing written.

The odd images at the end are no bad input: they must load.
"""

import shutil

import common
import pytest
import torch
from conftest import METHODS, call
from PIL import Image, ImageSequence

ALL = (*METHODS, "linear_eval")
# program(s), options, what the line must say
OPTIONS = [
    (METHODS, ["--epochs", "0"], "--epochs: must be from 1 to 1000000000, got 0"),
    (METHODS, ["--epochs", "-3"], "--epochs: must be from 1 to 1000000000, got -3"),
    (METHODS, ["--epochs", "ten"], "--epochs: invalid whole number value: 'ten'"),
    (METHODS, ["--epochs", "1e2"], "--epochs: invalid whole number value: '1e2'"),
    (METHODS, ["--epochs", "9" * 30], "--epochs: must be from 1"),
    (METHODS, ["--batch-size", "0"], "--batch-size: must be from 2"),
    (METHODS, ["--batch-size", "1"], "--batch-size: must be from 2"),
    (METHODS, ["--batch-size", "2.5"], "--batch-size: invalid whole number value: '2.5'"),
    (METHODS, ["--batch-size", "321"], "--batch-size 321 is above the 320 images"),
    (METHODS, ["--lr", "nan"], "--lr: must be from"),
    (METHODS, ["--lr", "inf"], "--lr: must be from"),
    (METHODS, ["--lr", "0"], "--lr: must be from"),
    (METHODS, ["--lr", "-0.1"], "--lr: must be from"),
    (METHODS, ["--lr", "fast"], "--lr: invalid number value: 'fast'"),
    (METHODS, ["--weight-decay", "-1"], "--weight-decay: must be from 0"),
    (METHODS, ["--weight-decay", "nan"], "--weight-decay: must be from 0"),
    (METHODS, ["--warmup-epochs", "-1"], "--warmup-epochs: must be from 0"),
    (METHODS, ["--warmup-epochs", "nan"], "--warmup-epochs: must be from 0"),
    (METHODS, ["--seed", "-1"], "--seed: must be from 0"),
    (METHODS, ["--seed", "1.5"], "--seed: invalid whole number value: '1.5'"),
    (METHODS, ["--image-size", "7"], "--image-size: must be from 8 to 1024, got 7"),
    (METHODS, ["--image-size", "100000"], "--image-size: must be from 8 to 1024"),
    (METHODS, ["--knn-every", "-1"], "--knn-every: must be from 0"),
    (METHODS, ["--max-steps", "0"], "--max-steps: must be from 1"),
    (METHODS, ["--backbone", "vgg"], "--backbone: invalid choice: 'vgg'"),
    (METHODS, ["--device", "tpu"], "--device: invalid choice: 'tpu'"),
    (METHODS, ["--dataset", "no-such-folder"], "--dataset no-such-folder is neither"),
    (METHODS, ["--out", "missing/x.pt"], "missing/x.pt.trial: No such file or directory"),
    (METHODS, ["--out", "."], "--out . is a folder or .csv"),
    (METHODS, ["--out", "x.csv"], "--out x.csv is a folder or .csv"),
    (METHODS, ["--resume"], ".pt does not exist"),
    (METHODS, ["--resume", "missing.pt"], "missing.pt does not exist"),
    (METHODS, ["--resume", "."], ". is a folder"),
    (METHODS, ["--preview", "missing/views.png"], "missing/views.png"),
    (METHODS, ["--preview", "views.xyz"], "unknown file extension: .xyz"),
    (METHODS, ["--no-such-option"], "unrecognized arguments: --no-such-option"),
    (METHODS, ["stray"], "unrecognized arguments: stray"),
    (["simclr", "moco"], ["--temperature", "0"], "--temperature: must be from 0.001"),
    (["simclr", "moco"], ["--temperature", "-1"], "--temperature: must be from 0.001"),
    (["simclr", "moco"], ["--temperature", "nan"], "--temperature: must be from 0.001"),
    (["moco", "byol"], ["--momentum", "1.5"], "--momentum: must be from 0 to 1, got 1.5"),
    (["moco", "byol"], ["--momentum", "-0.1"], "--momentum: must be from 0 to 1, got -0.1"),
    (["moco", "byol"], ["--momentum", "nan"], "--momentum: must be from 0 to 1, got nan"),
    (["moco"], ["--queue-size", "0"], "--queue-size: must be from 1"),
    (["moco"], ["--queue-size", "many"], "--queue-size: invalid whole number value: 'many'"),
    (["moco"], ["--queue-size", "1000001"], "--queue-size: must be from 1 to 1000000"),
    (["simclr", "moco", "byol"], ["--hidden-dim", "0"], "--hidden-dim: must be from 1"),
    (METHODS, ["--projection-dim", "0"], "--projection-dim: must be from 1"),
    (METHODS, ["--projection-dim", "99999"], "--projection-dim: must be from 1 to 16384"),
    (["simsiam"], ["--bottleneck-dim", "0"], "--bottleneck-dim: must be from 1"),
    (["linear_eval"], [], "the following arguments are required: --weights"),
    (["linear_eval"], ["--weights", "missing.pt"], "missing.pt does not exist"),
    (["linear_eval"], ["--weights", "."], ". is a folder"),
    (["linear_eval"], ["--weights", "x", "--labels", "0"], "must be 'all' or at least 2, got 0"),
    (["linear_eval"], ["--weights", "x", "--labels", "-5"], "must be 'all' or at least 2, got -5"),
    (["linear_eval"], ["--weights", "x", "--labels", "few"], "'all' or at least 2, got few"),
    (["linear_eval"], ["--weights", "x", "--labels", "1.5"], "'all' or at least 2, got 1.5"),
    (["linear_eval"], ["--weights", "x", "--labels"], "--labels: expected at least one argument"),
    (["linear_eval"], ["--weights", "x", "--trials", "0"], "--trials: must be from 1"),
    (["linear_eval"], ["--weights", "x", "--seed", "-1"], "--seed: must be from 0"),
    (["linear_eval"], ["--weights", "x", "y", "--export", "e"], "--export e needs one --weights"),
    (["linear_eval"], ["--weights", "x", "--export", "e", "--dataset", "d"], "leave out --dataset"),
    (["linear_eval"], ["--weights", "x", "--device", "tpu"], "--device: invalid choice: 'tpu'"),
]
if not torch.cuda.is_available():
    OPTIONS.append((METHODS, ["--device", "cuda"], "--device cuda: PyTorch finds none here"))
    OPTIONS.append(
        (["linear_eval"], ["--weights", "x", "--device", "cuda"], "--device cuda: PyTorch finds")
    )


def check_refused(process, words):
    assert process.returncode == 2 and process.stdout == "", process.stderr
    assert process.stderr.count("\n") == 1 and words in process.stderr
    assert "Traceback" not in process.stderr


def test_there_are_enough_cases():
    assert len(OPTIONS) + len(FOLDERS) >= 60


@pytest.mark.parametrize("scripts, options, words", OPTIONS)
def test_bad_options_are_refused(tiny, tmp_path, capfd, scripts, options, words):
    for script in scripts:
        size = ["--batch-size", "64"] * (script != "linear_eval")
        process = call(capfd, tmp_path, f"{script}.py", "--data-dir", tiny, *size, *options)
        check_refused(process, words)
        assert process.stderr.startswith(f"{script}.py: error: ")
        assert not list(tmp_path.iterdir())


def image_folder(folder, classes=("cat", "dog"), n=4, size=(20, 20)):
    for split in ("train", "test"):
        for label, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for i in range(n):
                image = Image.effect_noise(size, 50 + label).convert("RGB")
                image.save(folder / split / name / f"{i}.jpg", quality=95)
    return folder


def cut(path, share):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


FOLDERS = {
    "no train folder": (lambda f: shutil.rmtree(f / "train"), "it has 0"),
    "no test folder": (lambda f: shutil.rmtree(f / "test"), "holds no images"),
    "one class": (lambda f: shutil.rmtree(f / "train/dog"), "two classes or more"),
    "an empty class": (lambda f: [p.unlink() for p in (f / "train/dog").iterdir()], "train/dog"),
    "an empty test class": (lambda f: [p.unlink() for p in (f / "test/dog").iterdir()], "test/dog"),
    "a class in test only": (lambda f: (f / "test/bird").mkdir(), "test/bird has no counterpart"),
    "a text file": (lambda f: (f / "train/cat/a.txt").write_text("x"), "a.txt is not an image"),
    "an empty file": (lambda f: (f / "train/cat/1.jpg").write_bytes(b""), "1.jpg is not an image"),
    "a JPEG cut in half": (lambda f: cut(f / "train/cat/1.jpg", 0.5), "1.jpg is not an image"),
    "a JPEG of its head": (lambda f: cut(f / "test/dog/3.jpg", 0.1), "3.jpg is not an image"),
    "fractions": (
        lambda f: Image.new("F", (9, 9), 0.5).save(f / "train/cat/1.tiff"),
        "1.tiff is not an image that can be decoded (it holds fractions",
    ),
    "a file as dataset": (
        lambda f: (shutil.rmtree(f), f.write_text("x")),
        "nor an existing folder",
    ),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_bad_folders_are_refused(tmp_path, capfd, kind):
    folder = image_folder(tmp_path / "images")
    spoil, words = FOLDERS[kind]
    spoil(folder)
    process = call(capfd, tmp_path, "simclr.py", "--dataset", "images", "--batch-size", "4")
    check_refused(process, words)
    assert not list(tmp_path.glob("*.*")) and "images" in process.stderr


def test_batch_above_the_folder(tmp_path, capfd):
    image_folder(tmp_path / "images")
    process = call(capfd, tmp_path, "moco.py", "--dataset", "images", "--batch-size", "9")
    check_refused(process, "--batch-size 9 is above the 8 images")


def cmyk(image, path):
    image.convert("CMYK").save(path.with_suffix(".jpg"))


def palette(image, path):
    image.convert("P", palette=Image.Palette.ADAPTIVE).save(path.with_suffix(".gif"))


def transparent(image, path):
    image.convert("RGBA").save(path.with_suffix(".png"))


def animated(image, path):
    frames = [image, Image.new("RGB", image.size)]
    image.save(path.with_suffix(".webp"), save_all=True, append_images=frames[1:], lossless=True)
    assert len(list(ImageSequence.Iterator(Image.open(path.with_suffix(".webp"))))) == 2


def sixteen_bits(image, path):
    grey = torch.frombuffer(bytearray(image.convert("L").tobytes()), dtype=torch.uint8)
    wide = (grey.int() * 257).to(torch.uint16).view(image.height, image.width)
    Image.fromarray(wide.numpy()).save(path.with_suffix(".png"))
    assert Image.open(path.with_suffix(".png")).mode.startswith("I")


def sixteen_bits_that_use_eight(image, path):
    grey = torch.frombuffer(bytearray(image.convert("L").tobytes()), dtype=torch.uint8)
    wide = grey.to(torch.uint16).view(image.height, image.width)
    Image.fromarray(wide.numpy()).save(path.with_suffix(".png"))


def one_bit(image, path):
    image.convert("1").save(path.with_suffix(".png"))


@pytest.mark.parametrize(
    "save",
    [cmyk, palette, transparent, animated, sixteen_bits, sixteen_bits_that_use_eight, one_bit],
)
def test_odd_images_load(tmp_path, save):
    """Images of all kinds come out as what they show."""
    folder = image_folder(tmp_path)
    image = Image.new("RGB", (20, 20), (255, 255, 255))
    image.paste((0, 0, 0), (0, 0, 10, 20))  # left half black, right half white
    save(image, folder / "train" / "cat" / "!first")
    images = common.load_dataset(str(folder), "data", 20).train_images
    left, right = images[0, :, :, 2:8].float(), images[0, :, :, 12:18].float()
    assert images.shape == (9, 3, 20, 20) and left.mean() < 12 and right.mean() > 243


def test_hidden_files_and_odd_class_names_load(tmp_path):
    folder = image_folder(tmp_path, ("[a]", "b*"))
    (folder / "train" / ".hidden").mkdir()
    (folder / "train" / "b*" / ".DS_Store").write_bytes(b"x")
    assert common.load_dataset(str(folder), "data", 20).train_labels.tolist() == [0] * 4 + [1] * 4


def test_mixed_sizes_and_names_load(tmp_path, capfd):
    folder = image_folder(tmp_path / "my pictures é", ("Katze", "niño 2"))
    for i, size in enumerate([(9, 40), (40, 9), (1, 1), (300, 200)]):
        Image.effect_noise(size, 30).save(folder / "train" / "niño 2" / f"größe {i} 猫.png")
    options = ["--dataset", folder, "--batch-size", "4", "--backbone", "convnet"]
    process = call(capfd, tmp_path, "byol.py", *options, "--max-steps", "1", "--knn-every", "0")
    assert process.returncode == 0, process.stderr
    data = common.load_dataset(str(folder), "data", 16)
    assert data.train_images.shape == (12, 3, 16, 16)
    assert data.train_labels.tolist() == [0] * 4 + [1] * 8
