"""Messages that a row holds as JSON text, as CSV files and tables of texts must: read as the messages they are.

Text that is no such list stays text, whatever it looks like, unless something says that it was to be one: its column
holds messages in other rows, another column of its row does, or it stands where a question is read as one turn.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from align.data.formats.guess import LAST_QUESTIONS, QUESTIONS, SIDES, TURNS
from align.data.records import RowError
from align.data.unread import is_filled
from align.data.values import ROLES, BadValue, Json, says_who, shown

_COLUMNS = frozenset({
    *TURNS, "prompt", "completion", "context", "rejected_messages", "preferred_output", "non_preferred_output",
    *(name for sides in SIDES for name in sides),
})  # fmt: skip
_QUESTIONS = frozenset({"query", *QUESTIONS, *LAST_QUESTIONS}) - _COLUMNS
"""Where a text is one turn, and messages in it would be read by nobody."""
_IDS = frozenset({"id", "conversation_id"})
_BESIDE = frozenset({"messages", "metadata", *_IDS})  # of an object that is nothing but its messages
_BEGUN = re.compile(r"""\s*\[?\s*\{\s*["'](role|from|content|value)["']\s*:\s*["']""")


class Values(dict[str, Any]):
    """A row's values with such texts as lists (or one object) of messages. written: the names of those columns; beside:
    what stands with the messages in their text and is not read."""

    written: frozenset[str] = frozenset()
    beside: tuple[str, ...] = ()

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Values:
        found, beside = dict[str, Any](), list[str]()
        for name in sorted(_COLUMNS.intersection(values)):
            messages, more = _messages(values[name])
            if messages is not None and not more.keys() - _BESIDE:
                found[name] = messages
                beside += [f"`{key}` beside the messages in the JSON text of `{name}`" for key in more]
        read = cls({**values, **found})
        read.written, read.beside = frozenset(found), tuple(beside)
        if isinstance(values, Values):  # renamed: what was read once is no text any more
            same = {name for name in values.written if name in read}
            read.written, read.beside = read.written | same, values.beside + read.beside
        return read


def refuse_unread_messages(values: Values, written: Collection[str]) -> None:
    """Raises RowError for a text that was to be messages and cannot be read as them, or that holds them where a text is
    one turn. written: columns that hold messages as JSON text in the first rows of the source."""
    beside = any(isinstance(value, list) and value and _BEGUN.match(str(value[0])) for value in values.values())
    for name, value in values.items():
        if not isinstance(value, str) or value[:1000].lstrip()[:1] not in ("[", "{"):
            continue
        messages, more = _messages(value)
        if name in _QUESTIONS and messages is not None:
            raise RowError(
                f"`{name}` holds messages as JSON text, and would be one turn with that text: map it to a column of "
                f"messages, as `columns: {{prompt: {name}, completion: ...}}`"
            )
        if name in _COLUMNS and messages is not None:  # else it were a list by now
            raise RowError(
                f"`{name}` holds messages as JSON text, and beside them {', '.join(more)}, which is not read: write "
                "the messages alone into it"
            )
        if name in written or (name in _COLUMNS and beside and _BEGUN.match(value)):
            where = "in other rows" if name in written else "in other columns of the row"
            raise RowError(f"the text of `{name}` is no messages in JSON, as they stand {where}: {shown(value)}")
    _refuse_answer(values)


def _refuse_answer(values: Values) -> None:
    """Raises RowError for a completion of messages in JSON text that goes on with another turn of the user, behind a
    prompt that is a text: it may be what the prompt asks for."""
    prompt, completion = values.get("prompt"), values.get("completion")
    if "completion" not in values.written or not isinstance(prompt, str) or not isinstance(completion, list):
        return
    first = completion[0]
    role = str(first.get("role", first.get("from")))
    if role in ("user", "human") and str(first.get("content", first.get("value"))).strip() != prompt.strip():
        raise RowError(
            "`completion` is messages as JSON text that begin with a user's turn, behind a `prompt` that is a text: "
            "they may be turns, or a JSON text that was asked for; write the messages as a list, or the text into a "
            "message"
        )


def are_texts_in_json(text: str) -> bool:
    """Whether a text is a JSON list of texts, as tables of arenas hold turns."""
    if text[:1000].lstrip()[:1] != "[":
        return False
    try:
        read = Json().loads(text)
    except BadValue:
        return False
    return isinstance(read, list) and bool(read) and all(isinstance(item, str) for item in read)


def said_in_json(text: str) -> str | None:
    """What a text is, where it is JSON that some layout would have read: "messages" or "calls of tools"; else None."""
    if text[:1000].lstrip()[:1] not in ("[", "{"):
        return None
    try:
        read = Json().loads(text)
    except BadValue:
        return None
    if isinstance(read, dict) and isinstance(read.get("messages"), list):
        read = read["messages"]
    items = [item for item in (read if isinstance(read, list) else [read]) if isinstance(item, dict)]
    if not items or (isinstance(read, list) and len(items) < len(read)):
        return None
    if all(says_who(item) and not item.keys().isdisjoint(("content", "value")) for item in items):
        return "messages"
    calls = all(isinstance(item.get("name"), str) and "arguments" in item for item in items)
    return "calls of tools" if calls else None


def _messages(value: Any) -> tuple[Any, Mapping[str, Any]]:
    """(messages of a JSON text or None, what stands beside them and is no id)."""
    if not isinstance(value, str) or value[:1000].lstrip()[:1] not in ("[", "{"):
        return None, {}
    if not any(f'"{name}"' in value for name in ROLES):
        return None, {}
    try:
        read = Json().loads(value)
    except BadValue:
        return None, {}
    more: Mapping[str, Any] = {}
    if isinstance(read, dict) and isinstance(read.get("messages"), list):
        more = {key: one for key, one in read.items() if key != "messages" and key not in _IDS and is_filled(one)}
        read = read["messages"]
    items = read if isinstance(read, list) else [read]
    return (read, more) if items and all(isinstance(item, dict) and says_who(item) for item in items) else (None, {})
