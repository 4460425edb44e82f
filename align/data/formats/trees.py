"""Message trees of Open-Assistant: `message_tree_id`, `prompt: {text, role, replies: [{text, role, rank, replies}]}`.

A tree becomes one conversation: of each turn's replies the best ranked (`rank` 0 before 1), of replies that nobody
ranked the first. As a pair it is the first question with its best and its worst ranked answer, in that path. What
moderators took away (`deleted`, `review_result: false`) is no reply, and a tree without its root none (nor one of which
`tree_state` says that it was halted). Replies and keys that are left out are named in the report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from align.data.formats.base import Layout, Row, tools_of, weight_of
from align.data.formats.messages import with_system
from align.data.records import Conversation, Kind, Message, Pair, Prompt, RowError, assistant, prompt_from
from align.data.unread import is_filled
from align.data.values import kind_of

_ROLES = {"prompter": "user", "user": "user", "assistant": "assistant"}
_ENDED = ("aborted", "halted")
_READ = frozenset({"text", "role", "replies", "rank", "deleted", "review_result"})
_IDS = frozenset({"message_id", "parent_id", "user_id", "message_tree_id", "created_date"})
_TAKEN = "a reply that moderators took away (`deleted` or `review_result: false`)"
_LEFT = "a reply beside the best ranked one of its turn (of unranked ones: the first)"


def _path(row: Row) -> list[tuple[Message, Sequence[Mapping[str, Any]]]]:
    """(message, its replies) from the root along the best replies, up to the assistant's last."""
    row.get("message_tree_id")  # a name, which is read in that it says what this is
    state = str(row.get("tree_state") or "")
    if state.startswith(_ENDED):
        raise RowError(f"`tree_state` is {state!r}: moderators ended the tree, and its texts were not accepted")
    if not isinstance(row["prompt"], Mapping):
        raise RowError(f"`prompt` must be a message with its `replies`, got {kind_of(row['prompt'])}")
    if _is_taken(row["prompt"]):
        raise RowError("moderators took the first message away (`deleted` or `review_result: false`)")
    path = list[tuple[Message, Sequence[Mapping[str, Any]]]]()
    node: Mapping[str, Any] | None = row["prompt"]
    while node is not None:
        replies = _replies(node)
        path.append((_message(node), replies))
        node = min(replies, key=_rank) if replies else None
    while len(path) > 1 and path[-1][0].role != "assistant":
        path.pop()
    return path


def _message(node: Mapping[str, Any]) -> Message:
    text, role = node.get("text"), _ROLES.get(str(node.get("role")))
    if not isinstance(text, str) or role is None:
        raise RowError(f"a message of the tree needs a `text` and a `role` of {', '.join(_ROLES)}")
    kept = len(_replies(node))
    keys = [f"key {key!r} of a message" for key in node if key not in _READ | _IDS and is_filled(node[key])]
    taken = (_TAKEN,) * (len(node.get("replies") or ()) - kept)
    return Message(role, text, unread=(*(_LEFT,) * (kept - 1), *taken, *keys))


def _replies(node: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = node.get("replies") or []
    if not isinstance(found, list) or not all(isinstance(one, Mapping) for one in found):
        raise RowError(f"`replies` must be a list of messages, got {kind_of(found)}")
    kept = [one for one in found if not _is_taken(one)]
    asks = _ROLES.get(str(node.get("role")))
    if any(_ROLES.get(str(one.get("role"))) == asks for one in kept):
        raise RowError(f"a reply to a message of {node.get('role')!r} is of the same role: it is no answer to it")
    return kept


def _is_taken(node: Mapping[str, Any]) -> bool:
    return _truth(node, "deleted", False) or not _truth(node, "review_result", True)


def _truth(node: Mapping[str, Any], key: str, default: bool) -> bool:
    value = node.get(key)
    said = {"true": True, "1": True, "false": False, "0": False, "none": default}.get(str(value).strip().lower())
    if said is None:
        raise RowError(f"`{key}` of a message must be true or false, got {value!r}")
    return said


def _rank(node: Mapping[str, Any]) -> float:
    """The lower the better; behind all ranks where there is none. Raises RowError."""
    rank = node.get("rank")
    if rank is None:
        return float("inf")
    if isinstance(rank, bool) or not isinstance(rank, int | float):
        raise RowError(f"`rank` must be a number, got {rank!r}")
    return float(rank)


def _turns(row: Row) -> tuple[Message, ...]:
    return with_system(row, tuple(message for message, _ in _path(row)))


def _conversation(row: Row) -> Conversation:
    return Conversation((), _turns(row), tools_of(row), weight_of(row))


def _prompt(row: Row) -> Prompt:
    return prompt_from(_turns(row), (), tools_of(row))


def _pair(row: Row) -> Pair:
    """Of the first turn of the path whose answers are ranked apart."""
    asked: list[Message] = []
    for message, replies in _path(row):
        asked.append(message)
        ranked = sorted((one for one in replies if one.get("rank") is not None), key=_rank)
        if message.role == "user" and ranked and _rank(ranked[0]) < _rank(ranked[-1]):
            best, worst = (assistant(_message(one).text) for one in (ranked[0], ranked[-1]))
            return Pair(with_system(row, tuple(asked)), best, worst, tools_of(row), weight_of(row))
    raise RowError("no turn of the tree has two answers that are ranked apart: none is preferred")


def _is_tree(row: Row) -> bool:
    return isinstance(row["prompt"], Mapping) and isinstance(row["prompt"].get("replies"), list)


def _layout(kind: Kind, read: Any) -> Layout:
    required = frozenset({"message_tree_id", "prompt"})
    optional = frozenset({"system", "tree_state"})
    name = "tree of messages, the best ranked path"
    return Layout(name, ("oasst",), kind, required, read, optional, fits=_is_tree, verbatim=True)


LAYOUTS = (_layout("conversation", _conversation), _layout("pair", _pair), _layout("prompt", _prompt))
