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

SCRIPTS = {"simclr": simclr, "moco": moco, "byol": byol, "simsiam": simsiam}
CLASSES = {"simclr": "SimCLR", "moco": "MoCo", "byol": "BYOL", "simsiam": "SimSiam"}
UPDATES = ("update_target", "update_key_encoder", "enqueue")


def watch(name, tiny, folder, *options, epochs=4, batch=64):
    """Train with a script, views being the images themselves; return all that happened.

    log: in order, ("step", rates), ("update_target", tau) and the like. inputs: of the backbone in
    training. drawn: the images and settings that augment got. first: the model before training.
    grads: the gradients of the first step. loss: the arguments of the loss function, once each.
    """
    script, patch = SCRIPTS[name], pytest.MonkeyPatch()
    seen = SimpleNamespace(log=[], inputs=[], drawn=[], grads=[], loss=[], autocast=[])

    def augment(x, **view):
        seen.drawn.append((x, view))
        return x if len(seen.drawn) % 2 else x.flip(3)

    class SGD(torch.optim.SGD):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            seen.optimizer = self

        def step(self):
            seen.log.append(("step", [group["lr"] for group in self.param_groups]))
            if not seen.grads:
                names = {id(p): key for key, p in seen.model.named_parameters()}
                params = [p for group in self.param_groups for p in group["params"]]
                seen.grads = {names[id(p)]: p.grad.clone() for p in params if p.grad is not None}
            super().step()

    method, losses = getattr(script, CLASSES[name]), dict(simclr="nt_xent", moco="info_nce")
    loss = losses.get(name, "regression_loss" if name == "byol" else "negative_cosine")
    original_loss = getattr(script, loss)

    def build(*args):
        seen.model = method(*args)
        seen.first = copy.deepcopy(seen.model)
        seen.model.backbone.register_forward_pre_hook(look)
        for update in UPDATES:
            if hasattr(seen.model, update):
                watch_update(update, getattr(seen.model, update))
        return seen.model

    def look(module, inputs):
        if module.training:
            seen.inputs.append(inputs[0])
            seen.autocast.append(torch.is_autocast_enabled("cpu"))

    def watch_update(update, original):
        def replacement(value):
            seen.log.append((update, value if isinstance(value, float) else value.clone()))
            original(value)

        setattr(seen.model, update, replacement)

    def watched_loss(*args):
        seen.autocast.append(torch.is_autocast_enabled("cpu") and "in the loss")
        seen.loss.append([x.detach().clone() if torch.is_tensor(x) else x for x in args])
        return original_loss(*args)

    fixed = ["--data-dir", tiny, "--epochs", epochs, "--batch-size", batch, "--device", "cpu"]
    argv = [*fixed, "--out", folder / f"{name}.pt", *options]
    try:
        patch.setattr(script, "augment", augment)
        patch.setattr(script, CLASSES[name], build)
        patch.setattr(script, loss, watched_loss)
        patch.setattr(torch.optim, "SGD", SGD)
        seen.args = script.parse_args([*map(str, argv)])
        script.train(seen.args)
    finally:
        patch.undo()
    seen.saved = torch.load(folder / f"{name}.pt", weights_only=True)
    return seen


@pytest.fixture(scope="module", params=METHODS)
def run(request, tiny, tmp_path_factory):
    """Four epochs of five steps."""
    return request.param, watch(request.param, tiny, tmp_path_factory.mktemp("run"))


def numbers(x):
    """The numbers of the images in a batch of the tiny data (conftest.py)."""
    return ((x[:, 0, 0, 0] * 255 * 16) + x[:, 0, 0, 1] * 255).round().int().tolist()


def test_every_epoch_has_every_image_once_in_another_order(run):
    _, seen = run
    batches = [numbers(x) for x, _ in seen.drawn]
    assert batches[0::2] == batches[1::2]  # both views are of the same images
    epochs = [sum(batches[0::2][i : i + 5], []) for i in (0, 5, 10, 15)]
    for order in epochs:
        assert sorted(order) == list(range(320)) != order
    assert len({tuple(order) for order in epochs}) == 4


def test_the_two_views_are_drawn_with_their_own_settings(run):
    name, seen = run
    views = [SCRIPTS[name].VIEW_1, SCRIPTS[name].VIEW_2]
    assert [view for _, view in seen.drawn] == views * 20


def test_the_backbone_gets_normalised_views(run, tiny):
    name, seen = run
    data = common.load_dataset("fashion-mnist", tiny)
    x = torch.cat([seen.drawn[0][0], seen.drawn[0][0].flip(3)])
    found = torch.cat(seen.inputs[:2])[: len(x)] if name != "moco" else seen.inputs[0]
    torch.testing.assert_close(found, ((x - data.mean) / data.std)[: len(found)])
    assert data.mean.item() == pytest.approx(
        data.train_images.float().mean().item() / 255, abs=1e-4
    )
    assert data.std.item() == pytest.approx(data.train_images.float().std().item() / 255, abs=1e-4)


