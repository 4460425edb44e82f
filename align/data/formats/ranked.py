"""Pairs by a verdict: two answers and which is better, or a list of answers with ranks or scores.

    query, answer_1, answer_2, preference    preference: 1 or 2, a or b, or such as model_a and response_2
    query, answer_0, answer_1, preference    preference: 0 or 1
    query, responses                         objects, each with a text and a `rank` or a `score`
    query, responses, ranks | scores         texts, and a number for each

A rank is better the lower it is, a score the higher; a `ranking` beside a list may also be the order of its answers,
and is refused. Of a list the best and the worst make the pair. A tie is refused:
it prefers nothing. Other names for these columns are found by guess.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from align.data.formats.base import Layout, Row, text_of, tools_of, weight_of
from align.data.formats.swift import read_query
from align.data.records import Pair, RowError, assistant
from align.data.values import kind_of

RANKS = ("rank", "ranks", "ranking")
SCORES = ("score", "scores", "rating", "ratings", "overall_score", "reward", "rewards")
_TEXTS = ("text", "content", "response", "answer", "completion", "output")
_WORDS = {"1": 0, "a": 0, "2": 1, "b": 1}
_VERDICT = re.compile(
    r"(?:(?:model|response|answer|option|output|completion|candidate|reply|generation|assistant|choice)[_\s-]?)?([ab\d])"
)
"""Whom a verdict names: any other word before the name may say the contrary (worse_a), or that nobody is (tie_b)."""
_OPTIONAL = frozenset({"history", "system"})
_NUMBER = re.compile(r"[-+]?\d+(\.\d+)?", re.A)


# ------------------------------------------------------------------------------------------------- two answers


def _two_answers(first: str, second: str, words: Mapping[str, int]) -> Layout:
    def read(row: Row) -> Pair:
        better = _which(row["preference"], words)
        sides = (first, second) if better == 0 else (second, first)
        chosen, rejected = (assistant(text_of(row, name)) for name in sides)
        return Pair(read_query(row), chosen, rejected, tools_of(row), weight_of(row))

    required = frozenset({"query", first, second, "preference"})
    return Layout("two answers", ("ranked",), "pair", required, read, _OPTIONAL)


def _which(value: Any, words: Mapping[str, int]) -> int:
    """0 or 1: the answer that a verdict names. Raises RowError."""
    said = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    found = _VERDICT.fullmatch(said.strip().lower())
    if isinstance(value, bool) or found is None or found[1] not in words:
        raise RowError(f"`preference` must name one of the two answers ({', '.join(words)}), got {value!r}")
    return words[found[1]]


# ------------------------------------------------------------------------------------------------- ranked lists


def _inside(row: Row) -> Pair:
    return _best_and_worst(row, [_judged(answer) for answer in _answers(row)])


def _beside(name: str) -> Layout:
    def read(row: Row) -> Pair:
        answers, values = _answers(row), row[name]
        if not isinstance(values, list) or len(values) != len(answers):
            raise RowError(f"`{name}` must be a list as long as `responses` ({len(answers)}), got {kind_of(values)}")
        judged = [(_text(answer), _goodness(v, name)) for answer, v in zip(answers, values, strict=True)]
        return _best_and_worst(row, judged)

    return Layout("ranked", ("ranked",), "pair", frozenset({"query", "responses", name}), read, _OPTIONAL)


def _answers(row: Row) -> Sequence[Any]:
    answers = row["responses"]
    if not isinstance(answers, list) or len(answers) < 2:
        raise RowError(f"`responses` must be a list of at least two answers, got {kind_of(answers)}")
    return answers


def _best_and_worst(row: Row, judged: Sequence[tuple[str, float]]) -> Pair:
    """Of (text, goodness) of each answer; of several that are equal, the first."""
    best, worst = max(judged, key=lambda one: one[1]), min(judged, key=lambda one: one[1])
    if best[1] == worst[1]:
        raise RowError("all answers are ranked alike: none is preferred")
    return Pair(read_query(row), assistant(best[0]), assistant(worst[0]), tools_of(row), weight_of(row))


def _judged(answer: Any) -> tuple[str, float]:
    given = [name for name in (*RANKS, *SCORES) if isinstance(answer, Mapping) and answer.get(name) is not None]
    if len(given) != 1:
        raise RowError(
            f"an answer has {' and '.join(given) or 'neither a rank nor a score'}: one of them must judge it"
        )
    return _text(answer), _goodness(answer[given[0]], given[0])


def _text(answer: Any) -> str:
    if isinstance(answer, Mapping):
        texts = [name for name in _TEXTS if isinstance(answer.get(name), str)]
        if len(texts) != 1:
            raise RowError(f"an answer has the texts {', '.join(texts)}" if texts else "an answer has no text")
        return str(answer[texts[0]])
    if not isinstance(answer, str):
        raise RowError(f"an answer must be text, got {kind_of(answer)}")
    return answer


def _goodness(value: Any, name: str) -> float:
    """The higher the better. Raises RowError."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
        raise RowError(f"`{name}` must be a number, got {value!r}")
    return -float(value) if name in RANKS else float(value)


def _has_verdicts(row: Row) -> bool:
    answers = row["responses"]
    first = answers[0] if isinstance(answers, list) and answers else None
    return isinstance(first, Mapping) and any(first.get(name) is not None for name in (*RANKS, *SCORES))


LAYOUTS = (
    _two_answers("answer_1", "answer_2", _WORDS),
    _two_answers("answer_0", "answer_1", {"0": 0, "1": 1}),
    Layout("ranked", ("ranked",), "pair", frozenset({"query", "responses"}), _inside, _OPTIONAL, fits=_has_verdicts),
    _beside("ranks"),
    _beside("scores"),
)
