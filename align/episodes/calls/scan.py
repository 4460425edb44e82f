"""A text read once from its beginning to its end: thoughts, content, and at each marker a call.

A format is the markers under which it writes calls, and a function that reads what stands behind one. Every search goes
forward from where the last one ended, so that a text of nothing but markers takes no longer than another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from align.data.values import end_of_value
from align.episodes.calls.reply import Reply, ToolCall
from align.episodes.calls.values import BadCall, Types, call_of, read_value

THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|channel>thought", "<channel|>"))
_MOST_SAID = 32  # invalid calls that are told one by one
_WINDOW = 4096
_MOST_TRIES = 16  # calls of a text whose values may hold markers


def ends_in_thoughts(prompt: str) -> bool:
    """Whether a prompt's text ends within thoughts that it has begun."""
    return any(prompt.rstrip().endswith(opening) for opening, _ in THOUGHTS)


class Scan:
    """A text, what was found in it so far, and the tools' types."""

    def __init__(self, text: str, types: Types):
        self.text = text
        self.types = types
        self.calls: list[ToolCall] = []
        self._said: list[str] = []
        self._thoughts: list[str] = []
        self._invalid: list[str] = []
        self._more = 0
        self.unclosed = ""  # thoughts that the text ends within
        self._found: dict[str, tuple[int, int]] = {}
        self._tries = _MOST_TRIES

    def next(self, what: str, start: int) -> int:
        """Where `what` stands next, from `start` on; the text's length where it does not."""
        since, found = self._found.get(what, (0, -1))
        if not since <= start <= found:
            found = self.text.find(what, start)
            found = len(self.text) if found < 0 else found
            self._found[what] = (start, found)
        return found

    def first(self, these: Sequence[str], start: int) -> tuple[int, str]:
        """(where the first of these stands, which it is); the text's length and "" where none does."""
        at, _, one = min(
            ((self.next(what, start), -len(what), what) for what in these), default=(len(self.text), 0, "")
        )
        return (at, one) if at < len(self.text) else (at, "")

    def skip(self, start: int) -> int:
        """Behind the white space at `start`."""
        text = self.text
        while start < len(text) and text[start].isspace():
            start += 1
        return start

    def value(self, start: int, stops: Sequence[str]) -> tuple[Any, int]:
        """(the JSON value at `start`, where it ends). stops: markers before which it ends, if they are not within one
        of its own texts. Raises BadCall."""
        stop, _ = self.first(stops, start)
        size = _WINDOW  # what is cut out is copied, and a text may be of many values
        while True:
            try:
                value, end = read_value(self.text[start : min(stop, start + size)])
                return value, start + end
            except BadCall:
                if start + size < stop:
                    size *= 8
                    continue
                begin = self.skip(start)
                if stop == len(self.text) or self.text[begin : begin + 1] not in ("{", "["):
                    raise
                if not self.may_hold_markers():
                    raise
                end = end_of_value(self.text, begin)
                if end <= stop:
                    raise
                return read_value(self.text[begin:end])[0], end

    def may_hold_markers(self) -> bool:
        """Whether one more value may go on behind a marker: each such may read to the text's end."""
        self._tries -= 1
        return self._tries >= 0

    def say(self, start: int, end: int) -> None:
        """What stands there is content."""
        self._said.append(self.text[start:end])

    def think(self, start: int, end: int, closed: bool = True) -> None:
        """What stands there are thoughts."""
        self._thoughts.append(self.text[start:end])
        self.unclosed = "" if closed else self.text[start:end]

    def wrong(self, why: str, start: int, end: int) -> int:
        """What stands there looks like a call and is none. The place where reading goes on."""
        self.say(start, end)
        if len(self._invalid) < _MOST_SAID:
            self._invalid.append(why)
        else:
            self._more += 1
        return end

    @property
    def found(self) -> bool:
        """Whether there was a call, or what looks like one, so far."""
        return bool(self.calls or self._invalid)

    def objects(self, value: Any) -> None:
        """The calls of an object or of a list of them. Raises BadCall, and takes none then."""
        items = value if isinstance(value, list) else [value]
        if not items:
            raise BadCall("an empty list, which calls nothing")
        self.calls += [call_of(item) for item in items]

    def reply(self) -> Reply:
        """What was found in the text."""
        thoughts = "\n".join(filter(None, (part.strip() for part in self._thoughts))) if self._thoughts else None
        if self.found:
            content = "\n".join(filter(None, (part.strip() for part in self._said)))
        else:
            content = "".join(self._said)
            content = content.lstrip() if self._thoughts else content
        more = [f"and {self._more} more"] if self._more else []
        return Reply(content, thoughts, tuple(self.calls), (*self._invalid, *more))


