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
    data = load(photos, 16)
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, -1, -1, -1, -1]
    assert data.test_labels.tolist() == [0, 0, 1, 1, 2, 2] and data.test_images.shape[0] == 6
    assert data.classes == ("cat", "dog", "élan 2") and len(data.paths) == 19
    assert data.paths[0] == "train/cat/0.png" and data.paths[-1] == "test/élan 2/1.png"
    assert data.paths[9] == "unlabelled/a/b/0.png"
    assert capsys.readouterr().out.startswith(
        f"{photos}: 13 training images (9 with a label), 6 test images, 3 classes in "
        "train/ (9 images), test/ (6 images), unlabelled/ (4 images)\nignored: nothing\n"
    )


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
    for name in ("train/.ipynb_checkpoints", "train/__MACOSX/cat", "__MACOSX/train/cat", "@eaDir"):
        write_images(photos / name, 2)  # what systems leave behind is passed over
    (photos / "train/cat/._0.png").write_bytes(b"no image, but what a Mac adds")
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
    data = load(photos)
    assert len(data.paths) == 4 and data.classes == ("cat", "dog")
    assert (
        "ignored: val/ (4 images), unlabeled/ (3 images), test/ (2 images), train/ (1 images), "
        f"[Errno 13] Permission denied: '{secret}', 1 files other than .jpg, "
    ) in capsys.readouterr().out


def test_links_are_followed_but_not_in_circles(photos):
    other = photos.parent / "other"
    write_images(photos, 2)
    write_images(other, 3)
    (photos / "more").symlink_to(other)
    (other / "back").symlink_to(photos)
    (photos / "self").symlink_to(photos)
    paths = load(photos).paths
    assert paths == ("0.png", "1.png", "more/0.png", "more/1.png", "more/2.png")


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
        ("0.png", "palette", {}, (1, 2, 3, 0), [255, 255, 255]),
        ("0.png", "RGBA", {}, (200, 100, 0, 51), [244, 224, 204]),  # a fifth of it, 204 of white
    ],
)
def test_images_load_as_what_they_show(photos, name, mode, options, left, seen):
    image = Image.new("RGBA", (32, 48), "grey")  # of which the square in the middle is taken
    image.paste(left, (0, 8, 16, 40))
    image.paste("black", (16, 8, 32, 40))
    image = image.quantize(4) if mode == "palette" else image.convert(mode)
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
    if suffix == "tiff":
        image.save(photos / "0.tiff", tiffinfo={0x112: orientation})
    else:
        image.save(photos / f"0.{suffix}", exif=exif, quality=100)
    difference = first_pixels(photos).float() - pixels.permute(2, 0, 1)
    assert difference.abs().mean() < 12  # turned wrongly: above 40


def png(bits, colour_type, row, key):
    """Return a PNG file of 32 equal rows in which one colour is declared transparent."""
    header = struct.pack(">IIBBBBB", 32, 32, bits, colour_type, 0, 0, 0)
    data, file = zlib.compress(32 * (b"\0" + row)), b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + header, b"tRNS" + key, b"IDAT" + data, b"IEND"):
        file += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return file


@pytest.mark.parametrize(
    "bits, colour_type, row, key",
    [
        (8, 0, [70] * 16 + [0] * 16, [0, 70]),  # grey
        (8, 2, [70, 1, 2] * 16 + [0] * 48, [0, 70, 0, 1, 0, 2]),  # RGB
        (16, 0, [0, 70] * 16 + [0, 71] * 16, [0, 70]),  # unlike the key in the lower bits: opaque
    ],
)
def test_the_colour_that_is_declared_transparent_is_white(photos, bits, colour_type, row, key):
    (photos / "0.png").write_bytes(png(bits, colour_type, bytes(row), bytes(key)))
    pixels = first_pixels(photos)
    assert (pixels[:, :, :16] == 255).all() and (pixels[:, :, 16:] == 0).all()


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
    with pytest.raises(common.DataError, match="^6 images cannot be decoded") as error:
        load(photos)
    for words in ("cut.png", "dead.png", "empty.png", "fractions", "large.tiff (it holds no int"):
        assert words in str(error.value)
    assert "negative" not in str(error.value)  # five are enough

    def fail(*args):
        raise MemoryError  # as a decoder can, without a word

    monkeypatch.setattr(common, "decode_image", fail)
    with pytest.raises(common.DataError, match="^8 images .* remove: .*0.png .MemoryError"):
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
    decode, decoded, cache = common.decode_image, [], photos.parent / "cache"
    write_images(photos, 6)
    Image.linear_gradient("L").save(photos / "6.bmp")
    monkeypatch.setattr(common, "decode_image", lambda *x: decoded.append(x) or decode(*x))

    def pixels(size=16, folder=photos):
        decoded.clear()
        return common.load_dataset(str(folder), cache, size).train_images

    first = pixels()
    before = first.clone()
    assert len(decoded) == 7 and torch.equal(pixels(), first) and not decoded
    first[:] = 0  # a change in memory is none on the disk
    assert torch.equal(pixels(), before) and not decoded
    assert pixels(8).shape == (7, 3, 8, 8) and len(decoded) == 7  # another size
    write_image(photos / "0.png", torch.full((3, 20, 20), 77, dtype=torch.uint8))
    assert pixels()[0, :, 8, 8].tolist() == [77] * 3 and len(decoded) == 7  # another content
    (photos / "5.png").rename(photos / "7.png")
    assert len(pixels()) == 7 and len(decoded) == 7  # another name
    same = shutil.copytree(photos, photos.parent / "other" / "photos")  # sizes and times too
    assert len(pixels(folder=same)) == 7 and len(decoded) == 7  # another place
    bmp, times = same / "6.bmp", (1, (same / "6.bmp").stat().st_mtime_ns)
    bmp.write_bytes(bmp.read_bytes().replace(bytes([128] * 256), bytes([0] * 256)))
    os.utime(bmp, ns=times)
    assert len(pixels(folder=same)) == 7 and len(decoded) == 7  # another content, dated alike
    os.truncate(max(cache.iterdir(), key=os.path.getmtime), 1000)
    assert len(pixels(folder=same)) == 7 and len(decoded) == 7  # cut short
    shutil.rmtree(cache)
    cache.touch()
    with pytest.raises(common.DataError, match="choose another --data-dir"):
        pixels()
