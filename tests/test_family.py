"""The methods in docs/variants/ that have their own loss: against float64 loops from the papers."""

import math

import byol
import moco
import pytest
import simclr
import torch
from conftest import DIFFS, train
from torch.autograd import grad

N, D = 6, 4


def draw(rows=N, columns=D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64).requires_grad_()


def column(z, i):
    return [row[i] for row in z]


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def covariance(a, b, divisor):
    return sum((x - mean(a)) * (y - mean(b)) for x, y in zip(a, b, strict=True)) / divisor


def log_softmax(values, i):
    return values[i] - sum(v.exp() for v in values).log()


def barlow_twins(z1, z2):
    """Eq. 1 with lambda 0.005, over D, and the 1e-5 of BatchNorm in the variance."""
    loss = 0
    for i in range(D):
        for j in range(D):
            a, b = column(z1, i), column(z2, j)
            scale = ((covariance(a, a, N) + 1e-5) * (covariance(b, b, N) + 1e-5)).sqrt()
            c = covariance(a, b, N) / scale
            loss += (1 - c) ** 2 if i == j else 0.005 * c**2
    return loss / D


def vicreg(z1, z2):
    """Eq. 6 with 25, 25 and 1, over 25."""
    loss = mean((z1[i, j] - z2[i, j]) ** 2 for i in range(N) for j in range(D))
    for z in (z1, z2):
        for i in range(D):
            a = column(z, i)
            loss += max(0, 1 - (covariance(a, a, N - 1) + 1e-4).sqrt()) / D / 2
            others = [covariance(a, column(z, j), N - 1) ** 2 for j in range(D) if j != i]
            loss += sum(others) / D / 25
    return loss


def supcon(z1, z2, labels, temperature):
    """Eq. 2, where an image without a label has only its other view."""
    z = [row / dot(row, row).sqrt() for row in (*z1, *z2)]
    names = [label if label >= 0 else -1 - i for i, label in enumerate(labels.tolist())] * 2
    terms = []
    for i in range(2 * N):
        others = [j for j in range(2 * N) if j != i]
        logits = [dot(z[i], z[j]) / temperature for j in others]
        found = [log_softmax(logits, k) for k, j in enumerate(others) if names[j] == names[i]]
        terms.append(-mean(found))
    return mean(terms)


def invaspread(z1, z2, temperature):
    """Section 3: the image is found from its view, and is not found from another image."""
    f = [row / dot(row, row).sqrt() for row in z1]
    loss = 0
    for i, view in enumerate(z2):
        scores = [dot(x, view) / dot(view, view).sqrt() / temperature for x in f]
        loss -= log_softmax(scores, i)
        for j in range(N):
            if j != i:
                p = log_softmax([dot(x, f[j]) / temperature for x in f], i).exp()
                loss -= (1 - p).log()
    return loss / N


def lejepa(z1, z2, directions, weight):
    """(1 - lambda) * distance from the mean of the views + lambda * Epps-Pulley, 17 knots."""
    step, tests, distance = 10 / 16, [], 0
    for z in (z1, z2):
        for direction in directions.T:
            projected = [dot(row, direction) / dot(direction, direction).sqrt() for row in z]
            for k in range(17):
                t = -5 + k * step
                normal = math.exp(-(t**2) / 2)
                real = mean((t * p).cos() for p in projected) - normal
                imaginary = mean((t * p).sin() for p in projected)
                width = step / 2 if k in (0, 16) else step
                tests.append(N * width * normal * (real**2 + imaginary**2))
        views = zip(z.flatten(), z1.flatten(), z2.flatten(), strict=True)
        distance += mean((x - (a + b) / 2) ** 2 for x, a, b in views)
    return (1 - weight) * distance / 2 + weight * sum(tests) / 2 / directions.shape[1]


def swav(s1, s2, temperature):
    """Eq. 2 for both views, with assignments after three rounds of Sinkhorn, epsilon 0.05."""

    def assign(scores):
        q = [[math.exp(s / 0.05) for s in row] for row in scores.tolist()]
        for _ in range(3):
            columns = [sum(row[k] for row in q) for k in range(D)]
            q = [[x / total for x, total in zip(row, columns, strict=True)] for row in q]
            q = [[x / sum(row) for x in row] for row in q]
        return q

    terms = []
    for q, s in ((assign(s1), s2), (assign(s2), s1)):
        for weights, row in zip(q, s, strict=True):
            scores = [x / temperature for x in row]
            terms.append(-sum(w * log_softmax(scores, k) for k, w in enumerate(weights)))
    return mean(terms)


