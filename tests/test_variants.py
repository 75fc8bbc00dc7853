"""Each diff in docs/variants/ applies to today's scripts, runs, and does what it says."""

import inspect
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import common
import linear_eval
import pytest
import torch
import torch.nn.functional as F
from conftest import DIFFS, train, write_images
from refresh_variants import refresh
from test_family import calls_of, model_of, train_here
from torch import nn

TRAINED = [name for name in DIFFS if not name.startswith("linear_eval")]
MOVING = {  # what training changes beside backbone and projector: of the longest name that fits
    "swav": {"prototypes"},
    "moco": {"key_encoder", "queue"},
    "moco_v3": {"key_encoder", "predictor"},
    "dino": {"target"},
    "instdisc": {"bank"},
    "byol": {"predictor", "target"},
    "byol_no_predictor": {"target"},
    "simsiam": {"predictor"},
    **dict.fromkeys(("moco_end_to_end", "simsiam_no_predictor", "simsiam_frozen_predictor"), set()),
    "cpc": {"gru", "predictors"},
    "cmc": {"projectors"},
}
SETTINGS = {  # options that are not as in the script that the diff copies
    "simclr_triplet": dict(margin=0.5, lr=2.0),
    "simclr_logistic": dict(lr=0.5),
    "simclr_margin": dict(margin=1.0, lr=0.1),
    "simclr_n_pair": dict(weight=0.02, lr=0.03),
    "barlow_twins": dict(weight=0.005, projection_dim=512),
    "vicreg": dict(projection_dim=512, lr=0.5),
    "lejepa": dict(weight=0.05, projection_dim=64, lr=0.5),
    "swav": dict(prototypes=128, temperature=0.1),
    "moco_v3": dict(backbone="vit", lr=0.002),
    "dino": dict(backbone="vit", lr=0.002, prototypes=1024, tau=0.99),
    "instdisc": dict(negatives=4096, momentum=0.5, temperature=0.2, lr=0.03),
    "cpc": dict(context_dim=256),
    "cmc": dict(temperature=0.07),
    **dict.fromkeys(("supcon", "invaspread", "simclr_v2"), dict(temperature=0.1)),
}
MLP = [nn.Linear, nn.ReLU, nn.Linear]
NORM, BATCHNORM = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear], [nn.BatchNorm1d]
HEADS = {  # projector and predictor
    "simclr_no_projector": [nn.Identity, type(None)],
    **dict.fromkeys(("simclr_linear_projector", "moco_v1"), [nn.Linear, type(None)]),
    "simclr_v2": [NORM[:3] + NORM, type(None)],
    "byol_no_predictor": [NORM, nn.Identity],
    "simsiam_no_predictor": [NORM + BATCHNORM, nn.Identity],
    **dict.fromkeys(("byol_no_batchnorm", "simsiam_no_batchnorm"), [MLP, MLP]),
    "simsiam_no_stop_grad_no_norm": [NORM, NORM],
}
VIEWS = {  # does a view differ from the image in crop, and in colour? All others do in both.
    "simclr_crop_alone": (True, False),
    "simclr_colour_alone": (False, True),
    "simclr_mirror_alone": (False, False),
    "cmc": (True, False),
}


def build(module, **sizes):
    """Return the model of a variant, for images of 28 x 28, with the weights of seed 0."""
    args = vars(module.parse_args(["--out", "there-is-none"])) | sizes
    torch.manual_seed(0)
    if hasattr(module, "TwoBackbones"):
        backbone = module.TwoBackbones(args["backbone"], 3, 32)
    else:
        backbone = module.build_backbone(args["backbone"], 1, 28)
    names = list(inspect.signature(model_of(module)).parameters)[1:]
    return model_of(module)(backbone, *(args[name] for name in names))


def test_variants_are_formatted(variants):
    style = ["--line-length", "100", *(f"{name}.py" for name in DIFFS)]
    for command in (["check", "--select", "E,F,W,B,UP"], ["format", "--check"]):
        subprocess.run([sys.executable, "-m", "ruff", *command, *style], cwd=variants, check=True)


