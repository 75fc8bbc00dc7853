"""Each diff in docs/variants/ applies to today's scripts, runs, and does what it says."""

import inspect
import math
import subprocess
import sys

import linear_eval
import pytest
import torch
import torch.nn.functional as F
from conftest import DIFFS, METHODS, ROOT, train, write_images
from refresh_variants import refresh
from torch import nn

TRAINED = [name for name in DIFFS if not name.startswith("linear_eval")]
MOVING = {  # the parts that training changes: those of the longest name that fits
    "barlow_twins": {"backbone", "projector"},
    "vicreg": {"backbone", "projector"},
    "lejepa": {"backbone", "projector"},
    "supcon": {"backbone", "projector"},
    "invaspread": {"backbone", "projector"},
    "swav": {"backbone", "projector", "prototypes"},
    "moco_v3": {"backbone", "projector", "key_encoder", "predictor"},
    "dino": {"backbone", "projector", "target"},
    "instdisc": {"backbone", "projector", "bank"},
    "cpc": {"backbone", "gru", "predictors"},
    "cmc": {"backbone", "projectors"},
    "simclr": {"backbone", "projector"},
    "simclr_no_projector": {"backbone"},
    "moco": {"backbone", "projector", "key_encoder", "queue"},
    "moco_end_to_end": {"backbone", "projector"},
    "byol": {"backbone", "projector", "predictor", "target"},
    "byol_no_predictor": {"backbone", "projector", "target"},
    "simsiam": {"backbone", "projector", "predictor"},
    "simsiam_no_predictor": {"backbone", "projector"},
    "simsiam_frozen_predictor": {"backbone", "projector"},
}


def build(module, **sizes):
    """Return the model of a variant, for images of 28 x 28, with the weights of seed 0."""
    args = vars(module.parse_args([])) | sizes
    torch.manual_seed(0)
    if hasattr(module, "TwoBackbones"):
        backbone = module.TwoBackbones(args["backbone"], 3, 32)
    else:
        backbone = module.build_backbone(args["backbone"], 1, 28)
    *_, kind = (
        x
        for x in vars(module).values()
        if getattr(x, "__module__", "") == module.__name__ and isinstance(x, type)
    )
    names = list(inspect.signature(kind).parameters)[1:]
    return kind(backbone, *(args[name] for name in names))


def views(n=16):
    return torch.rand(2, n, 1, 28, 28, generator=torch.Generator().manual_seed(1)).unbind()


def test_variants_are_formatted(variants):
    style = ["--line-length", "100", *(f"{name}.py" for name in DIFFS)]
    for command in (["check", "--select", "E,F,W,B,UP"], ["format", "--check"]):
        subprocess.run([sys.executable, "-m", "ruff", *command, *style], cwd=variants, check=True)


@pytest.mark.parametrize("name", TRAINED)
def test_variant_trains_and_is_evaluated(variants, load_variant, tiny, name):
    """Two epochs move the right parts; --help says what it is; linear_eval.py reads the result."""
    module = load_variant(name)
    options = ["--queue-size", "96"] if "queue_size" in vars(module.parse_args([])) else []
    if name == "cmc":  # the tiny images are grey
        write_images(variants / "colour", 70)
        options = ["--dataset", variants / "colour"]
    process = train(variants, tiny, variants / name, *options)
    assert process.returncode == 0, process.stderr
    model = build(module, queue_size=96, n_images=320)
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    after = torch.load(variants / f"{name}.pt", weights_only=True)["model"]
    compared = [k for k, _ in model.named_parameters()] + [
        key for key in ("queue", "bank") if hasattr(model, key)
    ]
    moved = {k.split(".")[0] for k in compared if not torch.equal(before[k], after[k])}
    assert moved == MOVING[max((key for key in MOVING if name.startswith(key)), key=len)]
    originals = "".join((ROOT / f"{method}.py").read_text() for method in METHODS)
    assert module.__doc__.split("\n")[0] not in originals
    if name == "cmc":  # which linear_eval_cmc.py evaluates
        std = torch.load(variants / "cmc.pt", weights_only=True)["args"]["std"]
        assert len(set(std)) == 1  # so that the colour of a grey image is 0
        return
    encoder, saved = linear_eval.load_encoder(variants / f"{name}.pt")
    assert saved["args"]["method"] == name
    features, adamw_decay = 2048, {"dino": 0.04, "moco_v3": 0.1}.get(name)
    if adamw_decay:  # a transformer
        assert saved["args"]["lr"] == 0.002
        features = 64
    optimizer = saved["optimizer"]["param_groups"][0]
    assert optimizer["weight_decay"] == (adamw_decay or 5e-4)
    assert optimizer.get("decoupled_weight_decay", False) == bool(adamw_decay)
    assert encoder(torch.zeros(2, 1, 28, 28, dtype=torch.uint8)).shape == (2, features)


