"""Tool calls, tool results and tool schemas in every spelling that is met, as the one that chat templates read.

    call     {"type": "function", "id"?, "function": {"name", "arguments": {...}}}
    schema   {"type": "function", "function": {"name", "description", "parameters": {...}}}

Calls are read as OpenAI writes them (arguments as JSON text or as an object), flat ({name, arguments | parameters |
args | input}), with the function's name beside (`{"function": "f", "args": {}}`), as Anthropic's tool_use, Gemini's
functionCall, Bedrock's toolUse, LangChain's, or as JSON text of one or of a list (LLaMA-Factory, ms-swift). Schemas:
OpenAI's, flat, Anthropic's input_schema, MCP's inputSchema, Gemini's functionDeclarations, Bedrock's toolSpec, or an
object of functions by name; any object of these also as JSON text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from align.data.records import RowError
from align.data.values import BadValue, Json

_WRAPPERS = ("functionCall", "function_call", "toolUse", "tool_use", "toolCall", "tool_call")
_NAMES = ("name", "function_name", "tool_name", "toolName", "tool", "function")
_ARGUMENTS = ("arguments", "parameters", "args", "input", "kwargs", "tool_input", "tool_arguments")
ARGUMENTS = frozenset(_ARGUMENTS)
"""Keys that hold a call's arguments."""
_IDS = ("id", "call_id", "tool_call_id", "toolUseId", "tool_use_id", "toolCallId")
_SCHEMAS = ("parameters", "input_schema", "inputSchema", "parametersJsonSchema")
_DECLARATIONS = ("functionDeclarations", "function_declarations", "tools", "functions")
_JSON_TYPES = ("object", "array", "string", "number", "integer", "boolean")  # of parameters alone, without a function
_NO_NAME = frozenset('{}[]()<>"\n')  # in what stands where a function's name is to stand, and is none


# ------------------------------------------------------------------------------------------------- calls


def calls_of(value: Any) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """(calls, keys that were not read) of one call, a list of calls, or either as JSON text. Raises RowError."""
    if isinstance(value, str):
        value = _parsed(value, "a tool call")
    calls, unread = list[dict[str, Any]](), list[str]()
    for item in value if isinstance(value, list) else [value]:
        call, more = _call(_parsed(item, "a tool call") if isinstance(item, str) else item)
        calls.append(call)
        unread += more
    return calls, tuple(unread)


def _call(value: Any) -> tuple[dict[str, Any], list[str]]:
    if not isinstance(value, dict):
        raise RowError(f"a tool call must be an object, got {_short(value)}")
    value = {name: item for name, item in value.items() if item is not None}
    value |= {name: _object(value[name], "a tool call") for name in (*_WRAPPERS, "function") if name in value}
    inner = next((value[name] for name in (*_WRAPPERS, "function") if isinstance(value.get(name), dict)), value)
    name_key = next((name for name in _NAMES if isinstance(inner.get(name), str) and inner[name]), None)
    if name_key is None or _NO_NAME.intersection(inner[name_key]):
        raise RowError(f"a tool call names no function: {_short(value)}")
    given = [name for name in _ARGUMENTS if inner.get(name) is not None]
    if len(given) > 1:
        raise RowError(f"a tool call has {' and '.join(given)}; one of them holds its arguments")
    arguments = _arguments(inner[given[0]], inner[name_key]) if given else {}
    call: dict[str, Any] = {"type": "function", "function": {"name": inner[name_key], "arguments": arguments}}
    id_key = next((name for name in _IDS if name in value), None) or next((n for n in _IDS if n in inner), None)
    if id_key is not None:
        call = {"id": value.get(id_key, inner.get(id_key)), **call}
    read = {"type", "index", "function", *_WRAPPERS, name_key, *given, id_key}
    keys = {name for part in (value, inner) for name in part if name not in read and part[name] is not None}
    return call, [f"tool call key {name!r}" for name in sorted(keys, key=str)]


def _arguments(value: Any, function: str) -> dict[str, Any]:
    """An object, whose nulls stay; JSON text is parsed, also where it was encoded twice, and "" is no argument."""
    for _ in range(2):
        if isinstance(value, str):
            value = _parsed(value, f"the arguments of {function}") if value.strip() else {}
    if not isinstance(value, dict):
        raise RowError(f"a tool call's arguments must be an object, got {_short(value)} for {function}")
    _require_json(value, f"the arguments of {function}")
    return value


