"""pydantic's errors in the words of a recipe: file:line, key, value, nearest key, and the words of peers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from align.errors import RecipeError, Unsupported
from align.recipe import grammar
from align.recipe.document import Document, Path_, Problem
from align.recipe.later import later_key, later_value
from align.recipe.peers import translate
from align.recipe.schema import Recipe

_WRONG_TYPE = ("_type", "_parsing", "_from_float", "literal_error", "int_parsing_size")


def raise_problems(problems: Sequence[Problem], name: str) -> None:
    """One error for all of them. Does nothing where there are none."""
    if not problems:
        return
    problems = sorted(problems, key=lambda p: _line(p.where))
    kind = Unsupported if all(p.unsupported for p in problems) else RecipeError
    if len(problems) == 1:
        only = problems[0]
        raise kind(only.what, where=only.where, remedy=only.remedy)
    lines = [str(RecipeError(p.what, where=p.where, remedy=p.remedy)) for p in problems]
    raise kind(f"{len(problems)} problems\n" + "\n".join(lines), where=name)


def _line(where: str | None) -> int:
    line = (where or "").rpartition(":")[2]
    return int(line) if line.isdigit() else 0


def from_validation(error: ValidationError, document: Document) -> list[Problem]:
    """All problems that pydantic found, each once, in the order of the file."""
    problems: dict[tuple[Path_, str], Problem] = {}
    for detail in error.errors():
        path, raw, annotation = grammar.locate(detail["loc"], document.data)
        if _other_branch(detail, raw) or (detail["type"] == "too_short" and raw):
            continue  # "too short" of a list whose items failed is about what was left of it
        problem = _problem(detail, path, raw, annotation, document)
        problems.setdefault((path, problem.what), problem)
    return list(problems.values())


def booleans(document: Document) -> list[Problem]:
    """Problems that pydantic does not see: true or false where a number belongs."""
    return [
        Problem(
            f"`{document.called(path)}`: expected {grammar.words(expected)}, got {_show(_value(document.data, path))}",
            document.where(path),
        )
        for path, expected in grammar.misplaced_booleans(document.data)
    ]


def unknown_key(path: Path_, model: Any, document: Document) -> Problem:
    """An unknown key: what it is called here, or the nearest, or all that may stand there."""
    key, parent = str(path[-1]), document.called(path[:-1])
    place = f"in `{parent}`" if parent else "at the top of a recipe"
    value = _show(_value(document.data, path))
    what = f"unknown key `{key}` {place} (value {value})"
    later = later_key(path)
    if later:
        return Problem(f"`{key}` {place}: {later.what}", document.where(path), later.remedy, unsupported=True)
    return Problem(what, document.where(path), _remedy_for_key(key, model))


def option_problems(error: ValidationError, given: dict[str, Any], model: Any, owner: str) -> list[Problem]:
    """The same for the options of a loss, whose type is not part of the grammar. `where` is the option."""
    problems = []
    for detail in error.errors():
        key, value, expected, parent = _option(detail["loc"], given, model)
        last = key.rpartition(".")[2]
        if detail["type"] == "extra_forbidden":
            what = f"unknown option `{key}` of {owner} (value {_show(value)})"
            problems.append(Problem(what, key, _remedy_for_key(last, parent)))
        elif detail["type"] == "value_error":
            problems.append(Problem(f"{owner}: {detail['msg'].partition(', ')[2]}", key))
        elif detail["type"].endswith(_WRONG_TYPE):
            what = f"`{key}` of {owner}: expected {grammar.words(expected)}, got {_show(value)}"
            problems.append(Problem(what, key, _nearest_choice(expected, value)))
        else:
            said = detail["msg"].replace("Input should be", "must be")
            problems.append(Problem(f"`{key}` of {owner} {said}, got {_show(value)}", key))
    return problems


def _option(loc: Sequence[str | int], given: Any, model: Any) -> tuple[str, Any, Any, Any]:
    """Of an option at `loc`: its dotted name, the value given, its type, and the type of the map that it stands in."""
    value, expected, parent = given, model, model
    for step in loc:
        parent = grammar.choose(expected, value)
        expected = grammar.descend(expected, step, value)
        value = value.get(step) if isinstance(value, dict) else None
    return ".".join(map(str, loc)), value, expected, parent


def _remedy_for_key(key: str, model: Any) -> str:
    keys = grammar.keys_of(model) if grammar.is_model(model) else {}
    said: list[str] = []
    nearest = difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    if nearest:
        said.append(f"did you mean `{nearest[0]}`?")
    peer = translate(key)
    if peer:
        said.append(peer)
    if not said:
        below = [f"{name}.{key}" for name, kind in keys.items() if key in _keys_below(kind)]
        said += [f"`{key}` is `{below[0]}`"] if below else []
    if not said:
        kinds = [kind for kind, stage in grammar.stage_models().items() if key in grammar.keys_of(stage)]
        if kinds and model is not Recipe:
            said.append(f"`{key}` belongs to a stage of kind {' or '.join(kinds)}")
        elif kinds:
            said.append(f"`{key}` stands in a stage, below `stages`")
        elif key in grammar.keys_of(Recipe):
            said.append(f"`{key}` stands at the top of the recipe")
    if not said:
        said.append("keys here: " + ", ".join(keys))
    return "; ".join(said)


def _keys_below(annotation: Any) -> dict[str, Any]:
    chosen = grammar.choose(annotation, {})
    if not grammar.is_model(chosen):
        chosen = grammar.choose(grammar.descend(chosen, 0, []), {})
    return grammar.keys_of(chosen) if grammar.is_model(chosen) else {}


def _other_branch(detail: ErrorDetails, raw: Any) -> bool:
    """Whether this is the complaint of a union's member that the value plainly is not."""
    last = str(detail["loc"][-1]) if detail["loc"] else ""
    plain = last.startswith(("literal[", "constrained-")) or last in ("str", "int")
    if isinstance(raw, dict) and plain and detail["type"] != "extra_forbidden":
        return last not in raw
    return isinstance(raw, list) and last == "str"


