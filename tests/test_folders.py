"""Folders of images as people have them: what is read, as what, and what is said of the rest."""

import os
import shutil
import struct
import time
from unittest.mock import Mock

import common
import pytest
import torch
from conftest import write_image, write_images
from PIL import Image

GREY = torch.arange(1024, dtype=torch.int32).view(32, 32).numpy()  # 0 to 1,023


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    return folder


def load(folder, size=32):
    return common.load_dataset(str(folder), folder.parent / "cache", size)


def first_pixels(folder, size=32):
    """Load the only image of a folder, and a second one, as there must be two: (3, size, size)."""
    Image.linear_gradient("L").save(folder / "second.png")
    return load(folder, size).train_images[0]


def test_classes_and_unlabelled(photos, capsys):
    for name in ("cat", "dog", "élan 2"):
        write_images(photos / "train" / name, 3)
        write_images(photos / "test" / name, 2)
    write_images(photos / "unlabelled" / "a" / "b", 4)
    data = load(photos, 16)
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, -1, -1, -1, -1]
    assert data.test_labels.tolist() == [0, 0, 1, 1, 2, 2] and data.test_images.shape[0] == 6
    assert data.classes == ("cat", "dog", "élan 2") and len(data.paths) == 19
    assert data.paths[8:10] == ("train/élan 2/2.png", "unlabelled/a/b/0.png")
    assert data.paths[-1] == "test/élan 2/1.png"
    assert capsys.readouterr().out.startswith(
        f"{photos}: 13 training images (9 with a label), 6 test images, 3 classes in "
        "train/ (9 images), test/ (6 images), unlabelled/ (4 images)\nignored: nothing\n"
    )


@pytest.mark.parametrize(
    "places, found, said",
    [
        (["train/cat"], "cat", "./ (2 images), train/ (1 images)"),  # one class is none
        (["2019/summer", "Train/a", "Train/b"], "none", "./ (2 images), Train/ (2 images), 2019/"),
        (["a", "b/b", "b", "c", "d", "e", "f"], "none", "./ (2 images), b/ (2 images), a/ (1 "),
    ],
)
def test_without_labels_all_images_count(photos, capsys, places, found, said):
    for name in places:
        write_images(photos / name, 1)
    write_images(photos, 2)
    data = load(photos)
    assert data.train_labels.tolist() == [-1] * (len(places) + 2) and data.classes == ()
    out = capsys.readouterr().out
    assert f"no kNN: it takes two folders train/CLASS, found: {found}\n" in out
    assert f"(0 with a label), 0 test images, 0 classes in {said}" in out
    assert ("d/ (1 images), and more\n" in out) == (len(places) > 5)


def test_what_is_ignored_is_said(photos, capsys, monkeypatch):
    for name in ("train/cat", "train/dog", "val/cat", "val/dog", "test/bird"):
        write_images(photos / name, 2)
    for name in ("train/.ipynb_checkpoints", "train/__MACOSX/cat", "__MACOSX/train/cat", "@eaDir"):
        write_images(photos / name, 2)  # what systems leave behind is passed over
    (photos / "train/cat/._0.png").write_bytes(b"no image, but what a Mac adds")
    write_images(photos / "unlabeled", 3)
    write_images(photos / "train", 1)
    (photos / "train/dog/notes.txt").write_text("no image")
    (photos / "secret").mkdir()  # cannot be read
    scandir = os.scandir
    fail = Mock(side_effect=lambda x: scandir(f"{x}/no" if str(x).endswith("secret") else x))
    monkeypatch.setattr(os, "scandir", fail)
    data = load(photos)
    assert len(data.paths) == 4 and data.classes == ("cat", "dog")
    assert (
        "ignored: val/ (4 images), unlabeled/ (3 images), test/ (2 images), train/ (1 images), "
        f"[Errno 2] No such file or directory: '{photos}/secret/no', 1 files other than .jpg, "
    ) in capsys.readouterr().out


