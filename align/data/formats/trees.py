"""Message trees of Open-Assistant: `message_tree_id`, `prompt: {text, role, replies: [{text, role, rank, replies}]}`.

A tree becomes one conversation: of each turn's replies the best ranked (`rank` 0 before 1), of replies that nobody
ranked the first. As a pair it is the first question with its best and its worst ranked answer, in that path. What
moderators took away (`deleted`, `review_result: false`) is no reply. Replies that are left out are named in the report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from align.data.formats.base import Layout, Row, tools_of, weight_of
from align.data.formats.messages import with_system
from align.data.records import Conversation, Kind, Message, Pair, Prompt, RowError, assistant, prompt_from
from align.data.values import kind_of

_ROLES = {"prompter": "user", "user": "user", "assistant": "assistant"}
_LEFT = "a reply beside the best ranked one of its turn (of unranked ones: the first)"
_GONE = "a reply that moderators took away, with all below it,"
_READ = frozenset({"text", "role", "replies", "rank", "deleted", "review_result", "message_id", "parent_id", "user_id"})


def _path(row: Row) -> list[tuple[Message, Sequence[Mapping[str, Any]]]]:
    """(message, its replies) from the root along the best replies, up to the assistant's last."""
    row.get("message_tree_id")  # a name, which is read in that it says what this is
    state = row.get("tree_state")
    if isinstance(state, str) and state.startswith(("aborted", "halted")):
        raise RowError(f"`tree_state` is {state!r}: moderators took the tree away")
    if _is_gone(row["prompt"]):
        raise RowError("moderators took the tree's first message away (`deleted`, `review_result`)")
    node, path = row["prompt"], list[tuple[Message, Sequence[Mapping[str, Any]]]]()
    while node is not None:
        replies = _replies(node)
        said = _message(node)
        if path and said.role == path[-1][0].role:
            raise RowError(f"two messages of the {said.role} follow each other in the tree")
        path.append((said, replies))
        node = min(replies, key=_rank) if replies else None
    while len(path) > 1 and path[-1][0].role != "assistant":
        path.pop()
    return path


def _message(node: Mapping[str, Any]) -> Message:
    text, role = node.get("text"), _ROLES.get(str(node.get("role")))
    if not isinstance(text, str) or role is None:
        raise RowError(f"a message of the tree needs a `text` and a `role` of {', '.join(_ROLES)}")
    gone = len(node.get("replies") or ()) - len(_replies(node))
    more = sorted(key for key in node.keys() - _READ if node[key] not in (None, [], {}, ""))
    unread = (_LEFT,) * (len(_replies(node)) - 1) + (_GONE,) * gone
    return Message(role, text, unread=(*unread, *(f"`{key}` of a message" for key in more)))


def _replies(node: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = node.get("replies") or []
    if not isinstance(found, list) or not all(isinstance(one, Mapping) for one in found):
        raise RowError(f"`replies` must be a list of messages, got {kind_of(found)}")
    return [one for one in found if not _is_gone(one)]


def _is_gone(node: Mapping[str, Any]) -> bool:
    """Whether moderators took a message away, however the file writes a truth value."""
    deleted, kept = str(node.get("deleted")).lower(), str(node.get("review_result")).lower()
    return deleted in ("true", "1") or kept in ("false", "0")


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
            if any(_message(one).role != "assistant" for one in (ranked[0], ranked[-1])):
                raise RowError("a ranked reply to the user is not the assistant's")
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
