"""Each flag that takes a method apart does what it says: what is there, what moves, what stays."""

import copy

import byol
import linear_eval
import pytest
import simclr
import simsiam
import torch
from conftest import METHODS, call
from test_steps import SCRIPTS, build, optimizer, step, unit, views
from torch import nn

COMMANDS = [
    ("simsiam", "--no-stop-grad"),
    ("simsiam", "--predictor", "none"),
    ("simsiam", "--predictor", "frozen"),
    ("simsiam", "--predictor-lr", "decay"),
    ("simsiam", "--head-norm", "hidden"),
    ("simsiam", "--head-norm", "all"),
    ("simsiam", "--head-norm", "none"),
    ("byol", "--predictor", "none"),
    ("byol", "--predictor", "frozen"),
    ("byol", "--momentum", "1"),
    ("byol", "--momentum", "0"),
    ("byol", "--head-norm", "all"),
    ("byol", "--head-norm", "none"),
    ("moco", "--momentum", "0"),
    ("moco", "--queue-size", "50"),
    ("moco", "--no-mlp"),
    ("simclr", "--projector", "linear"),
    ("simclr", "--projector", "none"),
    ("simclr", "--temperature", "1"),
]
COMMANDS += [("moco", "--augment", "none")]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_command_runs_and_its_checkpoint_is_read(command, tiny, tmp_path, capfd):
    name, *flags = command
    options = ["--data-dir", tiny, "--epochs", 1, "--batch-size", 64, "--max-steps", 2, *flags]
    process = call(capfd, tmp_path, f"{name}.py", *options)
    assert process.returncode == 0, process.stderr
    for layer in ("h", "z"):
        encoder, checkpoint = linear_eval.load_encoder(tmp_path / f"{name}.pt", layer)
        assert encoder(torch.rand(2, 1, 28, 28)).shape[0] == 2
        flag = flags[0].removeprefix("--").removeprefix("no-").replace("-", "_")
        expected = flags[1] if len(flags) == 2 else "False"
        assert str(checkpoint["args"][flag]).removesuffix(".0") == expected


@pytest.mark.parametrize("name", ["byol", "simsiam"])
@pytest.mark.parametrize("predictor, moves", [("mlp", True), ("frozen", False)])
def test_frozen_predictor_never_moves(name, predictor, moves):
    model, args = build(name, predictor=predictor)
    before = copy.deepcopy(model)
    step(name, model, args, *views())
    for part in ("backbone", "projector", "predictor"):
        pairs = zip(model[part].parameters(), before[part].parameters(), strict=True)
        same = all(torch.equal(p, old) for p, old in pairs)
        assert same == (part == "predictor" and not moves)


def test_frozen_predictor_still_passes_the_gradient_on():
    """Only its weights are fixed: the embedding learns through it, as SimSiam Eq. 4 says."""
    model, args = build("simsiam", predictor="frozen")
    before = copy.deepcopy(model)
    x1, x2 = views()
    step("simsiam", model, args, x1, x2)
    z1, z2 = (before["projector"](before["backbone"](x)) for x in (x1, x2))
    p1, p2 = before["predictor"](z1), before["predictor"](z2)
    loss = (
        -(
            (unit(p1) * unit(z2.detach())).sum(1).mean()
            + (unit(p2) * unit(z1.detach())).sum(1).mean()
        )
        / 2
    )
    weights = list(before["backbone"].parameters())
    for p, old, g in zip(
        model["backbone"].parameters(), weights, torch.autograd.grad(loss, weights), strict=True
    ):
        torch.testing.assert_close(p, old - 0.1 * g, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["byol", "simsiam"])
def test_without_predictor_z_is_compared_itself(name):
    model, args = build(name, predictor="none")
    x1, x2 = views()
    online = nn.Sequential(copy.deepcopy(model["backbone"]), copy.deepcopy(model["projector"]))
    other = copy.deepcopy(model["target"]) if name == "byol" else online
    cos = [(unit(online(x)) * unit(other(y))).sum(1).mean() for x, y in ((x1, x2), (x2, x1))]
    expected = 4 - 2 * sum(cos) if name == "byol" else -sum(cos) / 2
    assert not list(model["predictor"].parameters())
    torch.testing.assert_close(step(name, model, args, x1, x2)[0], expected.detach())


def test_predictors_learning_rate_decays_on_demand():
    model, args = build("simsiam", predictor_lr="decay")
    sgd = optimizer("simsiam", model, lr=1e-3)
    simsiam.train_step(model, sgd, *views(), 0.5, args)
    assert [group["lr"] for group in sgd.param_groups] == [1e-3] * 3


def test_without_stop_gradient_both_sides_are_trained():
    model, args = build("simsiam", stop_grad=False)
    before = copy.deepcopy(model)
    x1, x2 = views()
    step("simsiam", model, args, x1, x2)
    z1, z2 = (before["projector"](before["backbone"](x)) for x in (x1, x2))
    p1, p2 = before["predictor"](z1), before["predictor"](z2)
    loss = -((unit(p1) * unit(z2)).sum(1).mean() + (unit(p2) * unit(z1)).sum(1).mean()) / 2
    weights = list(before["backbone"].parameters())
    for p, old, g in zip(
        model["backbone"].parameters(), weights, torch.autograd.grad(loss, weights), strict=True
    ):
        torch.testing.assert_close(p, old - 0.1 * g, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name, norm, projector, predictor",
    [("simsiam", "default", 2, 1), ("simsiam", "hidden", 1, 1), ("simsiam", "all", 2, 2),
     ("simsiam", "none", 0, 0), ("byol", "hidden", 1, 1), ("byol", "all", 2, 2),
     ("byol", "none", 0, 0)],
)  # fmt: skip
def test_head_norm_sets_the_batchnorms(name, norm, projector, predictor):
    model, _ = build(name, head_norm=norm)

    def layers(head):
        return [type(m) for m in head if isinstance(m, nn.BatchNorm1d | nn.Linear)]

    for head, n in ((model["projector"], projector), (model["predictor"], predictor)):
        assert layers(head).count(nn.BatchNorm1d) == n
        assert (layers(head)[-1] is nn.BatchNorm1d) == (n == 2)
        assert (head[0].bias is None) == (n > 0)  # BatchNorm would take the bias away again


