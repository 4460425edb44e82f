"""Values of calls: strict JSON, and texts as the types that a tool's schema gives them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from align.data.values import MOST_DIGITS, problem_of, shown
from align.episodes.calls.reply import ToolCall

LONGEST = 1 << 20  # characters of one call

_NAMES = ("name",)
_ARGUMENTS = ("arguments", "parameters")
_MORE = {"id", "type"}  # keys that some models write beside them


class BadCall(Exception):
    """Why a text is no call."""


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen = set[str]()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise BadCall(f"the key {shown(twice)} stands twice")
    return values


def _constant(text: str) -> NoReturn:
    raise BadCall(f"{text} is no JSON value")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise BadCall(f"the number {shown(text)} is not finite")
    return value


def _int(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise BadCall(f"a number of {len(digits)} digits")
    return int(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant, parse_float=_float, parse_int=_int)


def read_value(text: str) -> tuple[Any, int]:
    """(the JSON value that begins the text, where it ends). Raises BadCall."""
    start = len(text) - len(text.lstrip())
    try:
        value, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as e:
        if start == len(text):
            raise BadCall("nothing stands where JSON should") from e
        what = "it ends before it is complete" if not text[e.pos :].strip() else f"{e.msg} at character {e.pos - start}"
        raise BadCall(f"not valid JSON: {what}") from e
    except RecursionError as e:
        raise BadCall("it is nested too deeply") from e
    if end - start > LONGEST:
        raise BadCall(f"{end - start} characters; at most {LONGEST}")
    if (wrong := problem_of(value)) is not None:
        raise BadCall(wrong)
    return value, end


def call_of(value: Any) -> ToolCall:
    """A call from {"name", "arguments"}; "parameters" may stand for the latter, or neither. Raises BadCall."""
    if not isinstance(value, dict):
        raise BadCall(f'a call is an object with "name" and "arguments", not {shown(value)}')
    name = value.get("name")
    if not isinstance(name, str) or not name.strip():
        raise BadCall(f'a call has a "name", which is a text; this has {shown(sorted(value))}')
    given = [key for key in _ARGUMENTS if key in value]
    if len(given) > 1:
        raise BadCall(f'the call of {shown(name)} has "arguments" and "parameters"')
    if more := sorted(value.keys() - {*_NAMES, *_ARGUMENTS, *_MORE}):
        raise BadCall(f'the call of {shown(name)} has {shown(more[0])} beside its "name" and "arguments"')
    arguments = value[given[0]] if given else {}
    if not isinstance(arguments, dict):
        raise BadCall(f"the arguments of {shown(name)} are an object, not {shown(arguments)}")
    found = value.get("id")
    return ToolCall(name, arguments, found if isinstance(found, str) and found else None)


class Types:
    """Texts as values, by the tools' schemas: formats of tags write every value as text.

    Args:
        schemas: of the tools, as OpenAI writes them.
    """

    def __init__(self, schemas: Sequence[Mapping[str, Any]] = ()):
        self._tools: dict[str, Mapping[str, Any]] = {}
        for schema in schemas:
            function = schema.get("function", schema)
            parameters = function.get("parameters")
            known = parameters.get("properties") if isinstance(parameters, Mapping) else None
            self._tools[function.get("name", "")] = known if isinstance(known, Mapping) else {}

    def value(self, tool: str, name: str, text: str) -> Any:
        """What an argument's text stands for: itself where it is to be a text, its type is not known, or it is no
        value of that type (whoever calls the tool says so then). Raises BadCall for values that no JSON has."""
        schema = self._tools.get(tool, {}).get(name)
        kinds = _kinds(schema) if isinstance(schema, Mapping) else set[str]()
        if not kinds or kinds == {"string"}:
            return text
        bare = text.strip()
        if "boolean" in kinds and bare in ("True", "False"):  # as templates that print values write them
            return bare == "True"
        if "null" in kinds and bare in ("None", "null"):
            return None
        try:
            value, end = read_value(bare)
        except BadCall:
            if bare in ("NaN", "Infinity", "-Infinity"):
                raise
            return text
        return value if not bare[end:].strip() and _kind(value) & kinds else text


def _kinds(schema: Mapping[str, Any]) -> set[str]:
    """The JSON types that a schema allows, as far as it says so."""
    found, waiting = set[str](), [schema]
    for _ in range(1000):
        if not waiting:
            break
        one = waiting.pop()
        kind = one.get("type")
        found |= {kind} if isinstance(kind, str) else set(kind) if isinstance(kind, list) else set()
        for key in ("anyOf", "oneOf", "allOf"):
            inner = one.get(key)
            waiting += [part for part in inner if isinstance(part, Mapping)] if isinstance(inner, list) else []
        named = one.get("enum") if kind is None else None
        for value in named if isinstance(named, list) else []:
            found |= _kind(value) - {"number"}
    return found


def _kind(value: Any) -> set[str]:
    if value is None:
        return {"null"}
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, int):
        return {"integer", "number"}
    if isinstance(value, float):
        return {"number", "integer"} if value.is_integer() else {"number"}
    return {"string"} if isinstance(value, str) else {"array"} if isinstance(value, list) else {"object"}