@pytest.mark.parametrize("name", ["simsiam_no_stop_grad", "simsiam_no_stop_grad_no_norm"])
def test_no_stop_grad(load_variant, name):
    module = load_variant(name)
    p, z = torch.randn(2, 4, 8, requires_grad=True).unbind()
    gradients = torch.autograd.grad(module.negative_cosine(p, z), [p, z])
    assert all(g.norm() > 0 for g in gradients)
    last = build(module).projector[-1]
    assert isinstance(last, nn.Linear if name.endswith("no_norm") else nn.BatchNorm1d)


@pytest.mark.parametrize("name", ["simsiam_no_predictor", "byol_no_predictor"])
def test_no_predictor(load_variant, name):
    model, (x1, x2) = build(load_variant(name)), views()
    z1 = model.projector(model.backbone(x1))
    torch.testing.assert_close(model(x1, x2)[0], z1)


def test_simsiam_frozen_predictor_lets_gradients_through(load_variant):
    module, (x1, x2) = load_variant("simsiam_frozen_predictor"), views()
    model = build(module)
    p1, _, _, z2 = model(x1, x2)
    module.negative_cosine(p1, z2).backward()
    assert model.backbone[0].weight.grad.norm() > 0 and model.predictor[0].weight.grad is None


def test_simsiam_predictor_decays(variants, load_variant, tiny):
    for name in ("simsiam", "simsiam_predictor_decays"):
        out = variants / f"rates-{name}.pt"
        assert train(variants, tiny, variants / name, "--out", out).returncode == 0
        groups = torch.load(out, weights_only=True)["optimizer"]["param_groups"]
        assert (groups[0]["lr"] == groups[1]["lr"]) == (name != "simsiam")


@pytest.mark.parametrize("name", ["simsiam_no_batchnorm", "byol_no_batchnorm"])
def test_no_batchnorm_in_the_heads(load_variant, name):
    model = build(load_variant(name))
    for head in (model.projector, model.predictor):
        layers = [type(layer) for layer in head]
        assert layers == [nn.Linear, nn.ReLU, nn.Linear] and head[0].bias is not None


def test_byol_target_copied(variants, load_variant, tiny):
    out = variants / "copied.pt"
    assert train(variants, tiny, variants / "byol_target_copied", "--out", out).returncode == 0
    model = build(load_variant("byol_target_copied"))
    model.load_state_dict(torch.load(out, weights_only=True)["model"])
    online = nn.Sequential(model.backbone, model.projector)
    pairs = zip(model.target.parameters(), online.parameters(), strict=True)
    assert all(torch.equal(xi, theta) for xi, theta in pairs)


def test_byol_views_alike(load_variant):
    module = load_variant("byol_views_alike")
    assert module.VIEW_1 == module.VIEW_2 and "solarize" not in module.VIEW_1


@pytest.mark.parametrize("name", ["moco_v1", "simclr_linear_projector"])
def test_linear_projector(load_variant, name):
    assert isinstance(build(load_variant(name)).projector, nn.Linear)


def test_simclr_no_projector(load_variant):
    z1, _ = build(load_variant("simclr_no_projector"))(*views())
    assert z1.shape == (16, 2048)