def _object(value: Any, what: str) -> Any:
    """An object that stands as JSON text, as files of columns write what differs by row; all else as it is."""
    return _parsed(value, what) if isinstance(value, str) and value.lstrip().startswith("{") else value


def calls_in_text(value: Any) -> tuple[str, list[dict[str, Any]], tuple[str, ...]]:
    """(text before, calls, unread keys) of a turn that is a call: JSON, behind the thoughts that may precede it."""
    before = ""
    if isinstance(value, str) and "</think>" in value:
        head, mark, value = value.rpartition("</think>")
        before = head + mark
    if not value:
        raise RowError("a turn that is to hold a tool call is empty")
    calls, unread = calls_of(value)
    if not calls:
        raise RowError("a turn that is to hold a tool call holds none")
    return before, calls, unread


def _require_json(value: Any, what: str) -> None:
    """Raises RowError for numbers that Python reads and JSON has not: templates would write them into what is learnt,
    and no server parses such a call."""
    try:
        json.dumps(value, allow_nan=False, default=str)
    except ValueError as e:
        raise RowError(f"{what} hold a number that is not finite (NaN, Infinity, or beyond 1.8e308)") from e
    except RecursionError as e:
        raise RowError(f"{what} are nested too deeply") from e


def _parsed(text: str, what: str) -> Any:
    try:
        return Json().loads(text)
    except BadValue as e:
        raise RowError(f"{what} is {e}, in {_short(text)}" if e.line else f"{what}: {e}") from e


# ------------------------------------------------------------------------------------------------- schemas


def schemas_of(value: Any, column: str = "tools") -> tuple[Mapping[str, Any], ...]:
    """Tool schemas of a column: a list, one schema, or either as JSON text. Raises RowError."""
    if isinstance(value, str):
        value = _parsed(value, f"`{column}`") if value.strip() else None
    if value is None:
        return ()
    items = value if isinstance(value, list) else [value]
    items = [_parsed(item, f"a schema of `{column}`") if isinstance(item, str) else item for item in items]
    if not all(isinstance(item, dict) for item in items):
        raise RowError(f"`{column}` must be a list of JSON schemas, got {_short(value)}")
    _require_json(items, f"schemas of `{column}`")
    return tuple(schema for item in items for schema in _schemas(item))


def _schemas(tool: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if isinstance(tool.get("name"), str):
        return [_schema(tool)]
    declared = next((tool[name] for name in _DECLARATIONS if isinstance(tool.get(name), list)), None)
    if declared is not None:
        return [schema for one in declared for schema in schemas_of(one)]
    if tool and all(isinstance(one, dict) and {"description", *_SCHEMAS} & one.keys() for one in tool.values()):
        spec = tool.keys() <= {"function", "toolSpec", "tool_spec"}
        return [_schema(tool)] if spec else [_schema({"name": name, **one}) for name, one in tool.items()]
    return [_schema(tool)]


def _schema(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """Wrapped as a function. A server's built-in tool, which has a type or nothing to say, stays as it is."""
    specified = next((tool[name] for name in ("toolSpec", "tool_spec") if isinstance(tool.get(name), dict)), None)
    inner = specified if specified is not None else _object(tool.get("function"), "a tool's schema")
    if isinstance(inner, dict):
        more = {} if specified is not None else tool
        return {"type": "function", **more, "function": _function(inner)}
    if tool.get("type") not in (None, "function", "custom", *_JSON_TYPES):
        return tool
    if not isinstance(tool.get("name"), str):
        if "type" not in tool and not any(tool.values()):
            return tool
        raise RowError(f"a tool's schema names no function: {_short(tool)}")
    return {"type": "function", "function": _function({k: v for k, v in tool.items() if k != "type"})}


def _function(function: Mapping[str, Any]) -> dict[str, Any]:
    """A function's schema with its parameters under that name, in their place, and as an object."""
    if not isinstance(function.get("name"), str):
        raise RowError(f"a tool's schema names no function: {_short(function)}")
    key = next((name for name in _SCHEMAS if name in function), None)
    return {"parameters" if name == key else name: _parameters(v, name == key) for name, v in function.items()}


def _parameters(value: Any, are: bool) -> Any:
    """The parameters' own schema: also of JSON text, and of Bedrock's {json: schema}."""
    value = _object(value, "a tool's schema") if are else value
    return value["json"] if are and isinstance(value, dict) and list(value) == ["json"] else value


def result_text(value: Any) -> str:
    """A tool's result as text: text as it stands, null as nothing, all else as JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
