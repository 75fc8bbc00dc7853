"""One training step of each method: what moves, by how much, and what must not."""

import copy
import math
from types import SimpleNamespace

import byol
import common
import moco
import pytest
import simclr
import simsiam
import torch
from torch import nn
from torch.nn import functional as F

SCRIPTS = {"simclr": simclr, "moco": moco, "byol": byol, "simsiam": simsiam}
ARGS = SimpleNamespace(
    momentum=0.9, hidden_dim=16, projection_dim=8, bottleneck_dim=4, temperature=0.3, lr=0.1,
    batch_size=256, queue_size=20, mlp=True, symmetric=False, stop_grad=True, predictor="mlp",
    predictor_lr="fixed", head_norm="default", projector="mlp", optimizer="sgd",
)  # fmt: skip


def build(name, **options):
    """A small model whose averaged network, if it has one, is not equal to the trained one."""
    torch.manual_seed(0)
    args = SimpleNamespace(**vars(ARGS) | options)
    model = SCRIPTS[name].build_model(common.build_backbone("convnet", 1), args)
    for average in ("target", "key_encoder"):
        for p in model[average].parameters() if average in model else ():
            p.data += 0.05 * torch.randn_like(p)
    return model, args


def views(n=6):
    return torch.rand(2, n, 1, 28, 28, generator=torch.Generator().manual_seed(1))


def optimizer(name, model, lr=0.1):
    groups = [
        dict(params=list(model[part].parameters()), name=part) for part in SCRIPTS[name].TRAINED
    ]
    return torch.optim.SGD(groups, lr=lr)


def step(name, model, args, x1, x2, progress=0.25):
    return SCRIPTS[name].train_step(model, optimizer(name, model), x1, x2, progress, args)


def trained(name, model):
    return [p for part in SCRIPTS[name].TRAINED for p in model[part].parameters()]


def unit(x):
    return x / x.norm(dim=1, keepdim=True)


def reference_loss(name, model, args, x1, x2):
    """The papers' losses on the networks' outputs, with the stop-gradients as constants."""
    online = nn.Sequential(model["backbone"], model["projector"])
    if name == "byol":  # section 3.1: Eq. 2 and the same with the views exchanged
        loss = 0
        for x, other in ((x1, x2), (x2, x1)):
            p, answer = model["predictor"](online(x)), model["target"](other).detach()
            loss = loss + (unit(p) - unit(answer)).square().sum(dim=1).mean()
        return loss
    if name == "simsiam":  # Eq. 4
        z1, z2 = online(x1), online(x2)
        p1, p2 = model["predictor"](z1), model["predictor"](z2)
        cos = [(unit(p) * unit(z.detach())).sum(1).mean() for p, z in ((p1, z2), (p2, z1))]
        return -(cos[0] + cos[1]) / 2
    if name == "simclr":  # Eq. 1, summed as in algorithm 1
        z = unit(online(torch.cat([x1, x2])))
        n, loss = len(x1), 0
        for i in range(2 * n):
            similar = (z @ z[i] / args.temperature).exp()
            others = sum(similar[k] for k in range(2 * n) if k != i)
            loss = loss - (similar[(i + n) % (2 * n)] / others).log() / (2 * n)
        return loss
    losses = []  # moco: Eq. 1
    for x_q, x_k in ((x1, x2), (x2, x1)) if args.symmetric else ((x1, x2),):
        q, k = unit(online(x_q)), unit(model["key_encoder"](x_k)).detach()
        positive = ((q * k).sum(1) / args.temperature).exp()
        negatives = (q @ model.queue.clone().T / args.temperature).exp().sum(1)
        losses.append(-(positive / (positive + negatives)).log().mean())
    return sum(losses) / len(losses)


CASES = [("simclr", {}), ("moco", {}), ("moco", {"symmetric": True}), ("moco", {"mlp": False}),
         ("byol", {}), ("simsiam", {})]  # fmt: skip


@pytest.mark.parametrize("name, options", CASES)
def test_step_equals_the_paper(name, options):
    """The loss, its gradient by way of one step of SGD, and nothing else that moves."""
    model, args = build(name, **options)
    before = copy.deepcopy(model)
    loss, z = step(name, model, args, *views())
    expected = reference_loss(name, before, args, *views())
    gradients = torch.autograd.grad(expected, trained(name, before))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert not loss.requires_grad and not z.requires_grad and z.shape == (6, 8)
    for p, old, g in zip(trained(name, model), trained(name, before), gradients, strict=True):
        torch.testing.assert_close(p, old - 0.1 * g, rtol=1e-4, atol=1e-5)
        assert g.abs().sum() > 0


@pytest.mark.parametrize("name, average", [("byol", "target"), ("moco", "key_encoder")])
def test_averaged_network_is_not_trained(name, average):
    model, args = build(name)
    ids = {id(p) for p in trained(name, model)}
    assert average not in SCRIPTS[name].TRAINED
    assert not ids & {id(p) for p in model[average].parameters()}
    step(name, model, args, *views())
    assert all(p.grad is None for p in model[average].parameters())  # the stop-gradient


