"""The networks: what forward returns, where gradients stop, the running averages, the queue."""

import copy

import byol
import common
import moco
import pytest
import simclr
import simsiam
import torch
from torch import nn

BUILD = {
    "simclr": lambda backbone: simclr.SimCLR(backbone, 16, 8),
    "moco": lambda backbone: moco.MoCo(backbone, 16, 8, 20),
    "byol": lambda backbone: byol.BYOL(backbone, 16, 8),
    "simsiam": lambda backbone: simsiam.SimSiam(backbone, 8, 4),
}
AVERAGED = {"byol": "target", "moco": "key_encoder"}


def build(name):
    """A small model, two views of a batch, the trained encoder, and the averaged one if any."""
    torch.manual_seed(0)
    model = BUILD[name](common.build_backbone("convnet", 1, 28))
    online = nn.Sequential(model.backbone, model.projector)
    return model, torch.rand(2, 6, 1, 28, 28), online, getattr(model, AVERAGED.get(name, ""), None)


def move(network):
    """Change all weights, so that a network is not equal to another."""
    for p in network.parameters():
        p.data += 0.05 * torch.randn_like(p)


def layers(head):
    """The inputs, outputs and bias of linear layers, whether BatchNorm scales and shifts, ReLU."""
    found = []
    for m in head:
        if isinstance(m, nn.Linear):
            found.append((m.in_features, m.out_features, m.bias is not None))
        else:
            found.append((type(m), m.affine) if isinstance(m, nn.BatchNorm1d) else type(m))
    return found


def test_heads():
    """A bias everywhere but before BatchNorm, which has its own."""
    norm, relu = (nn.BatchNorm1d, True), nn.ReLU
    models = {name: build(name)[0] for name in BUILD}
    mlp = [(2048, 16, False), norm, relu, (16, 8, True)]
    assert layers(models["simclr"].projector) == layers(models["byol"].projector) == mlp
    assert layers(models["moco"].projector) == [(2048, 16, True), relu, (16, 8, True)]  # as MoCo v2
    assert layers(models["byol"].predictor) == [(8, 16, False), norm, relu, (16, 8, True)]
    last = (nn.BatchNorm1d, False)  # SimSiam, section 4.4 and the authors' code
    expected = [(2048, 8, False), norm, relu, (8, 8, False), last]
    assert layers(models["simsiam"].projector) == expected
    assert layers(models["simsiam"].predictor) == [(8, 4, False), norm, relu, (4, 8, True)]


@pytest.mark.parametrize("name", BUILD)
def test_forward(name):
    """The outputs; and all networks keep the BatchNorm statistics of their own batches."""
    model, (x1, x2), *_, average = build(name)
    if average:
        move(average)
    reference = copy.deepcopy(model)
    z = nn.Sequential(reference.backbone, reference.projector)
    if name == "simclr":  # one pass: BatchNorm sees the views of both kinds together
        expected = z(torch.cat([x1, x2])).chunk(2)
    elif name == "moco":
        expected = [x / x.norm(dim=1, keepdim=True) for x in (z(x1), reference.key_encoder(x2))]
    else:
        z1, z2 = z(x1), z(x2)
        targets = (reference.target(x1), reference.target(x2)) if name == "byol" else (z1, z2)
        expected = reference.predictor(z1), reference.predictor(z2), *targets
    torch.testing.assert_close(model(x1, x2), tuple(expected))
    torch.testing.assert_close(model.state_dict(), reference.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(x1, x2)
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in outputs)


@pytest.mark.parametrize("name", AVERAGED)
def test_averaged_network_gets_no_gradient(name):
    model, x, _, average = build(name)
    frozen = {id(p) for p in average.parameters()}
    outputs = model(*x.requires_grad_())  # not even the views get one by way of the targets
    half = len(outputs) // 2  # then come the targets of BYOL, the keys of MoCo
    assert not any(x.requires_grad for x in outputs[half:])
    sum(x.square().mean() for x in outputs[:half]).backward()
    for p in model.parameters():
        assert p.requires_grad == (p.grad is not None) == (id(p) not in frozen)


@pytest.mark.parametrize("name", AVERAGED)
def test_average_by_hand(name):
    """Equal to the trained network at first, but apart. An update changes nothing but weights."""
    model, (x, _), online, average = build(name)
    torch.testing.assert_close(average(x), online(x))
    for theta, xi in zip(online.parameters(), average.parameters(), strict=True):
        assert torch.equal(theta, xi) and theta.data_ptr() != xi.data_ptr()
    for momentum in (0.75, 0.4, 0.0, 1.0):
        move(online)
        for buffer in model.backbone.buffers():
            buffer += 5
        expected = copy.deepcopy(model)
        averages = getattr(expected, AVERAGED[name]).parameters()
        for theta, xi in zip(online.parameters(), averages, strict=True):
            xi.copy_(momentum * xi + (1 - momentum) * theta)
        getattr(model, f"update_{AVERAGED[name]}")(momentum)
        torch.testing.assert_close(model.state_dict(), expected.state_dict())


@pytest.mark.parametrize("size", [1, 5, 6, 12])
def test_pointer_wraps_around(size):
    """Row i % K gets key i: K no multiple of N, N above K, many times around."""
    model, written = moco.MoCo(common.build_backbone("convnet", 1, 28), 4, 1, size), 0
    expected = model.queue.flatten().tolist()
    for n in (1, 3, 5, 7, 12, 16) * 2 * size:
        keys = torch.rand(n, 1)
        model.enqueue(keys)
        for key in keys.flatten().tolist():
            expected[written % size] = key
            written += 1
        assert model.queue.flatten().tolist() == expected
        assert model.pointer.item() == written % size  # the row of the oldest key


def test_queue_starts_as_random_directions_and_is_saved():
    saved = build("moco")[0].state_dict()
    assert saved["queue"].shape == (20, 8) and saved["pointer"].item() == 0
    torch.testing.assert_close(saved["queue"].norm(dim=1), torch.ones(20))
    assert saved["queue"].std(dim=0).min() > 0.2


def test_spread_tells_directions_from_a_point():
    torch.manual_seed(0)
    directions, one = torch.randn(4000, 64), torch.randn(1, 64)
    for x in (directions, 7 * directions):  # length is no spread
        assert byol.spread(x).item() == pytest.approx(1, abs=0.01)
    assert byol.spread(one.expand(100, -1)).item() < 1e-5
    z = torch.tensor([[3.0, 4.0], [0.0, 2.0]])  # (0.6, 0.8) and (0, 1): deviations by hand
    expected = 2**0.5 * (0.6 / 2**0.5 + 0.2 / 2**0.5) / 2
    assert byol.spread(z).item() == pytest.approx(expected, rel=1e-6)