def test_the_rate_of_every_step(run):
    """Up in a line over the first tenth, 2 of 20 steps, then down along half a cosine."""
    name, seen = run
    peak = seen.args.lr * 64 / 256
    expected = [peak / 2, peak]
    expected += [peak * (1 + math.cos(math.pi * (i - 2) / 18)) / 2 for i in range(2, 20)]
    found = [value for kind, value in seen.log if kind == "step"]
    assert [rates[0] for rates in found] == pytest.approx(expected, rel=1e-9)
    if name == "simsiam":  # the predictor's rate stays at the peak (section 4.2)
        assert [rates[1] for rates in found] == pytest.approx([peak / 2, *[peak] * 19], rel=1e-9)
        predictor = {id(p) for p in seen.model.predictor.parameters()}
        assert {id(p) for p in seen.optimizer.param_groups[1]["params"]} == predictor
    assert all(len(rates) == (2 if name == "simsiam" else 1) for rates in found)


def test_the_optimizer(run):
    _, seen = run
    for group in seen.optimizer.param_groups:
        assert group["momentum"] == 0.9 and group["weight_decay"] == 5e-4
        assert not group["nesterov"] and not group["maximize"] and group["dampening"] == 0
    optimized = {id(p) for group in seen.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in seen.model.parameters() if p.requires_grad} <= optimized


def test_averages_and_queue_are_updated_after_each_step(run):
    name, seen = run
    order = [kind for kind, _ in seen.log]
    after = {"byol": ["update_target"], "moco": ["update_key_encoder", "enqueue"]}.get(name, [])
    assert order == ["step", *after] * 20
    if name == "byol":  # tau rises from 0.99 to 1 along half a cosine (section 3.2)
        expected = [1 - 0.01 * (1 + math.cos(math.pi * i / 20)) / 2 for i in range(20)]
        found = [value for kind, value in seen.log if kind == "update_target"]
        assert found == pytest.approx(expected, abs=1e-12)
    if name == "moco":
        assert {value for kind, value in seen.log if kind == "update_key_encoder"} == {0.99}
        keys = [value for kind, value in seen.log if kind == "enqueue"]
        for k, (_, own, _, _) in zip(keys, seen.loss, strict=True):
            assert torch.equal(k, own)  # the keys of this step, which the loss had as positives
        assert torch.equal(seen.model.queue[-20 * 64 :], torch.cat(keys))
        queues = [queue for _, _, queue, _ in seen.loss]  # each has the keys of the steps before
        assert torch.equal(queues[1], torch.cat([queues[0][64:], keys[0]]))


def test_the_default_settings():
    """What the docstrings and the README's results stand for."""
    for name, script in SCRIPTS.items():
        args = vars(script.parse_args(["--device", "cpu", "--out", "there-is-none.pt"]))
        assert (args["epochs"], args["batch_size"], args["seed"]) == (100, 128, 0)
        assert args["backbone"] == "convnet" and args["bf16"] is False
        assert args["method"] == name and args["dataset"] == "fashion-mnist"
        if name in ("simclr", "moco"):
            assert args["temperature"] == 0.2
        if name == "moco":
            assert (args["momentum"], args["queue_size"]) == (0.99, 4096)
        if name == "byol":
            assert args["tau"] == 0.99
        if name == "simsiam":
            assert (args["projection_dim"], args["bottleneck_dim"]) == (512, 128)
        else:
            assert (args["hidden_dim"], args["projection_dim"]) == (512, 128)


def expected_loss(name, model, x1, x2, temperature):
    """The paper's loss of two batches of views, with stop-gradients, in other words than ours."""
    online = nn.Sequential(model.backbone, model.projector)

    def cos(a, b):
        return (nn.functional.normalize(a) * nn.functional.normalize(b)).sum(1).mean()

    if name == "simclr":
        z = nn.functional.normalize(online(torch.cat([x1, x2])))
        similarity = (z @ z.T / temperature).exp()
        others = similarity.sum(1) - similarity.diag()
        partner = torch.cat([similarity[: len(x1)].diag(len(x1)), similarity.diag(-len(x1))])
        return -(partner / others).log().mean()
    if name == "moco":
        q, k = nn.functional.normalize(online(x1)), nn.functional.normalize(model.key_encoder(x2))
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


@pytest.mark.parametrize("name", METHODS)
def test_one_step_has_the_gradient_of_the_papers_loss(name, tiny, tmp_path):
    """Which view predicts which, sums and means, stop-gradients, temperature: all at once."""
    own = {"simclr": ["--temperature", "0.3"], "moco": ["--temperature", "0.3", "--queue-size", 40]}
    options = own.get(name, [])
    seen = watch(name, tiny, tmp_path, *options, epochs=1, batch=320)
    data = common.load_dataset("fashion-mnist", tiny)
    x = seen.drawn[0][0]
    x1, x2 = ((v - data.mean) / data.std for v in (x, x.flip(3)))
    seen.first.train()
    loss = expected_loss(name, seen.first, x1, x2, 0.3)
    loss.backward()
    row = seen.saved["metrics"][0]
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for key, p in seen.first.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(seen.grads[key], p.grad, rtol=1e-3, atol=1e-5)
            assert p.grad.abs().sum() > 0 or p.ndim == 1
        else:
            assert key not in seen.grads