@pytest.mark.parametrize("name, average", [("byol", "target"), ("moco", "key_encoder")])
def test_averaged_network_starts_equal_and_apart(name, average):
    model = SCRIPTS[name].build_model(common.build_backbone("convnet", 1), ARGS)
    online = nn.Sequential(model["backbone"], model["projector"])
    for theta, xi in zip(online.parameters(), model[average].parameters(), strict=True):
        assert torch.equal(theta, xi) and theta.data_ptr() != xi.data_ptr()


@pytest.mark.parametrize("name, average", [("byol", "target"), ("moco", "key_encoder")])
@pytest.mark.parametrize("progress", [0.0, 0.25, 1.0])
def test_averaged_network_follows_by_ema(name, average, progress):
    """BYOL's tau goes to 1 by a cosine (section 3.2); MoCo's m stays (Eq. 2)."""
    model, args = build(name)
    before = copy.deepcopy(model[average])
    step(name, model, args, *views(), progress)
    tau = 1 - (1 - 0.9) * (math.cos(math.pi * progress) + 1) / 2 if name == "byol" else 0.9
    online = nn.Sequential(model["backbone"], model["projector"])
    for xi, old, theta in zip(
        model[average].parameters(), before.parameters(), online.parameters(), strict=True
    ):
        torch.testing.assert_close(xi, tau * old + (1 - tau) * theta)


@pytest.mark.parametrize("name, average", [("byol", "target"), ("moco", "key_encoder")])
def test_averaged_network_keeps_the_statistics_of_its_own_batches(name, average):
    model, args = build(name)
    expected = copy.deepcopy(model[average])
    x1, x2 = views()
    with torch.no_grad():
        for x in (x1, x2) if name == "byol" else (x2,):
            expected(x)
    step(name, model, args, x1, x2)
    for name, buffer in model[average].named_buffers():
        torch.testing.assert_close(buffer, dict(expected.named_buffers())[name])


@pytest.mark.parametrize("script", [byol, moco])
def test_ema_update_by_hand(script):
    target, online = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    target.weight.data.fill_(1.0)
    expected = 1.0
    for value in (3.0, -2.0, 10.0):
        online.weight.data.fill_(value)
        script.ema_update(target, online, 0.75)
        expected = 0.75 * expected + 0.25 * value
        assert target.weight.item() == pytest.approx(expected, rel=1e-6)
    assert online.weight.item() == 10 and target.weight.grad is None


@pytest.mark.parametrize("script", [byol, moco])
def test_ema_update_at_the_ends(script):
    target, online = nn.Linear(3, 2), nn.Linear(3, 2)
    before = copy.deepcopy(target)
    script.ema_update(target, online, 1.0)
    assert torch.equal(target.weight, before.weight) and torch.equal(target.bias, before.bias)
    script.ema_update(target, online, 0.0)
    assert torch.equal(target.weight, online.weight) and torch.equal(target.bias, online.bias)


@pytest.mark.parametrize("script", [byol, moco])
def test_ema_update_leaves_buffers(script):
    target, online = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    online.running_mean.fill_(5)
    script.ema_update(target, online, 0.5)
    assert torch.equal(target.running_mean, torch.zeros(2))


@pytest.mark.parametrize("n", [1, 3, 5, 7, 16])
@pytest.mark.parametrize("size", [1, 5, 6, 12])
def test_enqueue_is_first_in_first_out(size, n):
    """Against a list, key by key, from every row: K no multiple of n, n above K, wraparound."""
    for start in range(size):
        expected = [-1.0] * size
        queue, pointer, row = torch.full((size, 1), -1.0), torch.tensor(start), start
        for batch in range(5):
            keys = torch.arange(batch * n, (batch + 1) * n).float()[:, None]
            pointer = moco.enqueue(queue, pointer, keys)
            for key in keys.flatten().tolist():
                expected[row] = key
                row = (row + 1) % size
            assert queue.flatten().tolist() == expected and int(pointer) == row


def test_enqueue_takes_a_last_short_batch():
    queue = torch.zeros(4, 1)
    pointer = moco.enqueue(queue, 0, torch.tensor([[1.0], [2], [3]]))
    assert moco.enqueue(queue, pointer, torch.tensor([[4.0]])) == 0
    assert queue.flatten().tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("symmetric", [False, True])
def test_moco_queues_the_keys_of_each_step_once(symmetric):
    model, args = build("moco", symmetric=symmetric)
    x1, x2 = views()
    before, encoder = model.queue.clone(), copy.deepcopy(model["key_encoder"])
    with torch.no_grad():
        keys = torch.cat([unit(encoder(x)) for x in ((x2, x1) if symmetric else (x2,))])
    step("moco", model, args, x1, x2)
    torch.testing.assert_close(model.queue[: len(keys)], keys)
    assert torch.equal(model.queue[len(keys) :], before[len(keys) :])
    assert int(model.pointer) == len(keys) == (12 if symmetric else 6)
    torch.testing.assert_close(model.queue.norm(dim=1), torch.ones(args.queue_size))


def test_moco_queue_is_saved_with_the_weights():
    state = build("moco")[0].state_dict()
    assert state["queue"].shape == (20, 8) and state["pointer"].dtype == torch.int64


