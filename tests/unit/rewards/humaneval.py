"""HumanEval's rows, and systematic faults in its canonical solutions."""

from __future__ import annotations

import ast
import copy
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_NEIGHBOUR: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
}  # fmt: skip


def rows(shared_data: Path) -> list[dict[str, Any]]:
    with gzip.open(shared_data / "text/code/HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def mutants(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(kind, whole program): the function returns None; its last statement is gone; the first integer is one more; the
    last integer is one less; the first comparison is its neighbour; the last `range` is one shorter. At most one of a
    kind, and only where the program changes."""
    tree = ast.parse(row["prompt"] + row["canonical_solution"])
    original = ast.unparse(tree)
    for kind, change in _CHANGES.items():
        changed = copy.deepcopy(tree)
        functions = [n for n in changed.body if isinstance(n, ast.FunctionDef) and n.name == row["entry_point"]]
        if change(functions[-1]) and (source := ast.unparse(ast.fix_missing_locations(changed))) != original:
            yield kind, source


def _none(function: ast.FunctionDef) -> bool:
    function.body = [ast.Return(ast.Constant(None))]
    return True


def _last_gone(function: ast.FunctionDef) -> bool:
    function.body = function.body[:-1] or [ast.Pass()]
    return True


def _integer(function: ast.FunctionDef, place: int, step: int) -> bool:
    found = [n for n in ast.walk(function) if isinstance(n, ast.Constant) and type(n.value) is int]
    if found:
        found[place].value += step
    return bool(found)


def _comparison(function: ast.FunctionDef) -> bool:
    found = [n for n in ast.walk(function) if isinstance(n, ast.Compare) and type(n.ops[0]) in _NEIGHBOUR]
    if found:
        found[0].ops[0] = _NEIGHBOUR[type(found[0].ops[0])]()
    return bool(found)


def _range(function: ast.FunctionDef) -> bool:
    found = [
        n for n in ast.walk(function)
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "range"
    ]  # fmt: skip
    if found:
        place = 0 if len(found[-1].args) == 1 else 1
        found[-1].args[place] = ast.BinOp(found[-1].args[place], ast.Sub(), ast.Constant(1))
    return bool(found)


_CHANGES = {
    "return None": _none,
    "last statement gone": _last_gone,
    "first integer + 1": lambda f: _integer(f, 0, 1),
    "last integer - 1": lambda f: _integer(f, -1, -1),
    "first comparison": _comparison,
    "last range - 1": _range,
}
