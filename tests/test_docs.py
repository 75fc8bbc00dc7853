"""Every command that README.md, docs/ or a docstring shows is one that the programs accept."""

import re
import shlex

import pytest
from conftest import METHODS, ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / f"{name}.py" for name in (*METHODS, "linear_eval")]
COMMAND = re.compile(r"^ *(?:python3? )([a-z_/]+\.py)(?: +([^#`&\n]*))?", re.MULTILINE)
COMMANDS = sorted({(p.name, *m.groups()) for p in PAGES for m in COMMAND.finditer(p.read_text())})


def test_commands_are_found():
    assert len(COMMANDS) >= 8 and any(page == "README.md" for page, *_ in COMMANDS)


@pytest.mark.parametrize("page, script, options", COMMANDS)
def test_command_is_accepted(page, script, options, tmp_path, monkeypatch):
    assert (ROOT / script).is_file(), f"{page} runs {script}"
    if script.startswith("tests/"):
        return
    module, options = __import__(script.removesuffix(".py")), shlex.split(options or "")
    monkeypatch.chdir(tmp_path)
    if "--resume" in options:  # there must be something to resume
        (tmp_path / module.parse_args([o for o in options if o != "--resume"]).out).touch()
    module.parse_args(options)


def test_links_lead_somewhere():
    for page in PAGES[: len(PAGES) - len(METHODS) - 1]:
        for target in re.findall(r"\]\((?!http|#)([^)]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
