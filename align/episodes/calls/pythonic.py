"""[f(a=1, b="x"), g()] as Python writes calls, at a turn's beginning or between markers: Llama 4 and 3.2, LFM2."""

from __future__ import annotations

import math
import re
from typing import Any

from align.data.values import DEEPEST, MOST_DIGITS, shown
from align.episodes.calls.reply import ToolCall
from align.episodes.calls.scan import Format, Scan
from align.episodes.calls.values import LONGEST, BadCall

_CLOSES = {"<|python_start|>": "<|python_end|>", "<|tool_call_start|>": "<|tool_call_end|>"}
_ENDS = ("<|python_end|>", "<|tool_call_end|>")
_BEGINS = re.compile(r"\[\s{0,99}[A-Za-z_][\w.\-]{0,255}\(")
_SPACE = re.compile(r"\s*")
_NAME = re.compile(r"[A-Za-z_][\w.\-]{0,255}")
_KEY = re.compile(r"[^\W\d]\w{0,255}")
_NUMBER = re.compile(r"[+-]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][+-]?\d+)?")
_TEXT = re.compile(r"'((?:[^'\\\n]|\\.)*+)'|\"((?:[^\"\\\n]|\\.)*+)\"", re.S)
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.S)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0", "\n": ""}
_WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}


class Literals:
    """Literals, read one behind the other. `ast` would take a hundred times the text's memory for it."""

    def __init__(self, text: str, start: int, stop: int):
        self.text, self.at, self.stop = text, start, min(stop, start + LONGEST)

    def take(self, what: str) -> bool:
        """Whether it stands here, behind which reading goes on."""
        self.space()
        found = self.text.startswith(what, self.at, self.stop)
        self.at += len(what) if found else 0
        return found

    def space(self) -> None:
        """Goes on behind white space."""
        found = _SPACE.match(self.text, self.at, self.stop)
        self.at = found.end() if found else self.at

    def match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """What stands here behind white space, behind which reading goes on."""
        self.space()
        found = pattern.match(self.text, self.at, self.stop)
        self.at = found.end() if found else self.at
        return found

    def wrong(self, wanted: str) -> BadCall:
        """The error that something is not here."""
        here = self.text[self.at : min(self.stop, self.at + 20)]
        return BadCall(f"{wanted} is missing before {shown(here) if here else 'its end'}")

    def value(self, depth: int) -> Any:
        """A literal. Raises BadCall."""
        if depth >= DEEPEST:
            raise BadCall(f"nested more than {DEEPEST} levels deep")
        if self.take("["):
            return self.items("]", depth)
        if self.take("("):
            return self.items(")", depth)
        if self.take("{"):
            return self.pairs(depth)
        if (found := self.match(_TEXT)) is not None:
            texts = [_unescaped(found)]
            while (found := self.match(_TEXT)) is not None:  # Python joins texts that stand side by side
                texts.append(_unescaped(found))
            return "".join(texts)
        return self.simple()

    def key(self, depth: int) -> Any:
        """The key of an object, which is refused where it is no text."""
        return self.value(depth)

    def simple(self) -> Any:
        """A number, or a word for a value. Raises BadCall."""
        if (found := self.match(_NUMBER)) is not None:
            return _number(found[0])
        if (found := self.match(_KEY)) is not None and found[0] in _WORDS:
            return _WORDS[found[0]]
        raise self.wrong("a value")

    def items(self, close: str, depth: int) -> list[Any]:
        """What a list holds, up to its end. Raises BadCall."""
        found: list[Any] = []
        while not self.take(close):
            if found and not self.take(","):
                raise self.wrong(f"`,` or `{close}`")
            if found and self.take(close):
                break
            found.append(self.value(depth + 1))
        return found

    def pairs(self, depth: int) -> dict[str, Any]:
        """What an object holds, up to its end. Raises BadCall."""
        found: dict[str, Any] = {}
        while not self.take("}"):
            if found and not self.take(","):
                raise self.wrong("`,` or `}`")
            if found and self.take("}"):
                break
            key = self.key(depth + 1)
            if not isinstance(key, str) or not self.take(":"):
                raise self.wrong("a key that is a text, and `:`")
            if key in found:
                raise BadCall(f"the key {shown(key)} stands twice")
            found[key] = self.value(depth + 1)
        return found


class _Python(Literals):
    """Calls with literals for arguments."""

    def calls(self) -> list[ToolCall]:
        """A list of calls, or one alone. Raises BadCall."""
        if not self.take("["):
            return [self.call()]
        found = [self.call()]
        while self.take(","):
            if self.take("]"):
                return found
            found.append(self.call())
        if not self.take("]"):
            raise self.wrong("`]`")
        return found

    def call(self) -> ToolCall:
        """One call. Raises BadCall."""
        name = self.match(_NAME)
        if name is None or not self.take("("):
            raise self.wrong("a call")
        arguments: dict[str, Any] = {}
        while not self.take(")"):
            if arguments and not self.take(","):
                raise self.wrong("`,` or `)`")
            if arguments and self.take(")"):
                break
            key = self.match(_KEY)
            if key is None or not self.take("="):
                raise self.wrong(f"an argument's name in the call of {shown(name[0])}")
            if key[0] in arguments:
                raise BadCall(f"{shown(key[0])} stands twice in the call of {shown(name[0])}")
            arguments[key[0]] = self.value(0)
        return ToolCall(name[0], arguments)


def _unescaped(found: re.Match[str]) -> str:
    text = found[1] if found[1] is not None else found[2]
    if "\\" in text:
        text = _ESCAPE.sub(_character, text)
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise BadCall("half a character, which no text can hold")
    return text


def _character(found: re.Match[str]) -> str:
    code = found[1] or found[2] or found[3]
    if code is not None:
        if int(code, 16) > 0x10FFFF:
            raise BadCall(f"no character has the number {code}")
        return chr(int(code, 16))
    one = found[4]
    return _ESCAPED.get(one, one if one in "\\'\"" else "\\" + one)


def _number(text: str) -> int | float:
    if len(text) > MOST_DIGITS:
        raise BadCall(f"a number of {len(text)} digits")
    text = text.replace("_", "").removeprefix("+")
    try:
        return int(text)
    except ValueError:
        value = float(text)
    if not math.isfinite(value):
        raise BadCall(f"the number {shown(text)} is not finite")
    return value


def read(scan: Scan, start: int, marker: str) -> int:
    """See `scan.Read`."""
    close, before = _CLOSES[marker], start - len(marker)
    python = _Python(scan.text, start, len(scan.text))
    try:
        calls = python.calls()
        if not python.take(close):
            raise BadCall(f"no {close} stands behind it")
    except BadCall as e:
        stop, what = scan.first((close, *_CLOSES), start)
        return scan.wrong(f"{marker} without a call: {e}", before, stop + len(close) * (what == close))
    scan.calls += calls
    return python.at


def bare(scan: Scan, start: int) -> int | None:
    """See `scan.Bare`."""
    if _BEGINS.match(scan.text, start) is None:
        return None
    python = _Python(scan.text, start, len(scan.text))
    try:
        scan.calls += python.calls()
    except BadCall as e:
        return scan.wrong(f"what begins like calls is none: {e}", start, scan.first((*_CLOSES, *_ENDS), start)[0])
    return python.at


FORMAT = Format("pythonic", tuple(_CLOSES), read, bare)
