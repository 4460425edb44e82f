"""A new kind of stage is one class and one driver: nobody else asks of which kind a stage is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from align.recipe.grammar import stage_models
from align.recipe.stages import Stage, TrainedStage, kind_of, kinds_for
from align.stages.pipeline import RUNNERS

ROOT = Path(__file__).resolve().parents[3]
DRIVERS = ROOT / "align" / "stages" / "pipeline.py"
GRAMMAR = ROOT / "align" / "recipe"
KINDS = tuple(stage_models())
CLASSES = tuple(model.__name__ for model in stage_models().values())
STAGES = ("stage", "source", "trained")  # what a stage is called


def questions(text: str) -> Iterator[tuple[int, str]]:
    """Lines that ask a stage for its kind, or take one of any type; and what is wrong with each."""
    for node in ast.walk(ast.parse(text)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Compare) and _asks(node):
            yield line, "asks for the name of a kind"
        if (isinstance(node, ast.Subscript) and _is_kind(node.slice)) or _got(node):
            yield line, "looks a stage's kind up in a table"
        if isinstance(node, ast.Dict) and sum(_word(key) in KINDS for key in node.keys if key is not None) > 1:
            yield line, "is a table of kinds"
        if isinstance(node, ast.match_case) and any(_word(one) in KINDS for one in ast.walk(node.pattern)):
            yield line, "asks for the name of a kind"
        if isinstance(node, ast.arg) and node.arg == "stage" and _name(node.annotation) == "Any":
            yield line, f"takes `{node.arg}: Any`"
        if isinstance(node, ast.Call) and _name(node.func) in ("isinstance", "getattr", "hasattr"):
            of_class = {_name(one) for one in ast.walk(node.args[1])} & set(CLASSES)
            if _name(node.func) == "isinstance" and of_class:
                yield line, f"asks whether it is a {', '.join(of_class)}"
            if _name(node.func) != "isinstance" and _name(node.args[0]) in STAGES and _word(node.args[1]):
                yield line, "asks which attributes a stage has"


def _asks(node: ast.Compare) -> bool:
    sides = [node.left, *node.comparators]
    if not any(isinstance(side, ast.Attribute) and side.attr == "kind" for side in sides):
        return False
    words = {_word(one) for side in sides for one in ast.walk(side)}
    return any(_is_kind(side) for side in sides) or bool(words & set(KINDS))


def _got(node: ast.AST) -> bool:
    """Whether it is `TABLE.get(stage.kind)`."""
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get"
    return called and any(_is_kind(one) for one in node.args)  # type: ignore[attr-defined]


def _is_kind(node: ast.expr | None) -> bool:
    return any(
        isinstance(one, ast.Attribute) and one.attr == "kind" and _name(one.value) in STAGES
        for one in (ast.walk(node) if node is not None else ())
    )


def _name(node: ast.AST | None) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def _word(node: ast.AST) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def test_no_file_outside_the_grammar_and_the_table_of_drivers_asks_for_the_kind_of_a_stage() -> None:
    found, looked = [], 0
    for file in sorted(path for room in ("align", "rollout", "rewards") for path in (ROOT / room).rglob("*.py")):
        if file == DRIVERS or file.is_relative_to(GRAMMAR):
            continue
        where, looked = file.relative_to(ROOT).as_posix(), looked + 1
        found += [f"{where}:{line} {what}" for line, what in questions(file.read_text())]
    assert looked > 300
    assert found == []


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("if stage.kind == 'online': pass", "name of a kind"),
        ("if recipe.stage(name).kind not in ('merge', 'export'): pass", "name of a kind"),
        ("ok = source.kind in SCORED", "name of a kind"),
        ("rate = RATES[stage.kind, True]", "in a table"),
        ("rate = RATES.get(stage.kind)", "in a table"),
        ("RATES = {'sft': 1e-4, 'online': 1e-5}", "table of kinds"),
        ("match kind:\n    case 'merge': pass", "name of a kind"),
        ("def of(stage: Any) -> int: ...", "stage: Any"),
        ("if isinstance(stage, SftStage | OnlineStage): pass", "asks whether"),
        ("rewards = getattr(stage, 'rewards', ())", "which attributes"),
    ],
)
def test_every_way_of_asking_is_noticed(line: str, what: str) -> None:
    assert [what in said for _, said in questions(line)] == [True]


def test_facts_and_what_a_class_can_do_may_be_asked_and_so_may_other_things_that_have_kinds() -> None:
    allowed = (
        "if stage.trains and isinstance(stage, TrainStage): pass",
        "if adapter.kind == 'full' or medium.kind in ('image', 'video'): pass",
        "report(stage.kind)",
        "value = getattr(stage, key)",
    )
    assert [list(questions(line)) for line in allowed] == [[]] * len(allowed)


def test_every_kind_has_a_driver_and_facts_of_its_own() -> None:
    assert set(RUNNERS) == set(KINDS) == {kind_of(one) for one in get_args(get_args(Stage)[0])}
    for one in get_args(TrainedStage):
        assert one.trains and one.records and one.defaults.whole_lr < one.defaults.adapter_lr
        assert kind_of(one) in kinds_for(one.records[0])
    assert {kind for kind, one in stage_models().items() if one.makes_folder} == {"merge", "export"}
    assert kinds_for("pair") == ["preference", "reward_model"] and kinds_for("pair", scoring=True) == ["reward_model"]
