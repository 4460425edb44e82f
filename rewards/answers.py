"""Whether what a plugin's process sent is an answer to what it was asked. ProtocolError where it is none: the process
is shared with the plugin, whose code may have written it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rewards.plugin import SHOWN_OPTIONS
from rewards.wire import ProtocolError


def checked_start(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """The answer to the start message: {"ready": `Plugin.describe`} or {"broken": what a PluginError says}."""
    if "broken" in answer:
        broken = answer["broken"]
        _need(isinstance(broken, dict) and isinstance(broken.get("what"), str), "a start that says not what is broken")
        _need(broken.keys() == {"what", "where", "remedy"}, "a start that says not what is broken")
        return answer
    ready = answer.get("ready")
    _need(isinstance(ready, dict), "a start that is neither ready nor broken")
    assert isinstance(ready, dict)
    kinds = {"name": str, "objectives": dict, "scope": str, "options": dict, "is_async": bool, "args": dict}
    for key, kind in kinds.items():
        _need(isinstance(ready.get(key), kind), f"a description without {key!r}")
    _need(ready["options"].keys() == set(SHOWN_OPTIONS), "a description without all its options")
    return answer


def checked_scores(answer: Mapping[str, Any], samples: int, objectives: int) -> None:
    """The answer to a call for samples: scores of every one, or why there are none."""
    if _is_error(answer):
        return
    _need(_is_number(answer.get("seconds")), "no `seconds`")
    values = answer.get("values")
    _need(_is_list(values, samples), f"no `values` of {samples} samples")
    for row in values:  # type: ignore[union-attr]
        _need(_is_list(row, objectives), f"values that are not those of {objectives} objectives")
        _need(all(value is None or _is_number(value) for value in row), "a value that is no number")
    for item in _list(answer, "errors"):
        _need(_is_list(item, 4), "an error that is none")
        index, objective, cause, message = item
        _need(_is_index(index, samples) and (objective == -1 or _is_index(objective, objectives)), "an error of nobody")
        _need(isinstance(cause, str) and isinstance(message, str), "an error without words")
    for item in _list(answer, "infos"):
        _need(_is_list(item, 2) and _is_index(item[0], samples) and isinstance(item[1], dict), "an info of nobody")
    for item in _dict(answer, "metrics").values():
        _need(_is_list(item, 2) and all(map(_is_number, item)) and item[1] > 0, "a metric that is no number")
    for item in _dict(answer, "columns").values():
        _need(_is_list(item, samples), f"a column of other than {samples} samples")


def checked_golds(answer: Mapping[str, Any], rows: int) -> None:
    """The answer to a call for gold answers."""
    if _is_error(answer):
        return
    golds = answer.get("golds")
    _need(_is_list(golds, rows), f"no `golds` of {rows} rows")
    for item in golds:  # type: ignore[union-attr]
        _need(_is_list(item, 2) and all(part is None or isinstance(part, str) for part in item), "a gold that is none")


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise ProtocolError(f"an answer with {what}")


def _is_error(answer: Mapping[str, Any]) -> bool:
    error = answer.get("error")
    if error is None:
        return False
    _need(_is_list(error, 2) and all(isinstance(part, str) for part in error), "an error without words")
    return True


def _is_list(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_index(value: Any, end: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < end


def _list(answer: Mapping[str, Any], key: str) -> list[Any]:
    found = answer.get(key)
    _need(isinstance(found, list), f"no list {key!r}")
    assert isinstance(found, list)
    return found


def _dict(answer: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = answer.get(key)
    _need(isinstance(found, dict), f"no object {key!r}")
    assert isinstance(found, dict)
    return found
