"""What an environment's methods returned, as what is sent: answers of tools, turns, states."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from collections.abc import Mapping
from typing import Any, TypeGuard

PARTS = ("text", "image", "image_url", "input_image", "input_audio", "audio", "audio_url", "video", "video_url", "file")


def answer(value: Any, trl: bool) -> Any:
    """Of a tool: text as it is, "" for None, OpenAI's content parts as they are, JSON text of other plain values.

    TypeError names a type that has no such text. trl: `str` of whatever is no list, as TRL's trainer has it.
    """
    if is_parts(value) or (trl and isinstance(value, list) and all(isinstance(item, dict) for item in value)):
        return [_part(part) for part in value]
    if isinstance(value, str):
        return value
    if trl:
        return str(value)
    return "" if value is None else json.dumps(plain(value), ensure_ascii=False)


def is_parts(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    """Whether it is a list of OpenAI's content parts, such as {"type": "text", "text": ...}."""
    return bool(isinstance(value, list) and value) and all(
        isinstance(part, dict) and part.get("type") in PARTS for part in value
    )


def turn(value: Any) -> str | list[Any] | None:
    """Of `reset` and `respond`: text, a list of messages (or parts), one message as a list; TypeError otherwise."""
    if value is None or isinstance(value, str):
        return value
    items: Any = [value] if isinstance(value, Mapping) else value
    if isinstance(items, list | tuple) and all(isinstance(item, Mapping) for item in items):
        return [_message(dict(item)) for item in items]
    raise TypeError(f"returned a {type(value).__name__} where text, a list of messages or None is needed")


def _message(item: dict[str, Any]) -> dict[str, Any]:
    if "role" in item:
        content = item.get("content")
        return {**item, "content": [_part(part) for part in content]} if is_parts(content) else item
    if item.get("type") in PARTS:
        return _part(item)
    raise TypeError(f"returned {str(item)[:100]}, which is no message: it has no `role`")


def _part(part: dict[str, Any]) -> dict[str, Any]:
    """A part whose image is an object of PIL carries it as a PNG in a data URL; others as they are."""
    image = part.get("image")
    if image is None or not (hasattr(image, "save") and hasattr(image, "mode")):
        return part
    data = io.BytesIO()
    image.save(data, format="PNG")
    url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def well_formed(value: Any) -> Any:
    """Plain JSON with texts that UTF-8 can write: halves of surrogate pairs are joined, what is left alone of one
    becomes U+FFFD. Neither a tokenizer nor a file takes such text, which websites hold."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {well_formed(name): well_formed(item) for name, item in value.items()}
    return [well_formed(item) for item in value] if isinstance(value, list) else value


def plain(value: Any) -> Any:
    """What JSON can hold, of dataclasses, sets and numpy's values too. TypeError names another type."""
    if value is None or isinstance(value, str | int | float):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {_key(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return [plain(item) for item in sorted(value)]
    if hasattr(value, "tolist"):  # numpy and torch, without importing them
        return value.tolist()
    raise TypeError(
        f"returned a {type(value).__name__}; what can be sent is text, numbers, lists, dicts, dataclasses, content "
        "parts, or None"
    )


def _key(name: Any) -> Any:
    if name is None or isinstance(name, str | int | float):
        return name
    raise TypeError(f"returned a dict with a {type(name).__name__} as key")


def attributes(thing: Any) -> dict[str, Any]:
    """An object's public attributes, those that JSON can hold."""
    found = {}
    for name, value in vars(thing).items() if hasattr(thing, "__dict__") else ():
        try:
            if not name.startswith("_"):
                found[name] = plain(value)
        except (TypeError, ValueError, RecursionError):
            continue
    return found
