"""The snippets of docs/guide.md run as they stand, one after the other, and do what they say."""

import csv
import re

import linear_eval
import numpy as np
import pytest
import simclr
import torch
import torchvision
from conftest import ROOT, write_images

SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "guide.md").read_text(), re.DOTALL)
[SORT] = [text for text in SNIPPETS if "predictions" in text]
[STUDENT] = [text for text in SNIPPETS if "shift_and_mirror" in text]  # takes the place of lines
[OTHERS] = [text for text in SNIPPETS if "resnet18" in text]
[SCORE] = [text for text in SNIPPETS if "chunk(5)" in text]  # goes on after SORT
SNIPPETS = [text for text in SNIPPETS if text not in (STUDENT, OTHERS, SCORE)]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder in which all snippets ran, and the variables that each left, by a word in it."""
    folder = tmp_path_factory.mktemp("guide")
    write_images(folder / "photos" / "2019" / "summer", 12)
    (folder / "photos/2019/summer/3.png").rename(folder / "photos/2019/summer/beach.jpg")
    write_images(folder / "album" / "train" / "cat", 12, channels=(255, 60, 60))
    write_images(folder / "album" / "train" / "dog", 16, channels=(60, 60, 255))
    write_images(folder / "album" / "test" / "dog", 2, channels=(60, 60, 255))
    write_images(folder / "album" / "unlabelled", 9, channels=(60, 60, 255))
    variables = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(linear_eval, "STEPS", 40)
        for name in ("photos", "album"):
            options = ["--dataset", name, "--out", f"{name}.pt", "--epochs", "1"]
            simclr.train(simclr.parse_args([*options, "--batch-size", "12", "--device", "cpu"]))
        for snippet in SNIPPETS:
            variables.append({})
            exec(snippet, variables[-1])
    return folder, dict(zip(map(first_use, SNIPPETS), variables, strict=True))


def first_use(snippet):
    """Return what tells one snippet from the others."""
    words = "np.savez", "argsort(-", "predictions", "simclr", "export.save", "export.load"
    words += ("build_backbone",)
    return next((word for word in words if word in snippet), snippet)


def test_features_are_saved_and_compared(ran):
    folder, variables = ran
    saved = np.load(folder / "features.npz")
    data, encoder = variables["np.savez"]["data"], variables["np.savez"]["encoder"]
    expected = linear_eval.extract_features(encoder, data.train_images)
    torch.testing.assert_close(torch.from_numpy(saved["features"]), expected)
    assert saved["paths"].tolist() == list(data.paths) and len(data.paths) == 12
    similar = variables["argsort(-"]
    assert similar["paths"][np.argmax(similar["cosines"])] == "2019/summer/beach.jpg"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(FileExistsError):
        patch.chdir(folder)  # a second run does not replace the file
        exec(next(text for text in SNIPPETS if "np.savez" in text), {})


def test_predictions_of_all_that_have_no_label(ran):
    folder, variables = ran
    assert variables["predictions"]["features"].shape == (12 + 16 + 9, 2048)
    check_predictions(folder)


def check_predictions(folder):
    with open(folder / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["path"] for row in rows) == [f"unlabelled/{i}.png" for i in range(9)]
    assert [row["class"] for row in rows].count("dog") >= 7  # they are as blue as the dogs
    probabilities = [float(row["probability"]) for row in rows]
    assert probabilities == sorted(probabilities, reverse=True) and 0.5 <= probabilities[-1]


def test_each_label_is_held_out_once(ran, capsys):
    """All are right where the features are the class. But a label that is wrong is not found."""
    data, known = (ran[1]["predictions"][name] for name in ("data", "known"))
    labels = data.train_labels.clone()
    features = torch.eye(2)[labels.clamp_min(0)]
    for n in (28, 25):
        variables = dict(features=features, known=known, linear_probe=linear_eval.linear_probe)
        exec(SCORE, variables | dict(data=data._replace(train_labels=labels)))
        assert capsys.readouterr().out == f"{100 * n / 28:.1f}% of 28 images\n"
        labels[:3] = 1 - labels[:3]  # three cats are called dogs


def sort_with(snippet, places, ran, monkeypatch, tmp_path):
    """Run the program that sorts, with a snippet in the place of the lines that begin so."""
    for name in ("album", "album.pt"):
        (tmp_path / name).symlink_to(ran[0] / name)
    monkeypatch.chdir(tmp_path)
    lines, variables = SORT.splitlines(), {}
    at = next(i for i, line in enumerate(lines) if line.startswith(places))
    assert sum(line.startswith(places) for line in lines) == len(places)
    lines[at] = snippet
    program = "\n".join(line for line in lines if not line.startswith(places))
    exec(program, variables)
    check_predictions(tmp_path)
    return variables


def test_student_sorts(ran, variants, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(variants)
    import linear_eval_distill

    monkeypatch.setattr(linear_eval_distill, "STEPS", 40)
    student = sort_with(STUDENT, ("probability, ",), ran, monkeypatch, tmp_path)["student"]
    untrained = ran[1]["predictions"]["encoder"][-1].state_dict()
    assert not all(map(torch.equal, student[-1][0].state_dict().values(), untrained.values()))


def test_network_of_others_sorts(ran, monkeypatch, tmp_path):
    url = torchvision.models.ResNet18_Weights.DEFAULT.url
    weights = tmp_path / "hub" / "checkpoints" / url.split("/")[-1]  # as if it were downloaded
    weights.parent.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), weights)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    variables = sort_with(OTHERS, ("encoder, ", "data = "), ran, monkeypatch, tmp_path)
    assert variables["features"].shape == (12 + 16 + 9, 512)
    assert variables["network"].feature_dim == 512  # which the student asks for


def test_exported_program(ran):
    folder, variables = ran
    encoder, _ = linear_eval.load_encoder(folder / "photos.pt")
    program = variables["export.load"]["encoder"]
    assert variables["export.load"]["features"].shape == (7, 2048)
    for n in (1, 7):
        x = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8)
        torch.testing.assert_close(program(x), encoder(x), rtol=1e-4, atol=1e-5)


def test_backbone_in_own_code(ran):
    folder, variables = ran
    encoder, _ = linear_eval.load_encoder(folder / "photos.pt")
    backbone = variables["build_backbone"]["backbone"]
    for a, b in zip(backbone.parameters(), encoder[-1].parameters(), strict=True):
        assert torch.equal(a, b)
    assert variables["build_backbone"]["logits"].shape == (5, 3)
    assert (folder / "notebook.pt").exists()
