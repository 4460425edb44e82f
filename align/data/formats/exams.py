"""Prompts of public exams whose turns are the user's alone.

    question_id, turns: [text, ...] [reference]       MT-Bench; Arena-Hard's turns are objects with a content
    question: [[{role, content}]] [function]          BFCL: the first list is the first turn, `function` its tools

The first turn is the prompt. MT-Bench's later ones ask about an answer that nobody gave yet: they are named as not
read. BFCL's later lists are refused, since its answers are checked after the last of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align.data.formats.base import Layout, Row, is_list_of, tools_of
from align.data.formats.messages import read_messages, with_system
from align.data.formats.tools import schemas_of
from align.data.records import Message, Prompt, RowError, prompt_from

_LATER = (
    "a later turn of the user, as which a further text of `turns` is taken (of a dialogue of two the column would be "
    "`messages`),"
)
_ANSWERED_BY = ("model_id", "answer_id", "model", "model_name", "choices", "tstamp")


def _first_turn(row: Row) -> Prompt:
    if (by := next((name for name in _ANSWERED_BY if row.get(name) is not None), None)) is not None:
        raise RowError(f"`{by}` beside `turns`: they are what a model answered, and no prompt is in the row")
    first, *later = (_asked(turn) for turn in row["turns"])
    asked = with_system(row, (Message("user", first, unread=(_LATER,) * len(later)),))
    reference = row.get("reference")
    known = reference[0] if isinstance(reference, list) and reference else reference
    return prompt_from(asked, known if isinstance(known, str) else (), tools_of(row))


def _asked(turn: Any) -> str:
    text = turn.get("content") if isinstance(turn, Mapping) else turn
    if not isinstance(text, str):
        raise RowError(f"a turn must be text, or an object with a `content`, got {str(turn)[:60]}")
    return text


def _turns_fit(row: Row) -> bool:
    turns = row["turns"]
    if not isinstance(turns, list) or not turns:
        return False
    return all(isinstance(one, str) or (isinstance(one, Mapping) and list(one) == ["content"]) for one in turns)


def _calls(row: Row) -> Prompt:
    first, *later = row["question"]
    if later:
        raise RowError(
            f"`question` has {len(later) + 1} turns, which are asked one after the other: a stage asks once. Leave "
            "the row out, or name a generator that plays them"
        )
    if row.get("function") and (row.get("tools") or row.get("functions")):
        raise RowError("the row has tools in `function` and beside it; one of them holds its tools")
    tools = schemas_of(row["function"], "function") if row.get("function") else tools_of(row)
    return prompt_from(with_system(row, read_messages(first, "question")), (), tools)


def _calls_fit(row: Row) -> bool:
    turns = row["question"]
    return isinstance(turns, list) and bool(turns) and is_list_of(turns[0], "role", "content")


LAYOUTS = (
    Layout(
        "mt-bench, the first turn", ("mt-bench",), "prompt", frozenset({"question_id", "turns"}), _first_turn,
        frozenset({"reference", "system", *_ANSWERED_BY}), fits=_turns_fit, verbatim=True,
    ),
    Layout(
        "bfcl", ("bfcl",), "prompt", frozenset({"question"}), _calls, frozenset({"function", "system"}),
        fits=_calls_fit, verbatim=True,
    ),
)  # fmt: skip
