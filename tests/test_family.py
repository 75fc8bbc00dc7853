"""The methods in docs/variants/ that have their own loss: against float64 loops from the papers."""

import math
from types import SimpleNamespace
from unittest.mock import Mock

import common
import pytest
import torch
import torch.nn.functional as F
from conftest import in_float64, write_images
from torch.autograd import grad

N, D = 6, 4


def train_here(module, folder, tiny, *options):
    """Train for one epoch of five steps in this process; return the checkpoint."""
    args = ["--data-dir", tiny, "--device", "cpu", "--epochs", 1, "--batch-size", 64]
    args += ["--out", folder / "here.pt", *options]
    module.train(module.parse_args(list(map(str, args))))
    return torch.load(folder / "here.pt", weights_only=True)


def calls_of(patch, place, name):
    """Return a list that will hold all calls of a function: their args, kwargs and result."""
    calls, function = [], getattr(place, name)

    def watched(*args, **kwargs):
        result = function(*args, **kwargs)
        calls.append(SimpleNamespace(args=args, kwargs=kwargs, result=result))
        return result

    patch.setattr(place, name, watched)
    return calls


def model_of(module):
    """The class of a script's model: the last that it defines."""
    kinds = [x for x in vars(module).values() if isinstance(x, type)]
    return [kind for kind in kinds if kind.__module__ == module.__name__][-1]


def draw(rows=N, columns=D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64).requires_grad_()


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def units(*views):
    return [row / (row @ row).sqrt() for view in views for row in view]


def covariance(a, b, divisor):
    return sum((x - a.mean()) * (y - b.mean()) for x, y in zip(a, b, strict=True)) / divisor


def log_softmax(values, i):
    return values[i] - sum(v.exp() for v in values).log()


def info_nce(queries, keys, temperature=1):
    """Each query picks its key out of all."""
    rows = [[query @ key / temperature for key in keys] for query in queries]
    return mean(-log_softmax(row, i) for i, row in enumerate(rows))


def others(i):
    """The rows of 2N views that show another image than row i."""
    return [j for j in range(2 * N) if j % N != i % N]


def one_half(z1, z2, temperature):
    """Eq. 1 of SimCLR, the mean over the first views alone."""
    z, terms = units(z1, z2), []
    for i in range(N):
        rest = [j for j in range(2 * N) if j != i]
        terms.append(-log_softmax([z[i] @ z[j] / temperature for j in rest], rest.index(i + N)))
    return mean(terms)


def triplet(z1, z2, margin):
    """Table 2 of SimCLR, with the nearest negative that is less like it than the partner is."""
    z, terms = units(z1, z2), []
    for i, row in enumerate(z):
        positive = row @ z[(i + N) % (2 * N)]
        similarities = [row @ z[j] for j in others(i)]
        semi_hard = [s for s in similarities if positive - margin < s < positive]
        terms.append(max(semi_hard) - positive + margin if semi_hard else 0)
    assert 0 < terms.count(0) < 2 * N  # some have no such negative
    return mean(terms)


def logistic(z1, z2, temperature):
    """Table 2 of SimCLR: a logistic loss tells each pair, of one image or of two."""
    z = units(z1, z2)
    pairs = [(i, j) for i in range(2 * N) for j in others(i)]
    found = [(1 + (-z[i] @ z[i + N] / temperature).exp()).log() for i in range(N)]
    told = [(1 + (z[i] @ z[j] / temperature).exp()).log() for i, j in pairs]
    return mean(found) + mean(told)


def margin_of_pairs(z1, z2, margin):
    """Partners attract by d^2 / 2; others nearer than the margin repel by (margin - d)^2 / 2."""
    z = units(z1, z2)
    attracted = mean(((z[i] - z[i + N]) ** 2).sum() for i in range(N))
    gaps = [margin - (z[i] - z[j]).norm() for i in range(2 * N) for j in others(i)]
    assert min(gaps) < 0 < max(gaps)  # some are far enough apart
    return (attracted + sum(gap**2 for gap in gaps if gap > 0) / (2 * N)) / 2


