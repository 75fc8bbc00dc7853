"""Folders of images as people have them: what is read, as what, and what is said of the rest."""

import os
import shutil
import struct
import zlib

import common
import pytest
import torch
from conftest import write_image, write_images
from PIL import Image

GREY = torch.arange(1024).view(32, 32).numpy()  # 0 to 1,023


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
    pixels = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    write_image(photos / "train/cat/0.png", pixels)
    data = load(photos, 16)
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, -1, -1, -1, -1]
    assert data.test_labels.tolist() == [0, 0, 1, 1, 2, 2] and data.test_images.shape[0] == 6
    assert data.classes == ("cat", "dog", "élan 2")
    assert torch.equal(data.train_images[0], pixels)  # of their own size, they stay as they are
    assert data.paths[0] == "train/cat/0.png" and data.paths[-1] == "test/élan 2/1.png"
    assert data.paths[9] == "unlabelled/a/b/0.png" and len(data.paths) == 19
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"{photos}: 13 training images (9 with a label), 6 test images, 3 classes in "
        "train/ (9 images), test/ (6 images), unlabelled/ (4 images)",
        "ignored: nothing",
    ]


@pytest.mark.parametrize(
    "places, found, said",
    [
        (["train/cat"], "cat", "train/ (1"),  # one class is none
        (["2019/summer", "Train/cat", "Train/dog"], "none", "./ (2 images), Train/ (2 images)"),
        (["a", "b", "b", "b/c", "d", "e", "f", "g"], "none", "b/ (2 images), a/ (1 images)"),
    ],
)
def test_without_labels_all_images_count(photos, capsys, places, found, said):
    for name in places:
        write_images(photos / name, 1)
    write_images(photos, 2)
    data = load(photos)
    assert data.train_labels.tolist() == [-1] * len(data.paths) and data.classes == ()
    assert len(data.paths) == len({*places, "."}) + 1 and len(data.test_images) == 0
    out = capsys.readouterr().out
    assert f"no kNN: it takes two folders train/CLASS, found: {found}\n" in out
    assert "(0 with a label), 0 test images, 0 classes" in out and said in out
    assert ("and more" in out) == (len(places) > 5)


def test_what_is_ignored_is_said(photos, capsys, monkeypatch):
    for name in ("train/cat", "train/dog", "val/cat", "val/dog", "test/bird"):
        write_images(photos / name, 2)
    write_images(photos / "unlabeled", 3)
    write_images(photos / "train", 1)
    (photos / "train/dog/notes.txt").write_text("no image")
    secret, scandir = photos / "secret", os.scandir
    secret.mkdir()

    def refuse_secret(path):
        if str(path) == str(secret):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse_secret)
    assert len(load(photos).paths) == 4
    assert (
        "ignored: val/ (4 images), unlabeled/ (3 images), test/ (2 images), train/ (1 images), "
        f"[Errno 13] Permission denied: '{secret}', 1 files other than .jpg, "
    ) in capsys.readouterr().out


def test_hidden_files_and_folders_are_passed_over(photos, capsys):
    for name in ("cat", "dog", ".ipynb_checkpoints", "__MACOSX", "@eaDir"):
        write_images(photos / "train" / name, 2)
    shutil.copytree(photos / "train", photos / "__MACOSX" / "train")
    (photos / "train/cat/._0.png").write_bytes(b"no image, but what a Mac adds")
    data = load(photos)
    assert data.classes == ("cat", "dog") and len(data.paths) == 4
    assert "ignored: nothing" in capsys.readouterr().out


def test_links_are_followed_but_not_in_circles(photos):
    other = photos.parent / "other"
    write_images(photos, 2)
    write_images(other, 3)
    (photos / "more").symlink_to(other)
    (other / "back").symlink_to(photos)
    (photos / "self").symlink_to(photos)
    paths = load(photos).paths
    assert paths == ("0.png", "1.png", "more/0.png", "more/1.png", "more/2.png")


def test_suffixes_and_first_pages(photos):
    red, blue = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    for name in ("a.gif", "b.png", "c.tiff", "d.webp"):
        options = {"lossless": True} if name == "d.webp" else {}
        red.save(photos / name, save_all=True, append_images=[blue], **options)
    red.save(photos / "e.JFIF", "JPEG", quality=100)
    images = load(photos).train_images
    assert len(images) == 5
    assert (images[:, 0] > 250).all() and (images[:, 1:] < 5).all()


