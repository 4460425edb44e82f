"""PaddleNLP and ERNIEKit: `src` and `tgt` are what user and assistant said, turn by turn.

    src: [q1, q2], tgt: [a1, a2] [label: [0, 1]]                       a conversation; of `label` 1 is learnt
    src: [q1, q2], tgt: [a1], response: [x, y], sort: [1, 0]           a pair: the higher `sort` is the chosen side
    src: [q1, q2], tgt: [a1], response: [x], sort: [1]                 an answer that is desirable (1) or not (0)

A response may go on with turns: [answer, question, answer]. `src` and `tgt` as texts are found by guess.py. The same
names are those of translations: with languages beside them, or with single words as their texts, they are refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from align.data.formats.base import Layout, Row, tools_of, weight_of
from align.data.formats.messages import with_system
from align.data.records import Conversation, Message, Pair, Prompt, RowError, Unpaired, prompt_from
from align.data.values import kind_of

_SPEAKERS = ("assistant", "user")
LANGUAGES = (
    "src_lang", "tgt_lang", "source_lang", "target_lang", "source_language", "target_language", "lang_pair", "langpair",
    "mt",
)  # fmt: skip
"""Columns beside `src` and `tgt` that say that these are a text and its translation."""
_WORD = re.compile(r"[^\W\d_]{2,}[.,;:!?]?")


def _texts(row: Row, column: str) -> list[str]:
    value = row.get(column)
    found = [value] if isinstance(value, str) else value if value is not None else []
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise RowError(f"`{column}` must be a list of texts, got {kind_of(value)}")
    return found


def _said(row: Row, more: int) -> tuple[Message, ...]:
    """The turns in order; more: how many questions there are beyond the answers."""
    asked, answered = _texts(row, "src"), _texts(row, "tgt")
    _refuse_translation(row, asked, answered)
    if row.get("is_system"):
        raise RowError(
            "`is_system` says that the first text of `src` is the system's: write it as a column `system`, and leave "
            "it and its answer out of `src` and `tgt`"
        )
    learnt = _learnt(row, len(answered))
    if len(asked) != len(answered) + more:
        wanted = f"{more} more" if more else "as many"
        raise RowError(f"`src` has {len(asked)} turns and `tgt` {len(answered)}; {wanted} must be in `src`")
    turns: list[Message] = []
    for n, question in enumerate(asked):
        turns.append(Message("user", question))
        said = zip(answered[n : n + 1], learnt[n : n + 1], strict=True)
        turns += [Message("assistant", answer, scored=scored) for answer, scored in said]
    return with_system(row, tuple(turns))


def _learnt(row: Row, count: int) -> list[bool]:
    """Which of the answers are learnt: those of which `label` says 1, all where there is none."""
    label = row.get("label")
    if label is None:
        return [True] * count
    if not isinstance(label, list) or len(label) != count or any(one not in (0, 1) for one in label):
        raise RowError(
            f"`label` must be a list of {count}, 1 for each text of `tgt` that is learnt and 0, got {label!r}"
        )
    return [one == 1 for one in label]


def _refuse_translation(row: Row, asked: Sequence[str], answered: Sequence[str]) -> None:
    """Raises RowError where `src` and `tgt` are hardly what two said: a text and its translation, or tokens of both."""
    if (beside := next((name for name in LANGUAGES if row.get(name)), None)) is not None:
        raise RowError(
            f"`{beside}` beside `src` and `tgt`: they may be a text and its translation, which no turn asks for. Make "
            "`messages` of them by a function of the row (`format: mine.py:rows`)"
        )
    texts = [*asked, *answered]
    if len(asked) > 1 and all(_WORD.fullmatch(text) and text.lower() != text.upper() for text in texts):
        raise RowError(
            "`src` and `tgt` hold single words: they may be the tokens of one text each, or turns. Join them, or "
            "write turns as `messages`"
        )


def _answer(value: Any) -> tuple[Message, ...]:
    turns = [value] if isinstance(value, str) else value
    if not isinstance(turns, list) or len(turns) % 2 != 1 or not all(isinstance(turn, str) for turn in turns):
        raise RowError(f"a `response` must be a text, or a list of turns that the assistant begins and ends: {value!r}")
    return tuple(Message(_SPEAKERS[n % 2], turn) for n, turn in enumerate(turns))


def _judged(row: Row, count: int) -> tuple[Sequence[Any], Sequence[float]]:
    """(responses, how good each is). Raises RowError."""
    answers, sort = row["response"], row["sort"]
    for name, value in (("response", answers), ("sort", sort)):
        if not isinstance(value, list) or len(value) != count:
            got = f"{len(value)} of them" if isinstance(value, list) else kind_of(value)
            raise RowError(f"`{name}` must be a list of {count}, as in most rows of its source, got {got}")
    if any(isinstance(one, bool) or not isinstance(one, int | float) for one in sort):
        raise RowError(f"`sort` must hold numbers, got {sort!r}")
    return answers, sort


def _conversation(row: Row) -> Conversation:
    return Conversation((), _said(row, 0), tools_of(row), weight_of(row))


def _pair(row: Row) -> Pair:
    answers, sort = _judged(row, 2)
    if sort[0] == sort[1]:
        raise RowError(f"`sort` is {sort!r}: none of the two is preferred")
    best, worst = (answers[0], answers[1]) if sort[0] > sort[1] else (answers[1], answers[0])
    return Pair(_said(row, 1), _answer(best), _answer(worst), tools_of(row), weight_of(row))


def _unpaired(row: Row) -> Unpaired:
    [answer], [sort] = _judged(row, 1)
    if sort not in (0, 1):
        raise RowError(f"`sort` of one response must be 1 (desirable) or 0, got {sort!r}")
    return Unpaired(_said(row, 1), _answer(answer), sort == 1, tools_of(row), weight_of(row))


def _prompt(row: Row) -> Prompt:
    more = len(_texts(row, "src")) - len(_texts(row, "tgt"))
    return prompt_from(_said(row, more if more in (0, 1) else 1), (), tools_of(row))


def _has_answers(row: Row) -> bool:
    """Of a prompt: `src` alone may be where a text is from."""
    return _is_list(row) and any(name in row for name in ("tgt", "response"))


def _is_list(row: Row) -> bool:
    return isinstance(row["src"], list) and bool(row["src"]) and isinstance(row["src"][0], str) and bool(row["src"][0])


def _answers(count: int) -> Any:
    def fits(row: Row) -> bool:
        return isinstance(row["response"], list) and len(row["response"]) == count

    return fits


_JUDGED, _OPTIONAL = frozenset({"src", "response", "sort"}), frozenset({"tgt", "system"})
_NAME, _FORMATS, _SYSTEM = "paddle", ("paddle",), frozenset({"system", "label"})

LAYOUTS = (
    Layout(
        _NAME, _FORMATS, "conversation", frozenset({"src", "tgt"}), _conversation, _SYSTEM,
        fits=lambda row: _is_list(row) and bool(row["tgt"]), verbatim=True,
    ),
    Layout(_NAME, _FORMATS, "pair", _JUDGED, _pair, _OPTIONAL, fits=_answers(2), verbatim=True),
    Layout(_NAME, _FORMATS, "unpaired", _JUDGED, _unpaired, _OPTIONAL, fits=_answers(1), verbatim=True),
    Layout(_NAME, _FORMATS, "prompt", frozenset({"src"}), _prompt, _OPTIONAL, fits=_has_answers, verbatim=True),
)  # fmt: skip