def test_links_are_followed_but_not_in_circles(photos):
    other = photos.parent / "other"
    write_images(photos, 2)
    write_images(other, 3)
    (photos / "more").symlink_to(other)
    (other / "back").symlink_to(photos)
    (photos / "self").symlink_to(photos)
    assert load(photos).paths == ("0.png", "1.png", "more/0.png", "more/1.png", "more/2.png")


WHITE, PAGES = (255, 255, 255, 255), dict(save_all=True, append_images=[Image.new("1", (32, 48))])


@pytest.mark.parametrize(
    "name, mode, options, left, seen",
    [
        ("0.JFIF", "RGB", dict(format="JPEG", quality=100), WHITE, [255, 255, 255]),
        ("0.jpg", "CMYK", dict(quality=100), WHITE, [255, 255, 255]),
        ("0.gif", "P", PAGES, WHITE, [255, 255, 255]),  # the first picture of several
        ("0.tiff", "L", PAGES, WHITE, [255, 255, 255]),
        ("0.webp", "RGB", dict(lossless=True, **PAGES), WHITE, [255, 255, 255]),
        ("0.bmp", "1", {}, WHITE, [255, 255, 255]),
        ("0.png", "RGBA", {}, (255, 0, 0, 0), [255, 255, 255]),  # transparent, whatever is hidden
        ("0.png", "LA", {}, (0, 0, 0, 0), [255, 255, 255]),
        ("0.png", "P", {}, (1, 2, 3, 0), [255, 255, 255]),
        ("0.png", "RGBA", {}, (200, 100, 0, 51), [244, 224, 204]),  # a fifth of it, 204 of white
        ("0.png", "L", dict(transparency=70), (70, 70, 70), [255, 255, 255]),  # a colour key
        ("0.png", "RGB", dict(transparency=(7, 1, 2)), (7, 1, 2), [255, 255, 255]),
        ("0.png", "L I;16", dict(transparency=70), (70, 70, 70), [255, 255, 255]),  # black: 0
    ],
)
def test_images_load_as_what_they_show(photos, name, mode, options, left, seen):
    image = Image.new("RGBA", (32, 48), "grey")  # of which the square in the middle is taken
    image.paste(left, (0, 8, 16, 40))
    image.paste("black", (16, 8, 32, 40))
    for step in mode.split():
        image = image.quantize(4) if step == "P" else image.convert(step)
    image.save(photos / name, **options)
    pixels = first_pixels(photos)
    assert (pixels[:, :, :14] - torch.tensor(seen)[:, None, None]).abs().max() < 8
    assert pixels[:, :, 18:].max() < 8


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_upright(photos, orientation, suffix):
    """Their EXIF holds a negative resolution, which Pillow reads but cannot write back."""
    pixels = torch.zeros(32, 32, 3, dtype=torch.uint8)
    pixels[:16, :16, 0] = pixels[:16, 16:, 1] = pixels[16:, :16, 2] = 255
    image, turn = Image.fromarray(pixels.numpy()), Image.Transpose
    # Row 0 and column 0 of the file are these sides of the scene (EXIF 2.3, 4.6.4).
    stored = [turn.FLIP_LEFT_RIGHT, turn.ROTATE_180, turn.FLIP_TOP_BOTTOM, turn.TRANSPOSE]
    stored += [turn.ROTATE_90, turn.TRANSVERSE, turn.ROTATE_270]
    image = image.transpose(stored[orientation - 2]) if orientation > 1 else image
    entries = struct.pack("<HHHIIHHII", 2, 0x112, 3, 1, orientation, 0x11A, 10, 1, 38)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + entries + bytes(4) + struct.pack("<ii", -72, 0)
    options = dict(exif=exif) if suffix != "tiff" else dict(tiffinfo={0x112: orientation})
    image.save(photos / f"0.{suffix}", **options)
    difference = first_pixels(photos).float() - pixels.permute(2, 0, 1)
    assert difference.abs().mean() < 12  # turned wrongly: above 40


