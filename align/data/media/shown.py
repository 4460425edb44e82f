"""Media in a text: the placeholder that a template writes for each, and the tokens that it becomes."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from align.data.records import MediaKind, RowError
from align.protocols.trees import Medium

Span = tuple[int, int]


@dataclass(frozen=True)
class Shown:
    """A medium that is in the store. placeholder: the token that a template writes for it; token_ids i64[n] take its
    place. facts: see `align.data.media.process.Facts`, of which `before` and `behind` is text around them; store: its
    folder; files: (path, sha256) that it was read from."""

    kind: MediaKind
    key: str
    placeholder: str
    token_ids: np.ndarray
    facts: dict[str, Any]
    store: str = ""
    files: tuple[tuple[str, str], ...] = ()

    def medium(self, start: int) -> Medium:
        """Its reference in a segment whose token `start` is its first."""
        return Medium(self.kind, self.key, self.store, start, len(self.token_ids), int(self.facts["patches"]))


@dataclass(frozen=True)
class Written:
    """A rendered text. spans: its scored parts; places: (character, medium) of every placeholder in it, in order."""

    text: str
    spans: list[Span]
    places: tuple[tuple[int, Shown], ...] = ()

    def media(self, start: int = 0, end: int | None = None) -> tuple[Shown, ...]:
        """Those whose placeholders stand in text[start:end]."""
        return tuple(s for at, s in self.places if at >= start and (end is None or at < end))


def written(text: str, spans: list[Span], shown: Sequence[Shown]) -> Written:
    """The text with what processors write around each medium; its placeholders stay, one token each.

    shown: the media of the messages in order; a template may move videos before images, but keeps each kind's order.
    Raises RowError where the template writes more or fewer placeholders than there are media.
    """
    if not shown:
        return Written(text, spans)
    queues: dict[str, list[Shown]] = {}
    for medium in shown:
        queues.setdefault(medium.placeholder, []).append(medium)
    found = list(re.finditer("|".join(map(re.escape, queues)), text))
    for token, queue in queues.items():
        count = sum(match[0] == token for match in found)
        if count != len(queue):
            raise RowError(
                f"the chat template writes {count} {token} for {len(queue)} {queue[0].kind}s; name a template that "
                f"knows content parts of type {queue[0].kind!r} by `model.chat_template`"
            )
    waiting = {token: iter(queue) for token, queue in queues.items()}
    parts: list[str] = []
    places: list[tuple[int, Shown]] = []
    ends, added, length, last = [], [], 0, 0
    for match in found:
        medium = next(waiting[match[0]])
        before, behind = medium.facts["before"], medium.facts["behind"]
        parts += [text[last : match.start()], before, match[0], behind]
        places.append((length + match.start() - last + len(before), medium))
        length += match.end() - last + len(before) + len(behind)
        last = match.end()
        ends.append(last)
        added.append(length - last)
    moved = [(a + _before(ends, added, a), b + _before(ends, added, b)) for a, b in spans]
    return Written("".join([*parts, text[last:]]), moved, tuple(places))


def _before(ends: Sequence[int], added: Sequence[int], at: int) -> int:
    """Characters that were added before character `at`."""
    n = bisect_left(ends, at + 1)
    return added[n - 1] if n else 0