@pytest.mark.parametrize("name", TRAINED)
def test_settings_and_views(load_variant, name):
    """Options are those of the script that the diff copies, but for a few; and so are the views."""
    source = re.search(r"copy from (\w+)\.py", DIFFS[name].read_text())[1]
    module, copied = load_variant(name), load_variant(source)
    options, before = (vars(m.parse_args(["--out", "there-is-none"])) for m in (module, copied))
    assert module.__doc__.split("\n")[0] != copied.__doc__.split("\n")[0]
    kept = {key: before.get(key) for key in options}
    assert options == kept | SETTINGS.get(name, {}) | {"method": name}
    if name in VIEWS:
        crops, colours = VIEWS[name]
        plain = torch.linspace(0.3, 0.6, 40)[:, None, None, None].expand(40, 3, 8, 8)
        assert torch.allclose(module.augment(plain), plain, atol=1e-5) != colours
        edge = torch.zeros(40, 3, 8, 8)
        edge[:, :, 2:5] = 0.5
        moved = module.augment(edge).diff(dim=2)[:, :, [0, 2, 3, 5, 6]].abs().max()
        assert (moved > 1e-3) == crops
    else:
        x, drawn = torch.rand(8, 3, 16, 16), []
        for m in (module, copied):
            torch.manual_seed(0)
            drawn.append(m.augment(x))
        torch.testing.assert_close(*drawn)


@pytest.mark.parametrize("name", TRAINED)
def test_variant_trains_and_is_evaluated(variants, load_variant, tiny, name):
    """Two epochs move the right parts, and linear_eval.py reads the result."""
    module = load_variant(name)
    options = ["--queue-size", "96"] if hasattr(module, "MoCo") else []
    if name == "cmc":  # the tiny images are grey
        write_images(variants / "colour", 70)
        options = ["--dataset", variants / "colour"]
    process = train(variants, tiny, variants / name, *options)
    assert process.returncode == 0, process.stderr
    model = build(module, queue_size=96, n_images=320)
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    after = torch.load(variants / f"{name}.pt", weights_only=True)["model"]
    compared = [k for k in before if k in ("queue", "bank") or k in dict(model.named_parameters())]
    moved = {k.split(".")[0] for k in compared if not torch.equal(before[k], after[k])}
    fits = max((key for key in MOVING if name.startswith(key)), key=len, default=None)
    heads = {"projector"} & {k.split(".")[0] for k in before}
    assert moved == {"backbone"} | heads | MOVING.get(fits, set())
    if name == "cmc":  # which linear_eval_cmc.py evaluates
        std = torch.load(variants / "cmc.pt", weights_only=True)["args"]["std"]
        assert len(set(std)) == 1  # so that the colour of a grey image is 0
        return
    encoder, saved = linear_eval.load_encoder(variants / f"{name}.pt")
    assert saved["args"]["method"] == name
    decays = {"dino": 0.04, "moco_v3": 0.1}  # of transformers, with AdamW
    decay = next((decays[key] for key in decays if name.startswith(key)), None)
    optimizer = saved["optimizer"]["param_groups"][0]
    assert optimizer["weight_decay"] == (decay or 5e-4)
    assert optimizer.get("decoupled_weight_decay", False) == bool(decay)
    features = encoder(torch.zeros(2, 1, 28, 28, dtype=torch.uint8))
    assert features.shape == (2, 64 if decay else 2048)


@pytest.mark.parametrize("name", ["simsiam_no_stop_grad", "simsiam_no_stop_grad_no_norm"])
def test_no_stop_grad(load_variant, name):
    module = load_variant(name)
    p, z = torch.randn(2, 4, 8, requires_grad=True).unbind()
    gradients = torch.autograd.grad(module.negative_cosine(p, z), [p, z])
    assert all(g.norm() > 0 for g in gradients)


@pytest.mark.parametrize("name", HEADS)
def test_heads(load_variant, name):
    model = build(load_variant(name))
    found = [getattr(model, head, None) for head in ("projector", "predictor")]
    kinds = [[type(x) for x in h] if isinstance(h, nn.Sequential) else type(h) for h in found]
    assert kinds == HEADS[name]


@pytest.mark.parametrize("name", ["simsiam", "simsiam_predictor_decays"])
def test_simsiam_predictor_decays(load_variant, tiny, tmp_path, name):
    groups = train_here(load_variant(name), tmp_path, tiny)["optimizer"]["param_groups"]
    assert (groups[0]["lr"] == groups[1]["lr"]) == (name != "simsiam")