def n_pair(z1, z2, weight):
    """log(1 + sum of exp(f_i . f_j+ - f_i . f_i+)), and the weight of the squared lengths."""
    terms = []
    for i in range(N):
        gaps = [z1[i] @ z2[j] - z1[i] @ z2[i] for j in range(N) if j != i]
        terms.append((1 + sum(gap.exp() for gap in gaps)).log())
    return mean(terms) + weight * mean(z1[i] @ z1[i] + z2[i] @ z2[i] for i in range(N))


def barlow_twins(z1, z2, weight):
    """The loss over D, with the 1e-5 of BatchNorm in the variance."""
    loss = 0
    for i, a in enumerate(z1.T):
        for j, b in enumerate(z2.T):
            scale = ((covariance(a, a, N) + 1e-5) * (covariance(b, b, N) + 1e-5)).sqrt()
            c = covariance(a, b, N) / scale
            loss += (1 - c) ** 2 if i == j else weight * c**2
    return loss / D


def vicreg(z1, z2):
    """Eq. 6 with 25, 25 and 1, over 25."""
    loss = mean((a - b) ** 2 for a, b in zip(z1.flatten(), z2.flatten(), strict=True))
    for z in (z1.T, z2.T):
        for i, a in enumerate(z):
            loss += max(0, 1 - (covariance(a, a, N - 1) + 1e-4).sqrt()) / D / 2
            rest = [covariance(a, b, N - 1) ** 2 for j, b in enumerate(z) if j != i]
            loss += sum(rest) / D / 25
    return loss


def supcon(z1, z2, labels, temperature):
    """Eq. 2, where an image without a label has only its other view."""
    z, terms = units(z1, z2), []
    names = [label if label >= 0 else -1 - i for i, label in enumerate(labels.tolist())] * 2
    for i in range(2 * N):
        rest = [j for j in range(2 * N) if j != i]
        logits = [z[i] @ z[j] / temperature for j in rest]
        found = [log_softmax(logits, k) for k, j in enumerate(rest) if names[j] == names[i]]
        terms.append(-mean(found))
    return mean(terms)


def invaspread(z1, z2, temperature):
    """Section 3: the image is found from its view, and is not found from another image."""
    images, mistaken = units(z1), 0
    for i in range(N):
        for j in others(i)[: N - 1]:
            scores = [image @ images[j] / temperature for image in images]
            mistaken -= (1 - log_softmax(scores, i).exp()).log() / N
    return info_nce(units(z2), images, temperature) + mistaken


def lejepa(z1, z2, directions, weight):
    """(1 - lambda) * distance from the mean of the views + lambda * Epps-Pulley, 17 knots."""
    step, tests = 10 / 16, []
    for z in (z1, z2):
        for direction in units(directions.T):
            for k in range(17):
                t = -5 + k * step
                normal = math.exp(-(t**2) / 2)
                real = mean((t * row @ direction).cos() for row in z) - normal
                imaginary = mean((t * row @ direction).sin() for row in z)
                width = step / 2 if k in (0, 16) else step
                tests.append(N * width * normal * (real**2 + imaginary**2))
    distance = mean(((z - (z1 + z2) / 2) ** 2).mean() for z in (z1, z2))
    return (1 - weight) * distance + weight * sum(tests) / 2 / directions.shape[1]


def swav(*views, temperature=0.1):
    """The first two views are assigned (three rounds of Sinkhorn, epsilon 0.05), the rest guess."""
    terms = []
    for i in range(2):
        q = (views[i].detach() / 0.05).exp()
        for _ in range(3):
            q = torch.stack([column / column.sum() for column in q.T], dim=1)
            q = torch.stack([row / row.sum() for row in q])
        for view in views[:i] + views[i + 1 :]:
            for weights, row in zip(q, view / temperature, strict=True):
                terms.append(-sum(w * log_softmax(row, k) for k, w in enumerate(weights)))
    return mean(terms)


