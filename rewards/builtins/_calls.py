"""Function calls in a completion: JSON as chat templates and APIs write it, or Python's call syntax."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

Call = tuple[str, dict[str, Any]]  # the function's name, dotted where it has a module; its arguments by name

_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_FENCED = re.compile(r"```(?:json|python|tool_code)?\s*\n?(.*?)```", re.DOTALL)
_ARGUMENTS = ("arguments", "parameters", "args")
_LONGEST = 20_000  # characters; deeper nesting than any call would overflow the parsers


def parse_calls(text: str) -> list[Call]:
    """The calls that a completion makes, in order.

    Read from `<tool_call>` blocks (Hermes, Qwen), else from the last code fence, else from the whole text, each as JSON
    ({"name", "arguments"}, OpenAI's {"function": {...}} with arguments as text, or a list of these) or as Python
    (`f(a=1)`, or a list of calls).

    Raises:
        ValueError: no call there, or one that cannot be read; the message says why.
    """
    if len(text) > _LONGEST:
        raise ValueError(f"a completion of {len(text)} characters is no call")
    tagged = _TAGGED.findall(text)
    if tagged:
        return [call for block in tagged for call in _block(block.strip())]
    fenced = _FENCED.findall(text)
    return _block((fenced[-1] if fenced else text).strip())


def _block(text: str) -> list[Call]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return _python(text)
    calls = [json_call(item) for item in (found if isinstance(found, list) else [found])]
    if not calls:
        raise ValueError("an empty list: no call")
    return calls


def json_call(item: Any) -> Call:
    """A call from {"name", "arguments"} or {"function": {"name", "arguments"}}. ValueError where it is neither."""
    if isinstance(item, Mapping) and isinstance(item.get("function"), Mapping):
        item = item["function"]
    if not isinstance(item, Mapping) or not isinstance(item.get("name"), str):
        raise ValueError('no {"name", "arguments"}')
    arguments: Any = next((item[key] for key in _ARGUMENTS if key in item), {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the arguments of {item['name']} are no JSON") from error
    if not isinstance(arguments, Mapping):
        raise ValueError(f"the arguments of {item['name']} are no object")
    return item["name"], dict(arguments)


def _python(text: str) -> list[Call]:
    try:
        body = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError("neither JSON nor a Python call") from error
    nodes = body.elts if isinstance(body, ast.List | ast.Tuple) else [body]
    if not nodes:
        raise ValueError("an empty list: no call")
    return [_python_call(node) for node in nodes]


def _python_call(node: ast.expr) -> Call:
    """Arguments by position are refused, as BFCL ignores them: their names are what is asked for."""
    if not isinstance(node, ast.Call):
        raise ValueError("no Python call")
    if node.args or any(k.arg is None for k in node.keywords):
        raise ValueError("arguments without a name")
    try:
        arguments = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
    except (ValueError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError("an argument that is no literal") from error
    return ast.unparse(node.func), arguments