def moco_v3(q, k, temperature):
    """Algorithm 1: 2 tau times InfoNCE among the keys of the batch."""
    rows = [[dot(query, key) / temperature for key in k] for query in q]
    return 2 * temperature * mean(-log_softmax(row, i) for i, row in enumerate(rows))


def dino(s, t, center):
    """Eq. 2 with temperatures 0.1 and 0.04; the teacher's scores are centred (Eq. 4)."""
    terms = []
    for student, teacher in zip(s, t, strict=True):
        sharp = [(x - c) / 0.04 for x, c in zip(teacher, center, strict=True)]
        scores = [x / 0.1 for x in student]
        pairs = [log_softmax(sharp, k).exp() * log_softmax(scores, k) for k in range(D)]
        terms.append(-sum(pairs))
    return mean(terms)


def instdisc(v, own, negatives, z, n, temperature):
    """Eq. 7, its expectations replaced by an image and its m negatives, as Eq. 6 has h."""
    m, loss = len(negatives), 0
    for row, feature in zip(v, own, strict=True):
        p = (dot(row, feature) / temperature).exp() / z
        loss -= (p / (p + m / n)).log()
        for other in negatives:
            p = (dot(row, other) / temperature).exp() / z
            loss -= (1 - p / (p + m / n)).log()
    return loss / len(v)


def cpc(p, z):
    """Eq. 4 with f = exp(z . W c), for each of two pairs of rows."""
    terms = []
    for prediction, patches in zip(p.unflatten(0, (2, -1)), z.unflatten(0, (2, -1)), strict=True):
        for i, row in enumerate(prediction):
            terms.append(-log_softmax([dot(patch, row) for patch in patches], i))
    return mean(terms)


def cmc(z1, z2, temperature):
    """Eq. 2 and 3 from the first view and from the second (Eq. 4), with the batch for negatives."""
    loss = 0
    for a, b in ((z1, z2), (z2, z1)):
        for i, row in enumerate(a):
            lengths = [(dot(row, row) * dot(other, other)).sqrt() for other in b]
            cosines = [dot(row, other) / n for other, n in zip(b, lengths, strict=True)]
            loss -= log_softmax([cosine / temperature for cosine in cosines], i) / N
    return loss


LABELS = torch.tensor([0, 1, 0, -1, -1, 1])
CASES = {  # variant: its loss, the reference, what they get beside the two views
    "barlow_twins": ("barlow_twins_loss", lambda a, b, weight: barlow_twins(a, b), (0.005,)),
    "vicreg": ("vicreg_loss", vicreg, ()),
    "supcon": ("supcon_loss", supcon, (LABELS, 0.3)),
    "invaspread": ("invaspread_loss", invaspread, (0.3,)),
    "lejepa": ("lejepa_loss", lejepa, (draw(D, 3, seed=5).detach(), 0.05)),
    "swav": ("swapped_loss", swav, (0.1,)),
    "moco_v3": ("contrast", moco_v3, (0.2,)),
    "dino": ("dino_loss", dino, (draw(1, D, seed=5)[0].detach(),)),
    "instdisc": ("nce_loss", instdisc, (draw(5, D, seed=5).detach(), 7.0, 20, 0.8)),
    "cmc": ("cmc_loss", cmc, (0.3,)),
}