def dino(s, t, center):
    """Algorithm 1, with temperatures 0.1 and 0.04; the teacher's scores are centred."""
    terms = []
    for student, teacher in zip(s / 0.1, (t - center) / 0.04, strict=True):
        terms += [-log_softmax(teacher, k).exp() * log_softmax(student, k) for k in range(D)]
    return sum(terms) / len(s)


def instdisc(v, own, negatives, z, n, temperature):
    """Eq. 7, its expectations replaced by an image and its m negatives, as Eq. 6 has h."""

    def h(row, feature):
        p = (row @ feature / temperature).exp() / z
        return p / (p + len(negatives) / n)

    found = sum(h(row, feature).log() for row, feature in zip(v, own, strict=True))
    told = sum((1 - h(row, other)).log() for row in v for other in negatives)
    return -(found + told) / len(v)


def cmc(z1, z2, temperature):
    """The second view is found from the first, and the first from the second, in the batch."""
    a, b = units(z1), units(z2)
    return info_nce(a, b, temperature) + info_nce(b, a, temperature)


LABELS = torch.tensor([0, 1, 0, -1, -1, 1])
CASES = {  # variant: its loss, the reference, what they get beside the two views
    "simclr_one_half": ("nt_xent", one_half, (0.3,)),
    "simclr_triplet": ("triplet_loss", triplet, (0.2,)),
    "simclr_logistic": ("logistic_loss", logistic, (0.3,)),
    "simclr_margin": ("margin_loss", margin_of_pairs, (1.0,)),
    "simclr_n_pair": ("n_pair_loss", n_pair, (0.02,)),
    "barlow_twins": ("barlow_twins_loss", barlow_twins, (0.005,)),
    "vicreg": ("vicreg_loss", vicreg, ()),
    "supcon": ("supcon_loss", supcon, (LABELS, 0.3)),
    "invaspread": ("invaspread_loss", invaspread, (0.3,)),
    "lejepa": ("lejepa_loss", lejepa, (draw(D, 3, seed=5).detach(), 0.05)),
    "swav": ("swapped_loss", lambda a, b, t: swav(a, b, temperature=t), (0.1,)),
    "moco_v3": ("contrast", lambda q, k, t: 2 * t * info_nce(q, k, t), (0.2,)),
    "dino": ("dino_loss", dino, (draw(1, D, seed=5)[0].detach(),)),
    "instdisc": ("nce_loss", instdisc, (draw(5, D, seed=5).detach(), 7.0, 20, 0.8)),
    "cmc": ("cmc_loss", cmc, (0.3,)),
    "cpc": ("info_nce", lambda p, z: mean(map(info_nce, p, z)), ()),
}


