"""The training loop, watched from outside: every step's images, views, rate, loss and update."""

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
from conftest import METHODS
from torch import nn
from torch.nn.functional import normalize

SCRIPTS = {"simclr": simclr, "moco": moco, "byol": byol, "simsiam": simsiam}
CLASSES = {"simclr": "SimCLR", "moco": "MoCo", "byol": "BYOL", "simsiam": "SimSiam"}
LOSSES = {"simclr": "nt_xent", "moco": "info_nce"}
LOSSES |= {"byol": "regression_loss", "simsiam": "negative_cosine"}
UPDATES = {"byol": ["update_target"], "moco": ["update_key_encoder", "enqueue"]}
# Other values than the default ones, so that a loop that ignores an option is seen.
OPTIONS = {
    "simclr": ["--lr", 0.1, "--hidden-dim", 32, "--temperature", 0.3],
    "moco": ["--lr", 0.1, "--temperature", 0.3, "--queue-size", 100, "--momentum", 0.9],
    "byol": ["--lr", 0.1, "--hidden-dim", 32, "--tau", 0.9],
    "simsiam": ["--lr", 0.1, "--projection-dim", 64, "--bottleneck-dim", 32],
}


def watch(name, tiny, folder, *options, images=320, epochs=2, batch=32):
    """Train with a script on some of the images, without test images; return all that happened.

    calls: what was called, in order. autocast: the calls under it. Of each call, by its name: of
    augment the images, the settings and a random number, of forward the views, of loss the
    arguments, of backward the loss, of step the rates, of updates their argument. first: the model
    before training. grads: those of the first step. saved: the checkpoint.
    """
    script, patch, out = SCRIPTS[name], pytest.MonkeyPatch(), folder / "run.pt"
    seen, method = SimpleNamespace(calls=[], autocast=[]), getattr(script, CLASSES[name])

    def spy(owner, function, note, called=None):
        original, called = getattr(owner, function), called or function
        setattr(seen, called, [])

        def replacement(*args, **kwargs):
            seen.calls.append(called)
            if torch.is_autocast_enabled("cpu"):
                seen.autocast.append((called, torch.get_autocast_dtype("cpu")))
            getattr(seen, called).append(note(*args, **kwargs))
            if function == "augment":  # instead: the image, and its mirror image
                return args[0] if len(seen.augment) % 2 else args[0].flip(3)
            return original(*args, **kwargs)

        patch.setattr(owner, function, replacement)

    def clone(*args):
        return [x.detach().clone() if torch.is_tensor(x) else x for x in args]

    def forward(model, *views):
        if not hasattr(seen, "model"):
            seen.model, seen.first = model, copy.deepcopy(model)
        return views

    def step(optimizer):
        if not seen.step:
            params = seen.model.named_parameters()
            seen.grads = {key: p.grad.clone() for key, p in params if p.grad is not None}
        seen.groups = optimizer.param_groups
        return [group["lr"] for group in optimizer.param_groups]

    def load_dataset(*args):
        data = common.load_dataset(*args)._replace(test_images=None, test_labels=None)
        x, labels = data.train_images[:images], data.train_labels[:images]
        return data._replace(train_images=x, train_labels=labels)

    spy(script, "augment", lambda x, **view: (x, view, torch.rand(1).item()))
    spy(script, LOSSES[name], clone, "loss")
    spy(method, "forward", forward)
    spy(torch.optim.SGD, "zero_grad", clone)
    spy(torch.Tensor, "backward", lambda loss: loss.item())
    spy(torch.optim.SGD, "step", step)
    for update in UPDATES.get(name, []):
        spy(method, update, lambda model, value: clone(value)[0])
    patch.setattr(script, "load_dataset", load_dataset)
    fixed = ["--data-dir", tiny, "--epochs", epochs, "--batch-size", batch, "--device", "cpu"]
    try:
        script.train(script.parse_args([*map(str, [*fixed, "--out", out, *options])]))
    finally:
        patch.undo()
    seen.saved = torch.load(out, weights_only=True)
    out.unlink()
    return seen


@pytest.fixture(scope="module", params=METHODS)
def run(request, tiny, tmp_path_factory):
    """Two epochs of ten steps."""
    folder, options = tmp_path_factory.mktemp("run"), OPTIONS[request.param]
    return request.param, watch(request.param, tiny, folder, *options)


def numbers(seen):
    """The numbers of the images in each batch, of both views, of the tiny data (conftest.py)."""
    pixels = [(x[:, 0, 0, :2] * 255).round().int() for x, *_ in seen.augment]
    return [(16 * x[:, 0] + x[:, 1]).tolist() for x in pixels]


