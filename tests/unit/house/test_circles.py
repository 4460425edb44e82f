"""Modules that import each other: few circles, and those by types alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest

PACKAGES = ("align", "rewards", "rollout")
AT_MOST = 3
"""Each a file and its parts, of which one names a type of the other. It may only fall."""


def circles(*packages: str, types: bool = True) -> Iterator[list[str]]:
    """Modules that reach each other by imports, at the head of a file, in functions and, with `types`, those under
    TYPE_CHECKING: each strongly connected part of the graph once, sorted."""
    graph = grimp.build_graph(*packages, exclude_type_checking_imports=not types, cache_dir=None)
    left = set(graph.modules)
    while left:
        one = left.pop()
        together = graph.find_downstream_modules(one) & graph.find_upstream_modules(one)
        left -= together
        if together:
            yield sorted({one, *together})


def test_few_modules_import_each_other() -> None:
    found = sorted(circles(*PACKAGES))
    assert len(found) <= AT_MOST, found


def test_no_modules_import_each_other_but_for_types() -> None:
    assert list(circles(*PACKAGES, types=False)) == []


IN_FUNCTION = "def make():\n    from {name}.{other} import make as made\n    return made\n"
FOR_TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from {name}.{other} import make\n"


@pytest.mark.parametrize(("back", "counted"), [(IN_FUNCTION, (1, 1)), (FOR_TYPES, (1, 0)), ("", (0, 0))])
def test_a_circle_of_three_is_one_whether_in_a_function_or_for_types(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, back: str, counted: tuple[int, int]
) -> None:
    name = f"circle_{abs(hash(back))}"
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").touch()
    for own, other in (("one", "two"), ("two", "three")):
        (folder / f"{own}.py").write_text(f"from {name}.{other} import make\n")
    (folder / "three.py").write_text(back.format(name=name, other="one"))
    monkeypatch.syspath_prepend(tmp_path)
    found = list(circles(name))
    assert (len(found), len(list(circles(name, types=False)))) == counted
    assert found in ([], [[f"{name}.one", f"{name}.three", f"{name}.two"]])