@pytest.mark.parametrize("kind", ["CMYK", "P", "RGBA", "L", "1", "wide", "turned"])
def test_odd_images_load_as_what_they_show(photos, kind):
    image, path = Image.new("RGB", (20, 20), (255, 255, 255)), photos / "0.tiff"
    image.paste((0, 0, 0), (0, 0, 10, 20))  # left half black, right half white
    if kind == "wide":
        image.resize((20, 90)).save(path)
    elif kind == "turned":  # a TIFF, which Pillow turns by itself
        image.rotate(-90).save(path, tiffinfo={0x0112: 8})
    elif kind == "CMYK":
        image.convert(kind).save(path.with_suffix(".jpg"), quality=100)
    else:
        image.convert(kind).save(path)
    pixels = first_pixels(photos, 20).float()
    assert pixels[:, :, 2:8].mean() < 12 and pixels[:, :, 12:18].mean() > 243


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_upright(photos, orientation, suffix):
    """Their EXIF holds a negative resolution, which Pillow reads but cannot write back."""
    pixels = torch.zeros(32, 32, 3, dtype=torch.uint8)
    pixels[:16, :16, 0] = pixels[:16, 16:, 1] = pixels[16:, :16, 2] = 255
    stored = {  # row 0 and column 0 of the file are these sides of the scene (EXIF 2.3, 4.6.4)
        1: pixels,
        2: pixels.flip(1),
        3: pixels.flip(0, 1),
        4: pixels.flip(0),
        5: pixels.transpose(0, 1),
        6: pixels.rot90(1),
        7: pixels.transpose(0, 1).flip(0, 1),
        8: pixels.rot90(-1),
    }[orientation]
    entries = struct.pack("<HHHIIHHII", 2, 0x112, 3, 1, orientation, 0x11A, 10, 1, 38)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + entries + bytes(4) + struct.pack("<ii", -72, 0)
    image, path = Image.fromarray(stored.contiguous().numpy()), photos / f"0.{suffix}"
    image.save(path, exif=exif, quality=100)
    difference = first_pixels(photos).float() - pixels.permute(2, 0, 1)
    assert difference.abs().mean() < 12  # turned wrongly: above 40


def png(bits, colour_type, row, key):
    """Return a PNG file of 32 equal rows in which one colour is declared transparent."""
    header = struct.pack(">IIBBBBB", 32, 32, bits, colour_type, 0, 0, 0)
    data, file = zlib.compress(32 * (b"\0" + row)), b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + header, b"tRNS" + key, b"IDAT" + data, b"IEND"):
        file += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return file


@pytest.mark.parametrize("form", ["RGBA", "LA", "palette", "L key", "RGB key", "16-bit key"])
@pytest.mark.parametrize("hidden", [(0, 0, 0), (255, 0, 0), (1, 2, 3)])
def test_transparent_is_white(photos, form, hidden):
    """The left half is transparent, whatever colour is hidden there, and the right half black."""
    image, path = Image.new("RGBA", (32, 32), (*hidden, 0)), photos / "0.png"
    image.paste((0, 0, 0, 255), (16, 0, 32, 32))
    if form == "palette":
        image.quantize(4).save(path)
    elif form == "L key":
        path.write_bytes(png(8, 0, bytes([70] * 16 + [0] * 16), bytes([0, 70])))
    elif form == "RGB key":
        path.write_bytes(png(8, 2, bytes([70, 1, 2] * 16 + [0] * 48), bytes([0, 70, 0, 1, 0, 2])))
    elif form == "16-bit key":  # what differs from the key in the lower 8 bits only is opaque
        path.write_bytes(png(16, 0, bytes([0, 70] * 16 + [0, 71] * 16), bytes([0, 70])))
    else:
        image.convert(form).save(path)
    pixels = first_pixels(photos)
    assert (pixels[:, :, :16] == 255).all() and (pixels[:, :, 16:] == 0).all()


def test_half_transparent_is_half_white(photos):
    Image.new("RGBA", (32, 32), (200, 100, 0, 51)).save(photos / "0.webp", lossless=True)
    assert first_pixels(photos)[:, 5, 5].tolist() == [244, 224, 204]  # a fifth, and 204 of white