@pytest.mark.parametrize("mode, dtype", [("I;16", "<u2"), ("I;16B", ">u2"), ("I", "<i4")])
@pytest.mark.parametrize("factor", [64, 5, 3])
def test_of_16_bits_the_upper_8_count(photos, capsys, mode, dtype, factor):
    """One rule for all images, however dark: a few grey levels are left, and that is said."""
    values = (factor * GREY).astype(dtype).tobytes()
    Image.frombytes(mode, (32, 32), values).save(photos / "0.tif")
    assert torch.equal(first_pixels(photos)[0], torch.from_numpy(factor * GREY // 256).byte())
    warned = f"1 images like {photos / '0.tif'} have few greys" in capsys.readouterr().out
    assert warned == (factor == 3)


def test_each_image_keeps_its_place(photos, monkeypatch):
    """Also if the first files take longest to decode."""
    write_images(photos, 100)
    original, begun = common.decode_image, []

    def decode_image(path, size):
        begun.append(path)
        time.sleep(max(0, 0.02 - 0.001 * len(begun)))
        return original(path, size)

    monkeypatch.setattr(common, "decode_image", decode_image)
    data = load(photos, 8)
    for image, name in zip(data.train_images, data.paths, strict=True):
        colour = Image.open(photos / name).getpixel((0, 0))
        assert image.view(3, -1).unique(dim=1).flatten().tolist() == list(colour)


def test_all_that_cannot_be_decoded_is_said_at_once(photos, monkeypatch):
    write_images(photos, 2)
    whole = (photos / "0.png").read_bytes()
    (photos / "cut.png").write_bytes(whole[:60])
    (photos / "empty.png").touch()
    (photos / "dead.png").symlink_to("nowhere.png")
    for name, values in (("f", GREY.astype("<f4")), ("large", 65 * GREY), ("negative", GREY - 1)):
        Image.fromarray(values).save(photos / f"{name}.tiff")
    five = (
        "cut.png .*; .*dead.png .*; .*empty.png .*; .*f.tiff .*; .*large.tiff .it holds no integers"
    )
    with pytest.raises(common.DataError, match=f"^6 images cannot be .*: .*{five} [^;]*$"):
        load(photos)

    fail = Mock(side_effect=MemoryError)  # as a decoder can, without a word
    monkeypatch.setattr(common, "decode_image", fail)
    with pytest.raises(common.DataError, match="^8 images .* remove: .*0.png .MemoryError"):
        load(photos)
    assert not list((photos.parent / "cache").glob("*"))  # nothing half done is left


def test_images_are_decoded_once(photos, monkeypatch):
    decode, decoded, cache = common.decode_image, [], photos.parent / "cache"
    write_images(photos, 6)
    Image.linear_gradient("L").save(photos / "6.bmp")
    monkeypatch.setattr(common, "decode_image", lambda *x: decoded.append(x) or decode(*x))

    def pixels(size=16, folder=photos, expected=7):
        """Load the seven images, so many of which are to be decoded."""
        decoded.clear()
        images = common.load_dataset(str(folder), cache, size).train_images
        assert images.shape == (7, 3, size, size) and len(decoded) == expected
        return images

    first = pixels()
    before = first.clone()
    assert torch.equal(pixels(expected=0), first)
    first[:] = 0  # a change in memory is none on the disk
    assert torch.equal(pixels(expected=0), before)
    pixels(8)  # another size
    write_image(photos / "0.png", torch.full((3, 20, 20), 77, dtype=torch.uint8))
    assert pixels()[0, :, 8, 8].tolist() == [77] * 3  # another content
    (photos / "5.png").rename(photos / "7.png")
    pixels()  # another name
    same = shutil.copytree(photos, photos.parent / "other" / "photos")  # sizes and times too
    pixels(folder=same)  # another place
    bmp, times = same / "6.bmp", (1, (same / "6.bmp").stat().st_mtime_ns)
    bmp.write_bytes(bmp.read_bytes().replace(bytes([128] * 256), bytes([0] * 256)))
    os.utime(bmp, ns=times)
    pixels(folder=same)  # another content, dated alike
    os.truncate(max(cache.iterdir(), key=os.path.getmtime), 1000)
    pixels(folder=same)  # cut short
    shutil.rmtree(cache)
    cache.touch()
    with pytest.raises(common.DataError, match="choose another --data-dir"):
        pixels()
