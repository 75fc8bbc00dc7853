"""Fit the diffs in docs/variants/ to scripts that have changed, and name those that conflict.

python tools/refresh_variants.py
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def git(folder, *arguments):
    """Run git in a folder; return the finished process."""
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)


def refresh(path):
    """Return the diff at `path` made anew from today's scripts, or None if it does not apply."""
    with tempfile.TemporaryDirectory() as folder:
        for script in ROOT.glob("*.py"):
            shutil.copy(script, folder)
        [source] = re.findall(r"^copy from (.+)\.py$", path.read_text(), re.M)
        if not (ROOT / f"{source}.py").exists():  # it changes what another diff makes
            git(folder, "apply", "-C1", path.with_name(f"{source}.diff"))
        git(folder, "init")
        git(folder, "add", ".")
        # One line around a change must still be there.
        if git(folder, "apply", "-C1", path).returncode:
            return None
        git(folder, "add", "--intent-to-add", ".")
        # Offer git the same script to compare with: another may happen to look more alike.
        files = re.findall(r"^copy (?:from|to) (.+)$", path.read_text(), re.M)
        return git(folder, "diff", "--find-copies-harder", "--find-copies=50%", *files).stdout


def main():
    """Rewrite the diffs that still apply."""
    conflicts = []
    for path in sorted((ROOT / "docs" / "variants").glob("*.diff")):
        diff = refresh(path)
        if diff:
            path.write_text(diff)
        else:
            conflicts.append(path.name)
    if conflicts:
        sys.exit(f"does not apply any more, mend by hand: {', '.join(conflicts)}")


if __name__ == "__main__":
    main()
