"""What reaches the terminal: texts of others are shown there, and not obeyed.

An exception of a plugin, a column's name, a file's name or an answer of a model may hold control characters, with which
a terminal moves its cursor, hides lines, sets its title or the clipboard. Everything that a command prints goes through
`Screen`; what draws with such characters itself (`rich`) writes to `real(...)`, and its texts go through `shown`.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

LINE = 2000  # characters of a line of a message
_LINES = 200  # of a message

# C0 but tab and line feed, DEL, C1; what turns the direction of text, ends lines or is not seen; halves of characters
_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def shown(text: str) -> str:
    """The text with what a terminal would obey as escapes: \\x1b, \\u202e."""
    return _OBEYED.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def cut(text: str, line: int = LINE) -> str:
    """The text with its long lines, and lines without end, cut off and "..." in their place."""
    lines = text.split("\n")
    kept = [part if len(part) <= line else f"{part[: line - 3]}... ({len(part):,} characters)" for part in lines]
    if len(kept) > _LINES:
        kept[_LINES - 1 :] = [f"... ({len(lines):,} lines)"]
    return "\n".join(kept)


class Screen:
    """A text stream that shows what it is given, see `shown`, also where the terminal has no such character."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        said = shown(text)
        try:
            self.stream.write(said)
        except UnicodeEncodeError:
            encoding = self.stream.encoding or "ascii"
            self.stream.write(said.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def real(stream: TextIO) -> TextIO:
    """The stream below a Screen."""
    return stream.stream if isinstance(stream, Screen) else stream


def screen_again() -> None:
    """Put a Screen over what has taken the place of one: rich's live display redirects what is printed to itself."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, Screen):
            setattr(sys, name, Screen(stream))


@contextlib.contextmanager
def screened() -> Iterator[None]:
    """Within the block, what this process prints is shown and not obeyed."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, Screen(real(stream))) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