def watch(module, patch, folder, tiny, *options):
    """Train for one epoch of five steps; return all that cross_entropy and enqueue were given."""
    losses, keys, original = [], [], F.cross_entropy
    enqueue = module.MoCo.enqueue

    def cross_entropy(logits, labels):
        losses.append((logits, labels))
        return original(logits, labels)

    patch.setattr(F, "cross_entropy", cross_entropy)
    patch.setattr(module.MoCo, "enqueue", lambda self, k: keys.append(k) or enqueue(self, k))
    args = ["--data-dir", tiny, "--device", "cpu", "--epochs", 1, "--batch-size", 64]
    args += ["--queue-size", 256, "--out", folder / "watched.pt", *options]
    module.train(module.parse_args(list(map(str, args))))
    return losses, keys


def test_moco_end_to_end(load_variant, tiny, tmp_path, monkeypatch):
    """The keys are those of the batch, the queue is not used, and gradients flow into both."""
    module, (x1, x2) = load_variant("moco_end_to_end"), views()
    losses, keys = watch(module, monkeypatch, tmp_path, tiny)
    assert keys == [] and all(logits.shape == (64, 64) for logits, _ in losses)
    assert all(labels.tolist() == list(range(64)) for _, labels in losses)
    model = build(module)
    q, k = model(x1, x2)
    torch.testing.assert_close(k, model(x2, x1)[0])
    assert torch.autograd.grad(k.sum(), model.projector[0].weight)[0].norm() > 0


def test_moco_split_batchnorm(load_variant):
    """A part of eight sees only itself, and the parts of queries and of keys are not the same."""
    model, (x1, x2) = build(load_variant("moco_split_batchnorm")), views(64)
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
    losses, keys = watch(load_variant("moco_symmetric"), monkeypatch, tmp_path, tiny)
    assert len(losses) == 10 and [len(k) for k in keys] == [128] * 5


def test_simclr_views(load_variant):
    """A crop keeps the colour of a plain image; colour changes leave every edge where it is."""
    plain = torch.linspace(0.3, 0.6, 40)[:, None, None, None].expand(40, 3, 8, 8)
    edge = torch.zeros(40, 3, 8, 8)
    edge[:, :, 2:5] = 0.5
    for name, crops, colours in (
        ("simclr", True, True),
        ("simclr_crop_alone", True, False),
        ("simclr_colour_alone", False, True),
        ("simclr_mirror_alone", False, False),
    ):
        module = load_variant(name)
        for view in (module.VIEW_1, module.VIEW_2):
            kept = torch.allclose(module.augment(plain, **view), plain, atol=1e-5)
            assert kept != colours and view["mirror"] == 0.5
            moved = module.augment(edge, **view).diff(dim=2)[:, :, [0, 2, 3, 5, 6]].abs().max()
            assert (moved > 1e-3) == crops


def test_simclr_one_half(load_variant):
    """The mean over the N first views alone, from Eq. 1 in loops."""
    z1, z2 = torch.randn(2, 5, 4, dtype=torch.float64).unbind()
    rows = [*F.normalize(z1, dim=1), *F.normalize(z2, dim=1)]
    expected = 0.0
    for i in range(5):
        exponents = [math.exp(float(rows[i] @ rows[j]) / 0.3) for j in range(10)]
        expected -= math.log(exponents[i + 5] / (sum(exponents) - exponents[i])) / 5
    found = load_variant("simclr_one_half").nt_xent(z1, z2, 0.3).item()
    assert found == pytest.approx(expected, abs=1e-12)


def test_linear_eval_z(variants, load_variant, tiny):
    options = ["--out", variants / "z.pt", "--hidden-dim", "40", "--projection-dim", "24"]
    assert train(variants, tiny, "simclr", *options).returncode == 0
    encoder, saved = load_variant("linear_eval_z").load_encoder(variants / "z.pt")
    assert encoder(torch.zeros(2, 1, 28, 28, dtype=torch.uint8)).shape == (2, 24)


def test_refresh_leaves_a_fresh_diff_alone():
    """InstDisc looks as much like SimCLR, but stays a diff of MoCo."""
    path = ROOT / "docs" / "variants" / "instdisc.diff"

    def lines(diff):  # but git's count of how alike they are
        return [line for line in diff.splitlines() if not line.startswith(("index", "similarity"))]

    assert "copy from moco.py" in path.read_text()
    assert lines(refresh(path)) == lines(path.read_text())
