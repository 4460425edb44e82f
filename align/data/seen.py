"""What rewards see of a row: its messages, its columns, and of pairs that they are to judge the answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from align.data.records import Pair, RowError, Text
from align.mediastore import described
from align.protocols.trees import Medium

_LONG_URI = 200  # characters of a data URI that go no further than the data
_DATA_URI = re.compile(r"data:[\w.+*/-]*(?:;[\w.=-]+)*;base64,", re.IGNORECASE)  # and no text that begins so

Messages = tuple[dict[str, Any], ...]


def seen_messages(prompt: Text, media: Sequence[Medium] = ()) -> Messages:
    """A prompt as rewards see it: of each medium its kind, and the file that shows it."""
    if isinstance(prompt, str):
        return ({"role": "text", "content": prompt},)
    waiting = {kind: iter([m for m in media if m.kind == kind]) for kind in ("image", "video", "audio")}
    return tuple(m.as_dict(lambda part: described(next(waiting[part.kind]))) for m in prompt)


def light(values: Mapping[str, Any]) -> dict[str, Any]:
    """A row without the bytes of its media, which would travel with every sample of it."""
    return {name: _without_bytes(value) for name, value in values.items()}


def _without_bytes(value: Any) -> Any:
    if isinstance(value, bytes | bytearray | memoryview):
        return None
    if isinstance(value, str) and len(value) > _LONG_URI and _DATA_URI.match(value):
        return f"{value[: value.find(',') + 1]}..."
    if isinstance(value, dict):
        return {name: _without_bytes(item) for name, item in value.items()}
    return [_without_bytes(item) for item in value] if isinstance(value, list) else value


def answer_texts(record: Pair) -> tuple[str, str]:
    """The texts of chosen and rejected. Raises RowError where one is several turns: rewards judge one answer."""
    texts = []
    for name in ("chosen", "rejected"):
        completion: Text = getattr(record, name)
        if not isinstance(completion, str) and len(completion) != 1:
            raise RowError(f"{name} has {len(completion)} turns, and rewards judge one answer")
        texts.append(completion if isinstance(completion, str) else completion[0].answer)
    return texts[0], texts[1]
