"""The views: one draw per image, torchvision's results for the same draws, distributions.

`augment` draws in the order of DRAWS. A test fixes all of them but one, and looks at what that one
does to many copies of an image.
"""

import math

import byol
import moco
import pytest
import simclr
import simsiam
import torch
import torchvision.transforms.v2.functional as reference
from torchvision.transforms import RandomResizedCrop

SCRIPTS = (simclr, moco, byol, simsiam)
DRAWS = ("mirror", "brightness", "contrast", "saturation", "hue", "jitter", "grey", "solarize")
STILL = dict(zip(DRAWS, (1, 1, 1, 1, 0, 0, 1, 0), strict=True))  # draws that change nothing
N = 20_000


def images(n, channels=3, size=28):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(n))


def view(script, x, free=(), solarized=None, **fixed):
    """Return a view with x for the crop, with all draws fixed but the one called `free`."""
    names = [name for name in DRAWS if x.shape[1] == 3 or name not in ("saturation", "hue")]
    names, original = iter(names), torch.Tensor.uniform_

    def draw(values, low, high):
        name = next(names)
        if name == free:
            return original(values, low, high)
        return values.fill_((STILL | fixed)[name])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "random_resized_crop", lambda black, smallest: x)
        patch.setattr(torch.Tensor, "uniform_", draw)
        black = torch.zeros_like(x)
        options = {} if solarized is None else dict(solarize=solarized)
        return script.augment(black, **options)


def is_uniform(values, low, high):
    """Whether many values are spread evenly from low to high (Kolmogorov and Smirnov)."""
    values = (values.flatten().sort().values - low) / (high - low)
    expected = (torch.arange(len(values)) + 0.5) / len(values)
    return (values - expected).abs().max() < 2.5 / math.sqrt(len(values))


def has_share(chosen, expected):
    """Whether this share of many images was chosen, with room for chance."""
    return abs(chosen.float().mean().item() - expected) < 0.015


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("script", SCRIPTS)
def test_shape_range_type_and_seed(script, channels):
    x, views = images(200, channels), []
    x[0], x[1] = 0, 1
    before = x.clone()
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        views.append(script.augment(x))
        assert views[-1].shape == x.shape and views[-1].dtype == torch.float32
        assert views[-1].min() >= 0 and views[-1].max() <= 1 and torch.equal(x, before)
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])
    torch.testing.assert_close(view(script, x), x)  # the fixed draws of STILL


def test_crop_equals_torchvision(monkeypatch):
    """Rows 7 to 20 and columns 14 to 27. At its edges our crop looks at the pixels next to it."""
    x, draws = images(2), iter([0.25, 0.0, torch.tensor([1.0, 0.0])])  # area, aspect, centre
    fill = torch.Tensor.copy_
    monkeypatch.setattr(
        torch.Tensor, "uniform_", lambda x, *_: fill(x, torch.as_tensor(next(draws)))
    )
    y = byol.random_resized_crop(x, 0.1)
    expected = reference.resized_crop(x, 7, 14, 14, 14, [28, 28], antialias=False)
    torch.testing.assert_close(y[:, :, 1:-1, 1:-1], expected[:, :, 1:-1, 1:-1], atol=1e-4, rtol=0)


def boxes(script):
    """Width, height, and the centre's place between the edges (N,) of the boxes of N views."""
    torch.manual_seed(0)
    line = torch.tensor([-0.75, -0.25, 0.25, 0.75]).expand(4, 4)  # pixels say where they are
    x = (torch.stack([line, line.T, 0 * line]).expand(N, 3, 4, 4) + 1) / 2
    with pytest.MonkeyPatch.context() as patch:
        y, crop = [], script.random_resized_crop
        patch.setattr(script, "random_resized_crop", lambda *a, **k: y.append(crop(*a, **k)) or x)
        script.augment(x)
    y = 2 * y[0] - 1
    width, height = 2 * (y[:, 0, 1, 2] - y[:, 0, 1, 1]), 2 * (y[:, 1, 2, 1] - y[:, 1, 1, 1])
    inside = width.clamp(max=0.98), height.clamp(max=0.98)  # else the place means nothing
    left = y[:, 0, :, 1:3].mean(dim=(1, 2)) / (1 - inside[0])
    return width, height, left, y[:, 1, 1:3].mean(dim=(1, 2)) / (1 - inside[1])


