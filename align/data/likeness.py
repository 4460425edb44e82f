"""Texts that are the same, or nearly: duplicates in a file, and rows that share their question with an exam.

The same: equal but for case, spaces and punctuation. Nearly: at least `THRESHOLD` of the runs of three words that
either has are in both (Jaccard). Candidates come from MinHash signatures in bands (Broder 1997; Leskovec et al.,
Mining of Massive Datasets, ch. 3) and are then compared exactly, so none is reported wrongly; of pairs at the threshold
about one in a hundred is missed.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

THRESHOLD = 0.8
_WORDS = 3
_BANDS, _ROWS = 16, 4  # finds a pair of likeness s with probability 1 - (1 - s^4)^16: 0.9998 at 0.8
_SPLIT = re.compile(r"\W+")


def plain(text: str) -> str:
    """Without case, punctuation and spaces that make no difference."""
    return " ".join(word for word in _SPLIT.split(text.casefold()) if word)


def same(texts: Sequence[str]) -> list[list[int]]:
    """Places of texts that are the same, by group of two and more, in order. Empty texts are no duplicates."""
    places: dict[str, list[int]] = {}
    for at, text in enumerate(texts):
        if key := plain(text):
            places.setdefault(key, []).append(at)
    return [group for group in places.values() if len(group) > 1]


def nearly_same(texts: Sequence[str], others: Sequence[str] | None = None) -> list[tuple[int, int, float]]:
    """(place, other place, likeness) of texts that are nearly, but not quite, the same; each text once, with the first
    that it is like. others: what they are compared with, in place of one another."""
    found = []
    pool = [_shingles(text) for text in texts]
    against = pool if others is None else [_shingles(text) for text in others]
    buckets: dict[tuple[int, bytes], list[int]] = {}
    for at, other in enumerate(against):
        for key in _keys(other):
            buckets.setdefault(key, []).append(at)
    for at, own in enumerate(pool):
        near = {
            place for key in _keys(own) for place in buckets.get(key, ())[:_FEW] if others is not None or place < at
        }
        for place in sorted(near):
            likeness = _jaccard(own, against[place])
            if THRESHOLD <= likeness < 1:
                found.append((at, place, likeness))
                break
    return found


_FEW = 50  # of a bucket that are compared: thousands of a kind need not all be


def _shingles(text: str) -> np.ndarray:
    """u64[n]: a hash of every run of words, each once, sorted; of a shorter text the whole of it."""
    words = plain(text).split()
    runs = {" ".join(words[at : at + _WORDS]) for at in range(max(1, len(words) - _WORDS + 1))} if words else set()
    return np.array(sorted({zlib.crc32(run.encode()) for run in runs}), dtype=np.uint64)


def _jaccard(one: np.ndarray, other: np.ndarray) -> float:
    shared = np.intersect1d(one, other, assume_unique=True).size
    whole = one.size + other.size - shared
    return shared / whole if whole else 0.0


def _keys(shingles: np.ndarray) -> Iterator[tuple[int, bytes]]:
    if not shingles.size:
        return
    hashed = (shingles[:, None] * _FACTORS[None, :] + _ADDENDS[None, :]) >> np.uint64(32)
    signature = hashed.min(axis=0).reshape(_BANDS, _ROWS)
    yield from ((band, signature[band].tobytes()) for band in range(_BANDS))


_DRAWN = np.random.default_rng(0)
# multiply-shift hashing (Dietzfelbinger 1996): the upper half of a product that wraps at 2^64
_FACTORS = _DRAWN.integers(0, 1 << 63, _BANDS * _ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_ADDENDS = _DRAWN.integers(0, 1 << 63, _BANDS * _ROWS, dtype=np.uint64)
