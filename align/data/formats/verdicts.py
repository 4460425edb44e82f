"""Pairs of arenas and of raters, whose verdict is written in a way of its own.

    conversation_a, conversation_b, winner [turn]                     LMSYS: model_a or model_b
    prompt, response_a, response_b, winner_model_a, winner_model_b    the same as a table: JSON lists of turns, 1 and 0
    prompt, response_a, response_b, winner                            such a table with a verdict in words
    history, human_ref_A, human_ref_B, labels                         SHP: 1 where A is better, 0 where B is
    context, response1, response2, overall_preference                 HelpSteer3: below 0 if 1 is better, above if 2 is

A tie is refused: it prefers nothing. Of an arena's conversation the turns behind the `turn` that was judged are left
out, and named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
    better = _winner(row)
    a, b = (_judged(row, read_messages(row[name], name), name) for name in ("conversation_a", "conversation_b"))
    prompt, chosen, rejected = split_common(*_ordered(a, b, better))
    return Pair(with_system(row, prompt), chosen, rejected, tools_of(row), weight_of(row))


def _winner(row: Row) -> int:
    """0 or 1: the side that `winner` names. Raises RowError."""
    said = str(row["winner"]).strip().lower()
    if said.startswith("tie"):
        raise RowError(_TIE)
    if said not in ("model_a", "model_b"):
        raise RowError(f"`winner` must be model_a, model_b or a tie, got {row['winner']!r}")
    return int(said == "model_b")


def _judged(row: Row, messages: tuple[Message, ...], name: str) -> tuple[Message, ...]:
    """A conversation up to the answer of the turn that was judged (MT-Bench asks after each); whole without one."""
    turn = row.get("turn")
    if turn is None:
        return messages
    answers = [n for n, message in enumerate(messages) if message.role == "assistant"]
    if not is_number(turn) or turn not in range(1, len(answers) + 1):
        raise RowError(f"`turn` says which answer was judged, and `{name}` has {len(answers)}; got {turn!r}")
    kept, left = messages[: answers[int(turn) - 1] + 1], messages[answers[int(turn) - 1] + 1 :]
    said = (f"a turn of `{name}` behind the one that was judged (`turn`)",) * len(left)
    return (replace(kept[0], unread=(*kept[0].unread, *said)), *kept[1:])


def _table(row: Row) -> Pair:
    won = [float(row[name]) if _is_flag(row[name]) else None for name in ("winner_model_a", "winner_model_b")]
    if None in won:
        raise RowError("`winner_model_a` and `winner_model_b` must be 0 or 1")
    if won[0] == won[1]:
        raise RowError(_TIE)
    if str(row.get("winner_tie")).lower() in ("1", "1.0", "true"):
        raise RowError("the row says that one model won, and in `winner_tie` that none did")
    return _of_turns(row, int(won[1] == 1))


def _table_in_words(row: Row) -> Pair:
    return _of_turns(row, _winner(row))


def _of_turns(row: Row, better: int) -> Pair:
    """Of JSON lists of turns. better: 0 or 1."""
    asked = _turns(row, "prompt")
    sides = list[tuple[Message, ...]]()
    for name in ("response_a", "response_b"):
        answers = _turns(row, name)
        if len(answers) != len(asked):
            raise RowError(f"`prompt` has {len(asked)} turns and `{name}` {len(answers)}")
        both = zip(asked, answers, strict=True)
        sides.append(tuple(m for q, a in both for m in (Message("user", q), Message("assistant", a))))
    prompt, chosen, rejected = split_common(*_ordered(sides[0], sides[1], better))
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
    name: str, read: Callable[[Row], Record], fits: Callable[[Row], bool], *required: str, kind: Kind = "pair"
) -> Layout:
    formats, optional = (name,), frozenset({"system", "turn", "winner_tie"} if kind == "pair" else {"system"})
    return Layout(name, formats, kind, frozenset(required), read, optional, fits=fits, verbatim=True)


LAYOUTS = (
    _layout(
        "arena", _conversations, lambda row: is_list_of(row["conversation_a"], "role", "content"),
        "conversation_a", "conversation_b", "winner",
    ),
    _layout(
        "arena table", _table, lambda row: _listed(row["prompt"]) is not None,
        "prompt", "response_a", "response_b", "winner_model_a", "winner_model_b",
    ),
    _layout(
        "arena table, a verdict in words", _table_in_words, lambda row: _listed(row["prompt"]) is not None,
        "prompt", "response_a", "response_b", "winner",
    ),
    _layout("arena table", _asked, lambda row: _listed(row["prompt"]) is not None,
            "prompt", "winner_model_a", "winner_model_b", kind="prompt"),
    _layout("shp", _preferred, lambda row: isinstance(row["history"], str),
            "history", "human_ref_A", "human_ref_B", "labels"),
    _layout("helpsteer3", _rated, lambda row: is_list_of(row["context"], "role", "content"),
            "context", "response1", "response2", "overall_preference"),
)  # fmt: skip
