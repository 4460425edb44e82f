"""[TOOL_CALLS][{"name": ..., "arguments": {...}, "id": ...}] of Mistral's v3, and [TOOL_CALLS]name[ARGS]{...} of v11,
there with [CALL_ID]id behind the name in some."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from align.episodes.calls.reply import ToolCall
from align.episodes.calls.scan import Format, Scan
from align.episodes.calls.values import BadCall, call_of

MARKER, ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_IS_ID = re.compile(r"[A-Za-z0-9]{9}")  # the templates refuse others
_NAME = re.compile(r"[^\s\[\]{}\"<>]{1,256}")


def read(scan: Scan, start: int, marker: str) -> int:
    """See `scan.Read`."""
    before = start - len(marker)
    try:
        begin = scan.skip(start)
        calls, end = (_listed if scan.text.startswith(("[{", "[ ", "[\n", "[]"), begin) else _named)(scan, begin)
    except BadCall as e:
        return scan.wrong(f"{marker} without a call: {e}", before, scan.next(MARKER, start))
    scan.calls += [_proper(call) for call in calls]
    return end


def _listed(scan: Scan, start: int) -> tuple[list[ToolCall], int]:
    value, end = scan.value(start, (MARKER,))
    if not value:
        raise BadCall("an empty list, which calls nothing")
    return [call_of(item) for item in value], end


def _named(scan: Scan, start: int) -> tuple[list[ToolCall], int]:
    name = _NAME.match(scan.text, start)
    if name is None:
        raise BadCall("neither a list of calls nor a name stands behind it")
    at, found = name.end(), None
    if scan.text.startswith(ID, at):
        identifier = _NAME.match(scan.text, at + len(ID))
        if identifier is None:
            raise BadCall(f"no id stands behind {ID}")
        at, found = identifier.end(), identifier[0]
    if not scan.text.startswith(ARGUMENTS, at) and not scan.text.startswith("{", at):
        raise BadCall(f"no {ARGUMENTS} stands behind the name {name[0]!r}")
    at += len(ARGUMENTS) if scan.text.startswith(ARGUMENTS, at) else 0
    value, end = scan.value(at, (MARKER,))
    whole: dict[str, Any] = {"name": name[0], "arguments": value}
    return [replace(call_of(whole), id=found)], end


def _proper(call: ToolCall) -> ToolCall:
    return call if call.id is None or _IS_ID.fullmatch(call.id) else replace(call, id=None)


FORMAT = Format("mistral", (MARKER,), read)