@pytest.mark.parametrize("script", SCRIPTS)
def test_crops_are_drawn_as_torchvision_draws_them(script):
    """Width and height have its distribution; the box lies anywhere; no draw tells another."""
    smallest = 0.2 if script in (simclr, moco) else 0.3
    width, height, left, top = boxes(script)
    assert max(width.max(), height.max()) < 1 + 1e-4
    whole, draws = torch.empty(1, 2000, 2000), []
    for _ in range(5000):
        _, _, h, w = RandomResizedCrop.get_params(whole, [smallest, 1], [3 / 4, 4 / 3])
        draws.append((w / 2000, h / 2000))
    theirs = torch.tensor(draws).T
    for ours, other in zip((width, height), theirs, strict=True):
        levels = torch.linspace(0.05, 0.95, 19)
        difference = ours.quantile(levels) - other.quantile(levels)
        assert difference.abs().max() < 0.02
    for measure in (torch.mul, torch.div):  # area and aspect, at their ends too
        ours, other = measure(width, height), measure(*theirs)
        assert ours.mean() == pytest.approx(other.mean().item(), abs=0.01)
        assert ours.min() == pytest.approx(other.min().item(), abs=0.01)
        assert ours.max() == pytest.approx(other.max().item(), abs=0.01)
    small = torch.maximum(width, height) < 0.98
    draws = [left[small], top[small]]
    assert all(is_uniform(values, -1, 1) for values in draws)
    related = torch.corrcoef(torch.stack([width[small], height[small], *draws]))
    assert related.fill_diagonal_(0)[2:].abs().max() < 0.05


@pytest.mark.parametrize("sign", [-1, 0, 1])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("last", [(), ("grey",), ("solarize",), ("grey", "solarize")])
def test_colours_equal_torchvision(last, channels, sign):
    """The changes in their order, with every draw at one end, or in the middle: no change."""
    x, turn = images(4, channels), 0.1 * sign
    colours = dict(brightness=1 + 0.4 * sign, contrast=1 + 0.3 * sign, saturation=1 + 0.2 * sign)
    expected = reference.adjust_brightness(x, colours["brightness"])
    expected = reference.adjust_contrast(expected, colours["contrast"])
    expected = reference.adjust_saturation(expected, colours["saturation"])
    if channels == 3:  # a rotation around the axis of greys, from red to green to blue
        cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
        rotation = torch.matrix_exp(2 * math.pi * turn * cross)
        expected = (rotation @ expected.flatten(2)).clamp(0, 1).view_as(x)
    if "grey" in last:
        expected = reference.rgb_to_grayscale(expected, channels)
    if "solarize" in last:
        expected = reference.solarize(expected, 0.5)
    solarized, scripts = (0.5, [byol]) if "solarize" in last else (None, SCRIPTS)
    for script in scripts:
        y = view(script, x, solarized=solarized, hue=turn, **colours, **dict.fromkeys(last, 0))
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("script", SCRIPTS)
def test_views_change_as_documented(script):
    """How many images change, and how much, from copies of an image of two pixels."""

    def draw(left, right, **settings):
        torch.manual_seed(0)
        x = torch.tensor([left, right]).T[:, None].expand(N, 3, 1, 2)
        return view(script, x, **settings)[:, :, 0].unbind(2)

    left, right = draw((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), free="mirror")
    mirrored = (left[:, 0] > 0.3) & (right[:, 0] < 0.3)
    assert has_share(mirrored, 0.5) and has_share(left[:, 0] < 0.3, 0.5)

    strengths = dict(brightness=0.4, contrast=0.4, saturation=0.2 if script is byol else 0.4)
    for name, strength in (strengths | dict(hue=0.1)).items():
        colours, others = draw((0.5, 0.4, 0.4), (0.5, 0.4, 0.4), free=name)
        assert torch.equal(colours, others)  # one draw for the whole image
        red, green, blue = colours.unbind(1)
        change = (red - green) / 0.1 - 1
        if name == "hue":  # the angle from red
            change = torch.atan2(3**0.5 * (green - blue), 2 * red - green - blue) / (2 * math.pi)
        assert is_uniform(change, -strength, strength)

    colours, _ = draw((0.5, 0.4, 0.4), (0.5, 0.4, 0.4), free="jitter", brightness=1.4)
    assert has_share(colours[:, 0] > 0.6, 0.8)
    colours, _ = draw((0.9, 0.9, 0.7), (0.9, 0.9, 0.7), free="grey")
    assert has_share((colours[:, 0] - colours[:, 2]).abs() < 1e-4, 0.2)


def test_a_share_of_the_views_is_solarized():
    x = torch.tensor([0.9, 0.4]).expand(N, 3, 1, 2)
    bright, dark = view(byol, x, free="solarize", solarized=0.3)[:, 0, 0].unbind(1)
    assert has_share(bright < 0.2, 0.3) and torch.equal(dark, x[:, 0, 0, 1])
