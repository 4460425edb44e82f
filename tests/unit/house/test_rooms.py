"""Every package's docstring says what the room is for and names its files in the order of reading."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = sorted(
    file.parent.relative_to(ROOT)
    for room in ("align", "rewards", "rollout")
    for file in (ROOT / room).rglob("__init__.py")
)
ONE_FILE_EACH = ("align/cli", "align/data/formats", "align/data/templates", "align/export/formats", "align/losses")
"""And `builtins`: a new verb, layout, loss, ... is one file there, and no list of it is kept."""


def said(package: Path) -> str:
    return ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text())) or ""


@pytest.mark.parametrize("package", PACKAGES, ids=str)
def test_a_package_says_what_it_is_for_and_names_no_file_that_is_gone(package: Path) -> None:
    assert len(said(package)) > 40
    for name in re.findall(r"(?<![\w/.`])(\w+\.py)\b", said(package)):
        assert (ROOT / package / name).is_file(), f"{package}/__init__.py names {name}"


@pytest.mark.parametrize(
    "package",
    [p for p in PACKAGES if str(p) not in ONE_FILE_EACH and "builtins" not in p.parts],
    ids=str,
)
def test_a_package_names_every_file_and_room_in_it(package: Path) -> None:
    entries = [
        entry for entry in (ROOT / package).iterdir() if (entry / "__init__.py").exists() or entry.suffix == ".py"
    ]
    names = {entry.stem for entry in entries} - {"__init__"}
    unnamed = sorted(name for name in names if not re.search(rf"(?<!\w){name}(?!\w)", said(package)))
    assert not unnamed, f"{package}/__init__.py does not name {', '.join(unnamed)}"