def assert_equal(found, expected, *inputs):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for x, y in zip(grad(found, inputs), grad(expected, inputs), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_loops(load_variant, name):
    function, reference, rest = CASES[name]
    a, b = draw(seed=1), draw(seed=2)
    if name == "cpc":  # two pairs of rows of patches
        a, b = (x.detach().unflatten(0, (2, -1)).requires_grad_() for x in (a, b))
    found = getattr(load_variant(name), function)(a, b, *rest)
    assert_equal(found, reference(a, b, *rest), a, b)


def test_triplet_is_not_its_own_negative(load_variant):
    """In float32 a view may seem less similar to itself than to a partner that is almost equal."""
    z1, z2 = draw(128, 32, seed=1).detach(), draw(128, 32, seed=2).detach()
    pair, loss = (z1, z1 + 1e-4 * z2), load_variant("simclr_triplet").triplet_loss
    exact, rounded = loss(*pair, 0.5), loss(*(z.float() for z in pair), 0.5)
    assert rounded.item() == pytest.approx(exact.item(), rel=1e-4) and exact < 0.1


def pair(a, b):
    return [(a, b)]


def both_ways(a1, a2, b1, b2):
    return [(a1, b2), (a2, b1)]


CALLS = {  # variant: its loss, an option, and which outputs of the network each call gets
    **{name: (CASES[name][0], "temperature", pair) for name in ("simclr_logistic", "cmc")},
    **{name: (CASES[name][0], "temperature", pair) for name in ("invaspread", "supcon")},
    "simclr_one_half": ("nt_xent", "temperature", pair),
    "simclr_triplet": ("triplet_loss", "margin", pair),
    "simclr_margin": ("margin_loss", "margin", pair),
    **{name: (f"{name}_loss", "weight", pair) for name in ("barlow_twins", "lejepa")},
    "simclr_n_pair": ("n_pair_loss", "weight", pair),
    "vicreg": ("vicreg_loss", None, pair),
    "cpc": ("info_nce", None, pair),
    "instdisc": ("nce_loss", "temperature", lambda *v: [(torch.stack(v),)]),
    "swav": ("swapped_loss", "temperature", lambda z1, s1, s2: [(s1, s2)]),
    "swav_multi_crop": ("swapped_loss", "temperature", lambda z1, scores: [(scores,)]),
    "moco_v3": ("contrast", "temperature", both_ways),
    "moco_v3_frozen_patches": ("contrast", "temperature", both_ways),
    "dino": ("dino_loss", None, both_ways),
    "dino_multi_crop": ("multi_crop_loss", None, lambda scores, t1, t2: [(scores, (t1, t2))]),
}


@pytest.mark.parametrize("name", CALLS)
def test_loss_gets_the_outputs(load_variant, variants, tiny, tmp_path, monkeypatch, name):
    """Of two different views, from all processes, and an option from the command line; and what it
    returns is what is minimised.
    """
    module, outputs = load_variant(name), []
    function, option, expected = CALLS[name]
    kind = model_of(module)
    forward, losses = kind.forward, calls_of(monkeypatch, module, function)
    gathered = calls_of(monkeypatch, module, "gather") if hasattr(module, "gather") else []

    def see(self, *views):
        assert not any(torch.equal(views[0], view) for view in views[1:])
        outputs.append(forward(self, *views))
        return outputs[-1]

    monkeypatch.setattr(kind, "forward", see)
    options = [f"--{option}", 0.7] if option else []
    if name == "cmc":  # the tiny images are grey
        write_images(tmp_path / "colour", 320)
        options += ["--dataset", tmp_path / "colour"]
    saved = train_here(module, tmp_path, tiny, *options)

    given = [rows for output in outputs for rows in expected(*output)]
    assert len(outputs) == 5 and len(losses) == len(given)
    for call, rows in zip(losses, given, strict=True):
        torch.testing.assert_close(call.args[: len(rows)], rows)
        assert not option or call.args[-1] == 0.7
    loss = sum(call.result.item() for call in losses) / 5  # of a step
    loss = loss / 2 if name == "dino" else loss
    assert saved["metrics"][0]["loss"] == pytest.approx(loss, rel=1e-5)
    if hasattr(module, "gather"):
        rows = [row for rows in given for row in rows]
        torch.testing.assert_close([call.args[0] for call in gathered], rows)


def test_invaspread_compares_with_the_image_itself(load_variant, tiny, tmp_path, monkeypatch):
    module = load_variant("invaspread")
    seen = calls_of(monkeypatch, module.InvaSpread, "forward")
    train_here(module, tmp_path, tiny)
    data = common.load_dataset("fashion-mnist", tiny)
    for call in seen:
        x1, x2 = (255 * (view * data.std + data.mean) for view in call.args[1:])
        corner = x1[:, 0, 0, :2].round().long()  # which image it is
        image = data.train_images[16 * corner[:, 0] + corner[:, 1]].float()
        torch.testing.assert_close(x1, image, atol=0.1, rtol=0)
        assert (x2 - image).abs().flatten(1).max(dim=1).values.min() > 10


def test_supcon_gets_the_labels_of_its_images(load_variant, tiny, tmp_path, monkeypatch):
    module = load_variant("supcon")
    losses, views = (calls_of(monkeypatch, module, x) for x in ("supcon_loss", "augment"))
    train_here(module, tmp_path, tiny)
    for call, view in zip(losses, views[::2], strict=True):
        corner = (255 * view.args[0][:, 0, 0, :2]).round().long()  # which image it is
        assert torch.equal(call.args[2], (16 * corner[:, 0] + corner[:, 1]) % 10)


@pytest.mark.parametrize("name", ["swav", "swav_multi_crop", "dino", "dino_multi_crop", "moco_v3"])
def test_network_treats_each_view_by_itself(load_variant, name):
    with in_float64():
        module, multi = load_variant(name), name.endswith("crop")
        kind, sizes = model_of(module), (16, 8) if name == "moco_v3" else (16, 8, 12)
        model = kind(module.build_backbone("convnet", 1, 28), *sizes).eval()
        for p in model.parameters():  # so that the two networks of a method differ
            p.data += 0.1 * torch.rand_like(p)
        views = torch.rand(6 if multi else 2, 5, 1, 28, 28).unbind()
        found, z = model(*views), [model.projector(model.backbone(view)) for view in views]
        if name.startswith("swav"):
            z = [F.normalize(row, dim=1) for row in z]
            scores = [row @ F.normalize(model.prototypes, dim=1).T for row in z]
            expected = (z[0], torch.stack(scores, dim=1)) if multi else (z[0], *scores)
        elif name == "moco_v3":
            q, k = [*map(model.predictor, z)], [model.key_encoder(view) for view in views]
            expected = tuple(F.normalize(row, dim=1) for row in (*q, *k))
        else:
            targets = [model.target(view) for view in views[:2]]
            expected = (z, *targets) if multi else (*z, *targets)
        torch.testing.assert_close(found, expected)


def test_multi_crop_losses_equal_loops(load_variant):
    """Only the two large views are assigned or taught from, and none is compared with itself."""
    views = [draw(seed=seed) for seed in range(4)]
    found = load_variant("swav_multi_crop").swapped_loss(torch.stack(views, dim=1), 0.1)
    assert_equal(found, swav(*views), *views)
    targets, center = [draw(seed=8).detach(), draw(seed=9).detach()], draw(1, D, seed=5)[0].detach()
    found = load_variant("dino_multi_crop").multi_crop_loss(views, targets, center)
    pairs = [(s, t) for i, t in enumerate(targets) for v, s in enumerate(views) if v != i]
    assert_equal(found, mean(dino(s, t, center) for s, t in pairs), *views)


def test_cpc_predicts_lower_patches(load_variant):
    """A prediction sees no patch below its context, and its target does."""
    module = load_variant("cpc")
    model = module.CPC(module.build_backbone("convnet", 1, 28), 16).eval()
    x = torch.rand(2, 1, 28, 28)
    changed = x.clone()
    changed[0, :, 27] = 1 - changed[0, :, 27]  # the last row of pixels: in the last patches alone
    (p, z), (q, y) = model(x), model(changed)
    torch.testing.assert_close(p, q)
    h = model.backbone(x).unflatten(1, (128, 4, 4))
    c, _ = model.gru(h.permute(0, 3, 2, 1).flatten(0, 1))
    for pair, (row, ahead) in enumerate([(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (2, 1)]):
        torch.testing.assert_close(p[pair], model.predictors[ahead - 1](c[:, row]))
        targets = [h[n, :, row + ahead, column] for n in range(2) for column in range(4)]
        torch.testing.assert_close(z[pair], torch.stack(targets))
        assert torch.equal(z[pair], y[pair]) == (row + ahead < 3)


def test_instdisc_bank(load_variant, tiny, tmp_path, monkeypatch):
    """A row moves to its image's new feature; Z is estimated once; a run looks up its own rows."""
    module = load_variant("instdisc")
    model = module.InstDisc(module.build_backbone("convnet", 1, 28), 8, 30)
    before, v = model.bank.clone(), F.normalize(torch.randn(3, 8), dim=1)
    model.update_bank(v, torch.tensor([4, 20, 7]), 0.75)
    for row, i in enumerate((4, 20, 7)):
        moved = 0.75 * before[i] + 0.25 * v[row]
        before[i] = moved / moved.norm()
    torch.testing.assert_close(model.bank, before)
    for feature in (v, -v):
        model.set_constant(feature, model.bank[:5], 0.5)
        expected = 30 * mean(math.exp(a @ b / 0.5) for a in v for b in model.bank[:5])
        assert model.z.item() == pytest.approx(expected, rel=1e-5)

    known, moved = calls_of(monkeypatch, module, "nce_loss"), Mock()
    monkeypatch.setattr(module.InstDisc, "update_bank", moved)
    bank = train_here(module, tmp_path, tiny)["model"]["bank"]  # which does not change then
    for call, update in zip(known, moved.call_args_list, strict=True):
        assert torch.equal(call.args[1], bank[update.args[1]]) and update.args[2] == 0.5
    assert len(known) == 5


def test_cmc_separates_luminance_and_colour(load_variant, variants, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(variants)
    module = load_variant("cmc")
    with pytest.raises(module.DataError):
        module.TwoBackbones("convnet", 1, 28)
    model = module.CMC(module.TwoBackbones("convnet", 3, 32), 8).eval()
    x = torch.rand(4, 3, 32, 32)
    brighter = x + torch.rand(4, 1, 32, 32)  # the same for red, green and blue
    grey = module.rgb_to_grayscale(x).expand_as(x)
    (z1, z2), (_, same_colour), (same_luminance, _) = (model(x), model(brighter), model(grey))
    torch.testing.assert_close(z1, same_luminance)
    torch.testing.assert_close(z2, same_colour)
    assert not torch.allclose(z1, model(brighter)[0]) and not torch.allclose(z2, model(grey)[1])

    saved = dict(backbone="convnet", images=[4, 3, 32, 32], mean=[0.5] * 3, std=[0.2] * 3)
    saved |= dict(method="cmc", dataset="photos")
    torch.save(dict(model=model.state_dict(), args=saved, metrics=[]), tmp_path / "cmc.pt")
    encoder, _ = load_variant("linear_eval_cmc").load_encoder(tmp_path / "cmc.pt")
    x = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(encoder(x), model.backbone((x / 255 - 0.5) / 0.2))


def test_simclr_v2_is_evaluated_at_its_first_layer(
    load_variant, variants, tiny, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(variants)
    module, options = load_variant("simclr_v2"), ["--hidden-dim", 40, "--projection-dim", 24]
    saved = train_here(module, tmp_path, tiny, *options)
    encoder, _ = load_variant("linear_eval_v2").load_encoder(tmp_path / "here.pt")
    model = module.SimCLRv2(module.build_backbone("convnet", 1, 28), 40, 24).eval()
    model.load_state_dict(saved["model"])
    x = torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8)
    h = model.backbone(module.normalize(x / 255, saved["args"]["mean"], saved["args"]["std"]))
    torch.testing.assert_close(encoder(x), model.projector[:3](h))


def test_lejepa_draws_other_directions_each_time(load_variant, tiny, tmp_path, monkeypatch):
    module = load_variant("lejepa")
    calls = calls_of(monkeypatch, module, "lejepa_loss")
    train_here(module, tmp_path, tiny)
    assert len({call.args[2].sum().item() for call in calls}) == 5


@pytest.mark.parametrize("name", ["dino", "dino_multi_crop"])
def test_dino_center(load_variant, tiny, tmp_path, monkeypatch, name):
    """After each step it moves by a tenth towards the mean of the teacher's scores."""
    module, center = load_variant(name), 0
    forward, targets = module.DINO.forward, []

    def see(self, *views):
        outputs = forward(self, *views)
        targets.append(torch.cat(outputs[-2:]))
        return outputs

    monkeypatch.setattr(module.DINO, "forward", see)
    saved = train_here(module, tmp_path, tiny, "--backbone", "convnet")
    for t in targets:
        center = 0.9 * center + 0.1 * t.mean(dim=0)
    torch.testing.assert_close(saved["model"]["center"], center)


@pytest.mark.parametrize("backbone, size", [("convnet", 14), ("vit", 28)])
@pytest.mark.parametrize("name", ["swav", "dino"])
def test_multi_crop_views(load_variant, tiny, tmp_path, monkeypatch, name, backbone, size):
    """Two large views and four small ones, of a twentieth to a quarter of the area; six scores."""
    module = load_variant(f"{name}_multi_crop")
    shapes, kind = [], module.SwAV if name == "swav" else module.DINO
    forward, boxes = kind.forward, calls_of(monkeypatch, module, "augment")

    def see(self, *views):
        outputs = forward(self, *views)
        scores = outputs[1].unbind(dim=1) if name == "swav" else outputs[0]
        shapes.append([view.shape[1:] for view in views] + [len(scores)])
        return outputs

    monkeypatch.setattr(kind, "forward", see)
    train_here(module, tmp_path, tiny, "--backbone", backbone)
    assert shapes == [[(1, 28, 28)] * 2 + [(1, size, size)] * 4 + [6]] * 5
    assert [call.args[1:] for call in boxes] == ([()] * 2 + [(0.05, 0.25, size)] * 4) * 5
    solarized = [call.kwargs.get("solarize", 0) for call in boxes]
    assert solarized == [0, 0.2 * (name == "dino"), 0, 0, 0, 0] * 5
    assert len({id(call.args[0]) for call in boxes[:6]}) == 1  # all of the same images


def test_multi_crop_cuts_small_boxes(load_variant):
    """Pixels hold their coordinates, so what a view holds shows its box."""
    across = torch.linspace(0, 1, 64).expand(300, 64, 64)
    x = torch.stack([across, across.mT], dim=1)
    for name in ("swav_multi_crop", "dino_multi_crop"):
        boxes = load_variant(name).random_resized_crop(x, 0.05, 0.25, 16)
        area = ((boxes.amax(dim=(2, 3)) - boxes.amin(dim=(2, 3))) * 16 / 15).prod(dim=1)
        assert 0.045 < area.min() < 0.07 and 0.22 < area.max() < 0.26


@pytest.mark.parametrize("name", ["moco_v3", "moco_v3_frozen_patches"])
def test_moco_v3_patch_projection(load_variant, tiny, tmp_path, monkeypatch, name):
    """Its largest gradient is printed; frozen, it has none, and neither network changes it."""
    module, step, watched = load_variant(name), torch.optim.AdamW.step, []

    def see(self):
        patches = next(p for p in self.param_groups[0]["params"] if p.shape == (64, 1, 4, 4))
        watched.append(patches.grad)
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", see)
    saved = train_here(module, tmp_path, tiny)
    largest = [grad.abs().max().item() for grad in watched if grad is not None]
    assert saved["metrics"][0].get("patch_grad", 0) == max(largest, default=0)
    assert len(largest) == (5 if name == "moco_v3" else 0)
    torch.manual_seed(0)
    start = module.build_backbone("vit", 1, 28).conv_proj
    for key in ("backbone", "key_encoder.0"):
        for part in ("weight", "bias"):
            end = saved["model"][f"{key}.conv_proj.{part}"]
            assert torch.equal(getattr(start, part), end) == (name != "moco_v3")
