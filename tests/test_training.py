"""The training loop against the paper's algorithm, written again: step by step, in float64."""

import copy
import importlib
import math
from types import SimpleNamespace

import byol
import common
import pytest
import torch
from conftest import METHODS, in_float64
from torch import nn
from torch.nn.functional import normalize

CLASSES = {"simclr": "SimCLR", "moco": "MoCo", "byol": "BYOL", "simsiam": "SimSiam"}
LOSSES = dict(
    zip(METHODS, ("nt_xent", "info_nce", "regression_loss", "negative_cosine"), strict=True)
)
# Other values than the default ones, so that a loop that ignores an option is seen.
OPTIONS = {
    "simclr": ["--lr", 0.1, "--hidden-dim", 32, "--temperature", 0.3],
    "moco": ["--lr", 0.1, "--temperature", 0.3, "--queue-size", 100, "--momentum", 0.9],
    "byol": ["--lr", 0.1, "--hidden-dim", 32, "--tau", 0.9],
    "simsiam": ["--lr", 0.1, "--projection-dim", 64, "--bottleneck-dim", 32],
}


def watch(name, tiny, folder, *options, images=320, epochs=2, batch=32):
    """Train with a script on some of the tiny images; return what could be seen.

    x: the images given to augment. draws: a random number of each call. solarize: its argument.
    views: what forward got. outputs: what it returned. autocast: its type, or False. scored: the
    networks whose kNN was taken. first and model: before and after training. metrics: the
    checkpoint's.
    """
    script, out = importlib.import_module(name), folder / "run.pt"
    seen = SimpleNamespace(
        x=[], draws=[], solarize=[], views=[], outputs=[], autocast=[], scored=[]
    )
    network, knn_accuracy = getattr(script, CLASSES[name]), script.knn_accuracy

    def augment(x, solarize=0.0):  # instead: the image, and its mirror image
        seen.x.append(x)
        seen.draws.append(torch.rand(1).item())
        seen.solarize.append(solarize)
        return x if len(seen.x) % 2 else x.flip(3)

    class Watched(network):
        def forward(self, *views):
            if not seen.views:
                seen.first, seen.model = copy.deepcopy(self), self
            seen.views.append(views)
            enabled = torch.is_autocast_enabled("cpu")
            seen.autocast.append(enabled and torch.get_autocast_dtype("cpu"))
            seen.outputs.append(super().forward(*views))
            return seen.outputs[-1]

    def watched_knn(backbone, data):
        seen.scored.append(backbone)
        return knn_accuracy(backbone, data)

    def load_dataset(*args):
        data = common.load_dataset(*args)._replace(test_images=None, test_labels=None)
        x, labels = data.train_images[:images], data.train_labels[:images]
        return data._replace(train_images=x, train_labels=labels)

    fixed = ["--data-dir", tiny, "--epochs", epochs, "--batch-size", batch, "--device", "cpu"]
    args = script.parse_args([*map(str, [*fixed, "--out", out, *options])])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "augment", augment)
        patch.setattr(script, "load_dataset", load_dataset)
        patch.setattr(script, "knn_accuracy", watched_knn)
        patch.setattr(script, CLASSES[name], Watched)
        script.train(args)
    seen.metrics = torch.load(out, weights_only=True)["metrics"]
    out.unlink()
    return seen


@pytest.fixture(scope="module", params=METHODS)
def run(request, tiny, tmp_path_factory):
    """Two epochs of ten steps, in float64."""
    folder, options = tmp_path_factory.mktemp("run"), OPTIONS[request.param]
    with in_float64():
        return request.param, watch(request.param, tiny, folder, *options)


def papers_loss(name, model, x1, x2, temperature=0.3):
    """The paper's loss of two batches of views, in other words than ours, and what is spread."""
    online = nn.Sequential(model.backbone, model.projector)

    def cos(a, b):
        return (normalize(a) * normalize(b)).sum(1).mean()

    if name == "simclr":
        z = normalize(online(torch.cat([x1, x2])))
        similarity = (z @ z.T / temperature).exp()
        others = similarity.sum(1) - similarity.diag()
        partner = torch.cat([similarity[: len(x1)].diag(len(x1)), similarity.diag(-len(x1))])
        return -(partner / others).log().mean(), z[: len(x1)]
    if name == "moco":
        q, k = normalize(online(x1)), normalize(model.key_encoder(x2)).detach()
        positive = ((q * k).sum(1) / temperature).exp()
        negatives = (q @ model.queue.clone().T / temperature).exp().sum(1)
        model.keys = k
        return -(positive / (positive + negatives)).log().mean(), q
    z1, z2 = online(x1), online(x2)
    p1, p2 = model.predictor(z1), model.predictor(z2)
    if name == "byol":
        t1, t2 = model.target(x1).detach(), model.target(x2).detach()
        return 4 - 2 * cos(p1, t2) - 2 * cos(p2, t1), t1
    return -(cos(p1, z2.detach()) + cos(p2, z1.detach())) / 2, z1


