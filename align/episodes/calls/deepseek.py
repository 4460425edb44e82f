"""Between <｜tool▁calls▁begin｜> and <｜tool▁calls▁end｜>, one call or more of <｜tool▁call▁begin｜> ...
<｜tool▁call▁end｜>. V3 and R1 write `function<｜tool▁sep｜>name` and JSON in a fence, V3.1 a name, <｜tool▁sep｜> and
JSON."""

from __future__ import annotations

import re

from align.episodes.calls.scan import Format, Scan
from align.episodes.calls.values import BadCall, call_of

ALL, ALL_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
ONE, ONE_END, MIDDLE = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
_STOPS = (ONE_END, ONE, ALL_END, ALL)
_NAME = re.compile(r"\s{0,9}([^\s<>{}`\"]{1,256})")
_FENCED = re.compile(r"([^\s<>{}`\"]{1,256})\s{0,9}```(?:json)?\s{0,9}")


def read(scan: Scan, start: int, marker: str) -> int:
    """See `scan.Read`."""
    before = start - len(marker)
    if marker == ALL_END:
        return start if scan.found else scan.wrong(f"{marker} ends calls that nothing began", before, start)
    if marker == ALL:
        begin = scan.skip(start)
        return begin if scan.text.startswith(ONE, begin) else scan.wrong(f"no {ONE} behind {marker}", before, start)
    try:
        return _call(scan, start)
    except BadCall as e:
        stop, what = scan.first(_STOPS, start)
        return scan.wrong(f"{marker} without a call: {e}", before, stop + len(ONE_END) * (what == ONE_END))


def _call(scan: Scan, start: int) -> int:
    head = _NAME.match(scan.text, start)
    if head is None or not scan.text.startswith(MIDDLE, head.end()):
        raise BadCall(f"no name and {MIDDLE} stand behind it")
    at = head.end() + len(MIDDLE)
    fenced = _FENCED.match(scan.text, at)
    name, at = (fenced[1], fenced.end()) if fenced else (head[1], at)
    value, end = scan.value(at, _STOPS)
    end = scan.skip(end)
    if fenced:
        if not scan.text.startswith("```", end):
            raise BadCall("the fence around its JSON is not closed")
        end = scan.skip(end + 3)
    if not scan.text.startswith(ONE_END, end):
        raise BadCall(f"no {ONE_END} stands behind its JSON")
    scan.calls.append(call_of({"name": name, "arguments": value}))
    return end + len(ONE_END)


FORMAT = Format("deepseek", (ALL, ONE, ALL_END), read)