def test_logged_loss_and_spread_are_means_over_the_epoch(run):
    name, seen = run
    z = [group[0] if name in ("simclr", "moco") else group[1] for group in seen.loss]
    step = 2 if name in ("byol", "simsiam") else 1  # calls of the loss in a step
    script = SCRIPTS[name]
    z = z[1::2] if step == 2 else z  # of the loss (p2, z1): z1, t1
    expected = sum(script.spread(v).item() for v in z[15:]) / 5
    assert seen.saved["metrics"][-1]["z_std"] == pytest.approx(expected, rel=1e-4)
    function = dict(simclr="nt_xent", moco="info_nce", byol="regression_loss")
    loss = getattr(script, function.get(name, "negative_cosine"))
    values = [loss(*group).item() for group in seen.loss[15 * step :]]
    expected = sum(values) / (10 if name == "simsiam" else 5)
    assert seen.saved["metrics"][-1]["loss"] == pytest.approx(expected, rel=1e-4)


def test_bf16_is_used_when_asked_for(tiny, tmp_path, run):
    """The networks run under autocast, the loss does not and gets float32."""
    name, plain = run
    assert not any(plain.autocast)
    seen = watch(name, tiny, tmp_path, "--bf16", epochs=1, batch=320)
    assert True in seen.autocast and "in the loss" not in seen.autocast
    tensors = [x for group in seen.loss for x in group if torch.is_tensor(x)]
    assert all(x.dtype == torch.float32 for x in tensors)
    coarse = tensors[0].bfloat16().float()
    assert torch.equal(coarse, tensors[0]) or name == "moco"  # q is normalised in float32
    assert math.isfinite(seen.saved["metrics"][0]["loss"])


@pytest.mark.parametrize("name", METHODS)
def test_the_seed_decides_about_weights_order_and_views(name, tiny, tmp_path):
    runs = []
    for i, seed in enumerate((0, 0, 1)):
        (tmp_path / f"{i}").mkdir()
        runs.append(watch(name, tiny, tmp_path / f"{i}", "--seed", seed, epochs=1, batch=160))
    a, b, c = ([numbers(x) for x, _ in seen.drawn] for seen in runs)
    assert a == b != c
    first = [seen.first.backbone[0].weight for seen in runs]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])
    last = [seen.saved["model"]["backbone.0.weight"] for seen in runs]
    assert torch.equal(last[0], last[1])


def clusters(n, classes=5, seed=0):
    """Images of one bright spot each, whose place is the class, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=generator)
    images = torch.randint(0, 160, (n, 1, 8, 8), generator=generator)
    images[torch.arange(n), 0, labels, labels] += 90
    images[::2] //= 4  # dark images are as near by the cosine, not by the product
    return images.to(torch.uint8), labels


def test_knn_equals_brute_force():
    """A fifth of the labelled images ask the 20 nearest of the others by cosine: a majority."""
    images, labels = clusters(150)
    labels[::3] = -1
    mean, std = torch.tensor([0.4]), torch.tensor([0.2])
    data = common.Dataset(images, labels, None, None, mean, std, tuple("abcde"))
    backbone = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64))
    backbone(torch.randn(50, 1, 8, 8) + 1)  # running statistics that are not the initial ones
    found = byol.knn_accuracy(backbone, data)
    assert backbone.training  # ready for the next epoch

    backbone.eval()
    labelled = (labels >= 0).nonzero().flatten()
    torch.manual_seed(0)
    order = labelled[torch.randperm(100)]
    h = backbone((images[order] / 255 - 0.4) / 0.2)
    h = (h / h.norm(dim=1, keepdim=True)).tolist()
    correct = 0
    for i in range(20):
        cosines = [sum(a * b for a, b in zip(h[i], h[j], strict=True)) for j in range(20, 100)]
        nearest = sorted(range(80), key=lambda j: -cosines[j])[:20]
        votes = [labels[order[20 + j]].item() for j in nearest]
        winner = max(sorted(set(votes)), key=votes.count)
        correct += winner == labels[order[i]]
    assert found == pytest.approx(100 * correct / 20) and 20 < found < 100


def test_knn_never_sees_the_test_set(tiny, tmp_path, monkeypatch):
    """A run ends the same when the test images are others."""
    rows = []
    for i in range(2):
        load = common.load_dataset

        def changed(*args, i=i, load=load):
            data = load(*args)
            return data._replace(test_images=None, test_labels=None) if i else data

        monkeypatch.setattr(simclr, "load_dataset", changed)
        (tmp_path / f"{i}").mkdir()
        rows.append(watch("simclr", tiny, tmp_path / f"{i}", epochs=2).saved["metrics"])
        monkeypatch.undo()
    assert rows[0][-1]["knn"] == rows[1][-1]["knn"] and "knn" not in rows[0][0]


def test_knn_is_taken_every_fifth_epoch_and_last(tiny, tmp_path):
    metrics = watch("simclr", tiny, tmp_path, epochs=7, batch=320).saved["metrics"]
    assert [row["epoch"] for row in metrics if "knn" in row] == [5, 7]
