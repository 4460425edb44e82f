"""Where a row's media columns belong: `<image>` tags and parts without a source, in the order in which they are read.

A row names its media in its content parts, or in columns (`images`, `image`, `videos`...) whose items take the places
that the messages leave: a tag in a text (`<image>`, `<video>`, `<audio>`: ms-swift, LLaMA-Factory) or a part without a
source (TRL). Without any place they stand at the start of the first user message, as in TRL. Places and media must be
equally many. The rejected side of a pair may show something else: `rejected_images` (ms-swift).

A row with media is messages: a plain-text prompt becomes a user's turn, for only a template knows where media stand.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from align.data.formats.base import MEDIA, REJECTED_MEDIA, joined
from align.data.formats.trl import split_common
from align.data.records import (
    Conversation,
    MediaKind,
    MediaPart,
    Message,
    Pair,
    Record,
    RowError,
    Text,
    media_of,
    texts,
    with_texts,
)

_TAG = re.compile(r"<(image|video|audio)>")
_ROLE_OF = {"prompt": "user", "completion": "assistant", "chosen": "assistant", "rejected": "assistant"}


def place_media(record: Record, values: Mapping[str, Any]) -> Record:
    """The record with every medium of its row in its place. Raises RowError where tags and media do not match."""
    columns = _columns(values, MEDIA)
    rejected = _columns(values, REJECTED_MEDIA) if isinstance(record, Pair) else {}
    if not columns and not rejected and not media_of(record):
        return record
    if isinstance(record, Pair) and rejected:
        return _sides(record, columns, {**columns, **rejected})
    if not any(columns.values()) and not media_of(record):
        _refuse_tags(record, columns)
        return record
    return _filled(_as_messages(record), columns)


def _columns(values: Mapping[str, Any], names: Mapping[str, MediaKind]) -> dict[MediaKind, list[Any]]:
    """The media of a row's columns by kind; an empty list where there is a column and nothing in it."""
    found: dict[MediaKind, list[Any]] = {}
    for name, kind in names.items():
        value = values.get(name)
        if value is None:
            continue
        items = list(value) if isinstance(value, list | tuple) else [value]
        if name == "video" and items and isinstance(value, list) and all(isinstance(x, str | dict) for x in value):
            items = [value]  # one video as a list of its frames
        if any(item is None for item in items):
            raise RowError(f"an item of `{name}` is null")
        if found.get(kind):
            raise RowError(f"the row has two columns of {kind}s; use one of them")
        found[kind] = items
    return found


def _sides(record: Pair, chosen: Mapping[MediaKind, list[Any]], rejected: Mapping[MediaKind, list[Any]]) -> Pair:
    """Both sides with their own media; what they share is the prompt again."""
    plain = _as_messages(record)
    assert isinstance(plain, Pair)
    head, one, other = plain.prompt, plain.chosen, plain.rejected
    assert not isinstance(head, str) and not isinstance(one, str) and not isinstance(other, str)
    sides = [
        _filled(Conversation((), head + side), columns).completion
        for side, columns in ((one, chosen), (other, rejected))
    ]
    prompt, first, second = split_common(sides[0], sides[1])
    return replace(plain, prompt=prompt, chosen=first, rejected=second)


def _as_messages(record: Record) -> Any:
    """Plain text as turns. Raises RowError for a text without a prompt, which is nobody's turn."""
    if isinstance(record, Conversation) and record.prompt == "":
        raise RowError("a row of plain `text` cannot show media; write messages, or a prompt and a completion")
    changed: dict[str, Text] = {
        name: (Message(_ROLE_OF[name], value),) for name, value in texts(record) if isinstance(value, str)
    }
    return with_texts(record, **changed)


def _refuse_tags(record: Record, columns: Mapping[MediaKind, list[Any]]) -> None:
    """A column that is there and empty promises that tags are meant as such."""
    for name, text in texts(record):
        whole = text if isinstance(text, str) else "".join(m.text for m in text)
        for tag in _TAG.findall(whole):
            if tag in columns:
                raise RowError(f"the {name} has a <{tag}> tag, and the row has no {tag}")


class _Queue:
    """The media of one kind that wait for their places."""

    def __init__(self, kind: MediaKind, items: list[Any]):
        self.kind, self.items, self.places = kind, items, 0

    def take(self) -> MediaPart:
        self.places += 1
        return MediaPart(self.kind, self.items[self.places - 1] if self.places <= len(self.items) else None)


def _filled(record: Any, columns: Mapping[MediaKind, list[Any]]) -> Any:
    queues: dict[str, _Queue] = {kind: _Queue(kind, items) for kind, items in columns.items()}
    changed: dict[str, Text] = {
        name: tuple(_fill_message(m, queues) for m in text) for name, text in texts(record) if not isinstance(text, str)
    }
    waiting = [q.take() for q in queues.values() if not q.places for _ in q.items]
    for queue in queues.values():
        if queue.places != len(queue.items):
            raise RowError(
                f"{queue.places} places for {queue.kind}s (<{queue.kind}> tags and parts), and the row has "
                f"{len(queue.items)}: they must be as many"
            )
    if waiting:
        changed = _at_first_user_turn(changed, waiting)
    filled = with_texts(record, **changed)
    for part in media_of(filled):
        if part.source is None:
            raise RowError(f"a content part of type {part.kind!r} says nowhere what it shows, nor does a column")
    return filled


def _fill_message(message: Message, queues: Mapping[str, _Queue]) -> Message:
    """Tags and parts without a source become the next media of their columns."""
    parts: list[str | MediaPart] = []
    for part in (message.content,) if isinstance(message.content, str) else message.content:
        if isinstance(part, MediaPart):
            parts.append(queues[part.kind].take() if part.source is None and part.kind in queues else part)
            continue
        for i, text in enumerate(_TAG.split(part)):
            tag = i % 2 == 1
            queue = queues.get(text) if tag else None
            parts.append(queue.take() if queue is not None else f"<{text}>" if tag else text)
    return replace(message, content=joined(parts))


def _at_first_user_turn(changed: dict[str, Text], waiting: list[MediaPart]) -> dict[str, Text]:
    for name, text in changed.items():
        for i, message in enumerate(text):
            if isinstance(message, Message) and message.role == "user":
                parts = (message.content,) if isinstance(message.content, str) else message.content
                shown = replace(message, content=joined([*waiting, *parts]))
                return {**changed, name: (*text[:i], shown, *text[i + 1 :])}
    raise RowError("the row has media, and no user's turn that could show them")
