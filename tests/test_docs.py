"""What README.md and docs/ show is what there is: commands, links and code."""

import inspect
import re
import shlex

import byol
import moco
import pytest
import simclr
import simsiam
from conftest import DIFFS, METHODS, ROOT

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
    if script.startswith("tools/"):
        return
    module, options = __import__(name), shlex.split(options or "")
    monkeypatch.chdir(tmp_path)
    if "--resume" in options:  # there must be something to resume
        (tmp_path / module.parse_args([o for o in options if o != "--resume"]).out).touch()
    module.parse_args(options)


def test_links_lead_somewhere():
    for page in PAGES[: len(PAGES) - len(METHODS) - 1]:
        for target in re.findall(r"\]\((?!http|#)([^)]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


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