def _problem(detail: ErrorDetails, path: Path_, raw: Any, annotation: Any, document: Document) -> Problem:
    kind, name = detail["type"], document.called(path)
    where = document.where(path)
    if kind == "extra_forbidden":
        _, parent_raw, parent = grammar.locate(detail["loc"][:-1], document.data)
        return unknown_key(path, grammar.choose(parent, parent_raw), document)
    if kind == "missing":
        place = f" in `{document.called(path[:-1])}`" if len(path) > 1 else ""
        return Problem(f"`{path[-1]}` is missing{place}", document.where(path[:-1]), f"add `{path[-1]}: ...`")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _stage_kind(path, raw, document)
    later = later_value(path, raw)
    if later:
        return Problem(f"`{name}: {raw}`: {later.what}", where, later.remedy, unsupported=True)
    if kind == "string_pattern_mismatch":
        return Problem(
            f"`{name}` names a folder and is {_show(raw)}",
            where,
            "use letters, digits, `-` and `_`, beginning with a letter or digit",
        )
    if kind in ("value_error", "assertion_error"):
        said = detail["msg"].partition(", ")[2]
        return Problem(f"`{name}`: {said}" if name else said, where if name else _stage_place(said, document))
    if kind == "too_short":
        return Problem(f"`{name}` is empty", where, "it needs at least one entry")
    if kind.endswith(_WRONG_TYPE):
        remedy = _nearest_choice(annotation, raw)
        if isinstance(raw, (int, float)) and "text" in grammar.words(annotation):
            remedy = f"put it in quotes: '{raw}'"
        return Problem(f"`{name}`: expected {grammar.words(annotation)}, got {_show(raw)}", where, remedy)
    said = detail["msg"].replace("Input should be", "must be")
    return Problem(f"`{name}` {said}, got {_show(raw)}", where)


def _stage_place(said: str, document: Document) -> str:
    """Where the stage stands that a sentence about several begins with; the last of that id."""
    named, stages = re.search("stages? (?:have the id )?'([^']*)'", said), document.data.get("stages")
    ids = [stage.get("id") if isinstance(stage, dict) else None for stage in stages] if isinstance(stages, list) else []
    at = [i for i, name in enumerate(ids) if named is not None and name == named[1]]
    return document.where(("stages", at[-1]) if at else ())


# what peers call a stage -> its kind here
_KINDS_OF_PEERS: dict[str, str] = {
    **dict.fromkeys(("grpo", "rloo", "rlhf", "rft"), "online"),
    **dict.fromkeys(("rm", "reward", "reward_modeling"), "reward_model"),
    **dict.fromkeys(("pt", "pretrain"), "sft"),
    **dict.fromkeys(("eval", "predict"), "evaluate"),
}


def _stage_kind(path: Path_, raw: Any, document: Document) -> Problem:
    kinds = list(grammar.stage_models())
    given = raw.get("kind") if isinstance(raw, dict) else None
    called = f" in `{document.called(path)}`"
    if given is None:
        return Problem(f"`{document.called(path)}` has no `kind`", document.where(path), "kinds: " + ", ".join(kinds))
    where = document.where((*path, "kind"))
    later = later_value((*path, "kind"), given)
    if later:
        return Problem(f"`kind: {given}`{called}: {later.what}", where, later.remedy, unsupported=True)
    peers = _KINDS_OF_PEERS.get(str(given).lower())
    if peers is not None:
        return Problem(f"`kind: {given}`{called} is no stage kind", where, f"`{given}` is `kind: {peers}`")
    near = difflib.get_close_matches(str(given), kinds, n=1)
    remedy = (f"did you mean `{near[0]}`? " if near else "") + "kinds: " + ", ".join(kinds)
    remedy += "; a loss of pairs is named under `loss` of `kind: preference`"
    return Problem(f"`kind: {given}`{called} is no stage kind", where, remedy)


def _nearest_choice(annotation: Any, raw: Any) -> str | None:
    expected = grammar.words(annotation).split(" or ")
    near = difflib.get_close_matches(str(raw), expected, n=1)
    return f"did you mean `{near[0]}`?" if near and near[0] != str(raw) else None


def _value(data: Any, path: Path_) -> Any:
    value: Any = data
    for step in path:
        value = value[step] if isinstance(value, list | dict) else None  # type: ignore[index]
    return value


def _show(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
