"""The four scripts are siblings: what is alike is the same, what differs is the method."""

import difflib
import importlib
import inspect

import pytest
from conftest import METHODS, ROOT

SHARED = ["random_resized_crop", "spread", "knn_accuracy", "join_processes", "save", "load"]


@pytest.mark.parametrize("function", SHARED)
def test_shared_functions_are_the_same(function):
    texts = {inspect.getsource(getattr(importlib.import_module(m), function)) for m in METHODS}
    assert len(texts) == 1


@pytest.mark.parametrize("name", ["byol", "simclr", "moco"])
def test_diff_to_simsiam_is_short(name):
    """`diff simsiam.py byol.py` shows how two methods differ: a line added for another reason has
    to take the place of one.
    """
    one, other = ((ROOT / f"{script}.py").read_text().splitlines() for script in ("simsiam", name))
    blocks = difflib.SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks()
    changed = len(one) + len(other) - 2 * sum(block.size for block in blocks)
    assert changed <= {"byol": 102, "simclr": 110, "moco": 118}[name]


@pytest.mark.parametrize("name", METHODS)
def test_a_script_imports_nothing_of_ours_but_common(name):
    """Copied with common.py alone into another folder, it is complete."""
    ours = {path.stem for path in ROOT.glob("*.py")} - {"common", name}
    script = importlib.import_module(name)
    used = {getattr(value, "__module__", "") or "" for value in vars(script).values()}
    used |= {value.__name__ for value in vars(script).values() if inspect.ismodule(value)}
    assert not used & ours and "common" in used