def papers_rates(step, steps, peak):
    """Up in a line over the first tenth, then down along half a cosine, at the middle of a step."""
    done = (step + 0.5) / steps
    if done < 0.1:
        return peak * done / 0.1
    return peak * (1 + math.cos(math.pi * (done - 0.1) / 0.9)) / 2


def train_again(name, model, views, peak):
    """Train `model` by the paper; return the loss and the spread of each step."""
    params = {key: p for key, p in model.named_parameters() if p.requires_grad}
    velocity, losses, spreads, steps = dict.fromkeys(params, 0), [], [], len(views)
    for step, (x1, x2) in enumerate(views):
        loss, z = papers_loss(name, model, x1, x2)
        gradients = torch.autograd.grad(loss, params.values())
        for (key, p), gradient in zip(params.items(), gradients, strict=True):
            velocity[key] = 0.9 * velocity[key] + gradient + 5e-4 * p.detach()
            rate = papers_rates(step, steps, peak)
            if name == "simsiam" and key.startswith("predictor"):  # its rate does not fall (4.2)
                rate = min(peak, peak * (step + 0.5) / steps / 0.1)
            p.data -= rate * velocity[key]
        if name in ("moco", "byol"):
            average, momentum = ("key_encoder", 0.9) if name == "moco" else ("target", None)
            if name == "byol":  # tau rises to 1 along half a cosine (section 3.3)
                momentum = 1 - 0.1 * (1 + math.cos(math.pi * (step + 0.5) / steps)) / 2
            online = [*model.backbone.parameters(), *model.projector.parameters()]
            for xi, theta in zip(getattr(model, average).parameters(), online, strict=True):
                xi.data = momentum * xi.data + (1 - momentum) * theta.data
        if name == "moco":  # key by key, around and around
            for i, key in enumerate(model.keys, start=step * len(x1)):
                model.queue[i % 100] = key
        losses.append(loss.item())
        spreads.append((normalize(z.detach()).std(0).mean() * z.shape[1] ** 0.5).item())
    return losses, spreads


def test_a_run_follows_the_papers_algorithm(run):
    """Losses, gradients, SGD and its rates, averages, the queue: 20 steps end where ours do."""
    name, seen = run
    again = copy.deepcopy(seen.first)
    losses, spreads = train_again(name, again, seen.views, peak=0.1 * 32 / 256)
    found, before = seen.model.state_dict(), seen.first.state_dict()
    for key, expected in again.state_dict().items():
        if expected.is_floating_point():  # what the steps changed, to a millionth
            error, change = (found[key] - expected).norm(), (expected - before[key]).norm()
            assert error <= 1e-6 * change + 1e-12, key
    for row, steps in zip(seen.metrics, (slice(10), slice(10, 20)), strict=True):
        assert row["loss"] == pytest.approx(sum(losses[steps]) / 10, rel=1e-6)
        assert row["z_std"] == pytest.approx(sum(spreads[steps]) / 10, rel=1e-6)


def numbers(seen):
    """The numbers of the images in each batch, of both views, of the tiny data (conftest.py)."""
    pixels = [(x[:, 0, 0, :2] * 255).round().int() for x in seen.x]
    return [(16 * x[:, 0] + x[:, 1]).tolist() for x in pixels]


def test_images_and_views(run, tiny):
    name, seen = run
    batches = numbers(seen)
    assert batches[0::2] == batches[1::2]  # both views are of the same images
    first, second = sum(batches[0:20:2], []), sum(batches[20::2], [])
    assert sorted(first) == sorted(second) == list(range(320))  # each image once an epoch
    assert len({tuple(order) for order in (first, second, range(320))}) == 3
    assert seen.solarize == [0, 0.2 if name == "byol" else 0] * 20
    assert len(set(seen.draws)) == 40  # other draws in each epoch
    pixels = common.load_dataset("fashion-mnist", tiny).train_images / 255
    for (x1, x2), x in zip(seen.views, seen.x[::2], strict=True):
        expected = (torch.cat([x, x.flip(3)]) - pixels.mean()) / pixels.std()
        torch.testing.assert_close(torch.cat([x1, x2]), expected, atol=2e-3, rtol=0)


