"""How many files a new loss, reward, engine, ... touches, counted from the tree: `python -m tests.seams`.

What a new one of a kind must be told to is what names the present ones. So every module of `align`, `rewards` and
`rollout` is read (as syntax, nothing is imported), and each place counts that names an instance of the kind outside its
own files:

    a table      a map, tuple, list or set with several instances in it, or a `Literal` of one
    an import    of the instance's own module, or class
    a question   an instance beside `==`, `!=`, `in` or `not in`, or in a `case`

`to run`: its own files, and those with a table or an import: without them there it is not found. `complete`: those with
a question too, where the others are treated in some other way. Tests and guides are left out, and so are words in
messages. Names that mean other things too (a reward `format`, the loss `sft`, a stage as well) are not searched.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("align", "rewards", "rollout")


@dataclass(frozen=True)
class Kind:
    """own: how many new files one takes. instances: name -> the files that are its own, as patterns from the root.
    module: of an instance, `{}` for its name: imports of it count. attributes: where set, a question counts only
    beside these (`stage.kind == "merge"`), because the names are words for other things too. calls: functions that are
    given one. maps, rows: whether its tables are such; packages and stages have the same names as some."""

    name: str
    instances: Mapping[str, tuple[str, ...]]
    own: int = 1
    module: str | None = None
    attributes: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()
    maps: bool = True
    rows: bool = True


def _each(names: str, *patterns: str) -> dict[str, tuple[str, ...]]:
    return {name: tuple(pattern.format(name) for pattern in patterns) for name in names.split()}


_ZERO = ("align/train/zero.py", "align/train/zero_engine.py")
KINDS = (
    Kind(
        "loss",
        _each("dpo kto orpo simpo cpo modpo", "align/losses/{}.py", "align/losses/{}_terms.py")
        | {"grpo": ("align/losses/grpo.py", "align/losses/policy_terms.py")},
        module="align.losses.{}",
    ),
    Kind(
        "reward",
        _each(
            "bbh box_iou contains ifeval json_schema judge overlap regex repetition soft_overlong",
            "rewards/builtins/*.py",
        ),
        module="rewards.builtins.{}",
    ),
    Kind(
        "engine",
        {
            "vllm": ("rollout/vllm*.py",),
            "transformers": ("align/model/generate/*.py",),
        },
        attributes=("name", "engine"),
        rows=False,
    ),
    Kind(
        "data format",
        _each("alpaca sharegpt openai labelled", "align/data/formats/{}.py"),
        module="align.data.formats.{}",
        attributes=("format", "formats", "layout"),
    ),
    Kind(
        "combiner",
        _each("weighted_sum decoupled", "align/objectives/combiners.py")
        | _each("lagrangian chebyshev hypervolume", "align/objectives/{}.py"),
        module="align.objectives.{}",
    ),
    Kind("strategy", {"replicated": ("align/train/strategy.py",), "zero1": _ZERO, "zero2": _ZERO, "zero3": _ZERO}),
    Kind("optimizer", _each("adamw adamw_8bit", "align/train/optim.py")),
    Kind(
        "export format",
        _each("safetensors", "align/export/formats/{}.py"),
        module="align.export.formats.{}",
        attributes=("format",),
    ),
    Kind(
        "stage kind",
        _each(
            "sft preference reward_model classify online evaluate merge export "
            "SftStage PreferenceStage RewardModelStage ClassifyStage OnlineStage EvaluateStage MergeStage ExportStage",
            "align/recipe/stages.py",
        ),
        own=2,  # its class and its driver
        module="align.recipe.stages.{}",  # whoever takes one kind's class asks for that kind
        attributes=("kind",),
    ),
    Kind(
        "verb",
        _each(
            "run submit check simulate rewards doctor merge pareto sweep rescore soup classify",
            "align/cli/{}.py",
            "align/cli/*_flags.py",
        ),
        module="align.cli.{}",
        attributes=("verb",),
        maps=False,
        rows=False,
        calls=("add_parser",),
    ),
)

LIMITS: Mapping[str, tuple[int, int]] = {
    "loss": (1, 1),
    "reward": (1, 1),
    "engine": (2, 2),  # a user's own: 1
    "data format": (2, 2),  # a user's own: 1
    "combiner": (2, 2),  # a user's own: 1
    "strategy": (2, 2),
    "optimizer": (2, 2),
    "export format": (1, 1),
    "stage kind": (3, 3),
    "verb": (1, 1),
}
"""(to run, complete), new files included. They may only fall: lower them with what lowers the count."""


@dataclass
class Count:
    """Places by file: `path:line`."""

    kind: Kind
    tables: dict[str, list[int]] = field(default_factory=dict)
    questions: dict[str, list[int]] = field(default_factory=dict)

    @property
    def to_run(self) -> int:
        return self.kind.own + len(self.tables)

    @property
    def complete(self) -> int:
        return self.kind.own + len(self.tables.keys() | self.questions.keys())


@dataclass(frozen=True)
class Site:
    """A place that holds words. sort: question, map, row, literal, call or import; beside: attributes and names that a
    question is asked of, or the function that is called."""

    line: int
    sort: str
    words: frozenset[str]
    beside: frozenset[str] = frozenset()


def count(kind: Kind, root: Path = ROOT) -> Count:
    found = Count(kind)
    for path, sites in _sites(root):
        mine = {name for name, own in kind.instances.items() if any(path.match(pattern) for pattern in own)}
        for site in sites:
            if mine and site.sort == "import":
                continue  # one that is made from another
            places = _counts(site, kind, frozenset(kind.instances.keys() - mine), found)
            if places is not None:
                places.setdefault(path.as_posix(), []).append(site.line)
    return found


def _counts(site: Site, kind: Kind, names: frozenset[str], found: Count) -> dict[str, list[int]] | None:
    """Where a site that names one of `names` belongs; None for one that names none of them, or other things."""
    if site.sort == "import":
        package = f"{kind.module}".removesuffix("{}")
        words = {path.removeprefix(package).partition(".")[0] for path in site.words if path.startswith(package)}
        return found.tables if kind.module and words & names else None
    if not site.words & names:
        return None
    several = len(site.words & kind.instances.keys()) > 1
    if site.sort == "question":
        return found.questions if not kind.attributes or site.beside & {*kind.attributes} else None
    if site.sort == "call":
        return found.tables if site.beside & {*kind.calls} else None
    if (site.sort == "map" and not kind.maps) or (site.sort == "row" and not kind.rows):
        return None
    return found.tables if several or (site.sort == "literal" and not kind.attributes) else None


@cache
def _sites(root: Path) -> list[tuple[Path, list[Site]]]:
    files = sorted(file for package in PACKAGES for file in (root / package).rglob("*.py"))
    return [(file.relative_to(root), list(_found(ast.parse(file.read_bytes())))) for file in files]


def _found(tree: ast.Module) -> Iterator[Site]:
    for node in ast.walk(tree):
        read = _READ.get(type(node))
        site = read(node) if read is not None else None
        if site is not None and site.words:
            yield site


def _compare(node: ast.Compare) -> Site:
    sides = [node.left, *node.comparators]
    held = [inner for side in sides for inner in (side.elts if isinstance(side, _ROWS) else [side])]
    return Site(node.lineno, "question", _words(*held), frozenset(map(_last, sides)))


def _case(node: ast.match_case) -> Site:
    return Site(node.pattern.lineno, "question", _words(*ast.walk(node.pattern)))


def _map(node: ast.Dict) -> Site:
    return Site(node.lineno, "map", _words(*node.keys))


def _row(node: ast.Tuple | ast.List | ast.Set) -> Site:
    return Site(node.lineno, "row", _words(*node.elts))


def _literal(node: ast.Subscript) -> Site | None:
    if _last(node.value) != "Literal":
        return None
    return Site(node.lineno, "literal", _words(*ast.walk(node.slice)))


def _call(node: ast.Call) -> Site | None:
    called = _last(node.func)
    return Site(node.lineno, "call", _words(*node.args), frozenset({called})) if called in _CALLS else None


def _import(node: ast.Import) -> Site:
    return Site(node.lineno, "import", frozenset(alias.name for alias in node.names))


def _import_from(node: ast.ImportFrom) -> Site:
    paths = [f"{node.module}", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return Site(node.lineno, "import", frozenset(paths))


_CALLS = {name for kind in KINDS for name in kind.calls}
_READ: dict[type[ast.AST], Callable[[Any], Site | None]] = {
    ast.Compare: _compare,
    ast.match_case: _case,
    ast.Dict: _map,
    ast.Tuple: _row,
    ast.List: _row,
    ast.Set: _row,
    ast.Subscript: _literal,
    ast.Call: _call,
    ast.Import: _import,
    ast.ImportFrom: _import_from,
}
_ROWS = (ast.Tuple, ast.List, ast.Set)


def _words(*nodes: ast.AST | None) -> frozenset[str]:
    return frozenset(n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str))


def _last(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def main(words: list[str]) -> int:
    """Print the table; with names of kinds, each place that counts."""
    print(f"{'a new':<14} {'to run':>7} {'complete':>9}   {'at most':>8}")
    worse = False
    for kind in KINDS:
        found = count(kind)
        limit = LIMITS[kind.name]
        over = found.to_run > limit[0] or found.complete > limit[1]
        worse |= over
        marks = f"   {limit[0]:>4} {limit[1]:>3}{'  WORSE' if over else ''}"
        print(f"{kind.name:<14} {found.to_run:>7} {found.complete:>9}{marks}", flush=True)
        if kind.name in words or "all" in words:
            for label, places in (("table", found.tables), ("question", found.questions)):
                for path, lines in places.items():
                    print(f"    {label:<9} {path}:{','.join(map(str, sorted(set(lines))))}")
    return int(worse)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
