"""The views: one draw per image, torchvision's results for the same parameters, distributions.

`augment` is the same in all scripts (test_alike.py), but each says what its views are to be. The
distributions are those that the scripts name: a view that is drawn in another way fails here.
"""

import math

import byol
import moco
import pytest
import simclr
import simsiam
import torch
import torchvision.transforms.v2.functional as reference

VIEWS = [(m, view) for m in (simclr, moco, byol, simsiam) for view in ("VIEW_1", "VIEW_2")]
STILL = dict(area=(1, 1), mirror=0, jitter=(0, 0, 0, 0), grayscale=0, solarize=0)
N = 20_000


def images(n, channels=3, size=28):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(n))


def uniform(values, low, high):
    """Whether many values are spread evenly from low to high (Kolmogorov and Smirnov)."""
    values = (values.flatten().sort().values - low) / (high - low)
    expected = (torch.arange(len(values)) + 0.5) / len(values)
    return (values - expected).abs().max() < 2.5 / math.sqrt(len(values))


def share(chosen):
    """The share of images that were chosen, with room for chance."""
    return pytest.approx(chosen.float().mean().item(), abs=0.015)


@pytest.mark.parametrize("channels", [1, 3])
def test_shape_range_type_and_seed(channels):
    x, views = images(200, channels), []
    x[0], x[1] = 0, 1
    before = x.clone()
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        views.append(byol.augment(x, **byol.VIEW_2))
        assert views[-1].shape == x.shape and views[-1].dtype == torch.float32
        assert views[-1].min() >= 0 and views[-1].max() <= 1 and torch.equal(x, before)
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])


def test_crop_equals_torchvision(monkeypatch):
    """Rows 7 to 20 and columns 14 to 27. At its edges our crop looks at the pixels next to it."""
    draws, x = torch.tensor([0.5, 0.5, 1.0, 0.5]), images(2)  # area, aspect, centre
    monkeypatch.setattr(torch, "rand", lambda *shape, device: draws[:, None].expand(*shape))
    y = byol.random_resized_crop(x, (0, 0.5))  # halfway: a quarter of the image
    expected = reference.resized_crop(x, 7, 14, 14, 14, [28, 28], antialias=False)
    torch.testing.assert_close(y[:, :, 1:-1, 1:-1], expected[:, :, 1:-1, 1:-1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("sign", [-1, 0, 1])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("last", ["", "grayscale", "solarize", "grayscale solarize"])
def test_colours_equal_torchvision(last, channels, sign, monkeypatch):
    """The changes in their order, with every draw at one end, or in the middle: no change."""

    def fill(x, low, high):  # draws from 0 decide whether a change is made
        return x.fill_(0 if low == 0 else (low + high) / 2 + sign * (high - low) / 2)

    monkeypatch.setattr(torch.Tensor, "uniform_", fill)
    x = images(4, channels)
    shares = dict(grayscale="grayscale" in last, solarize="solarize" in last)
    y = byol.augment(x, **STILL | dict(jitter=(0.2, 0.3, 0.4, 1 / 3)) | shares)
    expected = reference.adjust_brightness(x, 1 + 0.2 * sign)
    expected = reference.adjust_contrast(expected, 1 + 0.3 * sign)
    expected = reference.adjust_saturation(expected, 1 + 0.4 * sign)
    expected = expected.roll(sign, dims=1)  # a third of the circle: red to green to blue
    if "grayscale" in last:
        expected = reference.rgb_to_grayscale(expected, channels)
    if "solarize" in last:
        expected = reference.solarize(expected, 0.5)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=0)


def test_turn_hue_is_a_rotation():
    """By the angle asked for, around the axis of greys."""
    x, turn = images(5), torch.rand(5, 1, 1, 1) - 0.5
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    expected = torch.matrix_exp(2 * math.pi * turn[:, 0] * cross) @ x.flatten(2)
    torch.testing.assert_close(byol.turn_hue(x, turn).flatten(2), expected)


@pytest.mark.parametrize("script, view", VIEWS)
def test_views_are_cut_and_mirrored_as_documented(script, view):
    """Area uniform, aspect log-uniform from 3/4 to 4/3, anywhere in the image, half mirrored."""
    view, smallest = getattr(script, view), 0.2 if script in (simclr, moco) else 0.3
    torch.manual_seed(0)
    line = torch.tensor([-0.75, -0.25, 0.25, 0.75]).expand(4, 4)  # pixels say where they are
    x = (torch.stack([line, line.T, 0 * line]).expand(N, 3, 4, 4) + 1) / 2
    y = 2 * script.augment(x, **STILL | {key: view[key] for key in ("area", "mirror")}) - 1
    width = 2 * (y[:, 0, 1, 2] - y[:, 0, 1, 1])
    height = 2 * (y[:, 1, 2, 1] - y[:, 1, 1, 1])
    assert share(width < 0) == 0.5
    width = width.abs()
    assert uniform(width * height, smallest, 1) and max(width.max(), height.max()) < 1 + 1e-4
    small = width * height < 0.7  # larger ones have less aspect, as 4:3 would stick out
    width, height, y = width[small], height[small], y[small]
    draws = [(width / height).log() / math.log(4 / 3)]
    draws += [y[:, 0, :, 1:3].mean(dim=(1, 2)) / (1 - width)]
    draws += [y[:, 1, 1:3].mean(dim=(1, 2)) / (1 - height)]
    assert all(uniform(values, -1, 1) for values in draws)
    related = torch.corrcoef(torch.stack([width * height, *draws])).fill_diagonal_(0)
    assert related.abs().max() < 0.05  # each is drawn by itself


@pytest.mark.parametrize("script, view", VIEWS)
def test_views_change_colours_as_documented(script, view):
    """How many images change, and how much, from copies of an image of two equal pixels."""
    settings = getattr(script, view)

    def draw(colour, **changes):
        torch.manual_seed(0)
        x = torch.tensor(colour)[:, None, None].expand(N, 3, 1, 2)
        left, right = script.augment(x, **STILL | changes)[:, :, 0].unbind(2)
        assert torch.equal(left, right)  # one draw for the whole image
        return left.unbind(1)

    for i, strength in enumerate((0.4, 0.4, 0.2 if script is byol else 0.4, 0.1)):
        jitter = [s * (i == j) for j, s in enumerate(settings["jitter"])]
        red, green, blue = draw((0.5, 0.4, 0.4), jitter=jitter)
        change = (red - green) / 0.1 - 1
        if i == 3:  # hue: the angle from red
            change = torch.atan2(3**0.5 * (green - blue), 2 * red - green - blue) / (2 * math.pi)
        changed = change.abs() > 2e-4
        assert share(changed) == 0.8 and uniform(change[changed], -strength, strength)

    red, green, blue = draw((0.9, 0.9, 0.7), grayscale=settings["grayscale"])
    assert share((red - blue).abs() < 1e-4) == 0.2
    red, green, blue = draw((0.9, 0.9, 0.9), solarize=settings.get("solarize", 0))
    assert share(blue < 0.2) == (0.2 if (script, view) == (byol, "VIEW_2") else 0)