def test_bf16_is_used_when_asked_for(tiny, tmp_path, run, monkeypatch):
    """In the networks, and only there: the loss gets float32, and is computed in it."""
    name, plain = run
    assert not any(plain.autocast)
    script, in_losses = importlib.import_module(name), []
    loss, network = getattr(script, LOSSES[name]), getattr(script, CLASSES[name])

    def watched(*args):
        in_losses.append(torch.is_autocast_enabled("cpu"))
        return loss(*args)

    monkeypatch.setattr(script, LOSSES[name], watched)
    seen = watch(name, tiny, tmp_path, "--bf16", epochs=1, images=32, batch=16)
    assert seen.autocast == [torch.bfloat16] * 2 and in_losses and not any(in_losses)
    for rounded, exact in zip(
        seen.outputs[0], network.forward(seen.first, *seen.views[0]), strict=True
    ):
        assert rounded.dtype == torch.float32
        assert 0 < (rounded - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("name", METHODS)
def test_bf16_unasked_is_for_gpus_that_have_it(name, monkeypatch):
    """And not for the CPU of a machine that has such a GPU."""
    parse_args = importlib.import_module(name).parse_args
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for has_it in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", {False: has_it, True: True}.get)
        assert parse_args([]).bf16 == has_it and not parse_args(["--device", "cpu"]).bf16
        assert parse_args(["--device", "cpu", "--bf16"]).bf16
        assert not parse_args(["--no-bf16"]).bf16


@pytest.mark.parametrize("name", METHODS)
def test_backbone_and_image_size_are_used(name, tiny, tmp_path):
    options = ["--backbone", "vit", "--image-size", 16]
    seen = watch(name, tiny, tmp_path, *options, epochs=1, images=32, batch=16)
    vit = common.build_backbone("vit", in_channels=1, image_size=16)
    assert seen.model.backbone.state_dict().keys() == vit.state_dict().keys()
    assert seen.x[0].shape == (16, 1, 16, 16)


@pytest.mark.parametrize("name", METHODS)
def test_seeds_a_last_smaller_batch_and_when_knn_is_taken(name, tiny, tmp_path):
    """The seed decides about weights, order and views. kNN: every fifth epoch, and the last."""
    fixed = dict(epochs=7, images=40, batch=16)
    a, b, c = (watch(name, tiny, tmp_path, "--seed", seed, **fixed) for seed in (0, 0, 1))
    assert [len(x) for x in a.x] == [16] * 28
    assert numbers(a) == numbers(b) != numbers(c)
    assert a.draws == b.draws and not {*a.draws} & {*c.draws}
    for model in ("first", "model"):
        weights = [getattr(seen, model).backbone[0].weight for seen in (a, b, c)]
        assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert [row["epoch"] for row in a.metrics if "knn" in row] == [5, 7]
    assert len(a.scored) == 2 and all(x is a.model.backbone for x in a.scored)


def knn_data(n=100):
    """Images whose class shows as a bright spot, a third of them without a label; a backbone."""
    labels = torch.randint(0, 5, (n,), generator=torch.Generator().manual_seed(0))
    images = torch.randint(0, 160, (n, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    images[torch.arange(n), 0, labels, labels] += 70
    images[::2] //= 4  # dark images are as near by the cosine, not by the product
    labels[::3] = -1
    mean, std = torch.tensor([0.4]), torch.tensor([0.2])
    data = SimpleNamespace(train_images=images.byte(), train_labels=labels, mean=mean, std=std)
    backbone = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64))
    x = torch.randn(50, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    backbone(x + 1)  # running statistics that are not the initial ones
    return data, backbone


def brute_force(data, backbone, k):
    """The accuracy when each labelled image asks the k nearest of the others."""
    known = [i for i, label in enumerate(data.train_labels.tolist()) if label >= 0]
    h = normalize(backbone.eval()((data.train_images[known] / 255 - 0.4) / 0.2)).tolist()
    labels, correct = data.train_labels[known].tolist(), 0
    for i in range(len(h)):
        cosines = [sum(a * b for a, b in zip(h[i], x, strict=True)) for x in h]
        nearest = sorted((j for j in range(len(h)) if j != i), key=lambda j: -cosines[j])[:k]
        votes = [labels[j] for j in nearest]
        correct += max(sorted(set(votes)), key=votes.count) == labels[i]
    return 100 * correct / len(h)


def test_knn_equals_brute_force():
    data, backbone = knn_data()
    found = byol.knn_accuracy(backbone, data)
    assert backbone.training  # ready for the next epoch
    expected = {k: brute_force(data, backbone, k) for k in (1, 5, 10, 20, 40)}
    assert found == pytest.approx(expected.pop(20)) and 20 < found < 100
    assert found not in expected.values()  # another number of neighbours would be seen


def test_knn_takes_every_nth_of_many_images():
    """Every second of 10,010, sorted by class. The labels of those between are wrong."""
    classes = torch.arange(10_010) // 1001
    images = 255 * nn.functional.one_hot(classes, 10).byte().view(-1, 1, 2, 5)
    classes[1::2] = 9 - classes[1::2]
    mean, std = torch.zeros(1), torch.ones(1)
    data = SimpleNamespace(train_images=images, train_labels=classes, mean=mean, std=std)
    assert byol.knn_accuracy(nn.Flatten(), data) == 100


def test_knn_of_a_handful_of_images():
    data, backbone = knn_data(6)  # four of them with a label
    assert byol.knn_accuracy(backbone, data) == pytest.approx(brute_force(data, backbone, 3))
