"""What README.md and docs/ show is what there is: commands, links and code."""

import inspect
import pickle
import re
import shlex

import byol
import common
import moco
import pytest
import simclr
import simsiam
import torch
import torchvision
from conftest import DIFFS, METHODS, ROOT
from PIL import Image, JpegImagePlugin

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / f"{name}.py" for name in (*METHODS, "linear_eval")]
COMMAND = re.compile(r"(?:^|&&) *python3? ([a-z_/]+\.py)(?: +([^#`&\n]*))?", re.MULTILINE)
COMMANDS = sorted({(p.name, *m.groups()) for p in PAGES for m in COMMAND.finditer(p.read_text())})


def test_commands_are_found():
    assert len(COMMANDS) >= 8 and any(page == "README.md" for page, *_ in COMMANDS)


@pytest.mark.parametrize("page, script, options", COMMANDS)
def test_command_is_accepted(page, script, options, tmp_path, monkeypatch):
    name = script.removesuffix(".py")
    if name in DIFFS:  # it has the options of the script that it copies
        name = re.search(r"copy from (\w+)\.py", DIFFS[name].read_text())[1]
    assert (ROOT / f"{name}.py").is_file(), f"{page} runs {script}"
    module, options = __import__(name.removeprefix("tools/")), shlex.split(options or "")
    if not hasattr(module, "parse_args"):
        return
    monkeypatch.chdir(tmp_path)
    if "--resume" in options:  # there must be something to resume
        (tmp_path / module.parse_args([o for o in options if o != "--resume"]).out).touch()
    module.parse_args(options)


def test_links_lead_somewhere():
    for page in PAGES[: len(PAGES) - len(METHODS) - 1]:
        for target in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
            path, _, heading = target.partition("#")
            path = page.parent / path if path else page
            assert path.exists(), f"{page.name} links to {target}"
            if heading:  # as a web page names it
                headings = re.findall(r"^#+ (.+)", path.read_text(), re.M)
                headings = [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
                assert heading in headings, f"{page.name} links to {target}"


def test_folder_of_jpeg_files(tmp_path, monkeypatch):
    """The snippet in results.md, on small files in CIFAR-10's format."""
    kind, pixels = torchvision.datasets.CIFAR10, torch.randint(0, 256, (4, 3072)).byte()
    base = tmp_path / "data" / kind.base_folder
    base.mkdir(parents=True)
    for file, _ in kind.train_list + kind.test_list:
        batch = {"data": pixels.numpy(), "labels": [1, 0, 1, 1]}
        (base / file).write_bytes(pickle.dumps(batch))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": ["cat", "dog"]}))
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "results.md").read_text()
    [code] = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    exec(code, {})

    folder = tmp_path / "cifar10-jpeg"
    data = common.load_dataset(str(folder), tmp_path / "data")
    assert data.classes == ("cat", "dog")
    assert data.train_labels.tolist() == [0] * 5 + [1] * 15
    assert data.test_labels.tolist() == [0, 1, 1, 1]
    image = Image.open(folder / "train" / "dog" / "00000.jpg")
    # As in the files that were measured: the table of quality 75, colours at half the resolution.
    assert image.quantization[0][:8] == [8, 6, 5, 8, 12, 20, 26, 31]
    assert JpegImagePlugin.get_sampling(image) == 2


@pytest.mark.parametrize(
    "forward, loss",
    [
        (simclr.SimCLR.forward, simclr.nt_xent),
        (moco.MoCo.forward, moco.info_nce),
        (byol.BYOL.forward, byol.regression_loss),
        (simsiam.SimSiam.forward, simsiam.negative_cosine),
    ],
)
def test_readme_shows_the_code_of_the_scripts(forward, loss):
    code = f"```python\n{inspect.getsource(forward)}\n\n{inspect.getsource(loss)}```\n"
    assert code in (ROOT / "README.md").read_text(), f"paste this into README.md:\n{code}"
