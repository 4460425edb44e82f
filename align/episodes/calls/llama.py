"""{"name": ..., "parameters": {...}} as the whole of a turn, also behind <|python_tag|>: Llama 3.1 and later. Several
calls stand one behind the other, with or without a semicolon."""

from __future__ import annotations

import re

from align.episodes.calls.scan import Format, Scan
from align.episodes.calls.values import BadCall

TAG = "<|python_tag|>"
_LIKE = re.compile(r'\{\s*"(?:name"\s*:|type"\s*:\s*"function")')
_KEYS = {"parameters", "arguments"}


def read(scan: Scan, start: int, marker: str) -> int:
    """See `scan.Read`."""
    before, stop = start - len(marker), scan.next(TAG, start)
    try:
        value, end = scan.value(start, (TAG,))
        scan.objects(value)
    except BadCall as e:
        return scan.wrong(f"{marker} without a call: {e}", before, stop)
    return _more(scan, end)


def bare(scan: Scan, start: int) -> int | None:
    """See `scan.Bare`. An object that has no parameters is an answer in JSON and no call."""
    if not scan.text.startswith("{", start):
        return None
    try:
        value, end = scan.value(start, (TAG,))
    except BadCall as e:
        like = _LIKE.match(scan.text, start)
        return scan.wrong(f"what begins like a call is none: {e}", start, scan.next(TAG, start)) if like else None
    if not isinstance(value, dict) or "name" not in value or not _KEYS & value.keys():
        return None
    try:
        scan.objects(value)
    except BadCall as e:
        return scan.wrong(str(e), start, end)
    return _more(scan, end)


def _more(scan: Scan, at: int) -> int:
    """Behind the calls that follow one: objects alone, each of which must be a call."""
    while True:
        begin = scan.skip(at)
        begin = scan.skip(begin + 1) if scan.text.startswith(";", begin) else begin
        if not scan.text.startswith("{", begin):
            return at
        try:
            value, end = scan.value(begin, (TAG,))
            scan.objects(value)
        except BadCall as e:
            return scan.wrong(f"behind a call, what is none: {e}", begin, scan.next(TAG, begin))
        at = end


FORMAT = Format("llama", (TAG,), read, bare)