@pytest.mark.parametrize("mode, dtype", [("I;16", "<u2"), ("I;16B", ">u2"), ("I", "<i4")])
@pytest.mark.parametrize("factor", [64, 5, 3])
def test_of_16_bits_the_upper_8_count(photos, capsys, mode, dtype, factor):
    """One rule for all images, however dark: a few grey levels are left, and that is said."""
    values = (factor * GREY).astype(dtype)
    Image.frombytes(mode, (32, 32), values.tobytes()).save(photos / "0.tif")
    assert torch.equal(first_pixels(photos)[0], torch.from_numpy(factor * GREY // 256).byte())
    warned = f"1 images like {photos / '0.tif'} have few greys" in capsys.readouterr().out
    assert warned == (factor == 3)


def test_all_that_cannot_be_decoded_is_said_at_once(photos, monkeypatch):
    write_images(photos, 2)
    whole = (photos / "0.png").read_bytes()
    (photos / "cut.png").write_bytes(whole[:60])
    (photos / "empty.png").touch()
    (photos / "dead.png").symlink_to("nowhere.png")
    for name, values in (
        ("fractions", GREY.astype("<f4")),
        ("large", (65 * GREY).astype("<i4")),
        ("negative", (GREY - 1).astype("<i4")),
    ):
        Image.fromarray(values).save(photos / f"{name}.tiff")
    (photos / "raises.ppm").write_text("any error of a decoder")
    decode = common.decode_image

    def fail(path, size):
        if path.suffix == ".ppm":
            raise MemoryError
        return decode(path, size)

    monkeypatch.setattr(common, "decode_image", fail)
    with pytest.raises(common.DataError, match="^7 images cannot be decoded") as error:
        load(photos)
    for words in ("cut.png", "dead.png", "empty.png", "fractions", "large.tiff (it holds no int"):
        assert words in str(error.value)
    assert "negative" not in str(error.value)  # five are enough
    for path in set(photos.glob("*")) - {photos / "raises.ppm", photos / "0.png"}:
        path.unlink()
    with pytest.raises(common.DataError, match="1 images .* remove: .*raises.ppm .MemoryError"):
        load(photos)
    assert not list((photos.parent / "cache").glob("*"))  # nothing half done is left


def test_a_folder_without_images_is_named(photos):
    (photos / "a.heic").touch()
    with pytest.raises(common.DataError, match="photos holds no images, but 1 files other than"):
        load(photos)
    write_images(photos, 1)
    with pytest.raises(common.DataError, match="photos: 1 training images, at least 2 are needed"):
        load(photos)


def test_images_are_decoded_once(photos, monkeypatch):
    decode, decoded = common.decode_image, []
    write_images(photos, 6)

    def pixels(size=16):
        decoded.clear()
        return load(photos, size).train_images

    monkeypatch.setattr(common, "decode_image", lambda *x: decoded.append(x) or decode(*x))
    first = pixels()
    before = first.clone()
    assert len(decoded) == 6 and torch.equal(pixels(), first) and not decoded
    first[:] = 0  # a change in memory is none on the disk
    assert torch.equal(pixels(), before) and not decoded
    assert pixels(8).shape == (6, 3, 8, 8) and len(decoded) == 6  # another size
    write_image(photos / "0.png", torch.full((3, 20, 20), 77, dtype=torch.uint8))
    assert pixels()[0, :, 8, 8].tolist() == [77] * 3 and len(decoded) == 6  # another content
    (photos / "5.png").rename(photos / "7.png")
    assert len(pixels()) == 6 and len(decoded) == 6  # another name
    cache = max((photos.parent / "cache").iterdir(), key=os.path.getmtime)
    os.truncate(cache, 1000)
    assert len(pixels()) == 6 and len(decoded) == 6  # cut short
    shutil.rmtree(cache.parent)
    cache.parent.touch()
    with pytest.raises(common.DataError, match="choose another --data-dir"):
        pixels()


def test_folders_of_one_name_do_not_share_pixels(tmp_path):
    """Not even with files of the same names, sizes and times, nor unpacked in the same place."""

    def unpack(place, edge, middle):
        folder = tmp_path / place / "photos"
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.new("L", (32, 32), edge)
        image.paste(middle, (0, 8, 32, 24))
        for name in ("0.bmp", "1.bmp"):
            image.save(folder / name)
            os.utime(folder / name, (315_532_800, 315_532_800))  # 1980, as zip files have it
        data = common.load_dataset(str(folder), tmp_path / "cache")
        return data.train_images.unique().tolist()

    assert unpack("a", 10, 20) == [10, 20]
    assert unpack("b", 200, 20) == [20, 200]  # another place
    assert unpack("a", 10, 77) == [10, 77]  # another content
