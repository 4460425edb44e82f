"""Does the completion call the right function with the right arguments? 1 or 0.

The rules of BFCL's checker (Berkeley Function Calling Leaderboard, bfcl_eval/eval_checker/ast_eval/ast_checker.py): as
many calls as the gold answer has; the same name; every required argument and none that is unknown; each value of the
declared type (or of the gold value's, where the gold answer departs from that) and among the possible ones. Texts are
equal without case, spaces and the marks ,./-_*^; an integer stands for a float, never a float or a boolean for an
integer. The order of several calls does not matter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rewards.api import Objective, Sample, Score, reward
from rewards.builtins._answers import row_gold
from rewards.builtins._calls import Call, json_call, parse_calls

_IGNORED = re.compile(r"[ ,./\-_*^]")
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "float": (float, int),
    "number": (float, int),
    "boolean": (bool,),
    "array": (list, tuple),
    "tuple": (list, tuple),
    "dict": (dict,),
    "object": (dict,),
    "any": (object,),
}
Possible = dict[str, list[Any]]  # what each argument may be; "" among them: it may be left out


def _gold(row: Mapping[str, Any], *, column: str | None = None) -> str:
    """The gold calls as JSON, with the first possible value of every argument."""
    calls = [{"name": name, "arguments": _first(possible)} for name, possible in _gold_calls(row, column)]
    return json.dumps(calls, ensure_ascii=False)


@reward(objectives={"function_call": Objective(range=(0, 1))}, gold=_gold)
def function_call(
    samples: Sequence[Sample], *, column: str | None = None, functions: str | None = "function"
) -> list[Score]:
    """1 where the completion makes the gold answer's calls, else 0 and the reason.

    The completion may be JSON ({"name", "arguments"}, or a list), `<tool_call>` blocks, or Python (`[f(a=1)]`). Where
    `<tool_call>` is a special token, say `text: raw`: several calls are not told apart without.

    Args:
        column: the row's column with the gold calls: BFCL's possible answers [{name: {argument: [value, ...]}}], or
            plain calls [{"name", "arguments"}], as a list or as JSON; default: the first of reference_answer, answer,
            solution, ground_truth, target, label that the row has.
        functions: the row's column with the descriptions of the functions, which give types and required arguments;
            null: there is none, and every argument is required that may not be left out.
    """
    scores = []
    for sample in samples:
        wanted = _gold_calls(sample.row, column)
        described = {} if functions is None else _described(row_gold(sample.row, functions))
        if functions is not None and (unknown := [name for name, _ in wanted if name not in described]):
            raise ValueError(f"the gold answer calls {unknown[0]!r}; described are: {', '.join(described) or 'none'}")
        problem = _problem(sample.completion, wanted, described)
        scores.append(Score(0.0, info={"wrong": problem}) if problem else Score(1.0))
    return scores


def _problem(text: str, wanted: list[tuple[str, Possible]], described: Mapping[str, Any]) -> str | None:
    try:
        calls = parse_calls(text)
    except ValueError as error:
        return str(error)
    if len(calls) != len(wanted):
        return f"{len(calls)} calls; {len(wanted)} needed"
    for name, possible in wanted:  # each gold call takes the first call that fits it
        problems = [_call_problem(call, name, possible, described.get(name, {})) for call in calls]
        if None not in problems:
            return problems[0]
        calls.pop(problems.index(None))
    return None


def _call_problem(call: Call, name: str, possible: Possible, described: Mapping[str, Any]) -> str | None:
    said, arguments = call
    if said != name:
        return f"calls {said}, not {name}"
    required = described.get("required", [])
    types = described.get("properties", {})
    for key in possible:
        if key not in arguments and (key in required or not any(_is(v, "") for v in possible[key])):
            return f"{name} lacks {key}"
    for key, value in arguments.items():
        if key not in possible:
            return f"{name} has no {key}"
        first = next((p for p in possible[key] if not _is(p, "")), None)
        if not _has_type(value, types.get(key, {})) and type(value) is not type(first):
            return f"{key} of {name} is {value!r}, not of type {types[key]['type']}"
        if not any(_equal(value, p) for p in possible[key]):
            return f"{key} of {name} is {value!r}"
    return None


# ------------------------------------------------------------------------------------------------- values and types


def _has_type(value: Any, described: Mapping[str, Any]) -> bool:
    kind = described.get("type", "any")
    if kind not in _TYPES:
        raise ValueError(f"an argument has the type {kind!r}; known: {', '.join(_TYPES)}")
    if isinstance(value, bool) and kind not in ("boolean", "any"):
        return False
    if not isinstance(value, _TYPES[kind]):
        return False
    items = described.get("items")
    return not isinstance(value, list | tuple) or not items or all(_has_type(v, items) for v in value)


def _equal(value: Any, possible: Any) -> bool:
    """Objects hold possible values themselves, in BFCL: {"city": ["Berlin", "Berlin, Germany"]}."""
    if isinstance(value, str) and isinstance(possible, str):
        return _plain(value) == _plain(possible)
    if isinstance(value, list | tuple) and isinstance(possible, list | tuple):
        return len(value) == len(possible) and all(map(_equal, value, possible))
    if isinstance(value, dict) and isinstance(possible, dict):
        known = all(k in possible and any(_equal(v, p) for p in _choices(possible[k])) for k, v in value.items())
        return known and all(k in value or any(_is(p, "") for p in _choices(v)) for k, v in possible.items())
    if isinstance(value, bool) or isinstance(possible, bool):
        return value is possible
    return bool(value == possible)


def _is(value: Any, wanted: str) -> bool:
    return isinstance(value, str) and value == wanted


def _plain(text: str) -> str:
    return _IGNORED.sub("", text).lower().replace("'", '"')


def _choices(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


# ------------------------------------------------------------------------------------------------------- gold calls


def _gold_calls(row: Mapping[str, Any], column: str | None) -> list[tuple[str, Possible]]:
    answer = row_gold(row, column)
    if isinstance(answer, str):
        try:
            answer = json.loads(answer)
        except ValueError as error:
            raise ValueError(f"the gold answer {answer[:200]!r} is no JSON") from error
    calls = [_gold_call(item) for item in _choices(answer)]
    if not calls:
        raise ValueError("the gold answer is an empty list: a call is needed")
    return calls


def _gold_call(item: Any) -> tuple[str, Possible]:
    if not isinstance(item, Mapping):
        raise ValueError(f"a gold call is {item!r}; an object is needed")
    if "function" in item or isinstance(item.get("name"), str):
        name, arguments = json_call(item)
        return name, {key: [_only(value)] for key, value in arguments.items()}
    if len(item) != 1 or not isinstance(possible := next(iter(item.values())), Mapping):
        raise ValueError(f"a gold call is {dict(item)!r}; {{name: {{argument: [value, ...]}}}} is needed")
    for key, values in possible.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"the gold values of {key!r} are {values!r}; a list of the possible ones is needed")
    return str(next(iter(item))), dict(possible)


def _described(functions: Any) -> dict[str, Mapping[str, Any]]:
    """name -> {properties, required}, from BFCL's or OpenAI's descriptions, as objects or as JSON."""
    if isinstance(functions, str):
        functions = json.loads(functions)
    named = {}
    for item in _choices(functions):
        item = item.get("function", item) if isinstance(item, Mapping) else item
        if not isinstance(item, Mapping) or not isinstance(item.get("name"), str):
            raise ValueError(f"a function is described by {item!r}; an object with a name is needed")
        named[item["name"]] = item.get("parameters") or {}
    return named


def _only(value: Any) -> Any:
    """A plain value as the one possible, in BFCL's form."""
    if isinstance(value, list):
        return [_only(v) for v in value]
    return {k: [_only(v)] for k, v in value.items()} if isinstance(value, dict) else value


def _first(possible: Any) -> Any:
    """The first value of everything that has one; what can only be left out is."""
    if isinstance(possible, list):
        return [_first(v) for v in possible]
    if not isinstance(possible, Mapping):
        return possible
    values = {k: [p for p in _choices(v) if not _is(p, "")] for k, v in possible.items()}
    return {k: _first(v[0]) for k, v in values.items() if v}
