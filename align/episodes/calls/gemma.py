"""<|tool_call>call:name{key:<|"|>text<|"|>,other:3}<tool_call|>: Gemma 4, whose texts stand between tokens and whose
keys stand bare."""

from __future__ import annotations

import re
from typing import Any

from align.data.values import DEEPEST, shown
from align.episodes.calls.pythonic import Literals
from align.episodes.calls.reply import ToolCall
from align.episodes.calls.scan import Format, Scan
from align.episodes.calls.values import BadCall

OPEN, CLOSE, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
_HEAD = re.compile(r"\s{0,9}call:([^\s{}<>]{1,256})")
_KEY = re.compile(r"[^\s:,{}\[\]<>]{1,256}")


class _Call(Literals):
    def call(self) -> ToolCall:
        """One call. Raises BadCall."""
        name = self.match(_HEAD)
        if name is None or not self.take("{"):
            raise self.wrong("call:name{")
        return ToolCall(name[1], self.pairs(0))

    def key(self, depth: int) -> Any:
        if self.text.startswith(QUOTE, self.at):
            return self.value(depth)
        found = self.match(_KEY)
        return found and found[0]

    def value(self, depth: int) -> Any:
        """A value. Raises BadCall."""
        if depth >= DEEPEST:
            raise BadCall(f"nested more than {DEEPEST} levels deep")
        if self.take(QUOTE):
            end = self.text.find(QUOTE, self.at, self.stop)
            if end < 0:
                raise BadCall(f"no {QUOTE} stands behind the text {shown(self.text[self.at : self.at + 20])}")
            start, self.at = self.at, end + len(QUOTE)
            return self.text[start:end]
        if self.take("["):
            return self.items("]", depth)
        return self.pairs(depth) if self.take("{") else self.simple()


def read(scan: Scan, start: int, marker: str) -> int:
    """See `scan.Read`."""
    reader = _Call(scan.text, start, len(scan.text))
    try:
        call = reader.call()
        if not reader.take(CLOSE):
            raise BadCall(f"no {CLOSE} stands behind the call of {shown(call.name)}")
    except BadCall as e:
        stop, what = scan.first((CLOSE, OPEN), start)
        return scan.wrong(f"{marker} without a call: {e}", start - len(marker), stop + len(CLOSE) * (what == CLOSE))
    scan.calls.append(call)
    return reader.at


FORMAT = Format("gemma", (OPEN,), read)