def test_images_and_views(run, tiny):
    name, seen = run
    batches = numbers(seen)
    assert batches[0::2] == batches[1::2]  # both views are of the same images
    first, second = sum(batches[0:20:2], []), sum(batches[20::2], [])
    assert sorted(first) == sorted(second) == list(range(320))  # each image once an epoch
    assert len({tuple(order) for order in (first, second, range(320))}) == 3
    views = [SCRIPTS[name].VIEW_1, SCRIPTS[name].VIEW_2]
    assert [view for _, view, _ in seen.augment] == views * 20
    assert len({draw for *_, draw in seen.augment}) == 40  # other draws in each epoch
    pixels = common.load_dataset("fashion-mnist", tiny).train_images / 255
    for (x1, x2), (x, *_) in zip(seen.forward, seen.augment[::2], strict=True):
        expected = (torch.cat([x, x.flip(3)]) - pixels.mean()) / pixels.std()
        torch.testing.assert_close(torch.cat([x1, x2]), expected, atol=2e-3, rtol=0)


def test_the_rate_of_every_step_and_the_optimizer(run):
    """Up in a line over the first tenth, 2 of 20 steps, then down along half a cosine."""
    name, seen = run
    peak, falls, decay = 0.1 * 32 / 256, range(2, 20), dict(momentum=0.9, weight_decay=5e-4)
    whole = [peak / 2, peak]
    whole += [peak * (1 + math.cos(math.pi * (i - 2) / 18)) / 2 for i in falls]
    rates, trained = [whole], [{id(p) for p in seen.model.parameters() if p.requires_grad}]
    if name == "simsiam":  # the predictor's rate stays at the peak (section 4.2)
        rates.append([peak / 2, *[peak] * 19])
        trained.append({id(p) for p in seen.model.predictor.parameters()})
        trained[0] -= trained[1]
    for group, found, expected, params in zip(
        seen.groups, zip(*seen.step, strict=True), rates, trained, strict=True
    ):
        assert found == pytest.approx(expected, rel=1e-9)
        assert params <= {id(p) for p in group["params"]}
        others = dict(nesterov=False, maximize=False, dampening=0)
        assert {key: group[key] for key in decay | others} == decay | others


def test_averages_and_queue_are_updated_after_each_step(run):
    name, seen = run
    losses = ["loss"] * (2 if name in ("byol", "simsiam") else 1)
    order = ["augment", "augment", "forward", *losses, "zero_grad", "backward", "step"]
    assert seen.calls == [*order, *UPDATES.get(name, [])] * 20
    if name == "byol":  # tau rises to 1 along half a cosine (section 3.3)
        expected = [1 - 0.1 * (1 + math.cos(math.pi * i / 20)) / 2 for i in range(20)]
        assert seen.update_target == pytest.approx(expected, abs=1e-12)
    if name == "moco":
        assert seen.update_key_encoder == [0.9] * 20
        queue = seen.first.queue
        for k, (_, own, before, _) in zip(seen.enqueue, seen.loss, strict=True):
            assert torch.equal(k, own)  # the keys of this step, which the loss has as positives
            assert torch.equal(before, queue)  # the keys of the steps before
            queue = torch.cat([queue, k])[-100:]
        assert torch.equal(seen.saved["model"]["queue"], queue)


def expected_loss(name, model, x1, x2, temperature):
    """The paper's loss of two batches of views, with stop-gradients, in other words than ours."""
    online = nn.Sequential(model.backbone, model.projector)

    def cos(a, b):
        return (normalize(a) * normalize(b)).sum(1).mean()

    if name == "simclr":
        z = normalize(online(torch.cat([x1, x2])))
        similarity = (z @ z.T / temperature).exp()
        others = similarity.sum(1) - similarity.diag()
        partner = torch.cat([similarity[: len(x1)].diag(len(x1)), similarity.diag(-len(x1))])
        return -(partner / others).log().mean()
    if name == "moco":
        q, k = normalize(online(x1)), normalize(model.key_encoder(x2))
        positive = ((q * k.detach()).sum(1) / temperature).exp()
        negatives = (q @ model.queue.T / temperature).exp().sum(1)
        return -(positive / (positive + negatives)).log().mean()
    if name == "byol":
        p1, p2 = model.predictor(online(x1)), model.predictor(online(x2))
        t1, t2 = model.target(x1).detach(), model.target(x2).detach()
        return 4 - 2 * cos(p1, t2) - 2 * cos(p2, t1)
    z1, z2 = online(x1), online(x2)
    p1, p2 = model.predictor(z1), model.predictor(z2)
    return -(cos(p1, z2.detach()) + cos(p2, z1.detach())) / 2


def test_one_step_has_the_gradient_of_the_papers_loss(run):
    """Which view predicts which, sums and means, stop-gradients, temperature: all at once."""
    name, seen = run
    loss = expected_loss(name, seen.first, *seen.forward[0], 0.3)
    loss.backward()
    assert seen.backward[0] == pytest.approx(loss.item(), rel=1e-5)
    params = {key: p for key, p in seen.first.named_parameters() if p.requires_grad}
    assert seen.grads.keys() == params.keys()
    for key, p in params.items():
        torch.testing.assert_close(seen.grads[key], p.grad, rtol=1e-3, atol=1e-5)
        assert p.grad.abs().sum() > 0 or p.ndim == 1


