"""What the built-ins share: the gold answer of a row, and the place where a completion gives its answer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rewards.api import Sample

# In this order: what a prompt loader took off the conversation, then what data sets call it.
COLUMNS = ("reference_answer", "answer", "solution", "ground_truth", "target", "label")

# Within one line and without two repeats side by side: a completion of a thousand line breaks must not take minutes.
MARKER = re.compile(
    r"####|\\boxed\s*\{|<answer>|^[ \t*]*(?:Final )?(?:A|Answer)[ \t*]*:|\banswer\s+is\b", re.IGNORECASE | re.MULTILINE
)
_WRAPPING = " \t\r\n*$`\"'“”"


def gold(sample: Sample, column: str | None) -> Any:
    """`row_gold` of the sample's row."""
    return row_gold(sample.row, column)


def row_gold(row: Mapping[str, Any], column: str | None) -> Any:
    """The row's value in `column`, or in the first of COLUMNS that it has. KeyError names the row's columns."""
    for name in COLUMNS if column is None else (column,):
        if row.get(name) is not None:
            return row[name]
    wanted = f"a column {column!r}" if column else f"one of {', '.join(COLUMNS)}"
    raise KeyError(f"the row needs {wanted}; it has: {', '.join(row) or 'none'}{_inside(row, column)}")


def _inside(row: Mapping[str, Any], column: str | None) -> str:
    """Where the answer stands inside an object (verl's `reward_model`), and what reaches it."""
    for outer, held in row.items():
        for name in COLUMNS if column is None else (column,):
            if isinstance(held, Mapping) and held.get(name) is not None:
                return f". `columns: {{{name}: {outer}.{name}}}` of the source reaches the one inside `{outer}`"
    return ""


def several(answer: Any) -> list[str]:
    """The texts of one gold answer or of a list of them. ValueError where the list is empty or holds null: nothing
    could match it, and a score of 0 would blame the completion."""
    answers = list(answer) if isinstance(answer, list | tuple) else [answer]
    if not answers or None in answers:
        raise ValueError(f"the gold answer is {answer!r}: a text, a number or a list of these is needed")
    return [str(a) for a in answers]


def gold_text(row: Mapping[str, Any], *, column: str | None = None) -> str:
    """A completion that is the gold answer itself, the first where there are several: `gold=` of the rewards that
    compare with one. It takes the plugin's arguments, as far as they matter."""
    return several(row_gold(row, column))[0]


def final_answer(text: str) -> str | None:
    """What follows the last marker (`\\boxed{}`, `<answer>`, `####`, `A:`, `Answer:`, "the answer is"): the braces or
    the tag, or the first line that is not empty. White space, quotes, `*`, `$` and a full stop around it are dropped.
    None where no marker is followed by anything."""
    end = len(text)
    for marker in reversed(list(MARKER.finditer(text))):
        said = _after(text[marker.end() : end], marker[0])
        if said:
            return said
        end = marker.start()
    return None


def _after(rest: str, marker: str) -> str:
    if marker.startswith("\\"):
        return rest[: _closing_brace(rest)].strip(_WRAPPING)
    if marker.startswith("<"):
        return re.split(r"</answer>", rest, maxsplit=1, flags=re.IGNORECASE)[0].strip(_WRAPPING)
    line = rest.strip(" \t\r\n*:").partition("\n")[0]
    return line.strip(_WRAPPING).removesuffix(".").strip(_WRAPPING)


def _closing_brace(text: str) -> int:
    """Where the brace closes that was opened before `text`; its end where none does."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return place
    return len(text)
