"""Calls as a JSON list behind a marker: Phi-4-mini's <|tool_call|>[...]<|/tool_call|> and functools[...], Granite's
<|tool_call|>[...]."""

from __future__ import annotations

from functools import partial

from align.episodes.calls.scan import Format, Scan
from align.episodes.calls.values import BadCall


def read(scan: Scan, start: int, marker: str, *, closes: dict[str, str]) -> int:
    """See `scan.Read`. closes: what stands behind a list, by the marker before it."""
    close, before = closes.get(marker, ""), start - len(marker)
    ends = (*filter(None, (close,)), *closes)
    try:
        value, end = scan.value(start, ends)
        if close:
            end = scan.skip(end)
            if not scan.text.startswith(close, end):
                raise BadCall(f"no {close} stands behind its JSON")
        scan.objects(value)
    except BadCall as e:
        stop, what = scan.first(ends, start)
        return scan.wrong(f"{marker} without a call: {e}", before, stop + (len(close) if what == close else 0))
    return end + len(close)


_PHI = {"<|tool_call|>": "<|/tool_call|>", "functools": ""}
_GRANITE = {"<|tool_call|>": "", "<tool_call>": ""}

PHI = Format("phi", tuple(_PHI), partial(read, closes=_PHI))
GRANITE = Format("granite", tuple(_GRANITE), partial(read, closes=_GRANITE))