def test_logged_loss_and_spread_are_means_over_the_epoch(run):
    name, seen = run
    z = [args[1] for args in seen.loss[1::2]]  # z1 or t1, in the loss of (p2, z1)
    if name in ("simclr", "moco"):
        z = [args[0] for args in seen.loss]  # z1 or q
    for row, steps in zip(seen.saved["metrics"], (slice(10), slice(10, 20)), strict=True):
        assert row["loss"] == pytest.approx(sum(seen.backward[steps]) / 10, rel=1e-4)
        spreads = [SCRIPTS[name].spread(x).item() for x in z[steps]]
        assert row["z_std"] == pytest.approx(sum(spreads) / 10, rel=1e-4)


def test_the_default_settings(tmp_path, monkeypatch):
    """What the docstrings and the README's results stand for."""
    monkeypatch.chdir(tmp_path)
    same = dict(epochs=100, batch_size=128, seed=0, dataset="fashion-mnist", data_dir="data")
    same |= dict(image_size=None, backbone="convnet", device="cpu", bf16=False, resume=False)
    heads = dict(hidden_dim=512, projection_dim=128)
    own = {
        "simclr": heads | dict(temperature=0.2, lr=0.25),
        "moco": heads | dict(temperature=0.1, lr=0.3, momentum=0.99, queue_size=4096),
        "byol": heads | dict(tau=0.95, lr=0.3),
        "simsiam": dict(projection_dim=512, bottleneck_dim=128, lr=0.4),
    }
    for name, script in SCRIPTS.items():
        expected = same | own[name] | dict(method=name, out=f"{name}.pt")
        assert vars(script.parse_args(["--device", "cpu"])) == expected


def test_bf16_is_used_when_asked_for(tiny, tmp_path, run):
    """The networks run under autocast, the loss does not and gets float32."""
    name, plain = run
    assert plain.autocast == []
    seen = watch(name, tiny, tmp_path, "--bf16", epochs=1, images=32, batch=16)
    assert seen.autocast == [("forward", torch.bfloat16)] * 2
    assert all(x.dtype == torch.float32 for x in sum(seen.loss, []) if torch.is_tensor(x))
    assert math.isfinite(seen.saved["metrics"][0]["loss"])


@pytest.mark.parametrize("name", METHODS)
def test_seeds_a_last_smaller_batch_and_when_knn_is_taken(name, tiny, tmp_path):
    """The seed decides about weights, order and views. kNN: every fifth epoch, and the last."""
    fixed = dict(epochs=7, images=40, batch=16)
    a, b, c = (watch(name, tiny, tmp_path, "--seed", seed, **fixed) for seed in (0, 0, 1))
    assert [len(x) for x, *_ in a.augment] == [16] * 28
    assert numbers(a) == numbers(b) != numbers(c)
    draws = [{draw for *_, draw in seen.augment} for seen in (a, b, c)]
    assert draws[0] == draws[1] and not draws[0] & draws[2]
    for model in ("first", "model"):
        weights = [getattr(seen, model).backbone[0].weight for seen in (a, b, c)]
        assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert [row["epoch"] for row in a.saved["metrics"] if "knn" in row] == [5, 7]


def test_knn_equals_brute_force():
    """A fifth of the labelled images ask the 20 nearest of the others by cosine: a majority."""
    labels = torch.randint(0, 5, (150,), generator=torch.Generator().manual_seed(0))
    images = torch.randint(0, 160, (150, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    images[torch.arange(150), 0, labels, labels] += 70  # a bright spot, whose place is the class
    images[::2] //= 4  # dark images are as near by the cosine, not by the product
    labels[::3] = -1
    data = SimpleNamespace(train_images=images.to(torch.uint8), train_labels=labels)
    data.mean, data.std = torch.tensor([0.4]), torch.tensor([0.2])
    backbone = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64))
    backbone(torch.randn(50, 1, 8, 8) + 1)  # running statistics that are not the initial ones
    found = byol.knn_accuracy(backbone, data)
    assert backbone.training  # ready for the next epoch

    backbone.eval()
    torch.manual_seed(0)
    order = (labels >= 0).nonzero().flatten()[torch.randperm(100)]
    h = normalize(backbone((images[order] / 255 - 0.4) / 0.2)).tolist()

    def brute_force(k):
        correct = 0
        for i in range(20):
            cosines = [sum(a * b for a, b in zip(h[i], h[j], strict=True)) for j in range(20, 100)]
            nearest = sorted(range(80), key=lambda j: -cosines[j])[:k]
            votes = [labels[order[20 + j]].item() for j in nearest]
            correct += max(sorted(set(votes)), key=votes.count) == labels[order[i]]
        return 5 * correct  # percent

    assert found == pytest.approx(brute_force(20)) and 20 < found < 100
    assert brute_force(5) != brute_force(20)
