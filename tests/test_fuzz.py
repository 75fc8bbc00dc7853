"""Random shapes, values and types through losses, queue, EMA and augmentation (Hypothesis)."""

import copy
import math

import byol
import moco
import pytest
import simclr
import simsiam
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losses import (
    loop_info_nce,
    loop_negative_cosine,
    loop_nt_xent,
    loop_regression_loss,
)
from torch import nn

settings.register_profile("suite", max_examples=150, deadline=None, derandomize=True)
settings.load_profile("suite")

SEED = st.integers(0, 2**31 - 1)
SIZE = st.integers(1, 9)
SCALE = st.sampled_from([1e-3, 1.0, 30.0, 1e4])
DTYPE = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
TEMPERATURE = st.floats(0.02, 10)


def vectors(n, dim, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, dim, generator=generator, dtype=torch.float64)


@given(SIZE, SIZE, SEED, SCALE, TEMPERATURE)
def test_nt_xent(n, dim, seed, scale, temperature):
    z1, z2 = vectors(n, dim, seed, scale), vectors(n, dim, seed + 1, scale)
    loss = simclr.nt_xent(z1, z2, temperature).item()
    assert loss == pytest.approx(loop_nt_xent(z1, z2, temperature), rel=1e-9, abs=1e-9)
    assert -1e-9 <= loss <= math.log(2 * n - 1) + 2 / temperature + 1e-9


@given(SIZE, SIZE, SIZE, SEED, TEMPERATURE)
def test_info_nce(n, dim, size, seed, temperature):
    q, k, queue = (
        nn.functional.normalize(vectors(rows, dim, seed + i), dim=1)
        for i, rows in enumerate((n, n, size))
    )
    loss = moco.info_nce(q, k, queue, temperature).item()
    assert loss == pytest.approx(loop_info_nce(q, k, queue, temperature), rel=1e-9, abs=1e-9)
    assert -1e-9 <= loss <= math.log(size + 1) + 2 / temperature + 1e-9


@given(SIZE, SIZE, SEED, SCALE)
def test_byol_and_simsiam_losses(n, dim, seed, scale):
    p, z = vectors(n, dim, seed, scale), vectors(n, dim, seed + 1)
    loss = byol.regression_loss(p, z).item()
    assert loss == pytest.approx(loop_regression_loss(p, z), rel=1e-9, abs=1e-9)
    assert -1e-9 <= loss <= 4 + 1e-9
    cosine = simsiam.negative_cosine(p, z).item()
    assert cosine == pytest.approx(loop_negative_cosine(p, z), rel=1e-9, abs=1e-9)
    assert loss == pytest.approx(2 + 2 * cosine, abs=1e-9)  # BYOL's footnote: the same but for this


@given(SIZE, SIZE, SEED, SCALE, DTYPE, TEMPERATURE)
def test_losses_stay_finite_in_every_type(n, dim, seed, scale, dtype, temperature):
    scale = min(scale, 1e3) if dtype is torch.float16 else scale  # 65,504 is its largest number
    a, b = (vectors(n, dim, seed + i, scale).to(dtype) for i in (0, 1))
    a[0] = 0  # a vector without a direction
    leaf = a.clone().requires_grad_()
    unit, other = (nn.functional.normalize(x.float(), dim=1) for x in (leaf, b))
    for loss in (
        simclr.nt_xent(leaf.float(), b.float(), temperature),
        moco.info_nce(unit, other, other, temperature),
        byol.regression_loss(leaf.float(), b.float()),
        simsiam.negative_cosine(leaf.float(), b.float()),
    ):
        assert loss.isfinite() and loss.ndim == 0
        [gradient] = torch.autograd.grad(loss, leaf, retain_graph=True)
        assert gradient.isfinite().all() or dtype is torch.float16  # 1 / |z| can be above 65,504


@given(SIZE, SIZE, st.lists(st.integers(1, 25), min_size=1, max_size=6), st.integers(0, 8))
def test_queue(size, dim, batches, pointer):
    pointer %= size
    queue = torch.zeros(size, dim)
    expected, position, value = [[0.0] * dim for _ in range(size)], pointer, 0.0
    place = torch.tensor(pointer)
    for n in batches:
        keys = torch.arange(n).float()[:, None].expand(n, dim) + value + 1
        place = moco.enqueue(queue, place, keys)
        for row in keys.tolist():  # one key after the other, over the oldest
            expected[position] = row
            position = (position + 1) % size
        value += n
        assert queue.tolist() == expected and int(place) == position


@given(SEED, st.floats(0, 1), st.integers(1, 5), st.sampled_from([byol, moco]))
def test_ema(seed, momentum, steps, script):
    torch.manual_seed(seed)
    online = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    target = copy.deepcopy(online)
    expected = [p.detach().clone() for p in target.parameters()]
    for _ in range(steps):
        for p in online.parameters():
            p.data.normal_()
        script.ema_update(target, online, momentum)
        pairs = zip(expected, online.parameters(), strict=True)
        expected = [momentum * e + (1 - momentum) * p.detach() for e, p in pairs]
    for found, wanted in zip(target.parameters(), expected, strict=True):
        torch.testing.assert_close(found.detach(), wanted, rtol=1e-12, atol=1e-12)
    assert all(not p.isnan().any() for p in target.buffers())


PROBABILITY = st.sampled_from([0.0, 0.3, 1.0])
STRENGTH = st.sampled_from([0.0, 0.4, 1.0])


@given(
    shape=st.tuples(st.integers(1, 5), st.sampled_from([1, 3]), SIZE, st.integers(1, 33)),
    low=st.floats(0.02, 1),
    chances=st.tuples(PROBABILITY, PROBABILITY, PROBABILITY),
    strengths=st.tuples(STRENGTH, STRENGTH, STRENGTH),
    hue=st.floats(0, 0.5),
    kind=st.sampled_from(["noise", "black", "white"]),
    seed=SEED,
)
def test_augment(shape, low, chances, strengths, hue, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    images = {"noise": torch.rand(shape, generator=generator), "black": torch.zeros(shape)}
    images = images.get(kind, torch.ones(shape))
    before = images.clone()
    options = dict(
        zip(("jitter", "grayscale", "solarize"), chances, strict=True),
        **dict(zip(("brightness", "contrast", "saturation"), strengths, strict=True)),
        crop_scale=(low, 1.0),
        hue=hue,
    )
    views, again = (
        byol.augment(images, **options, generator=torch.Generator().manual_seed(seed))
        for _ in range(2)
    )
    assert views.shape == images.shape and views.dtype == images.dtype
    assert views.isfinite().all() and views.min() >= -1e-6 and views.max() <= 1 + 1e-6
    assert torch.equal(views, again) and torch.equal(images, before)
    if not any(chances) and low == 1:
        reference = torch.stack([views, views.flip(3)])  # at most mirrored
        close = (reference - images).abs().amax(dim=(2, 3, 4)).amin(dim=0) < 1e-5
        assert close.all()
