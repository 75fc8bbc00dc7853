"""The views: one draw per image, torchvision's results for the same parameters."""

import byol
import moco
import pytest
import simclr
import simsiam
import torch
import torchvision.transforms.v2.functional as reference

SCRIPTS = [simclr, moco, byol, simsiam]
IDENTITY = dict(
    crop_scale=(1.0, 1.0), jitter=1.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0,
    grayscale=0.0, solarize=0.0,
)  # fmt: skip


def images(n=8, channels=3, size=28):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(n))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def distance(y, x):
    """Largest difference per image, to x or to x mirrored, whichever is nearer."""
    return torch.stack([(y - x).abs(), (y - x.flip(3)).abs()]).amax((2, 3, 4)).amin(0)


def column(*values):
    return torch.tensor(values).view(-1, 1, 1, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_identity_changes_nothing_but_mirrors(channels):
    x = images(64, channels)
    y = byol.augment(x, **IDENTITY, generator=generator())
    same = (y - x).abs().amax(dim=(1, 2, 3)) < 1e-5
    mirrored = (y - x.flip(3)).abs().amax(dim=(1, 2, 3)) < 1e-5
    assert (same ^ mirrored).all()
    assert 16 < mirrored.sum() < 48


@pytest.mark.parametrize("view", ["VIEW_1", "VIEW_2"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("script", SCRIPTS)
def test_shape_range_and_type(script, channels, view):
    x = images(50, channels)
    x[0], x[1] = 0, 1
    y = script.augment(x, **getattr(script, view), generator=generator())
    assert y.shape == x.shape and y.dtype == torch.float32
    assert y.min() >= 0 and y.max() <= 1


@pytest.mark.parametrize("what", list(IDENTITY)[2:6] + ["crop_scale", "grayscale", "solarize"])
def test_every_image_draws_its_own(what):
    """With one strength turned up, copies of one image come out in many ways."""
    x = images(1).expand(32, -1, -1, -1)
    strength = {"crop_scale": (0.1, 1.0), "grayscale": 0.5, "solarize": 0.5, "hue": 0.4}
    y = byol.augment(x, **IDENTITY | {what: strength.get(what, 0.6)}, generator=generator())
    distinct = len(torch.unique(y.flatten(1).mul(1e4).round(), dim=0))
    assert distinct >= (4 if what in ("grayscale", "solarize") else 30)


@pytest.mark.parametrize("what", ["brightness", "contrast", "saturation", "hue"])
def test_without_jitter_no_strength_matters(what):
    x = images(64)
    y = byol.augment(x, **IDENTITY | {"jitter": 0.0, what: 0.4}, generator=generator())
    assert distance(y, x).max() < 1e-5
    y = byol.augment(x, **IDENTITY | {"jitter": 1.0, what: 0.4}, generator=generator())
    assert (distance(y, x) > 1e-3).float().mean() > 0.9


def test_jitter_is_a_probability():
    x = images(1).expand(400, -1, -1, -1)
    y = byol.augment(x, **IDENTITY | dict(jitter=0.25, brightness=0.9), generator=generator())
    assert 60 < (distance(y, x) > 1e-4).sum() < 140


def test_same_seed_gives_the_same_views():
    x = images(16)
    first, again, other = (
        byol.augment(x, **byol.VIEW_1, generator=generator(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("box", [(0, 0, 28, 28), (3, 5, 20, 12), (27, 0, 1, 28), (10, 10, 7, 18)])
@pytest.mark.parametrize("mirror", [False, True])
def test_resized_crop_equals_torchvision(box, mirror):
    x = images(2)
    top, left, height, width = box
    y = byol.resized_crop(
        x, *(column(float(v), float(v)) for v in box), mirror=column(mirror, mirror)
    )
    expected = reference.resized_crop(x, top, left, height, width, [28, 28], antialias=False)
    torch.testing.assert_close(y, expected.flip(3) if mirror else expected, atol=1e-5, rtol=0)


def test_resized_crop_takes_a_box_per_image():
    x = images(3)
    boxes = [(0, 4, 9, 20), (8, 8, 14, 14), (1, 2, 25, 26)]
    y = byol.resized_crop(
        x, *(column(*map(float, side)) for side in zip(*boxes, strict=True)),
        mirror=column(False, True, False),
    )  # fmt: skip
    for i, box in enumerate(boxes):
        expected = reference.resized_crop(x[i], *box, [28, 28], antialias=False)
        expected = expected.flip(2) if i == 1 else expected
        torch.testing.assert_close(y[i], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shift", [-0.5, -0.2, 0.0, 0.1, 0.37, 0.5])
def test_shift_hue_equals_torchvision(shift):
    x = images(4)
    x[0, :, :9] = 0.5  # grey, black, white and pure colours are the special cases
    x[1, :, :9], x[2, :, :9] = 0, 1
    x[3, 0, :9], x[3, 1:, :9] = 1, 0
    y = byol.shift_hue(x, column(*[shift] * 4))
    torch.testing.assert_close(y, reference.adjust_hue(x, shift), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "what, width", [("brightness", 0.4), ("contrast", 0.5), ("saturation", 0.9)]
)
def test_colours_equal_torchvision(monkeypatch, what, width):
    """Draws of exactly 1 take the upper end of each range: factor 1 + width, no mirroring."""
    x = images(4)
    monkeypatch.setattr(byol.torch, "rand", lambda *shape, **_: torch.ones(*shape))
    y = byol.augment(x, **IDENTITY | {"jitter": 1.1, what: width})
    expected = getattr(reference, f"adjust_{what}")(x, 1 + width)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=0)


def test_grayscale_and_solarize_equal_torchvision():
    x = images(4)
    y = byol.augment(x, **IDENTITY | dict(grayscale=1.0), generator=generator())
    expected = reference.rgb_to_grayscale(x, 3)
    assert distance(y, expected).max() < 1e-5
    y = byol.augment(x, **IDENTITY | dict(solarize=1.0), generator=generator())
    expected = reference.solarize(x, 0.5)
    assert distance(y, expected).max() < 1e-4


def test_crop_area_is_in_its_range_and_inside(monkeypatch):
    boxes = []
    monkeypatch.setattr(
        byol, "resized_crop", lambda x, *box, mirror: boxes.append([b.flatten() for b in box]) or x
    )
    x = images(2000, 1)
    byol.augment(x, **IDENTITY | dict(crop_scale=(0.3, 0.9)), generator=generator())
    top, left, height, width = boxes[0]
    area = height * width / 28**2
    assert 0.3 - 1e-4 < area.min() < 0.31 and 0.89 < area.max() < 0.9 + 1e-4
    assert area.mean().item() == pytest.approx(0.6, abs=0.02)
    assert top.min() >= 0 and left.min() >= 0
    assert (top + height).max() <= 28 + 1e-3 and (left + width).max() <= 28 + 1e-3
    aspect = width / height
    assert 0.75 - 1e-3 <= aspect.min() < 0.76 and 1.32 < aspect.max() <= 4 / 3 + 1e-3
