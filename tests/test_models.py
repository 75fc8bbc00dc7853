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
    """A small model whose averaged network, if it has one, is not equal to the trained one."""
    torch.manual_seed(0)
    model = BUILD[name](common.build_backbone("convnet", 1, 28))
    if name in AVERAGED:
        for p in getattr(model, AVERAGED[name]).parameters():
            p.data += 0.05 * torch.randn_like(p)
    return model


def views(n=6):
    return torch.rand(2, n, 1, 28, 28, generator=torch.Generator().manual_seed(1))


def unit(x):
    return x / x.norm(dim=1, keepdim=True)


def layers(head):
    """What a head is made of: the sizes of linear layers, and the names of the rest."""
    return [(m.in_features, m.out_features) if isinstance(m, nn.Linear) else type(m) for m in head]


def test_heads():
    norm, relu = nn.BatchNorm1d, nn.ReLU
    models = {name: build(name) for name in BUILD}
    assert layers(models["simclr"].projector) == [(2048, 16), norm, relu, (16, 8)]
    assert layers(models["moco"].projector) == [(2048, 16), relu, (16, 8)]  # MoCo v2: no BatchNorm
    assert layers(models["byol"].projector) == [(2048, 16), norm, relu, (16, 8)]
    assert layers(models["byol"].predictor) == [(8, 16), norm, relu, (16, 8)]
    assert layers(models["byol"].target[1]) == layers(models["byol"].projector)
    assert layers(models["simsiam"].projector) == [(2048, 8), norm, relu, (8, 8), norm]
    assert layers(models["simsiam"].predictor) == [(8, 4), norm, relu, (4, 8)]
    affine = [m.affine for m in models["simsiam"].projector if isinstance(m, norm)]
    assert affine == [True, False]  # SimSiam, section 4.4 and the authors' code


def test_simclr_forward():
    """z1 and z2 come out of one pass: BatchNorm has seen the views of both kinds together."""
    model, (x1, x2) = build("simclr"), views()
    reference = copy.deepcopy(model)
    z1, z2 = model(x1, x2)
    z = reference.projector(reference.backbone(torch.cat([x1, x2])))
    torch.testing.assert_close(torch.cat([z1, z2]), z)


def test_moco_forward():
    model, (x1, x2) = build("moco"), views()
    reference = copy.deepcopy(model)
    q, k = model(x1, x2)
    torch.testing.assert_close(q, unit(reference.projector(reference.backbone(x1))))
    torch.testing.assert_close(k, unit(reference.key_encoder(x2)))


def test_byol_forward():
    model, (x1, x2) = build("byol"), views()
    reference = copy.deepcopy(model)
    found = model(x1, x2)
    online = nn.Sequential(reference.backbone, reference.projector, reference.predictor)
    expected = online(x1), online(x2), reference.target(x1), reference.target(x2)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_simsiam_forward():
    model, (x1, x2) = build("simsiam"), views()
    reference = copy.deepcopy(model)
    found = model(x1, x2)
    z = [reference.projector(reference.backbone(x)) for x in (x1, x2)]
    expected = *(reference.predictor(x) for x in z), *z
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", BUILD)
def test_forward_returns_float32_under_autocast(name):
    with torch.autocast("cpu", torch.bfloat16):
        outputs = build(name)(*views())
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in outputs)