@pytest.mark.parametrize("progress", [0.0, 0.3, 0.99])
def test_byol_target_at_momentum_0_and_1(progress):
    for momentum in (0, 1):
        model, args = build("byol", momentum=momentum)
        before = copy.deepcopy(model["target"])
        step("byol", model, args, *views(), progress)
        online = nn.Sequential(model["backbone"], model["projector"])
        for xi, old, theta in zip(
            model["target"].parameters(), before.parameters(), online.parameters(), strict=True
        ):
            assert torch.equal(xi, old if momentum else theta)


def test_simclr_projectors():
    model, _ = build("simclr", projector="linear")
    assert isinstance(model["projector"], nn.Linear) and model["projector"].out_features == 8
    model, args = build("simclr", projector="none")
    before = copy.deepcopy(model["backbone"])
    z = step("simclr", model, args, *views())[1]
    h = before(torch.cat(views().unbind()))[:6]
    torch.testing.assert_close(z, h.detach())  # the loss is on h itself


@pytest.mark.parametrize("name", METHODS)
def test_augment_keeps_what_it_says(name):
    """Flat images show colour changes, a frame of another grey shows crops."""
    script, generator = SCRIPTS[name], torch.Generator().manual_seed(0)
    flat, framed = torch.full((200, 3, 28, 28), 0.5), torch.full((200, 3, 28, 28), 0.5)
    flat[:, 0], framed[:, :, 0] = 0.3, 0.1
    changed = {}
    for kept, change in script.WITHOUT.items():
        view = script.VIEW_2 | change
        colours = (script.augment(flat, **view, generator=generator) - flat).abs().amax((1, 2, 3))
        frames = script.augment(framed, **(view | script.WITHOUT["crop"]), generator=generator)
        moved = (frames - framed).abs().amax((1, 2, 3))
        changed[kept] = tuple((x > 0.01).float().mean().item() > 0.5 for x in (moved, colours))
        assert all(
            (x < 1e-5).all()
            for x, on in zip((moved, colours), changed[kept], strict=True)
            if not on
        )
    assert changed == {"crop+color": (True, True), "crop": (True, False),
                       "color": (False, True), "none": (False, False)}  # fmt: skip


@pytest.mark.parametrize(
    "name, kept",
    [("byol", "crop+color"), ("simclr", "crop"), ("moco", "color"), ("simsiam", "none")],
)
def test_main_augments_as_told(name, kept, tiny, tmp_path, monkeypatch):
    script, seen = SCRIPTS[name], []

    def spy(images, generator=None, **view):
        seen.append(view)
        return images

    monkeypatch.setattr(script, "augment", spy)
    options = ["--data-dir", tiny, "--epochs", 1, "--batch-size", 64, "--max-steps", 1,
               "--knn-every", 0, "--augment", kept, "--out", tmp_path / "x.pt"]  # fmt: skip
    script.main([str(x) for x in options])
    assert seen == [view | script.WITHOUT[kept] for view in (script.VIEW_1, script.VIEW_2)]


def test_layer_z_is_the_projection(tiny, tmp_path, capfd):
    options = ["--data-dir", tiny, "--epochs", 1, "--batch-size", 64, "--max-steps", 2]
    call(capfd, tmp_path, "simclr.py", *options)
    encoder, checkpoint = linear_eval.load_encoder(tmp_path / "simclr.pt", layer="z")
    images = torch.rand(3, 1, 28, 28)
    model, _ = build("simclr", hidden_dim=512, projection_dim=128)
    model.load_state_dict(checkpoint["model"])
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), model["projector"](model["backbone"](images)))
    common = ["--weights", "simclr.pt", "--data-dir", tiny, "--labels", 20]
    tables = [
        call(capfd, tmp_path, "linear_eval.py", *common, "--layer", layer).stdout.split("\n")
        for layer in "hz"
    ]
    cells = [
        [line.split()[:6] for line in table if line[:6] in ("random", "simclr")] for table in tables
    ]
    assert cells[0][0][1:5] == cells[1][0][1:5] and cells[0][1] != cells[1][1]


def test_layer_z_wants_a_known_method(tiny, tmp_path, capfd):
    options = ["--data-dir", tiny, "--epochs", 1, "--batch-size", 64, "--max-steps", 2]
    call(capfd, tmp_path, "simclr.py", *options)
    checkpoint = torch.load(tmp_path / "simclr.pt", weights_only=True)
    torch.save(checkpoint | {"method": "antigravity"}, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match="its method is antigravity"):
        linear_eval.load_encoder(tmp_path / "foreign.pt", layer="z")


@pytest.mark.parametrize("other", [["--finetune"], ["--export", "new.pt"]])
def test_layer_z_is_not_for_the_backbone_alone(other, tmp_path, capfd):
    process = call(capfd, tmp_path, "linear_eval.py", "--weights", "x.pt", "--layer", "z", *other)
    assert process.returncode == 2 and "use --layer h" in process.stderr


def test_same_heads_in_the_siblings():
    """`diff` should show no other MLP than the papers'."""
    assert byol.mlp.__code__.co_code == simsiam.mlp.__code__.co_code != simclr.mlp.__code__.co_code