def test_moco_heads():
    assert isinstance(build("moco", mlp=False)[0]["projector"], nn.Linear)  # v1
    v2 = build("moco")[0]["projector"]
    assert [type(m) for m in v2] == [nn.Linear, nn.ReLU, nn.Linear]


def test_simsiam_heads():
    model, _ = build("simsiam")
    last = model["projector"][-1]
    assert isinstance(last, nn.BatchNorm1d) and not last.affine
    assert [m.out_features for m in model["predictor"] if isinstance(m, nn.Linear)] == [4, 8]
    assert isinstance(model["predictor"][-1], nn.Linear)


@pytest.mark.parametrize("name", SCRIPTS)
def test_only_simsiams_predictor_keeps_its_learning_rate(name):
    model, args = build(name)
    sgd = optimizer(name, model)
    for group in sgd.param_groups:
        group["lr"] = 1e-3
    SCRIPTS[name].train_step(model, sgd, *views(), 0.5, args)
    kept = [group["name"] for group in sgd.param_groups if group["lr"] == 0.1]
    assert kept == (["predictor"] if name == "simsiam" else [])


@pytest.mark.parametrize("name", ["simclr", "byol", "simsiam"])
def test_steps_learn(name):
    """On one pair of views, repeated, the loss falls (MoCo's queue would fill with that pair)."""
    model, args = build(name, momentum=0.99)
    sgd = optimizer(name, model, lr=0.05)
    losses = [SCRIPTS[name].train_step(model, sgd, *views(16), 0, args)[0] for _ in range(15)]
    assert losses[-1] < losses[0] - 0.05
    assert (
        F.normalize(SCRIPTS[name].train_step(model, sgd, *views(16), 0, args)[1]).isfinite().all()
    )


def test_lars_by_hand():
    """As SimCLR's optimizer: v = 0.9 v + lr * ratio * (g + decay * w), w = w - v; lr changes."""
    values = {"weight": [[3.0, 4.0]], "bias": [1.0, 2.0], "idle": [[2.0]]}
    p = {name: nn.Parameter(torch.tensor(value)) for name, value in values.items()}
    groups = [dict(params=[p["weight"], p["idle"]], weight_decay=0.1), dict(params=[p["bias"]])]
    sgd = torch.optim.SGD(groups, 0.5, momentum=0.9)
    weight, bias, speed, bias_speed = [3.0, 4.0], [1.0, 2.0], [0.0, 0.0], [0.0, 0.0]
    idle, idle_speed = 2.0, 0.0
    for lr, gradient in ((0.5, [6.0, -8.0]), (2.0, [1.0, 2.0]), (0.1, [-3.0, 1.0])):
        p["weight"].grad = torch.tensor([gradient])
        p["bias"].grad = torch.tensor(gradient)
        p["idle"].grad = torch.zeros(1, 1)  # moves by its decay alone
        for group in sgd.param_groups:
            group["lr"] = lr
        simclr.lars(sgd)
        sgd.step()
        update = [g + 0.1 * w for g, w in zip(gradient, weight, strict=True)]
        ratio = 1e-3 * math.hypot(*weight) / math.hypot(*update)
        speed = [0.9 * v + lr * ratio * u for v, u in zip(speed, update, strict=True)]
        weight = [w - v for w, v in zip(weight, speed, strict=True)]
        bias_speed = [0.9 * v + lr * g for v, g in zip(bias_speed, gradient, strict=True)]
        bias = [b - v for b, v in zip(bias, bias_speed, strict=True)]
        idle_speed = 0.9 * idle_speed + lr * 1e-3 * idle
        idle -= idle_speed
        torch.testing.assert_close(p["weight"].data, torch.tensor([weight]))
        torch.testing.assert_close(p["bias"].data, torch.tensor(bias))
        assert p["idle"].item() == pytest.approx(idle, rel=1e-6)


@pytest.mark.parametrize("weight, gradient, expected", [(0.0, 2.0, -1.0), (0.0, 0.0, 0.0)])
def test_lars_where_a_norm_is_zero(weight, gradient, expected):
    """Then there is nothing to scale by: a plain step of SGD, and no NaN."""
    w = nn.Parameter(torch.full((1, 1), weight))
    sgd = torch.optim.SGD([dict(params=[w], weight_decay=0.1)], 0.5)
    w.grad = torch.full((1, 1), gradient)
    simclr.lars(sgd)
    sgd.step()
    assert w.item() == expected


def test_lars_is_used_on_demand():
    moved = {}
    for name in ("sgd", "lars"):
        model, args = build("simclr", optimizer=name)
        before = copy.deepcopy(model)
        step("simclr", model, args, *views())
        for (key, p), old in zip(model.named_parameters(), before.parameters(), strict=True):
            moved[name, key] = ((p - old).norm() / old.norm()).item()
    weight, norm = "backbone.0.weight", "backbone.1.weight"
    assert moved["lars", weight] == pytest.approx(0.1 * 1e-3, rel=1e-3) != moved["sgd", weight]
    assert moved["lars", norm] == moved["sgd", norm]
