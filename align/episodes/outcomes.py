"""What becomes of an episode: its end, what its environment says of it, and how it can be lost."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from align.protocols.fleet import Completion, EpisodeFailure
from align.protocols.trees import Medium
from rewards.environments.live import Outcome

Message = Mapping[str, Any]


class Played(NamedTuple):
    """An episode's prompt, i64[n], its completion, and what stands in the prompt."""

    prompt: np.ndarray
    completion: Completion
    media: tuple[Medium, ...] = ()


class Lost(Exception):
    """The environment is gone, or did what an episode cannot go on from. killed: its process died or had to be. stands:
    what the episode comes to where it is not drawn again; None: it is missing."""

    def __init__(self, cause: str, message: str, *, killed: bool):
        super().__init__(message)
        self.cause, self.message, self.killed = cause, message, killed
        self.stands: Played | None = None


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
        return Verdict(failure=EpisodeFailure(outcome.kind, _said(outcome, "reward")))
    found = outcome.value
    wrong = [EpisodeFailure(cause, f"reward: {message}") for _, cause, message in found.get("errors") or ()]
    return Verdict(dict(found["values"]), wrong[0] if wrong else None, dict(found.get("info") or {}))


def with_state(verdict: Verdict, outcome: Outcome) -> Verdict:
    """With what `state` came to. A state that fails takes no score away; it is said, and counts as one that failed."""
    if outcome.kind == "value":
        return replace(verdict, state=outcome.value)
    failure = EpisodeFailure(outcome.kind, _said(outcome, "state"))
    return verdict if verdict.failure else replace(verdict, failure=failure)


def lost(outcome: Outcome, what: str) -> Lost:
    """The end of an episode whose environment failed in `what`."""
    return Lost(outcome.kind, _said(outcome, what), killed=outcome.lost or outcome.kind == "died")


def _said(outcome: Outcome, what: str) -> str:
    """Why `what` gave nothing, with its place in the user's code."""
    return f"{what}: {outcome.message}" + (f" ({outcome.where})" if outcome.where else "")


def as_messages(value: Any, what: str) -> list[Message]:
    """A text as a user's message, messages as they are, nothing of None, nor of a reset's empty text; an empty one of
    `respond` is a turn in which nothing is said. Raises Lost for anything else."""
    if value is None or (value == "" and what == "reset"):
        return []
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    items = [value] if isinstance(value, Mapping) else value
    if isinstance(items, list) and all(isinstance(m, Mapping) for m in items):
        wrong = next((why for m in items if (why := _is_no_message(m, _ROLES[what]))), None)
        if wrong is None:
            return [dict(m) for m in items]
        raise Lost("wrong_type", f"{what} gave {str(value)[:100]!r}: {wrong}", killed=False)
    said = f"{what} gave {str(value)[:100]!r}: give a text, a list of messages, or None"
    raise Lost("wrong_type", said, killed=False)


_ROLES = {
    "reset": ("system", "developer", "user", "assistant", "tool"),
    "respond": ("system", "developer", "user", "tool"),
}
"""What an environment's messages may be. The assistant's turns behind the first are the policy's own."""


def _is_no_message(item: Message, roles: Sequence[str]) -> str | None:
    """Why it is none; None where it is one."""
    role, content = item.get("role"), item.get("content")
    if role not in roles:
        return f"the `role` of a message is one of {', '.join(roles)}"
    parts = isinstance(content, list) and all(isinstance(part, Mapping) and "type" in part for part in content)
    if not isinstance(content, str) and not parts and not (content is None and item.get("tool_calls")):
        return "the `content` of a message is text, or a list of content parts"
    return None


def with_more(message: Message, more: str | Sequence[Any]) -> Message:
    """The message with a text, or content parts, behind its content."""
    content = message["content"]
    if isinstance(content, str) and isinstance(more, str):
        return {**message, "content": f"{content}{more}"}
    lists = [[{"type": "text", "text": one}] if isinstance(one, str) else one or () for one in (content, more)]
    return {**message, "content": [part for parts in lists for part in parts]}


def seed_of(seed: int, *words: object) -> int:
    """A 63-bit seed of its own for each part of a group."""
    digest = hashlib.blake2b("|".join(map(str, (seed, *words))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
