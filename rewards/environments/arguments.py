"""Whether a call's arguments fit the tool's schema, said to the model; and JSON values as the annotated types."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from rewards.environments.schemas import record_fields, schema_of

_SHOWN = 80


def check_arguments(schema: Mapping[str, Any], arguments: Any) -> str | None:
    """What is wrong with a call's arguments, in words for the model; None where nothing is.

    As JSON Schema and OpenAI's strict mode have it: 1.0 is an integer, 1 is a number, true is neither, and "3" is text:
    a model that writes numbers as text is told so. What formats without types (XML) hold is turned into values by their
    parser. Arguments that the tool does not know are wrong.

    schema: the tool's, or only its `parameters`. arguments: the call's, decoded from JSON.
    """
    parameters = schema.get("function", schema).get("parameters", schema)
    if not isinstance(arguments, Mapping):
        return f"the arguments must be an object, not {_shown(arguments)}"
    return _object({"additionalProperties": False, **parameters}, arguments, "")


def _object(schema: Mapping[str, Any], value: Mapping[str, Any], path: str) -> str | None:
    properties: Mapping[str, Any] = schema.get("properties", {})
    for name in schema.get("required", ()):
        if name not in value:
            return f"the argument `{path}{name}` is missing ({_expected(properties.get(name, {}))})"
    more = schema.get("additionalProperties", True)
    for name, item in value.items():
        if name in properties:
            inner = properties[name]
        elif more is False:
            known = ", ".join(properties) or "none"
            return f"there is no argument `{path}{name}`; there are: {known}"
        else:
            inner = more if isinstance(more, Mapping) else {}
        if (wrong := _value(inner, item, f"{path}{name}")) is not None:
            return wrong
    return None


def _value(schema: Mapping[str, Any], value: Any, path: str) -> str | None:
    refused = f"the argument `{path}` must be {_expected(schema)}, not {_shown(value)}"
    if "anyOf" in schema:
        return None if any(_value(option, value, path) is None for option in schema["anyOf"]) else refused
    if "type" in schema:
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if not any(_is(value, kind) for kind in kinds):
            return refused
    if "enum" in schema:
        same = (value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in schema["enum"])
        return None if any(same) else refused
    if isinstance(value, Mapping):
        return _object(schema, value, f"{path}.")
    if isinstance(value, list):
        return _array(schema, value, path)
    return None


def _array(schema: Mapping[str, Any], value: list[Any], path: str) -> str | None:
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
        return f"the argument `{path}` must have {schema['minItems']} items, not {len(value)}"
    each = schema.get("prefixItems") or [schema.get("items", {})] * len(value)
    wrong = (_value(inner, item, f"{path}[{i}]") for i, (inner, item) in enumerate(zip(each, value, strict=True)))
    return next((text for text in wrong if text is not None), None)


def _is(value: Any, kind: str) -> bool:
    if kind == "integer":
        return not isinstance(value, bool) and (isinstance(value, int) or (isinstance(value, float) and value % 1 == 0))
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    plain: dict[str, type] = {"string": str, "boolean": bool, "null": type(None), "array": list, "object": Mapping}
    return isinstance(value, plain[kind])


def _expected(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_expected(option) for option in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(json.dumps(choice, ensure_ascii=False) for choice in schema["enum"])
    kind = schema.get("type", "any value")
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def converted(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that fit the schema, as what the function's annotations name: members of an Enum, dataclasses, tuples,
    sets, 1.0 as int, 1 as float."""
    hints = typing.get_type_hints(getattr(function, "__func__", function))
    return {name: _as(value, hints.get(name, Any)) for name, value in arguments.items()}


def _as(value: Any, hint: Any) -> Any:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, typing.NewType):
        return _as(value, hint.__supertype__)
    if origin in (typing.Annotated, typing.Required, typing.NotRequired):
        return _as(value, parts[0])
    if origin in (typing.Union, types.UnionType):
        exact = (part for part in parts if type(value) is part)
        return _as(value, next(exact, next((part for part in parts if _suits(value, part)), Any)))
    if origin is Literal:
        return next((choice for choice in parts if isinstance(choice, enum.Enum) and choice.value == value), value)
    if hint in (int, float) and isinstance(value, int | float):
        return hint(value)
    kind = origin or hint
    if not inspect.isclass(kind):
        return value
    if issubclass(kind, enum.Enum):
        return kind(value)
    if isinstance(value, Mapping):
        return _as_mapping(value, kind, parts)
    if isinstance(value, list):
        return _as_sequence(value, kind, parts)
    return value


def _as_mapping(value: Mapping[str, Any], kind: type, parts: tuple[Any, ...]) -> Any:
    if (fields := record_fields(kind)) is None:
        return {name: _as(item, parts[1]) for name, item in value.items()} if len(parts) == 2 else dict(value)
    found = {name: _as(item, fields[name][0]) for name, item in value.items()}
    return kind(**found) if dataclasses.is_dataclass(kind) else found


def _as_sequence(value: Sequence[Any], kind: type, parts: tuple[Any, ...]) -> Any:
    if kind is tuple and parts and parts[-1] is not Ellipsis:
        return tuple(_as(item, part) for item, part in zip(value, parts, strict=True))
    items = [_as(item, parts[0]) for item in value] if parts else list(value)
    return kind(items) if kind in (tuple, set, frozenset) else items


def _suits(value: Any, hint: Any) -> bool:
    """Whether this member of a union is one that the value may stand for."""
    return _value(schema_of(hint), value, "") is None
