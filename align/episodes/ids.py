"""The token ids of an episode as they grow, in one sequence or in several, and what stands in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from align.protocols.fleet import Completion, Fork
from align.protocols.trees import REPEATED, Medium

Beginning = tuple[np.ndarray, tuple[Medium, ...]]
"""A prompt's ids, i64[n], and what stands in them."""


@dataclass
class Ids:
    """The sequence that is sampled now: its ids, the first `start` of them the prompt, and of those behind it whether
    they were sampled, by which log-probability and by which version. before: sequences that it does not continue."""

    tokens: list[int]
    start: int = 0
    sampled: list[bool] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    media: list[Medium] = field(default_factory=list)
    before: list[Ids] = field(default_factory=list)

    def sample(self, drawn: Completion) -> None:
        self.tokens += drawn.token_ids.tolist()
        self.sampled += [True] * len(drawn.token_ids)
        self.logps += drawn.logps.tolist()
        self.versions += drawn.versions.tolist()

    def join(self, ids: Sequence[int], media: Sequence[Medium] = (), *, version: int = -1) -> None:
        """Ids that nobody sampled. media: what stands in them, counted from their first. version: -1 of what is new,
        REPEATED of what an earlier sequence holds."""
        self.media += moved(media, len(self.tokens))
        self.tokens += ids
        self.sampled += [False] * len(ids)
        self.logps += [0.0] * len(ids)
        self.versions += [version] * len(ids)

    def begin_anew(self, ids: Sequence[int], media: Sequence[Medium], new: int) -> None:
        """Go on behind other ids than those that were sampled: the sequence so far is kept beside a new one. Its prompt
        is what all sequences have in common.

        Args:
            ids: of the new sequence from its first on. media: what stands in them.
            new: how many of its last ids no earlier sequence holds.
        """
        old = replace(self, before=[])
        begun = np.array(ids[: self.start], np.int64)
        common = shared_length([old.beginning, (begun, tuple(m for m in media if m.start < len(begun)))])
        sequences = [*self.before, old]
        for one in sequences:
            one._cut_prompt(common)
        inner = [m for m in media if m.start < common]
        self.tokens, self.start, self.media, self.before = list(ids[:common]), common, inner, sequences
        self.sampled, self.logps, self.versions = [], [], []
        split = max(common, len(ids) - new)
        for part, end, version in ((common, split, REPEATED), (split, len(ids), -1)):
            self.join(ids[part:end], moved([m for m in media if part <= m.start < end], -part), version=version)

    def _cut_prompt(self, common: int) -> None:
        """What is behind `common` is the sequence's own, and context all the same."""
        own = self.start - common
        self.start = common
        self.sampled = [False] * own + self.sampled
        self.logps = [0.0] * own + self.logps
        self.versions = [REPEATED] * own + self.versions

    @property
    def spent(self) -> int:
        """Tokens that were sampled, in all sequences."""
        return sum(sum(one.sampled) for one in (*self.before, self))

    @property
    def beginning(self) -> Beginning:
        return np.array(self.tokens[: self.start], np.int64), self.media_of(0, self.start)

    @property
    def sequences(self) -> tuple[Fork, ...]:
        """All that were sampled from, behind the prompt. One that began anew and was not is none."""
        whole = [*self.before, self]
        return tuple(one._fork() for one in whole if any(one.sampled) or len(whole) == 1)

    def _fork(self) -> Fork:
        return Fork(
            token_ids=np.array(self.tokens[self.start :], np.int64),
            logps=np.array(self.logps, np.float32),
            versions=np.array(self.versions, np.int32),
            sampled=np.array(self.sampled, bool),
            media=self.media_of(self.start, len(self.tokens)),
        )

    def media_of(self, start: int, end: int) -> tuple[Medium, ...]:
        """What stands in the tokens from `start` up to `end`, counted from `start`."""
        return moved([m for m in self.media if start <= m.start < end], -start)


def moved(media: Sequence[Medium], by: int) -> tuple[Medium, ...]:
    """The same media, so many tokens further behind."""
    return tuple(replace(medium, start=medium.start + by) for medium in media)


def shared_length(beginnings: Sequence[Beginning]) -> int:
    """Of the longest beginning that all have in common: the same tokens, and the same media, each whole."""
    shortest = min(len(ids) for ids, _ in beginnings)
    stacked = np.stack([ids[:shortest] for ids, _ in beginnings])
    differs = np.flatnonzero((stacked != stacked[0]).any(axis=0))
    common = int(differs[0]) if len(differs) else shortest
    shared = set[Any].intersection(*({m.identity for m in media} for _, media in beginnings))
    every = [medium for _, media in beginnings for medium in media]
    apart = [m.start for m in every if m.identity not in shared or m.start + m.length > common]
    return min([common, *apart])
