"""No behaviour lost its test: forty lines across the rooms are broken, one at a time, and tests of its room must fail.

    python -m tests.prove broken_lines

In a copy of the tree one expression is changed: a comparison turned, a condition negated, a number raised by one, a sum
made a difference, a returned value lost, a call left out. Then the tests of its room run, without those marked slow,
until the first one fails; at last the slow ones of files named after the changed one. A line says `caught` and by which
test, or `SURVIVED` and what was changed: read those, since a change that no input can show is no fault of the tests.
Some kinds of it are not made: a seed or a size above a hundred raised by one, None returned in place of None, output
not flushed.

ALIGN_PROVE_ROOMS=losses,data   some of the rooms
ALIGN_PROVE_SEED=1              other lines
ALIGN_PROVE_COUNT=40            how many
"""

from __future__ import annotations

import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.prove.entry import CHECKOUT, record

LIMIT_S = 900.0
PARTS = ("align", "rewards", "rollout", "recipes", "tests", "examples", "pyproject.toml", "README.md", "Makefile")
ROOMS = {
    **{f"align/{name}": (f"tests/unit/{name}",) for name in (
        "check", "cli", "data", "experiments", "export", "objectives", "recipe", "report", "simulate",
        "stages", "train",
    )},
    "align/actors": ("tests/unit/actors", "tests/integration/test_scoring.py"),
    "align/losses": ("tests/unit/losses", "tests/parity"),
    "align/model": ("tests/unit/model", "tests/unit/core"),
    "rewards": ("tests/unit/rewards",),
    "rollout": ("tests/unit/rollout",),
}  # fmt: skip
TURNED: dict[type, type] = {
    ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


class Break(NamedTuple):
    """One change: the text of `path` (relative to the tree) from `start` to `end` becomes `text`."""

    path: str
    line: int
    start: int
    end: int
    text: str
    was: str


def broken(node: ast.AST) -> ast.AST | None:
    """The node with its meaning changed, or None for one that is left alone."""
    other: Any = copy.deepcopy(node)
    match node:
        case ast.Compare(ops=[op]) if type(op) in TURNED:
            other.ops = [TURNED[type(op)]()]
        case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in TURNED:
            other.op = TURNED[type(op)]()
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return operand
        case ast.IfExp(test=test) | ast.If(test=test):
            return ast.UnaryOp(op=ast.Not(), operand=test)
        case ast.Constant(value=bool() as value):
            return ast.Constant(value=not value)
        case ast.Constant(value=int() | float() as value) if abs(value) < 100:
            return ast.Constant(value=value + 1)
        case ast.Return(value=ast.Constant()):
            return None  # a truth value or number is changed as itself
        case ast.Return(value=ast.expr()):
            other.value = ast.Constant(value=None)
        case ast.Expr(value=ast.Call() | ast.Await()):
            return ast.Pass()
        case _:
            return None
    return other  # type: ignore[no-any-return]


def living(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes whose change is a change of behaviour: no annotations, messages of errors, or imports for types."""
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list", "exc", "msg"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr | ast.Raise):
                continue
            if isinstance(child, ast.keyword) and child.arg == "flush":
                continue
            if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "__name__ == '__main__'"):
                continue
            yield child
            yield from living(child)


def breaks(tree: Path, path: str) -> list[Break]:
    """Every change that can be made to a file."""
    source = (tree / path).read_text()
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for node in living(ast.parse(source)):
        changed = broken(node)
        if changed is None:
            continue
        place: Any = node.test if isinstance(node, ast.IfExp | ast.If) else node
        start, end = starts[place.lineno - 1] + place.col_offset, starts[place.end_lineno - 1] + place.end_col_offset
        text = ast.unparse(ast.fix_missing_locations(changed))
        if isinstance(changed, ast.expr):
            text = f"({text})"
        was = source.encode()[start:end].decode()
        found.append(Break(path, place.lineno, start, end, text, was))
    return found


def chosen(tree: Path, rooms: dict[str, tuple[str, ...]], count: int, seed: int) -> list[tuple[str, Break]]:
    """`count` changes, as many of each room as of any other; within a room every file, and line, is as likely."""
    rng = random.Random(seed)
    names = list(rooms)
    picked = []
    for n in range(count):
        room = names[n % len(names)]
        files = sorted(str(p.relative_to(tree)) for p in (tree / room).rglob("*.py") if p.name != "__init__.py")
        found: list[Break] = []
        while not found:
            found = breaks(tree, rng.choice(files))
        picked.append((room, rng.choice(found)))
    return picked


def nearest_first(tree: Path, path: str, tests: tuple[str, ...]) -> list[str]:
    """The test files of a room, those that speak of the broken file first: most breaks are found within seconds."""
    module, stem = path.removesuffix(".py").replace("/", "."), Path(path).stem
    package = module.rpartition(".")[0]

    def distance(file: Path) -> tuple[bool, int, str]:
        text = file.read_text()
        named = text.count(module) + text.count(f"from {package} import {stem}")
        return stem not in file.stem, -named, str(file)

    files = [
        file
        for name in tests
        for file in ((tree / name).rglob("test_*.py") if (tree / name).is_dir() else [tree / name])
    ]
    return [str(file.relative_to(tree)) for file in sorted(files, key=distance)]


def first_failure(tree: Path, path: str, tests: tuple[str, ...]) -> str | None:
    """Run a room's tests in `tree` until one fails, and at last the slow ones of files named after the broken one; the
    failed one's name, or None when all pass."""
    files = nearest_first(tree, path, tests)
    named = [file for file in files if Path(path).stem in Path(file).stem]
    return _failed(tree, "not slow", files) or (_failed(tree, "slow", named) if named else None)


def _failed(tree: Path, marked: str, files: list[str]) -> str | None:
    command = [
        sys.executable, "-m", "pytest", "-x", "-q", "-m", marked, "-p", "no:cacheprovider", "--timeout=300", *files
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"no end in {LIMIT_S:.0f} s"
    if done.returncode in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
        return None
    said = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return said[0].partition(" - ")[0] if said else f"pytest ended with {done.returncode}"


def tried(tree: Path, one: Break, tests: tuple[str, ...], run: Callable[..., str | None] = first_failure) -> str | None:
    """`run` with the change made; the file is as before afterwards."""
    path = tree / one.path
    before = path.read_bytes()
    path.write_bytes(before[: one.start] + one.text.encode() + before[one.end :])
    try:
        return run(tree, one.path, tests)
    finally:
        path.write_bytes(before)


def main() -> int:
    begun = time.monotonic()
    wanted = os.environ.get("ALIGN_PROVE_ROOMS")
    rooms = {n: t for n, t in ROOMS.items() if not wanted or n.removeprefix("align/") in wanted.split(",")}
    seed, count = int(os.environ.get("ALIGN_PROVE_SEED", "0")), int(os.environ.get("ALIGN_PROVE_COUNT", "40"))
    lines = []
    with tempfile.TemporaryDirectory(prefix="align-broken-") as name:
        tree = Path(name)
        for part in PARTS:
            source = CHECKOUT / part
            copied: Callable[..., Any] = shutil.copytree if source.is_dir() else shutil.copy
            copied(source, tree / part)
        for room, one in chosen(tree, rooms, count, seed):
            caught = tried(tree, one, rooms[room])
            said = {
                "room": room,
                "line": f"{one.path}:{one.line}",
                "was": one.was,
                "became": one.text,
                "caught": caught,
            }
            lines.append(said)
            print(
                f"{'caught' if caught else 'SURVIVED':9} {said['line']}: {one.was!r} -> {one.text!r} {caught}",
                flush=True,
            )
    survived = [line for line in lines if not line["caught"]]
    path = record(
        "broken-lines",
        claim="a line that is broken anywhere fails a test of its own room",
        command=f"ALIGN_PROVE_SEED={seed} ALIGN_PROVE_COUNT={count} python -m tests.prove broken_lines",
        figures={"seed": seed, "broken": len(lines), "caught": len(lines) - len(survived), "lines": lines},
        proved=not survived,
        seconds=time.monotonic() - begun,
    )
    print(f"{len(lines) - len(survived)} of {len(lines)} caught; {path}")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