SETTINGS = {  # options that are not as in the script that the diff copies
    "barlow_twins": dict(weight=0.005, projection_dim=512),
    "vicreg": dict(projection_dim=512, lr=0.5),
    "supcon": dict(temperature=0.1),
    "invaspread": dict(temperature=0.1),
    "lejepa": dict(weight=0.05, projection_dim=64, lr=0.5),
    "swav": dict(prototypes=128, temperature=0.1),
    "moco_v3": dict(backbone="vit", lr=0.002),
    "dino": dict(backbone="vit", lr=0.002, prototypes=1024, tau=0.99),
    "instdisc": dict(negatives=4096, momentum=0.5, temperature=0.2, lr=0.03),
    "cpc": dict(context_dim=256),
    "cmc": dict(temperature=0.07),
    "simclr_v2": dict(temperature=0.1),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(load_variant, name):
    module, diff = load_variant(name), DIFFS[name].read_text()
    [script] = [s for s in (simclr, moco, byol) if f"copy from {s.__name__}.py" in diff]
    options, copied = (vars(m.parse_args(["--out", "there-is-none"])) for m in (module, script))
    expected = {key: copied.get(key) for key in options} | SETTINGS[name] | {"method": name}
    assert options == expected
    view = script.VIEW_1
    if name == "cmc":  # a change of colour would be the same in both of its views
        view = dict(area=(0.2, 1), mirror=0.5, jitter=(0, 0, 0, 0), grayscale=0)
    assert module.VIEW_1 == view


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_loops(load_variant, name):
    function, reference, rest = CASES[name]
    a, b = draw(seed=1), draw(seed=2)
    found = getattr(load_variant(name), function)(a, b, *rest)
    expected = reference(a, b, *rest)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for x, y in zip(grad(found, [a, b]), grad(expected, [a, b]), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10)


def test_cpc_loss_and_structure(load_variant):
    """The loss against loops; a prediction sees no patch below its context, and its target does."""
    module = load_variant("cpc")
    a, b = draw(seed=1), draw(seed=2)
    pairs = a.unflatten(0, (2, -1)), b.unflatten(0, (2, -1))
    found, expected = module.info_nce(*pairs), cpc(a, b)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for x, y in zip(grad(found, [a, b]), grad(expected, [a, b]), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10)

    model = module.CPC(module.build_backbone("convnet", 1, 28), 16).eval()
    x = torch.rand(2, 1, 28, 28)
    changed = x.clone()
    changed[0, :, 27] = 1 - changed[0, :, 27]  # the last row of pixels: in the last patches alone
    p, z = model(x)
    q, y = model(changed)
    torch.testing.assert_close(p, q)
    h = model.backbone(x).unflatten(1, (128, 4, 4))
    rows = [1, 2, 3, 2, 3, 3]  # the targets of contexts that end with row 0, 0, 0, 1, 1 and 2
    for pair, row in enumerate(rows):
        expected = [h[n, :, row, column] for n in range(2) for column in range(4)]
        torch.testing.assert_close(z[pair], torch.stack(expected))
        assert torch.equal(z[pair], y[pair]) == (row < 3)
    c, _ = model.gru(h.permute(0, 3, 2, 1).flatten(0, 1))
    for pair, (context, ahead) in enumerate([(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (2, 1)]):
        torch.testing.assert_close(p[pair], model.predictors[ahead - 1](c[:, context]))
    assert p.requires_grad and z.requires_grad


def test_instdisc_bank(load_variant, variants, tiny, monkeypatch):
    """A row moves to its image's new feature; Z is estimated once; a run looks up its own rows."""
    module = load_variant("instdisc")
    model = module.InstDisc(module.build_backbone("convnet", 1, 28), 8, 30)
    before, v = (model.bank.clone(), torch.nn.functional.normalize(torch.randn(3, 8), dim=1))
    torch.testing.assert_close(before.norm(dim=1), torch.ones(30))
    model.update_bank(v, torch.tensor([4, 20, 7]), 0.75)
    for row, i in enumerate((4, 20, 7)):
        moved = 0.75 * before[i] + 0.25 * v[row]
        torch.testing.assert_close(model.bank[i], moved / moved.norm())
        before[i] = model.bank[i]
    assert torch.equal(model.bank, before)
    model.set_constant(v, model.bank[:5], 0.5)
    expected = 30 * mean(math.exp(a @ b / 0.5) for a in v for b in model.bank[:5])
    assert model.z.item() == pytest.approx(expected, rel=1e-5)
    model.set_constant(-v, model.bank[:5], 0.5)
    assert model.z.item() == pytest.approx(expected, rel=1e-5)

    seen, original, update = [], module.nce_loss, module.InstDisc.update_bank

    def watch(self, v, indices, momentum):
        assert momentum == 0.5 and torch.equal(seen[-1], self.bank[indices])
        update(self, v, indices, momentum)

    monkeypatch.setattr(module, "nce_loss", lambda v, *x: seen.append(x[0]) or original(v, *x))
    monkeypatch.setattr(module.InstDisc, "update_bank", watch)
    args = ["--data-dir", tiny, "--device", "cpu", "--epochs", 1, "--batch-size", 64]
    module.train(module.parse_args([*map(str, args), "--out", str(variants / "bank.pt")]))
    assert len(seen) == 5


def test_cmc_separates_luminance_and_colour(load_variant, variants, monkeypatch):
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
    torch.save(dict(model=model.state_dict(), args=saved, metrics=[]), variants / "cmc-whole.pt")
    encoder, _ = load_variant("linear_eval_cmc").load_encoder(variants / "cmc-whole.pt")
    x = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(encoder(x), model.backbone((x / 255 - 0.5) / 0.2))


def test_simclr_v2_is_evaluated_at_its_first_layer(load_variant, variants, tiny, monkeypatch):
    monkeypatch.syspath_prepend(variants)
    options = ["--out", variants / "v2.pt", "--hidden-dim", "40", "--projection-dim", "24"]
    assert train(variants, tiny, variants / "simclr_v2", *options).returncode == 0
    encoder, saved = load_variant("linear_eval_v2").load_encoder(variants / "v2.pt")
    module = load_variant("simclr_v2")
    model = module.SimCLRv2(module.build_backbone("convnet", 1, 28), 40, 24).eval()
    model.load_state_dict(saved["model"])
    x = torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8)
    normal = module.normalize(x / 255, saved["args"]["mean"], saved["args"]["std"])
    linear, norm, *rest = model.projector
    torch.testing.assert_close(encoder(x), norm(linear(model.backbone(normal))).relu())
    assert encoder[-1].feature_dim == 40
    kinds = [type(layer).__name__ for layer in rest]
    assert kinds == ["ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]


def test_closed_forms(load_variant):
    """Independent dimensions of variance 1 are perfect for three; labels alone are SimCLR's."""
    hadamard = torch.tensor([[1.0]])
    for _ in range(3):
        hadamard = torch.cat([torch.cat([hadamard, hadamard]), torch.cat([hadamard, -hadamard])], 1)
    z = hadamard[:, 1:]  # (8, 7): columns of mean 0 and variance 1, orthogonal
    assert load_variant("barlow_twins").barlow_twins_loss(z, z, 0.005) < 1e-8
    assert load_variant("vicreg").vicreg_loss(z, z) < 1e-8
    z1, z2, labels = draw(seed=1), draw(seed=2), torch.full((N,), -1)
    supcon_loss = load_variant("supcon").supcon_loss(z1, z2, labels, 0.3)
    torch.testing.assert_close(supcon_loss, simclr.nt_xent(z1, z2, 0.3))
    normal, point = torch.randn(4000, 8), torch.zeros(4000, 8)
    sigreg, directions = load_variant("lejepa").sigreg, torch.randn(8, 50)
    assert sigreg(normal, directions) < 2 < 500 < sigreg(point, directions)


def test_sinkhorn_uses_all_prototypes_equally(load_variant):
    scores = draw(40, 5).detach().tanh() + torch.tensor([2.0, 0, 0, 0, 0])  # one is nearest to all
    q = load_variant("swav").sinkhorn(scores, iterations=500)
    torch.testing.assert_close(q.sum(dim=1), torch.ones(40, dtype=torch.float64))
    torch.testing.assert_close(q.sum(dim=0), torch.full((5,), 8.0).double(), atol=1e-3, rtol=0)
    assert (scores.argmax(dim=1) == 0).float().mean() > 0.9


def test_dino_center_and_teacher(load_variant):
    module = load_variant("dino")
    model = module.DINO(module.build_backbone("convnet", 1, 28), 16, 8, 12)
    t = torch.randn(5, 12)
    model.update_center(t)
    model.update_center(t)
    torch.testing.assert_close(model.center, 0.19 * t.mean(dim=0))  # 0.1 + 0.9 * 0.1
    s1, s2, t1, t2 = model(torch.rand(4, 1, 28, 28), torch.rand(4, 1, 28, 28))
    assert s1.shape == t1.shape == (4, 12) and s1.abs().max() <= 1 + 1e-6  # cosines
    assert s2.requires_grad and not t1.requires_grad and not t2.requires_grad


def test_moco_v3_queries_have_a_predictor_and_keys_no_gradient(load_variant):
    module = load_variant("moco_v3")
    model = module.MoCoV3(module.build_backbone("convnet", 1, 28), 16, 8)
    x1, x2 = torch.rand(2, 4, 1, 28, 28)
    q1, q2, k1, k2 = model(x1, x2)
    assert q1.requires_grad and not k1.requires_grad and not k2.requires_grad
    z1 = model.projector(model.backbone(x1))
    torch.testing.assert_close(k1, torch.nn.functional.normalize(z1, dim=1))  # the same at first
    expected = torch.nn.functional.normalize(model.predictor(z1), dim=1)
    torch.testing.assert_close(q1, expected)
    for x in (q1, q2, k1, k2):
        torch.testing.assert_close(x.norm(dim=1), torch.ones(4))
