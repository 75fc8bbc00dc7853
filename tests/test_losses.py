"""Each loss against float64 loops written from the paper's equation, and against closed forms."""

import math

import byol
import moco
import pytest
import simclr
import simsiam
import torch


def cosine(a, b):
    """Cosine similarity of two vectors, one number at a time."""
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    lengths = [math.sqrt(sum(float(x) ** 2 for x in v)) for v in (a, b)]
    return dot / lengths[0] / lengths[1]


def loop_regression_loss(p, z):
    """BYOL Eq. 2: || p/|p| - z/|z| ||^2, one pair after the other, then the mean."""
    total = 0
    for a, b in zip(p, z, strict=True):
        unit = [[float(x) / math.sqrt(sum(float(y) ** 2 for y in v)) for x in v] for v in (a, b)]
        total += sum((x - y) ** 2 for x, y in zip(*unit, strict=True))
    return total / len(p)


def loop_negative_cosine(p, z):
    """SimSiam Eq. 1 for each pair, then the mean."""
    return -sum(cosine(a, b) for a, b in zip(p, z, strict=True)) / len(p)


def loop_nt_xent(z1, z2, temperature):
    """SimCLR Eq. 1 for each of the 2N views, then the mean (algorithm 1)."""
    views = [*z1, *z2]
    n, total = len(z1), 0
    for i in range(2 * n):
        j = (i + n) % (2 * n)
        others = sum(
            math.exp(cosine(views[i], views[k]) / temperature) for k in range(2 * n) if k != i
        )
        total += -math.log(math.exp(cosine(views[i], views[j]) / temperature) / others)
    return total / (2 * n)


def loop_info_nce(q, k, queue, temperature):
    """MoCo Eq. 1 for each query, then the mean."""

    def dot(a, b):
        return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))

    total = 0
    for a, b in zip(q, k, strict=True):
        positive = math.exp(dot(a, b) / temperature)
        negatives = sum(math.exp(dot(a, c) / temperature) for c in queue)
        total += -math.log(positive / (positive + negatives))
    return total / len(q)


def numerical_gradient(function, tensor, eps=1e-6):
    """Central differences of a scalar function at a float64 tensor."""
    gradient = torch.zeros_like(tensor)
    for i in range(tensor.numel()):
        values = []
        for sign in (1, -1):
            moved = tensor.clone()
            moved.view(-1)[i] += sign * eps
            values.append(float(function(moved)))
        gradient.view(-1)[i] = (values[0] - values[1]) / (2 * eps)
    return gradient


def assert_equals_loops(loss, loops, inputs):
    """Value, and the gradient in each of the inputs that requires one."""
    value = loss(*inputs)
    expected = loops(*(tensor.detach() for tensor in inputs))
    assert value.item() == pytest.approx(expected, abs=1e-10)
    for i, tensor in enumerate(inputs):
        if tensor.requires_grad:
            (gradient,) = torch.autograd.grad(value, tensor, retain_graph=True)

            def moved(x, i=i):
                return loops(*(x if j == i else t.detach() for j, t in enumerate(inputs)))

            expected = numerical_gradient(moved, tensor.detach())
            torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-8)


def rows(*shape, unit=False, grad=True):
    x = torch.randn(*shape, dtype=torch.float64)
    return (x / x.norm(dim=-1, keepdim=True) if unit else x).requires_grad_(grad)


@pytest.mark.parametrize("n, d", [(1, 2), (3, 5), (8, 4)])
def test_regression_loss_equals_loops(n, d):
    torch.manual_seed(n)
    inputs = rows(n, d), rows(n, d, grad=False)
    assert_equals_loops(byol.regression_loss, loop_regression_loss, inputs)


@pytest.mark.parametrize("n, d", [(1, 2), (3, 5), (8, 4)])
def test_negative_cosine_equals_loops(n, d):
    torch.manual_seed(n)
    inputs = rows(n, d), rows(n, d, grad=False)
    assert_equals_loops(simsiam.negative_cosine, loop_negative_cosine, inputs)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 3.0])
@pytest.mark.parametrize("n, d", [(1, 2), (2, 3), (5, 4)])
def test_nt_xent_equals_loops(n, d, temperature):
    torch.manual_seed(n)
    assert_equals_loops(
        lambda a, b: simclr.nt_xent(a, b, temperature),
        lambda a, b: loop_nt_xent(a, b, temperature),
        (rows(n, d), rows(n, d)),
    )


@pytest.mark.parametrize("temperature", [0.1, 0.5, 3.0])
@pytest.mark.parametrize("n, d, size", [(1, 2, 1), (3, 4, 7), (5, 3, 2)])
def test_info_nce_equals_loops(n, d, size, temperature):
    torch.manual_seed(n)
    assert_equals_loops(
        lambda q, k, queue: moco.info_nce(q, k, queue, temperature),
        lambda q, k, queue: loop_info_nce(q, k, queue, temperature),
        (
            rows(n, d, unit=True),
            rows(n, d, unit=True, grad=False),
            rows(size, d, unit=True, grad=False),
        ),
    )


def test_closed_forms():
    x = torch.randn(6, 16, dtype=torch.float64)
    assert byol.regression_loss(x, 3 * x).item() == pytest.approx(0, abs=1e-12)
    assert byol.regression_loss(x, -x).item() == pytest.approx(4, abs=1e-12)
    assert simsiam.negative_cosine(x, 3 * x).item() == pytest.approx(-1, abs=1e-12)
    assert simsiam.negative_cosine(x, -x).item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_nt_xent_of_equal_embeddings_is_log_of_the_others(n):
    z = torch.ones(n, 5, dtype=torch.float64)
    assert simclr.nt_xent(z, z, 0.2).item() == pytest.approx(math.log(2 * n - 1), abs=1e-12)


@pytest.mark.parametrize("size", [1, 5, 100])
def test_info_nce_of_equal_similarities_is_log_of_all_keys(size):
    q, k, queue = (torch.ones(n, 4, dtype=torch.float64) / 2 for n in (3, 3, size))
    assert moco.info_nce(q, k, queue, 0.07).item() == pytest.approx(math.log(size + 1), abs=1e-12)


def test_losses_ignore_the_order_of_images():
    a, b, queue = torch.randn(3, 7, 8, dtype=torch.float64)
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    for loss in (
        byol.regression_loss,
        simsiam.negative_cosine,
        lambda x, y: simclr.nt_xent(x, y, 0.3),
        lambda x, y: moco.info_nce(x, y, queue, 0.3),
        lambda x, y: moco.info_nce(x, y, queue[order], 0.3),
    ):
        assert loss(a[order], b[order]).item() == pytest.approx(loss(a, b).item(), abs=1e-12)
        assert loss(a[order], b).item() != pytest.approx(loss(a, b).item(), abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1e-3, 0.2, 100])
def test_losses_stay_finite(dtype, temperature):
    """Logits of up to 1,000 and half precision; gradients too."""
    for scale in (1e-2, 1, 50):
        a, b, queue = (scale * torch.randn(3, 16, 32)).to(dtype)
        unit = [torch.nn.functional.normalize(x, dim=1) for x in (a, b, queue)]
        for loss, inputs in (
            (byol.regression_loss, (a, b)),
            (simsiam.negative_cosine, (a, b)),
            (lambda x, y: simclr.nt_xent(x, y, temperature), (a, b)),
            (lambda x, y, z: moco.info_nce(x, y, z, temperature), unit),
        ):
            leaf = inputs[0].clone().requires_grad_()
            value = loss(leaf, *inputs[1:])
            value.backward()
            assert value.isfinite() and leaf.grad.isfinite().all()
