"""Sections called "shared" are the same to the byte in all scripts; no script is too long."""

import difflib
import re

import pytest
from conftest import METHODS, ROOT

SCRIPTS = METHODS
BANNER = re.compile(r"^ *# === (shared|method): (.+) ===\n", re.MULTILINE)


def sections(name):
    """Split a script on its banners: a list of (kind, title, text)."""
    parts = BANNER.split((ROOT / f"{name}.py").read_text())
    return list(zip(parts[1::3], parts[2::3], parts[3::3], strict=True))


@pytest.mark.parametrize("name", SCRIPTS)
def test_shared_sections_are_identical(name):
    def shared(script):
        return {title: text for kind, title, text in sections(script) if kind == "shared"}

    first, other = shared(SCRIPTS[0]), shared(name)
    assert list(first) == list(other) and len(first) >= 5
    for title in first:
        assert first[title] == other[title], f"'{title}' of {name}.py differs from {SCRIPTS[0]}.py"


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_is_short(name):
    lines = (ROOT / f"{name}.py").read_text().splitlines()
    assert len(lines) <= 300
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("name", SCRIPTS)
def test_shared_sections_do_not_know_the_method(name):
    for kind, title, text in sections(name):
        if kind == "shared":
            assert not re.search(r"\bif METHOD\b|" + "|".join(METHODS), text), title


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "simsiam"])
def test_diff_to_simsiam_is_short(name):
    """`diff simsiam.py byol.py` shows how two methods differ, and nothing else."""
    one, other = ((ROOT / f"{script}.py").read_text().splitlines() for script in ("simsiam", name))
    changed = [line for line in difflib.ndiff(one, other) if line[0] in "+-"]
    assert len(changed) <= {"byol": 90, "simclr": 118, "moco": 130}[name]
