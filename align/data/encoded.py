"""A record as token ids, and the same within a length."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from align.data.records import RowError
from align.protocols.trees import Medium


@dataclass(slots=True)
class Tokens:
    """ids i64[n], mask bool[n] (scored) of one segment, and the media that stand in it, by start."""

    ids: np.ndarray
    mask: np.ndarray
    media: tuple[Medium, ...] = ()

    def __len__(self) -> int:
        return int(self.ids.shape[0])


@dataclass(slots=True)
class Encoded:
    """A record as token ids: its trunk and its branches."""

    trunk: Tokens
    branches: list[Tokens] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return len(self.trunk) + max((len(b) for b in self.branches), default=0)

    @property
    def scored(self) -> int:
        return int(self.trunk.mask.sum() + sum(b.mask.sum() for b in self.branches))


def fit(
    encoded: Encoded, max_length: int | None, truncate: str, bos_id: int | None, *, scored: bool = True
) -> tuple[Encoded, bool]:
    """(the record within max_length, whether it was cut).

    truncate "error" refuses; "right" keeps the beginning, of a pair the whole prompt; "left" keeps the end, of a pair
    the whole completions, and a leading BOS. A medium stays whole or goes with what is cut. Raises RowError where
    nothing is left to score, or (not `scored`: the whole is) nothing at all.
    """
    if max_length is None or encoded.length <= max_length:
        return encoded, False
    if truncate == "error":
        raise RowError(f"{encoded.length} tokens, more than max_length {max_length} (`truncate: right` or `left` cuts)")
    if not encoded.branches:
        cut = Encoded(_cut_tokens(encoded.trunk, max_length, truncate, bos_id))
    elif truncate == "right":
        room = max_length - len(encoded.trunk)
        if room < 1:
            raise RowError(f"the prompt alone has {len(encoded.trunk)} tokens, max_length is {max_length}")
        cut = Encoded(encoded.trunk, [_cut_tokens(b, room, truncate, bos_id) for b in encoded.branches])
    else:
        room = max_length - max(len(b) for b in encoded.branches)
        if room < 1:
            raise RowError(f"a completion alone has {max_length - room} tokens, max_length is {max_length}")
        cut = Encoded(_cut_tokens(encoded.trunk, room, truncate, bos_id), encoded.branches)
    if not all(part.mask.any() if scored else len(part) for part in cut.branches or [cut.trunk]):
        raise RowError(f"{encoded.length} tokens; cut to max_length {max_length} nothing is left to score")
    return cut, True


def _cut_tokens(tokens: Tokens, n: int, side: str, bos_id: int | None) -> Tokens:
    if side == "right":
        end = min([n, *(m.start for m in tokens.media if m.start < n < m.start + m.length)])
        kept = tuple(m for m in tokens.media if m.start + m.length <= end)
        return Tokens(tokens.ids[:end], tokens.mask[:end], kept)
    start = max(0, len(tokens) - n)
    starts_with_bos = bos_id is not None and tokens.ids[0] == bos_id
    for m in tokens.media:  # the first place is BOS's, where there is one
        if m.start < start < m.start + m.length or (starts_with_bos and m.start == start):
            start = m.start + m.length
    kept = tuple(replace(m, start=m.start - start) for m in tokens.media if m.start >= start)
    ids, mask = tokens.ids[start:].copy(), tokens.mask[start:].copy()
    if starts_with_bos and ids.size:
        ids[0] = bos_id
    mask[:1] = False
    return Tokens(ids, mask, kept)
