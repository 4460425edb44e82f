"""What an environment's methods returned, as what is sent: answers of tools, turns, states."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

PARTS = ("text", "image", "image_url", "input_image", "input_audio", "audio", "audio_url", "video", "video_url", "file")
_IMAGES = ("image", "image_url", "input_image")
MAX_IMAGE_BYTES = 8 << 20
"""Of one image, compressed: what a screen shows is a tenth of it."""
MAX_IMAGES_BYTES = 24 << 20
"""Of all images of one answer as they are sent, which is four thirds of their own."""
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")


def answer(value: Any, trl: bool) -> Any:
    """Of a tool: text as it is, "" for None, OpenAI's content parts, JSON text of other plain values. An image of PIL
    is a part, alone or in a list with texts; every image goes as bytes in a data URL.

    TypeError names a type that has no such text. trl: `str` of whatever is no list, as TRL's trainer has it.
    """
    value = _with_pictures(value)
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
    """Of `reset` and `respond`: text, a list of messages, one message as a list; content parts and images are one of
    the user's. TypeError otherwise."""
    value = _with_pictures(value)
    if is_parts(value):
        return [{"role": "user", "content": [_part(part) for part in value]}]
    if value is None or isinstance(value, str):
        return value
    items: Any = [value] if isinstance(value, Mapping) else value
    if isinstance(items, list | tuple) and all(isinstance(item, Mapping) for item in items):
        return [_message(dict(item)) for item in items]
    raise TypeError(f"returned a {type(value).__name__} where text, a list of messages or None is needed")


def _message(item: dict[str, Any]) -> dict[str, Any]:
    if "role" in item:
        content = _with_pictures(item.get("content"))
        return {**item, "content": [_part(part) for part in content]} if is_parts(content) else item
    if item.get("type") in PARTS:
        return {"role": "user", "content": [_part(item)]}
    raise TypeError(f"returned {str(item)[:100]}, which is no message: it has no `role`")


def _with_pictures(value: Any) -> Any:
    """An image, or a list of images, texts and parts of which one at least is an image, as content parts; whatever else
    as it is."""
    items = value if isinstance(value, list | tuple) else [value]
    if not any(_is_picture(item) or _is_image_part(item) for item in items):
        return value
    made: list[Any] = []
    for item in items:
        if _is_picture(item):
            made.append({"type": "image", "image": item})
        else:
            made.append({"type": "text", "text": item} if isinstance(item, str) else item)
    return made


def _is_image_part(value: Any) -> bool:
    return isinstance(value, dict) and value.get("type") in _IMAGES and ("image" in value or "image_url" in value)


def _is_picture(value: Any) -> bool:
    """An image of PIL, without importing it."""
    return hasattr(value, "save") and hasattr(value, "mode")


def _part(part: dict[str, Any]) -> dict[str, Any]:
    """A part with its image as a data URL, read here if it is a file: what reads it later has other folders, and would
    have to trust the path. Addresses, and parts of other kinds, are as they are.

    ValueError where an image is larger than may be sent; OSError where a file cannot be read."""
    if part.get("type") not in _IMAGES:
        return part
    given = part.get("image", part.get("image_url"))
    source = given.get("url") if isinstance(given, Mapping) else given
    if isinstance(source, str) and source[:5].lower() == "data:":
        _bounded(len(source) * 3 // 4)
        return {"type": "image", "image": source}
    if isinstance(source, str) and source[:8].lower().startswith(("http://", "https://")):
        return {"type": "image", "image": source}
    return {"type": "image", "image": f"data:;base64,{base64.b64encode(_image_bytes(source)).decode()}"}


def _image_bytes(source: Any) -> bytes:
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        _bounded(path.stat().st_size)
        return path.read_bytes()
    if isinstance(source, bytes | bytearray | memoryview):
        _bounded(len(source))
        return bytes(source)
    if not _is_picture(source):
        raise TypeError(f"an image is one of PIL, a path, bytes or a data URL, not a {type(source).__name__}")
    data = io.BytesIO()
    picture = source if source.mode in _PNG_MODES else source.convert("RGB")
    picture.save(data, format="PNG")
    _bounded(data.tell())
    return data.getvalue()


def image_bytes(value: Any) -> int:
    """How much of an answer is images."""
    if isinstance(value, list):
        return sum(map(image_bytes, value))
    if not isinstance(value, dict):
        return 0
    source = value.get("image") if value.get("type") == "image" else None
    return len(source) if isinstance(source, str) else image_bytes(value.get("content"))


def _bounded(size: int) -> None:
    if size > MAX_IMAGE_BYTES:
        raise ValueError(f"an image of {size:,} bytes; {MAX_IMAGE_BYTES:,} are the most: make it smaller")


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