def test_byol_target_copied(load_variant, tiny, tmp_path):
    module = load_variant("byol_target_copied")
    model = build(module)
    model.load_state_dict(train_here(module, tmp_path, tiny)["model"])
    online = [*model.backbone.parameters(), *model.projector.parameters()]
    assert all(map(torch.equal, model.target.parameters(), online))


@pytest.mark.parametrize("name", ["byol", "byol_views_alike", "dino"])
def test_byol_views_alike(load_variant, tiny, tmp_path, monkeypatch, name):
    """Without crops and colours, only solarization makes the second view another one."""
    module, alike = load_variant(name), []
    kind, forward = model_of(module), model_of(module).forward

    def see(self, *x):
        alike.append(torch.equal(*x))
        return forward(self, *x)

    monkeypatch.setattr(kind, "forward", see)
    monkeypatch.setattr(module, "augment", lambda x, solarize=0: 1 - x if solarize else x)
    train_here(module, tmp_path, tiny, "--backbone", "convnet")
    assert alike == [name == "byol_views_alike"] * 5


def watch_moco(module, patch, folder, tiny):
    """Train for one epoch of five steps; return the calls of forward, of the cross-entropy, the
    keys that were queued, and the loss that was printed.
    """
    forward, losses = calls_of(patch, module.MoCo, "forward"), calls_of(patch, F, "cross_entropy")
    queued = Mock()
    patch.setattr(module.MoCo, "enqueue", queued)
    options = ["--queue-size", 256, "--temperature", 0.3]
    [row] = train_here(module, folder, tiny, *options)["metrics"]
    return forward, losses, [call.args[0] for call in queued.call_args_list], row["loss"]


def test_moco_end_to_end(load_variant, tiny, tmp_path, monkeypatch):
    """The keys are those of the batch, the queue is not used, and gradients flow into both."""
    module, (x1, x2) = load_variant("moco_end_to_end"), torch.rand(2, 16, 1, 28, 28)
    with monkeypatch.context() as patch:
        forward, losses, queued, printed = watch_moco(module, patch, tmp_path, tiny)
    assert queued == [] and len(forward) == len(losses) == 5
    for call, loss in zip(forward, losses, strict=True):
        q, k = call.result
        torch.testing.assert_close(loss.args, (q @ k.T / 0.3, torch.arange(64)))
    assert printed == pytest.approx(sum(loss.result.item() for loss in losses) / 5)
    model = build(module)
    q, k = model(x1, x2)
    torch.testing.assert_close(k, model(x2, x1)[0])
    assert torch.autograd.grad(k.sum(), model.projector[0].weight)[0].norm() > 0


def test_moco_split_batchnorm(load_variant):
    """A part of eight sees only itself, and the parts of queries and of keys are not the same."""
    model, (x1, x2) = build(load_variant("moco_split_batchnorm")), torch.rand(2, 64, 1, 28, 28)
    sizes = []
    model.backbone[1].register_forward_hook(lambda _, x, y: sizes.append(len(x[0])))
    model.key_encoder[0][1].register_forward_hook(lambda _, x, y: sizes.append(len(x[0])))
    q, k = model(x1, x2)
    assert sizes == [8] * 16
    part = F.normalize(model.projector(model.backbone(x1[8:16])), dim=1)
    torch.testing.assert_close(q[8:16], part)
    assert not torch.allclose(k[8:16], F.normalize(model.key_encoder(x2[8:16]), dim=1), atol=1e-4)
    model.eval()  # without batch statistics every key is in its own row
    torch.testing.assert_close(model(x1, x2)[1], F.normalize(model.key_encoder(x2), dim=1))


def test_moco_symmetric(load_variant, tiny, tmp_path, monkeypatch):
    """The views change places, both losses are added, and both batches of keys are queued."""
    module = load_variant("moco_symmetric")
    forward, losses, queued, printed = watch_moco(module, monkeypatch, tmp_path, tiny)
    for (one, other), keys in zip(
        zip(forward[::2], forward[1::2], strict=True), queued, strict=True
    ):
        assert one.args[1] is other.args[2] and one.args[2] is other.args[1]
        assert torch.equal(keys, torch.cat([one.result[1], other.result[1]]))
    for call, loss in zip(forward, losses, strict=True):
        q, k = call.result
        torch.testing.assert_close(loss.args[0][:, 0], (q * k).sum(dim=1) / 0.3)
    assert printed == pytest.approx(sum(loss.result.item() for loss in losses) / 5)


