"""A method as a tool: its JSON schema from annotations and docstring, as OpenAI's API and chat templates take it."""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from rewards.api import PluginError
from rewards.environments import docstrings

Schema = dict[str, Any]
_PLAIN: dict[Any, str] = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
_LISTS = (list, set, frozenset, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)
_MAPS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
_REMEDY = (
    "annotate it with str, int, float, bool, None, Literal, Enum, list, dict, tuple, a TypedDict, a dataclass, or "
    "unions of them"
)


def tool_schema(function: Callable[..., Any], name: str, where: str) -> Schema:
    """{"type": "function", "function": {"name", "description", "parameters"}} of a function or a bound method.

    An optional value is `"type": [..., "null"]`; a default is shown where JSON can hold it, and makes the parameter no
    longer required. where: its place, for errors.

    Raises:
        PluginError: a parameter without annotation, of a type that JSON does not have, or that has no name.
    """
    said = docstrings.read(function)
    hints = _hints(function, name, where)
    properties: dict[str, Schema] = {}
    required = []
    for parameter in inspect.signature(function).parameters.values():
        place = f"parameter {parameter.name!r} of the tool {name!r}"
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            only = parameter.kind is parameter.POSITIONAL_ONLY
            kind = "has no name to call it by" if only else "takes any number"
            raise PluginError(f"{place} {kind}", where=where, remedy="name each parameter: a model calls by name")
        if parameter.name not in hints:
            raise PluginError(
                f"{place} has no annotation",
                where=where,
                remedy="write its type (`number: int`); a method that is no tool begins with an underscore",
            )
        try:
            schema = schema_of(hints[parameter.name])
        except TypeError as error:
            raise PluginError(f"{place}: {error}", where=where, remedy=_REMEDY) from None
        if (text := said.parameters.get(parameter.name)) is not None and text:
            schema["description"] = text
        if parameter.default is parameter.empty:
            required.append(parameter.name)
        elif (default := _json_default(parameter.default)) is not dataclasses.MISSING:
            schema["default"] = default
        properties[parameter.name] = schema
    parameters: Schema = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": said.text, "parameters": parameters}}


def _hints(function: Callable[..., Any], name: str, where: str) -> dict[str, Any]:
    try:
        return typing.get_type_hints(getattr(function, "__func__", function), include_extras=True)
    except (NameError, TypeError, AttributeError) as error:
        raise PluginError(
            f"the annotations of the tool {name!r} cannot be read: {error}",
            where=where,
            remedy="import what they name at the head of the file, not under TYPE_CHECKING",
        ) from error


def _json_default(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        value = value.value
    plain = value is None or isinstance(value, str | int | float | bool)
    if plain or (isinstance(value, list | tuple) and all(isinstance(v, str | int | float) for v in value)):
        return list(value) if isinstance(value, tuple) else value
    return {} if isinstance(value, dict) and not value else dataclasses.MISSING


def schema_of(hint: Any, within: tuple[Any, ...] = ()) -> Schema:
    """The JSON schema of a type hint; TypeError for one that JSON has no values of. within: records around it."""
    if isinstance(hint, typing.NewType):
        return schema_of(hint.__supertype__, within)
    if hint is Any:
        return {}
    if hint is None or hint in _PLAIN:
        return {"type": _PLAIN[type(None) if hint is None else hint]}
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Required, typing.NotRequired):
        return schema_of(parts[0], within)
    if origin is typing.Annotated:
        schema = schema_of(parts[0], within)
        texts = [note for note in parts[1:] if isinstance(note, str)]
        return {**schema, "description": texts[0]} if texts else schema
    if origin in (typing.Union, types.UnionType):
        return _union([schema_of(part, within) for part in parts])
    if origin is Literal:
        return _choice(list(parts))
    kind = origin or hint
    if inspect.isclass(kind):
        if issubclass(kind, enum.Enum):
            return _choice([member.value for member in kind])
        if kind in _LISTS:
            array: Schema = {"type": "array", "items": schema_of(parts[0], within)} if parts else {"type": "array"}
            return {**array, "uniqueItems": True} if kind in (set, frozenset) else array
        if kind is tuple:
            return _tuple(parts, within)
        if kind in _MAPS:
            return _map(parts, within)
        if (fields := record_fields(kind)) is not None:
            return _record(kind, fields, within)
    raise TypeError(f"a value of type {getattr(hint, '__name__', hint)} cannot be written as JSON")


def record_fields(kind: type) -> dict[str, tuple[Any, bool]] | None:
    """Of a TypedDict or a dataclass: name -> (hint, whether it is required); None of another class."""
    if typing.is_typeddict(kind):
        required: frozenset[str] = kind.__required_keys__  # type: ignore[attr-defined]
        hints = typing.get_type_hints(kind, include_extras=True)
        # under `from __future__ import annotations` NotRequired is text when the keys are sorted
        return {n: (h, n in required and typing.get_origin(h) is not typing.NotRequired) for n, h in hints.items()}
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind, include_extras=True)
        missing = dataclasses.MISSING
        return {
            f.name: (hints[f.name], f.default is missing and f.default_factory is missing)
            for f in dataclasses.fields(kind)
            if f.init
        }
    return None


def _union(options: list[Schema]) -> Schema:
    """`"type": [...]` where each is no more than a type, as chat templates print it best; `anyOf` otherwise."""
    distinct = [option for i, option in enumerate(options) if option not in options[:i]]
    if len(distinct) == 1:
        return distinct[0]
    if {} in distinct:
        return {}
    names = [option.get("type") for option in distinct]
    if all(len(option) == 1 for option in distinct):
        return {"type": names}
    others = [option for option in distinct if option != {"type": "null"}]
    if len(others) == 1 and isinstance(others[0].get("type"), str) and "enum" not in others[0]:
        return {**others[0], "type": [others[0]["type"], "null"]}
    if len(others) == 1 and "enum" in others[0] and "type" in others[0]:
        return {"type": [others[0]["type"], "null"], "enum": [*others[0]["enum"], None]}
    return {"anyOf": distinct}


def _choice(values: list[Any]) -> Schema:
    plain = [value.value if isinstance(value, enum.Enum) else value for value in values]
    strange = [value for value in plain if type(value) not in _PLAIN]
    if strange:
        raise TypeError(f"the choice {strange[0]!r} cannot be written as JSON")
    names = list(dict.fromkeys(_PLAIN[type(value)] for value in plain))
    return {"type": names[0] if len(names) == 1 else names, "enum": plain}


def _tuple(parts: tuple[Any, ...], within: tuple[Any, ...]) -> Schema:
    if not parts:
        return {"type": "array"}
    if len(parts) == 2 and parts[1] is Ellipsis:
        return {"type": "array", "items": schema_of(parts[0], within)}
    each = [schema_of(part, within) for part in parts]
    return {"type": "array", "prefixItems": each, "minItems": len(each), "maxItems": len(each)}


def _map(parts: tuple[Any, ...], within: tuple[Any, ...]) -> Schema:
    if not parts:
        return {"type": "object"}
    if parts[0] is not str:
        raise TypeError("a dict has text as keys")
    values = schema_of(parts[1], within)
    return {"type": "object", "additionalProperties": values} if values else {"type": "object"}


def _record(kind: type, fields: Mapping[str, tuple[Any, bool]], within: tuple[Any, ...]) -> Schema:
    if kind in within:
        raise TypeError(f"{kind.__name__} holds itself")
    properties = {name: schema_of(hint, (*within, kind)) for name, (hint, _) in fields.items()}
    required = [name for name, (_, needed) in fields.items() if needed]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
