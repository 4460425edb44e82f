"""The guides as tests read them: fenced blocks with their language and file name, commands, tables, links.

A block's info string is its language and, where the reader is to save it, the name of the file: `python my_rewards.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMES = (
    "README.md",
    "align/README.md",
    "recipes/README.md",
    "rewards/README.md",
    "rollout/README.md",
    "tests/README.md",
)
_BLOCK = re.compile(r"^```(\w+)[ ]?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """line: of its first line in the guide, from 1; title: the file that it is to be saved as, or "" ."""

    guide: str
    line: int
    language: str
    title: str
    text: str

    def __str__(self) -> str:
        return f"{self.guide}:{self.line}"


def text_of(guide: str) -> str:
    return (ROOT / guide).read_text(encoding="utf-8")


def prose_of(guide: str) -> str:
    """The guide without its blocks."""
    return _BLOCK.sub("", text_of(guide))


def blocks_of(guide: str, language: str | None = None) -> list[Block]:
    text = text_of(guide)
    found = [
        Block(guide, text.count("\n", 0, match.start()) + 2, match[1], match[2], match[3])
        for match in _BLOCK.finditer(text)
    ]
    return [block for block in found if language in (None, block.language)]


def commands_of(block: Block) -> list[str]:
    """Its lines without comments, continued ones joined."""
    lines = re.sub(r"\\\n\s*", "", block.text).splitlines()
    return [line for raw in lines if (line := re.sub(r"(^|\s+)#.*", "", raw).strip())]


def section(guide: str, heading: str) -> str:
    """What stands below a heading, down to the next of any level."""
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", text_of(guide), re.MULTILINE | re.DOTALL)
    assert found, f"{guide} has no heading {heading!r}"
    return found[1]


def first_cells(text: str) -> list[str]:
    """Every word in code type in the first column of the tables of `text`."""
    rows = re.findall(r"^\| (.*?) \|", text, re.MULTILINE)
    return [word for row in rows for word in re.findall(r"`([^`]+)`", row)]


def anchors(guide: str) -> set[str]:
    """The fragments that its headings are linked by."""
    headings = re.findall(r"^#+ (.+)$", prose_of(guide), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def public() -> list[str]:
    """Dotted names of what align/README.md lists; a name without a dot stands in the module of the one before it."""
    found: list[str] = []
    for cell in first_cells(section("align/README.md", "What is public")):
        found.append(cell if "." in cell else f"{found[-1].rpartition('.')[0]}.{cell}")
    return found
