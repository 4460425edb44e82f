"""Messages that a row holds as JSON text, as CSV files and tables of texts must: read as the messages they are.

Text that is no such list stays text, whatever it looks like, unless other rows hold messages in its place (`broken`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from align.data.formats.guess import SIDES, TURNS
from align.data.values import ROLES, BadValue, Json, says_who

_COLUMNS = frozenset({
    *TURNS, "prompt", "completion", "context", "rejected_messages", "preferred_output", "non_preferred_output",
    *(name for sides in SIDES for name in sides),
})  # fmt: skip
_BESIDE = frozenset({"messages", "id", "conversation_id", "metadata"})  # of an object that is nothing but its messages


class Values(dict[str, Any]):
    """A row's values with such texts as lists (or one object) of messages. written: the names of those columns."""

    written: frozenset[str] = frozenset()

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Values:
        found = {
            name: value for name in _COLUMNS.intersection(values) if (value := _messages(values[name])) is not None
        }
        read = cls({**values, **found})
        read.written = frozenset(found)
        return read


def broken(values: Values, usual: Collection[str]) -> str | None:
    """The name of a column that holds messages as JSON text in other rows (`usual`) and, here, a text that begins so
    and is none; None where there is no such."""
    for name in sorted(set(usual) - values.written):
        value = values.get(name)
        if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
            return name
    return None


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
    if all(says_who(item) for item in items):
        return "messages"
    calls = all(isinstance(item.get("name"), str) and "arguments" in item for item in items)
    return "calls of tools" if calls else None


def _messages(value: Any) -> Any:
    if not isinstance(value, str) or value[:1000].lstrip()[:1] not in ("[", "{"):
        return None
    if not any(f'"{name}"' in value for name in ROLES):
        return None
    try:
        read = Json().loads(value)
    except BadValue:
        return None
    if isinstance(read, dict) and isinstance(read.get("messages"), list) and read.keys() <= _BESIDE:
        read = read["messages"]
    items = read if isinstance(read, list) else [read]
    return read if items and all(isinstance(item, dict) and says_who(item) for item in items) else None
