"""What a docstring says of a function and of each of its parameters: Google's, numpy's and Sphinx's ways of writing."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field

_PARAMETERS = ("args", "arguments", "parameters", "params")
_SECTIONS = (
    *_PARAMETERS, "returns", "return", "raises", "yields", "yield", "example", "examples", "note", "notes",
    "attributes", "see also", "references", "warnings", "other parameters",
)  # fmt: skip
_GOOGLE = re.compile(rf"({'|'.join(_SECTIONS)}):", re.IGNORECASE)
_SPHINX = re.compile(r":(param|parameter|arg|argument|key|returns?|rtype|type|raises?|yields?)\b\s*([^:]*):\s*(.*)")
_ENTRY = re.compile(r"\*{0,2}(\w+)\s*(?:\([^)]*(?:\([^)]*\)[^)]*)*\))?\s*:\s*(.*)")
_NUMPY_ENTRY = re.compile(r"\*{0,2}(\w+(?:\s*,\s*\w+)*)\s*(?::.*)?")


@dataclass
class Said:
    """text: what stands before the first section, its paragraphs joined by a blank line, lines of one paragraph by a
    space. parameters: by name, on one line each."""

    text: str = ""
    parameters: dict[str, str] = field(default_factory=dict)


def read(function: object) -> Said:
    """What the function's own docstring says."""
    lines = (inspect.getdoc(function) or "").splitlines()
    said = Said()
    text: list[str] = []
    at = 0
    while at < len(lines):
        line = lines[at].strip()
        underlined = at + 1 < len(lines) and re.fullmatch(r"\s*-{3,}\s*", lines[at + 1]) is not None
        if line.lower() in _SECTIONS and underlined:
            at = _section(lines, at + 2, line.lower() in _PARAMETERS, said, numpy=True)
        elif _GOOGLE.fullmatch(line):
            at = _section(lines, at + 1, line[:-1].lower() in _PARAMETERS, said, numpy=False)
        elif (found := _SPHINX.match(line)) is not None:
            at = _sphinx(lines, at, found, said)
        else:
            text.append(line)
            at += 1
    said.text = _paragraphs(text)
    return said


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _section(lines: list[str], at: int, wanted: bool, said: Said, *, numpy: bool) -> int:
    """Reads a section's entries; where it ends. Google's end where a line stands left of the first, numpy's at the next
    header."""
    names: list[str] = []
    own: int | None = None
    while at < len(lines):
        line, indent = lines[at], _indent(lines[at])
        if line.strip():
            own = indent if own is None else own
            next_header = at + 1 < len(lines) and re.fullmatch(r"\s*-{3,}\s*", lines[at + 1])
            if indent < own or (next_header if numpy else indent == 0):
                break
            entry = (_NUMPY_ENTRY if numpy else _ENTRY).fullmatch(line.strip()) if indent == own else None
            if entry is not None:
                names = [name.strip() for name in entry[1].split(",")]
                _add(said, names, "" if numpy else entry[2], wanted)
            else:
                _add(said, names, line.strip(), wanted)
        at += 1
    return at


def _add(said: Said, names: list[str], text: str, wanted: bool) -> None:
    for name in names if wanted else ():
        said.parameters[name] = f"{said.parameters.get(name, '')} {text}".strip()


def _sphinx(lines: list[str], at: int, found: re.Match[str], said: Said) -> int:
    wanted = found[1] in ("param", "parameter", "arg", "argument", "key") and bool(found[2].split())
    names = [found[2].split()[-1]] if wanted else []
    _add(said, names, found[3], wanted)
    own, at = _indent(lines[at]), at + 1
    while at < len(lines) and lines[at].strip() and _indent(lines[at]) > own:
        _add(said, names, lines[at].strip(), wanted)
        at += 1
    return at


def _paragraphs(lines: list[str]) -> str:
    parts = re.split(r"\n\s*\n", "\n".join(lines).strip())
    return "\n\n".join(" ".join(part.split("\n")) for part in parts)