@pytest.mark.parametrize("name", AVERAGED)
def test_averaged_network_gets_no_gradient(name):
    model = build(name)
    frozen = {id(p) for p in getattr(model, AVERAGED[name]).parameters()}
    x1, x2 = views().requires_grad_()  # not even the views get one by way of the targets
    outputs = model(x1, x2)
    for x in outputs[len(outputs) // 2 :]:  # targets of BYOL, keys of MoCo
        assert not x.requires_grad
    sum(x.square().mean() for x in outputs[: len(outputs) // 2]).backward()
    for p in model.parameters():
        assert p.requires_grad == (id(p) not in frozen)
        assert (p.grad is None) == (id(p) in frozen)


@pytest.mark.parametrize("name", AVERAGED)
def test_averaged_network_starts_equal_and_apart(name):
    model = BUILD[name](common.build_backbone("convnet", 1, 28))
    online = nn.Sequential(model.backbone, model.projector)
    pairs = zip(online.parameters(), getattr(model, AVERAGED[name]).parameters(), strict=True)
    for theta, xi in pairs:
        assert torch.equal(theta, xi) and theta.data_ptr() != xi.data_ptr()


@pytest.mark.parametrize("momentum", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("name", AVERAGED)
def test_average_by_hand(name, momentum):
    """Three updates; the statistics of BatchNorm and the trained network stay as they are."""
    model = build(name)
    online = nn.Sequential(model.backbone, model.projector)
    average = getattr(model, AVERAGED[name])
    update = getattr(model, f"update_{AVERAGED[name]}")
    expected = [p.clone() for p in average.parameters()]
    for _ in range(3):
        for p in online.parameters():
            p.data.normal_()
        for buffer in model.backbone.buffers():
            buffer.fill_(5)
        before = copy.deepcopy(online.state_dict())
        buffers = [b.clone() for b in average.buffers()]
        update(momentum)
        weights = list(online.parameters())
        expected = [
            momentum * e + (1 - momentum) * p for e, p in zip(expected, weights, strict=True)
        ]
        for xi, e in zip(average.parameters(), expected, strict=True):
            torch.testing.assert_close(xi, e)
        assert all(torch.equal(a, b) for a, b in zip(average.buffers(), buffers, strict=True))
        assert all(torch.equal(v, before[k]) for k, v in online.state_dict().items())


@pytest.mark.parametrize("name", AVERAGED)
def test_averaged_network_keeps_the_statistics_of_its_own_batches(name):
    model, (x1, x2) = build(name), views()
    expected = copy.deepcopy(getattr(model, AVERAGED[name]))
    with torch.no_grad():
        for x in (x1, x2) if name == "byol" else (x2,):
            expected(x)
    model(x1, x2)
    for key, buffer in getattr(model, AVERAGED[name]).named_buffers():
        torch.testing.assert_close(buffer, dict(expected.named_buffers())[key])


@pytest.mark.parametrize("n", [1, 3, 5, 7, 12, 16])
@pytest.mark.parametrize("size", [1, 5, 6, 12])
def test_enqueue_is_first_in_first_out(size, n):
    """Against a list, key by key: K no multiple of N, N above K, many times around."""
    model = moco.MoCo(common.build_backbone("convnet", 1, 28), 4, 1, size)
    model.queue.copy_(-torch.arange(size)[:, None])
    expected = (-torch.arange(size)).tolist()
    for batch in range(2 * size):
        keys = torch.arange(batch * n, (batch + 1) * n).float()[:, None]
        model.enqueue(keys)
        for key in keys.flatten().tolist():
            expected.pop(0)
            expected.append(key)
        assert model.queue.flatten().tolist() == expected


def test_queue_starts_as_random_directions_and_is_saved():
    state = build("moco").state_dict()
    assert state["queue"].shape == (20, 8)
    torch.testing.assert_close(state["queue"].norm(dim=1), torch.ones(20))
    assert state["queue"].std(dim=0).min() > 0.2


def test_spread_tells_directions_from_a_point():
    torch.manual_seed(0)
    directions, one = torch.randn(4000, 64), torch.randn(1, 64)
    assert byol.spread(directions).item() == pytest.approx(1, abs=0.01)
    assert byol.spread(7 * directions).item() == pytest.approx(1, abs=0.01)  # length is no spread
    assert byol.spread(one.expand(100, -1)).item() < 1e-5
    z = torch.tensor([[3.0, 4.0], [0.0, 2.0]])  # (0.6, 0.8) and (0, 1): deviations by hand
    expected = 2**0.5 * (0.6 / 2**0.5 + 0.2 / 2**0.5) / 2
    assert byol.spread(z).item() == pytest.approx(expected, rel=1e-6)
