"""<tool_call>{"name": ..., "arguments": {...}}</tool_call>: Hermes, Qwen 2.5 and 3, SmolLM2 and many others."""

from __future__ import annotations

from align.episodes.calls.scan import Format, Scan
from align.episodes.calls.values import BadCall

OPEN, CLOSE = "<tool_call>", "</tool_call>"


def read(scan: Scan, start: int, marker: str) -> int:
    """See `scan.Read`."""
    before = start - len(marker)
    try:
        value, end = scan.value(start, (CLOSE, OPEN))
        end = scan.skip(end)
        if not scan.text.startswith(CLOSE, end):
            raise BadCall(f"no {CLOSE} stands behind its JSON")
        scan.objects(value)
    except BadCall as e:
        stop, what = scan.first((CLOSE, OPEN), start)
        return scan.wrong(f"{marker} without a call: {e}", before, stop + len(CLOSE) * (what == CLOSE))
    return end + len(CLOSE)


FORMAT = Format("hermes", (OPEN,), read)
