"""The views: one draw per image, torchvision's results for the same parameters, distributions.

The distributions are those that the scripts name: a view that is drawn in another way fails here.
"""

import math

import byol
import moco
import pytest
import simclr
import simsiam
import torch
import torchvision.transforms.v2.functional as reference

SCRIPTS = {"simclr": simclr, "moco": moco, "byol": byol, "simsiam": simsiam}
STILL = dict(area=(1, 1), mirror=0, jitter=(0, 0, 0, 0), grayscale=0)
N = 20_000


def images(n=8, channels=3, size=28):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(n))


def colours(view, x, **changes):
    """Draw views of N copies of the colours x (K, 3), as images of K pixels, without a crop."""
    torch.manual_seed(0)
    copies = x.T[None, :, None, :].expand(N, 3, 1, len(x))
    return byol.augment(copies, **view | dict(area=(1, 1), mirror=0) | changes)[:, :, 0].mT


def uniform(values, low, high):
    """Whether many values are spread evenly from low to high (Kolmogorov and Smirnov)."""
    values = (values.flatten().sort().values - low) / (high - low)
    expected = (torch.arange(len(values)) + 0.5) / len(values)
    return (values - expected).abs().max() < 2.5 / math.sqrt(len(values))


@pytest.mark.parametrize("channels", [1, 3])
def test_settings_of_nothing_change_nothing(channels):
    x = images(16, channels)
    torch.testing.assert_close(byol.augment(x, **STILL), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("view", ["VIEW_1", "VIEW_2"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", SCRIPTS)
def test_shape_range_and_type(name, channels, view):
    x = images(200, channels)
    x[0], x[1] = 0, 1
    before = x.clone()
    y = SCRIPTS[name].augment(x, **getattr(SCRIPTS[name], view))
    assert y.shape == x.shape and y.dtype == torch.float32 and torch.equal(x, before)
    assert y.min() >= 0 and y.max() <= 1


@pytest.mark.parametrize(
    "change", [dict(area=(0.1, 1)), dict(mirror=0.5), dict(grayscale=0.5), dict(solarize=0.5)]
    + [dict(jitter=[0.4 * (i == j) for j in range(4)]) for i in range(4)],
    ids=str,
)  # fmt: skip
def test_every_image_draws_its_own(change):
    """With one strength turned up, copies of one image come out in more than one way."""
    torch.manual_seed(0)
    y = byol.augment(images(1).expand(32, -1, -1, -1), **STILL | change)
    n_kinds = len(y.flatten(1).mul(1e4).round().unique(dim=0))
    assert n_kinds == 2 if set(change) & {"mirror", "grayscale", "solarize"} else n_kinds > 20


def test_the_seed_decides():
    x, views = images(), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        views.append(byol.augment(x, **byol.VIEW_2))
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])


def coordinates(size):
    """An image whose two channels say where each pixel is, from -1 to 1, left to right and down."""
    line = (torch.arange(size) + 0.5) * 2 / size - 1
    return torch.stack(
        [line.expand(size, size), line[:, None].expand(size, size), 0 * torch.eye(size)]
    )


def boxes(area):
    """Draw N crops of an image of coordinates; return width, height, centre x, centre y of each."""
    torch.manual_seed(0)
    x = coordinates(8).expand(N, 3, 8, 8)
    y = byol.random_resized_crop(x, area)[:, :2]
    step = torch.stack([y[:, 0, 4, 4] - y[:, 0, 4, 3], y[:, 1, 4, 4] - y[:, 1, 3, 4]])
    centre = torch.stack([y[:, 0, 4, 3:5].mean(1), y[:, 1, 3:5, 4].mean(1)])
    return *(step * 4), *centre


def test_crops_have_the_area_and_aspect_of_the_paper():
    """Area uniform, aspect log-uniform from 3/4 to 4/3, position uniform inside the image."""
    width, height, x, y = boxes((0.3, 0.7))
    assert uniform(width * height, 0.3, 0.7)
    assert uniform((width / height).log(), math.log(3 / 4), math.log(4 / 3))
    assert uniform(x / (1 - width), -1, 1) and uniform(y / (1 - height), -1, 1)
    width, height, *_ = boxes((0.8, 1))  # less aspect where 4:3 would stick out
    assert uniform(width * height, 0.8, 1)
    assert width.max() <= 1 + 1e-4 and height.max() <= 1 + 1e-4


def test_crop_equals_torchvision(monkeypatch):
    """Rows 7 to 20 and columns 14 to 27. At its edges our crop looks at the pixels next to it."""
    draws, x = torch.tensor([0.5, 0.5, 1.0, 0.5]), images(2)  # area, aspect, centre
    monkeypatch.setattr(torch, "rand", lambda *shape, device: draws[:, None].expand(*shape))
    y = byol.random_resized_crop(x, (0, 0.5))  # halfway: a quarter of the image
    expected = reference.resized_crop(x, 7, 14, 14, 14, [28, 28], antialias=False)
    torch.testing.assert_close(y[:, :, 1:-1, 1:-1], expected[:, :, 1:-1, 1:-1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("turn", [1 / 3, -1 / 3, 0.0])
def test_turn_hue_by_thirds_changes_places(turn):
    """A third of the circle is red to green, green to blue, blue to red."""
    x = images(4)
    expected = x.roll(round(3 * turn), dims=1)
    torch.testing.assert_close(byol.turn_hue(x, torch.tensor(turn)), expected, atol=1e-5, rtol=0)


def test_turn_hue_is_a_rotation():
    """Grey stays, the length stays, and the angle in the plane of colours is the one asked for."""
    x, turn = images(5), torch.rand(5, 1, 1, 1) - 0.5
    y = byol.turn_hue(x, turn)
    torch.testing.assert_close(y.mean(1), x.mean(1))
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1))
    a, b = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    expected = (2 * math.pi * turn[:, 0]).cos().expand_as(cosine)
    torch.testing.assert_close(cosine, expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(byol.turn_hue(images(5, 1), turn), images(5, 1))  # grey images


@pytest.mark.parametrize("which, adjust", [(0, "brightness"), (1, "contrast"), (2, "saturation")])
def test_colours_equal_torchvision(monkeypatch, which, adjust):
    """With every draw at the low end, the factor is 1 - strength."""
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, low, high: self.fill_(low))
    x = images(4)
    strengths = [0.4 * (which == i) for i in range(4)]
    y = byol.augment(x, **STILL | dict(jitter=strengths))
    expected = getattr(reference, f"adjust_{adjust}")(x, 0.6)
    torch.testing.assert_close(y, expected, atol=1e-3, rtol=0)


def test_grayscale_and_solarize_equal_torchvision():
    x = images(4)
    y = byol.augment(x, **STILL | dict(grayscale=1))
    torch.testing.assert_close(y, reference.rgb_to_grayscale(x, 3), atol=1e-3, rtol=0)
    y = byol.augment(x, **STILL | dict(solarize=1))
    torch.testing.assert_close(y, reference.solarize(x, 0.5), atol=1e-4, rtol=0)


# What each script is to draw: the papers' distributions, milder where the docstring says so.
SOLARIZE = {("byol", "VIEW_2"): 0.2}
VIEWS = [(name, view) for name in SCRIPTS for view in ("VIEW_1", "VIEW_2")]


@pytest.mark.parametrize("name, view", VIEWS)
def test_views_crop_as_documented(name, view, monkeypatch):
    seen = []
    script = SCRIPTS[name]
    monkeypatch.setattr(script, "random_resized_crop", lambda x, area: seen.append(area) or x)
    script.augment(images(2), **getattr(script, view))
    monkeypatch.undo()
    width, height, *_ = boxes(seen[0])
    assert uniform(width * height, 0.3, 1)


@pytest.mark.parametrize("name, view", VIEWS)
def test_views_mirror_half_of_the_images(name, view):
    torch.manual_seed(0)
    x = coordinates(8).expand(N, 3, 8, 8)
    settings = getattr(SCRIPTS[name], view) | dict(jitter=(0, 0, 0, 0), grayscale=0, area=(1, 1))
    y = SCRIPTS[name].augment((x + 1) / 2, **settings | dict(solarize=0))
    assert (y[:, 0, 4, 7] < y[:, 0, 4, 0]).float().mean().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("name, view", VIEWS)
def test_views_change_colours_as_documented(name, view):
    """The shares of images that change, and the range of each change, from images of two pixels."""
    settings = getattr(SCRIPTS[name], view)
    only = [(*[0] * i, s, *[0] * (3 - i)) for i, s in enumerate(settings["jitter"])]
    plain = dict(grayscale=0, solarize=0)
    grey = torch.tensor([[0.5, 0.5, 0.5], [0.3, 0.3, 0.3]])

    y = colours(settings, grey, jitter=only[0], **plain)[:, 0, 0]  # brightness: 0.5 times factor
    changed = (y - 0.5).abs() > 1e-4
    assert changed.float().mean().item() == pytest.approx(0.8, abs=0.015)
    assert uniform(y[changed] / 0.5, 0.6, 1.4)

    y = colours(settings, grey, jitter=only[1], **plain)  # contrast: the difference, times factor
    factor = (y[:, 0, 0] - y[:, 1, 0]) / 0.2
    changed = (factor - 1).abs() > 1e-4
    assert changed.float().mean().item() == pytest.approx(0.8, abs=0.015)
    assert uniform(factor[changed], 0.6, 1.4)

    x = torch.tensor([[0.5, 0.4, 0.4]])
    strength = 0.2 if name == "byol" else 0.4
    y = colours(settings, x, jitter=only[2], **plain)[:, 0]  # saturation: the difference again
    factor = (y[:, 0] - y[:, 1]) / 0.1
    changed = (factor - 1).abs() > 1e-4
    assert changed.float().mean().item() == pytest.approx(0.8, abs=0.015)
    assert uniform(factor[changed], 1 - strength, 1 + strength)

    y = colours(settings, x, jitter=only[3], **plain)[:, 0]  # hue: the angle from red
    angle = torch.atan2((y[:, 1] - y[:, 2]) * math.sqrt(3), 2 * y[:, 0] - y[:, 1] - y[:, 2])
    changed = angle.abs() > 1e-3
    assert changed.float().mean().item() == pytest.approx(0.8, abs=0.015)
    assert uniform(angle[changed] / (2 * math.pi), -0.1, 0.1)

    still = dict(jitter=(0, 0, 0, 0))
    y = colours(settings, x, **still, solarize=0)[:, 0]
    assert (y.std(dim=1) < 1e-4).float().mean().item() == pytest.approx(0.2, abs=0.015)
    y = colours(settings, torch.tensor([[0.9, 0.9, 0.9]]), **still)[:, 0, 0]
    share = SOLARIZE.get((name, view), 0)
    assert (y < 0.2).float().mean().item() == pytest.approx(share, abs=0.015)


def test_greyscale_comes_after_the_colours_and_solarize_last(monkeypatch):
    """A jittered image made grey is grey, whatever its saturation and hue; solarize comes last."""
    x = torch.tensor([[0.9, 0.8, 0.7]])
    y = colours(byol.VIEW_1, x, grayscale=1, solarize=0, jitter=(0, 0, 1, 0.5))[:, 0]
    assert (y.std(dim=1) < 1e-4).all()
    y = colours(byol.VIEW_1, x, grayscale=0, solarize=1, jitter=(1, 0, 0, 0))[:, 0]
    assert (y < 0.5 + 1e-4).all()  # whatever the brightness has become
