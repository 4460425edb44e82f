"""Pairs of arenas and of raters, whose verdict is written in a way of its own.

    conversation_a, conversation_b, winner                            LMSYS: model_a or model_b
    prompt, response_a, response_b, winner_model_a, winner_model_b    the same as a table: JSON lists of turns, 1 and 0
    history, human_ref_A, human_ref_B, labels                         SHP: 1 where A is better, 0 where B is
    context, response1, response2, overall_preference                 HelpSteer3: below 0 if 1 is better, above if 2 is

A tie is refused: it prefers nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from align.data.formats.base import Layout, Row, is_list_of, is_number, text_of, tools_of, weight_of
from align.data.formats.messages import read_messages, with_system
from align.data.formats.trl import split_common
from align.data.records import Kind, Message, Pair, Prompt, Record, RowError, assistant
from align.data.values import BadValue, Json

_TIE = "neither answer is preferred (a tie)"


def _ordered(first: Any, second: Any, better: int) -> tuple[Any, Any]:
    return (first, second) if better == 0 else (second, first)


def _conversations(row: Row) -> Pair:
    said = str(row["winner"]).strip().lower()
    if said.startswith("tie"):
        raise RowError(_TIE)
    if said not in ("model_a", "model_b"):
        raise RowError(f"`winner` must be model_a, model_b or a tie, got {row['winner']!r}")
    a, b = (read_messages(row[name], name) for name in ("conversation_a", "conversation_b"))
    turn = row.get("turn")
    answered = sum(message.role == "assistant" for message in a)
    if turn is not None and (not is_number(turn) or turn != answered) and answered > 1:
        raise RowError(f"`turn` is {turn!r}: the verdict is on that answer, and the conversations have {answered}")
    prompt, chosen, rejected = split_common(*_ordered(a, b, int(said == "model_b")))
    return Pair(with_system(row, prompt), chosen, rejected, tools_of(row), weight_of(row))


def _table(row: Row) -> Pair:
    won = [float(row[name]) if _is_flag(row[name]) else None for name in ("winner_model_a", "winner_model_b")]
    if None in won:
        raise RowError("`winner_model_a` and `winner_model_b` must be 0 or 1")
    if won[0] == won[1] or str(row.get("winner_tie")) in ("1", "1.0", "True", "true"):
        raise RowError(_TIE)
    asked = _turns(row, "prompt")
    sides = list[tuple[Message, ...]]()
    for name in ("response_a", "response_b"):
        answers = _turns(row, name)
        if len(answers) != len(asked):
            raise RowError(f"`prompt` has {len(asked)} turns and `{name}` {len(answers)}")
        both = zip(asked, answers, strict=True)
        sides.append(tuple(m for q, a in both for m in (Message("user", q), Message("assistant", a))))
    prompt, chosen, rejected = split_common(*_ordered(sides[0], sides[1], int(won[1] == 1)))
    return Pair(with_system(row, prompt), chosen, rejected, tools_of(row), weight_of(row))


def _asked(row: Row) -> Prompt:
    """What both models of a table were asked: of several turns none, since the answers between them differ."""
    asked = _turns(row, "prompt")
    if len(asked) > 1:
        raise RowError(f"`prompt` has {len(asked)} turns, and two answers to each but the last")
    return Prompt(with_system(row, (Message("user", asked[0]),)), None, tools_of(row))


def _is_flag(value: Any) -> bool:
    return (is_number(value) and value in (0, 1)) or value in ("0", "1")


def _turns(row: Row, name: str) -> list[str]:
    found = _listed(row[name])
    if found is None:
        raise RowError(f"`{name}` must be a list of texts, one for each turn, as JSON text")
    return found


def _listed(value: Any) -> list[str] | None:
    try:
        found = Json().loads(value) if isinstance(value, str) and value.lstrip().startswith("[") else value
    except BadValue:
        return None
    return found if isinstance(found, list) and found and all(isinstance(one, str) for one in found) else None


def _preferred(row: Row) -> Pair:
    """Of SHP, whose `history` is the post that is answered."""
    label = row["labels"]
    if not _is_flag(label):
        raise RowError(f"`labels` must be 1 (A is better) or 0 (B is), got {label!r}")
    sides = _ordered(text_of(row, "human_ref_A"), text_of(row, "human_ref_B"), int(str(label) not in ("1", "1.0")))
    prompt = with_system(row, (Message("user", text_of(row, "history")),))
    return Pair(prompt, assistant(sides[0]), assistant(sides[1]), tools_of(row), weight_of(row))


def _rated(row: Row) -> Pair:
    """Of HelpSteer3."""
    value = row["overall_preference"]
    if not is_number(value):
        raise RowError(f"`overall_preference` must be a number, got {value!r}")
    if value == 0:
        raise RowError(_TIE)
    sides = _ordered(text_of(row, "response1"), text_of(row, "response2"), int(value > 0))
    prompt = with_system(row, read_messages(row["context"], "context"))
    return Pair(prompt, assistant(sides[0]), assistant(sides[1]), tools_of(row), weight_of(row))


def _layout(
    name: str,
    read: Callable[[Row], Record],
    fits: Callable[[Row], bool],
    *required: str,
    kind: Kind = "pair",
    more: tuple[str, ...] = (),
) -> Layout:
    formats, optional = (name,), frozenset({"system", *more})
    return Layout(name, formats, kind, frozenset(required), read, optional, fits=fits, verbatim=True)


LAYOUTS = (
    _layout(
        "arena", _conversations, lambda row: is_list_of(row["conversation_a"], "role", "content"),
        "conversation_a", "conversation_b", "winner", more=("turn",),
    ),
    _layout(
        "arena table", _table, lambda row: _listed(row["prompt"]) is not None,
        "prompt", "response_a", "response_b", "winner_model_a", "winner_model_b", more=("winner_tie",),
    ),
    _layout("arena table", _asked, lambda row: _listed(row["prompt"]) is not None,
            "prompt", "winner_model_a", "winner_model_b", kind="prompt"),
    _layout("shp", _preferred, lambda row: isinstance(row["history"], str),
            "history", "human_ref_A", "human_ref_B", "labels"),
    _layout("helpsteer3", _rated, lambda row: is_list_of(row["context"], "role", "content"),
            "context", "response1", "response2", "overall_preference"),
)  # fmt: skip
