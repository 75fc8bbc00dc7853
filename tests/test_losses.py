"""Each loss against float64 loops written from the paper's equation, and against closed forms."""

import math

import byol
import moco
import pytest
import simclr
import simsiam
import torch
import torch.nn.functional as F

LOSSES = {  # all with the same arguments; moco.info_nce has them already
    "regression": lambda p, t, queue, temperature: byol.regression_loss(p, t),
    "cosine": lambda p, z, queue, temperature: simsiam.negative_cosine(p, z),
    "nt_xent": lambda z1, z2, queue, temperature: simclr.nt_xent(z1, z2, temperature),
    "info_nce": moco.info_nce,
}


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine(a, b):
    return dot(a, b) / math.sqrt(dot(a, a)) / math.sqrt(dot(b, b))


def loops(name, a, b, queue, temperature):
    """The same for lists of vectors, one number at a time: the mean of the paper's terms."""
    terms = []
    if name == "regression":  # BYOL Eq. 2: || p/|p| - t/|t| ||^2
        for pair in zip(a, b, strict=True):
            p, t = ([x / math.sqrt(dot(v, v)) for x in v] for v in pair)
            terms.append(sum((x - y) ** 2 for x, y in zip(p, t, strict=True)))
    elif name == "cosine":  # SimSiam Eq. 1
        terms = [-cosine(p, z) for p, z in zip(a, b, strict=True)]
    elif name == "nt_xent":  # SimCLR Eq. 1, for each of the 2N views (algorithm 1)
        for i, view in enumerate([*a, *b]):
            found = [math.exp(cosine(view, other) / temperature) for other in [*a, *b]]
            others = sum(found[:i] + found[i + 1 :])
            terms.append(-math.log(found[(i + len(a)) % (2 * len(a))] / others))
    else:  # MoCo Eq. 1
        for q, k in zip(a, b, strict=True):
            found = [math.exp(dot(q, key) / temperature) for key in [k, *queue]]
            terms.append(-math.log(found[0] / sum(found)))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 3.0])
@pytest.mark.parametrize("n, d, size", [(1, 2, 1), (3, 4, 7), (5, 3, 2)])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_equal_loops(name, n, d, size, temperature):
    torch.manual_seed(n)
    inputs = [torch.randn(rows, d, dtype=torch.float64) for rows in (n, n, size)]
    if name == "info_nce":  # its vectors have length 1 when they come in
        inputs = [x / x.norm(dim=1, keepdim=True) for x in inputs]
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = LOSSES[name](*leaves, temperature)
    value.backward()
    expected = loops(name, *(x.tolist() for x in inputs), temperature)
    assert value.item() == pytest.approx(expected, abs=1e-10)
    for i in range(2 if name == "nt_xent" else 1):  # the others take p or q to a fixed target
        for index in range(inputs[i].numel()):  # the gradient by central differences
            ends = []
            for eps in (1e-6, -1e-6):
                moved = [x.clone() for x in inputs]
                moved[i].view(-1)[index] += eps
                ends.append(loops(name, *(x.tolist() for x in moved), temperature))
            slope = (ends[0] - ends[1]) / 2e-6
            assert leaves[i].grad.view(-1)[index].item() == pytest.approx(slope, 1e-6, 1e-8)
    assert name != "cosine" or leaves[1].grad is None  # SimSiam's stop-gradient (Eq. 3)


def test_closed_forms():
    x, ones = torch.randn(6, 16, dtype=torch.float64), torch.ones(64, 4, dtype=torch.float64)
    found = [byol.regression_loss(x, 3 * x), byol.regression_loss(x, -x)]
    found += [simsiam.negative_cosine(x, 3 * x), simsiam.negative_cosine(x, -x)]
    expected = [0, 4, -1, 1]
    for n in (1, 2, 7, 64):  # equal embeddings: the log of the number of others, or of keys
        found.append(simclr.nt_xent(ones[:n], ones[:n], 0.2))
        found.append(moco.info_nce(ones[:3] / 2, ones[:3] / 2, ones[:n] / 2, 0.07))
        expected += [math.log(2 * n - 1), math.log(n + 1)]
    assert [value.item() for value in found] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_stay_finite(name, dtype):
    """Logits of up to 1,000 and half precision; gradients too."""
    for temperature in (1e-3, 0.2, 100):
        for scale in (1e-2, 1, 50):
            inputs = (scale * torch.randn(3, 16, 32)).to(dtype)
            a, *rest = F.normalize(inputs, dim=2) if name == "info_nce" else inputs
            value = LOSSES[name](a.requires_grad_(), *rest, temperature)
            value.backward()
            assert value.isfinite() and a.grad.isfinite().all()