Read = Callable[[Scan, int, str], int]
"""(the scan, the character behind a marker, the marker) -> where reading goes on."""
Bare = Callable[[Scan, int], int | None]
"""(the scan, the first character of the content) -> where reading goes on; None where no call stands there."""


@dataclass(frozen=True)
class Format:
    """A format of calls. markers: what begins a call; read: reads what stands behind one; bare: reads a call that no
    marker begins, where content begins; types: of the tools' arguments; thinking: whether the template's generation
    prompt begins the thoughts."""

    name: str
    markers: tuple[str, ...]
    read: Read
    bare: Bare | None = None
    types: Types = field(default_factory=Types)
    thinking: bool = False

    def parse(self, text: str, thinking: bool | None = None) -> Reply:
        """See `CallFormat`."""
        scan = Scan(text, self.types)
        thinking = self.thinking if thinking is None else thinking
        at = _leading(scan, thinking, self.markers, self.bare is not None)
        if self.bare is not None:
            at = self._bare(scan, at)
        opens = dict(THOUGHTS)
        while True:
            found, what = scan.first((*self.markers, *opens), at)
            scan.say(at, found)
            if not what:
                return _with_unclosed(scan.reply(), scan.unclosed, self.markers)
            behind = found + len(what)
            at = _thoughts(scan, behind, opens[what]) if what in opens else self.read(scan, behind, what)

    def _bare(self, scan: Scan, at: int) -> int:
        """Behind the thoughts that the text begins with, and the call that stands there without a marker."""
        opens = dict(THOUGHTS)
        while True:
            begin = scan.skip(at)
            found, what = scan.first(tuple(opens), begin)
            if not what or found != begin:
                break
            at = _thoughts(scan, found + len(what), opens[what])
        assert self.bare is not None
        end = self.bare(scan, begin)
        return at if end is None else end

    def of(self, schemas: Sequence[Mapping[str, Any]], thinking: bool = False) -> Format:
        """The format for these tools."""
        return Format(self.name, self.markers, self.read, self.bare, Types(schemas), thinking)


def _with_unclosed(reply: Reply, thoughts: str, markers: Sequence[str]) -> Reply:
    """The reply, which says of a call in thoughts without an end that it was none."""
    if reply.calls or not any(marker in thoughts for marker in markers):
        return reply
    why = "thoughts that do not end hold a call, which was not made: end them before it"
    return replace(reply, invalid=(*reply.invalid, why))


def _leading(scan: Scan, thinking: bool, markers: Sequence[str], bare: bool) -> int:
    """Behind thoughts that the prompt has begun, or that nothing begins."""
    close, what = scan.first([closing for _, closing in THOUGHTS], 0)
    if thinking:
        begin = scan.skip(0)
        begin += next((len(opening) for opening, _ in THOUGHTS if scan.text.startswith(opening, begin)), 0)
        scan.think(begin, max(begin, close), bool(what))
        return close + len(what)
    if not what or scan.first([*markers, *(opening for opening, _ in THOUGHTS)], 0)[0] < close:
        return 0
    if bare and scan.text[scan.skip(0)] in "{[":
        return 0
    scan.think(0, close)
    return close + len(what)


def _thoughts(scan: Scan, start: int, closing: str) -> int:
    close = scan.next(closing, start)
    scan.think(start, close, close < len(scan.text))
    return min(len(scan.text), close + len(closing))


def _none(scan: Scan, start: int, marker: str) -> int:
    raise AssertionError("no marker begins a call here")


PLAIN = Format("plain", (), _none)
"""Of replies to environments without tools: thoughts are split off, and nothing is a call."""