def test_linear_eval_z(load_variant, tiny, tmp_path):
    """Its features are the embeddings of the whole trained network."""
    module = load_variant("simclr")
    saved = train_here(module, tmp_path, tiny, "--projection-dim", 24)
    model = build(module, projection_dim=24).eval()
    model.load_state_dict(saved["model"])
    encoder, _ = load_variant("linear_eval_z").load_encoder(tmp_path / "here.pt")
    data = common.load_dataset("fashion-mnist", tiny)
    x = (data.test_images / 255 - data.mean) / data.std
    torch.testing.assert_close(encoder(data.test_images), model.projector(model.backbone(x)))


def test_linear_eval_distill(load_variant, tiny, tmp_path, monkeypatch, capsys):
    """The student learns from pretrained weights what a linear classifier says of all images."""
    train_here(load_variant("simclr"), tmp_path, tiny)
    module, calls = load_variant("linear_eval_distill"), []
    original = module.train_with_labels

    def watched(encoder, images, labels, *settings):
        network = original(encoder, images, labels, *settings)
        calls.append((encoder, images, labels, settings, network))
        return network

    monkeypatch.setattr(module, "train_with_labels", watched)
    monkeypatch.setattr(module, "STEPS", 30)
    monkeypatch.chdir(tmp_path)
    options = ["--weights", "here.pt", "--labels", "20", "--trials", "1", "--finetune"]
    module.main([*options, "--data-dir", str(tiny), "--device", "cpu", "--csv", "scores.csv"])
    [(encoder, images, soft, settings, student)] = calls
    pretrained = torch.load("here.pt", weights_only=True)["model"]["backbone.0.weight"]
    assert torch.equal(encoder[-1][0].weight, pretrained)
    assert settings == (10, 0, 0.001, module.shift_and_mirror)
    data = common.load_dataset("fashion-mnist", tiny)
    known = torch.arange(320)
    drawn = module.draw_labels(data.train_labels, known, 20, data.classes, seed=0)
    features = module.extract_features(encoder, data.train_images)
    teacher, _ = module.linear_probe(features[drawn], data.train_labels[drawn], 10)
    assert torch.equal(images, data.train_images)  # with and without labels
    torch.testing.assert_close(soft, teacher(features).softmax(dim=1))
    correct = (student(data.test_images).argmax(dim=1) == data.test_labels).sum().item()
    assert f"here.pt distilled {correct:14.2f}" in capsys.readouterr().out and correct > 20
    [line] = [x for x in Path("scores.csv").read_text().splitlines() if "distilled" in x]
    assert line.startswith("here.pt distilled,here.pt,")


def test_views_of_the_student_are_mild(load_variant, monkeypatch):
    """A pixel keeps its colour, and is found at most four of 32 pixels away, or mirrored there."""
    module, views = load_variant("linear_eval_distill"), []
    encoder = module.normalized(module.build_backbone("convnet", 3, 32), [0.5] * 3, [0.2] * 3)
    encoder[1].register_forward_hook(lambda _, inputs, __: views.append(inputs[0]))
    monkeypatch.setattr(module, "STEPS", 2)
    monkeypatch.setattr(module, "EPOCHS", 1)
    images = torch.zeros(200, 3, 32, 32, dtype=torch.uint8)
    images[:, :, 16, 10] = torch.tensor([255, 102, 0], dtype=torch.uint8)
    module.train_with_labels(
        encoder, images, torch.ones(200, 2) / 2, 2, 0, 0.001, module.shift_and_mirror
    )
    found = views[0][:, 0].nonzero()
    assert len(found) == len(views[0])
    torch.testing.assert_close(views[0].unique(), torch.tensor([0, 0.4, 1]))
    assert (found[:, 1].min(), found[:, 1].max()) == (12, 20)
    columns = found[:, 2].unique().tolist()
    assert columns == [*range(6, 15), *range(17, 26)] and 30 < (found[:, 2] > 15).sum() < 98


def test_refresh_leaves_a_fresh_diff_alone():
    """InstDisc looks as much like SimCLR, but stays a diff of MoCo."""

    fresh, kept = refresh(DIFFS["instdisc"]), DIFFS["instdisc"].read_text()
    counted = re.compile(r"^(index|similarity) .*\n", re.M)  # how alike the two files are
    assert counted.sub("", fresh) == counted.sub("", kept)
