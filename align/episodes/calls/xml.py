"""Calls in tags, whose values are texts: Qwen3-Coder's <tool_call><function=name><parameter=key>value</parameter> and
GLM's <tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value>."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from align.data.values import shown
from align.episodes.calls.hermes import CLOSE, OPEN
from align.episodes.calls.reply import ToolCall
from align.episodes.calls.scan import Format, Scan
from align.episodes.calls.values import LONGEST, BadCall

FUNCTION, FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_KEY, _KEY_END, _VALUE, _VALUE_END = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"
_NAME = re.compile(r"[^\s<>{}\"]{1,256}")


def _named(scan: Scan, start: int, end: str, what: str) -> tuple[str, int]:
    """(the name at `start`, behind the text that ends it). Raises BadCall."""
    found = _NAME.match(scan.text, scan.skip(start))
    at = start if found is None else scan.skip(found.end())
    if found is None or not scan.text.startswith(end, at):
        raise BadCall(f"{what} is not a name and {end}")
    return found[0], at + len(end)


def _text(scan: Scan, start: int, end: str, what: str) -> tuple[str, int]:
    """(the text at `start`, behind the tag that ends it). Raises BadCall."""
    close = scan.next(end, start)
    if close == len(scan.text):
        raise BadCall(f"no {end} stands behind {what}")
    if scan.next(OPEN, start) < close and not scan.may_hold_markers():
        raise BadCall(f"{what} holds {OPEN}")
    if close - start > LONGEST:
        raise BadCall(f"{what} has {close - start} characters; at most {LONGEST}")
    return scan.text[start:close], close + len(end)


def _set(scan: Scan, arguments: dict[str, Any], tool: str, key: str, text: str) -> None:
    if key in arguments:
        raise BadCall(f"{shown(key)} stands twice in the call of {shown(tool)}")
    arguments[key] = scan.types.value(tool, key, text)


def _coder(scan: Scan, start: int, marker: str) -> tuple[ToolCall, int]:
    at = start
    if marker == OPEN:
        at = scan.skip(start)
        if not scan.text.startswith(FUNCTION, at):
            raise BadCall(f"no {FUNCTION}name> stands behind it")
        at += len(FUNCTION)
    tool, at = _named(scan, at, ">", f"what stands behind {FUNCTION}")
    arguments: dict[str, Any] = {}
    while scan.text.startswith(_PARAMETER, at := scan.skip(at)):
        key, at = _named(scan, at + len(_PARAMETER), ">", f"what stands behind {_PARAMETER}")
        text, at = _text(scan, at, _PARAMETER_END, f"the parameter {shown(key)}")
        text = text.removeprefix("\n").removesuffix("\n")  # which the template writes around each
        _set(scan, arguments, tool, key, text)
    if not scan.text.startswith(FUNCTION_END, at):
        raise BadCall(f"no {FUNCTION_END} stands behind the parameters of {shown(tool)}")
    return ToolCall(tool, arguments), at + len(FUNCTION_END)


def _glm(scan: Scan, start: int, marker: str) -> tuple[ToolCall, int]:
    name = _NAME.match(scan.text, scan.skip(start))
    if name is None:
        raise BadCall("no name stands behind it")
    tool, at = name[0], name.end()
    arguments: dict[str, Any] = {}
    while scan.text.startswith(_KEY, at := scan.skip(at)):
        key, at = _named(scan, at + len(_KEY), _KEY_END, f"what stands behind {_KEY}")
        at = scan.skip(at)
        if not scan.text.startswith(_VALUE, at):
            raise BadCall(f"no {_VALUE} stands behind the key {shown(key)}")
        text, at = _text(scan, at + len(_VALUE), _VALUE_END, f"the value of {shown(key)}")
        _set(scan, arguments, tool, key, text)
    return ToolCall(tool, arguments), at


def read(scan: Scan, start: int, marker: str, *, call: Callable[[Scan, int, str], tuple[ToolCall, int]]) -> int:
    """See `scan.Read`. call: (the call that begins there, where it ends before the tag that closes it)."""
    before = start - len(marker)
    try:
        found, end = call(scan, start, marker)
        if marker == OPEN:
            end = scan.skip(end)
            if not scan.text.startswith(CLOSE, end):
                raise BadCall(f"no {CLOSE} stands behind the call of {shown(found.name)}")
            end += len(CLOSE)
    except BadCall as e:
        stop, what = scan.first((CLOSE, OPEN), start)
        return scan.wrong(f"{marker} without a call: {e}", before, stop + len(CLOSE) * (what == CLOSE))
    scan.calls.append(found)
    return end


CODER = Format("qwen3_coder", (OPEN, FUNCTION), partial(read, call=_coder))
GLM = Format("glm", (OPEN,), partial(read, call=_glm))
