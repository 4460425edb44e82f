"""What an episode is made of: its ids as they grow, its end, what its environment says of it, how it can be lost."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from align.protocols.fleet import Completion, EpisodeFailure
from rewards.environments.live import Outcome

Message = Mapping[str, Any]


@dataclass
class Ids:
    """The ids of an episode as they grow, the first `start` of them its prompt."""

    tokens: list[int]
    start: int = 0
    sampled: list[bool] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    def sample(self, drawn: Completion) -> None:
        self.tokens += drawn.token_ids.tolist()
        self.sampled += [True] * len(drawn.token_ids)
        self.logps += drawn.logps.tolist()
        self.versions += drawn.versions.tolist()

    def join(self, ids: Sequence[int]) -> None:
        self.tokens += ids
        self.sampled += [False] * len(ids)
        self.logps += [0.0] * len(ids)
        self.versions += [-1] * len(ids)


class Lost(Exception):
    """The environment is gone, or did what an episode cannot go on from. killed: its process died or had to be."""

    def __init__(self, cause: str, message: str, *, killed: bool):
        super().__init__(message)
        self.cause, self.message, self.killed = cause, message, killed


ENDS = ("reply", "done", "turns", "tokens", "context", "turn", "killed")
CUT = ("tokens", "context", "turn")
"""In the middle of a turn: the completion counts as truncated. One whose turns are over is whole, and what its
environment says of it is trained on: a policy that never came to an end would otherwise never learn to."""


@dataclass(frozen=True)
class Verdict:
    """What an environment says of an episode at its end."""

    scores: Mapping[str, float | None] = field(default_factory=dict)
    failure: EpisodeFailure | None = None
    infos: Mapping[str, Any] = field(default_factory=dict)
    state: Any = None
    killed: bool = False


def verdict_of(outcome: Outcome) -> Verdict:
    """Of what an environment's `reward` came to."""
    if outcome.kind != "value":
        return Verdict(failure=EpisodeFailure(outcome.kind, f"reward: {outcome.message}"))
    found = outcome.value
    wrong = [EpisodeFailure(cause, f"reward: {message}") for _, cause, message in found.get("errors") or ()]
    return Verdict(dict(found["values"]), wrong[0] if wrong else None, dict(found.get("info") or {}))


def lost(outcome: Outcome, what: str) -> Lost:
    """The end of an episode whose environment failed in `what`."""
    return Lost(outcome.kind, f"{what}: {outcome.message}", killed=outcome.lost or outcome.kind == "died")


def as_messages(value: Any, what: str) -> list[Message]:
    """A text as a user's message, messages as they are, nothing of None. Raises Lost for anything else."""
    if value is None or value == "":
        return []
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    items = [value] if isinstance(value, Mapping) else value
    if isinstance(items, list) and all(isinstance(m, Mapping) and "role" in m and "content" in m for m in items):
        return [dict(m) for m in items]
    said = f"{what} gave {str(value)[:100]!r}: give a text, a list of messages, or None"
    raise Lost("wrong_type", said, killed=False)


def seed_of(seed: int, *words: object) -> int:
    """A 63-bit seed of its own for each part of a group."""
    digest = hashlib.blake2b("|".join(map(str, (seed, *words))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
