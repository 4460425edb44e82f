"""What stages ask of engines: the completions of prompts, by the newest version that was published."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from align.protocols.trainer import Metrics, Publication
from align.protocols.trees import Medium


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn. Everything that changes the sampling distribution is listed here, and nothing else
    may change it: trainer log-probabilities are computed at this temperature. temperature 0 is greedy. max_tokens: of a
    completion, its end included; stop: texts that end one; stop_token_ids: tokens that do, beside the model's own."""

    temperature: float = 1.0
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptItem:
    """A prompt drawn for generation.

    group_id: unique per stage and draw (epoch, row, repeat). seed: 63-bit hash of (run seed, stage id, group id).
    token_ids: i64[n]. messages: the prompt as role/content dicts (a plain-text prompt is one user message with
    role "text"). row: every column of the data row; `reference_answer` where an assistant turn was taken off.
    origin: "file:line" of the row. media: what stands in `token_ids`, which hold all the tokens that stand for them.
    weight: the row's; what the advantages of its completions are multiplied by. arguments: the row's variables of the
    chat template, which turns that follow are rendered with, too.
    """

    group_id: int
    token_ids: np.ndarray
    seed: int
    messages: tuple[Mapping[str, Any], ...] = ()
    row: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""
    media: tuple[Medium, ...] = ()
    weight: float = 1.0
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EpisodeFailure:
    """A score that an environment owed and did not give. cause: raised | timeout | died | wrong_type | not_finite |
    out_of_range | unknown_objective | missing_objective; message: with the place in the user's code."""

    cause: str
    message: str


@dataclass(frozen=True, slots=True)
class Episode:
    """What came of a completion that took turns with an environment.

    turns: the messages behind the prompt as they went, as role/content dicts (tool calls and answers included). state:
    what the environment says of itself at the end, plain JSON. scores: by objective of the environment, None where not
    applicable; failure: why there are none. infos: what it noted beside its scores. counts: numbers of this episode by
    name (turns, calls, ...), averaged over a step; seconds: by tool, of each of its calls; ended: what ended it, in a
    word (reply, done, turns, tokens, context, turn, killed). killed: its process died or had to be killed. environment:
    the name that the recipe gives it, "" where it gives none.
    """

    turns: tuple[Mapping[str, Any], ...] = ()
    state: Any = None
    scores: Mapping[str, float | None] = field(default_factory=dict)
    failure: EpisodeFailure | None = None
    infos: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    ended: str = "reply"
    killed: bool = False
    environment: str = ""


@dataclass(frozen=True, slots=True)
class Fork:
    """A sequence of an episode that ended before the episode did: what came then began anew, behind a context that it
    does not continue. All arrays are as a Completion's, behind the same prompt; what it repeats of earlier sequences is
    context, `sampled` False and version REPEATED, so that every token is sampled, or observed, in one sequence.
    """

    token_ids: np.ndarray
    logps: np.ndarray
    versions: np.ndarray
    sampled: np.ndarray
    media: tuple[Medium, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled completion: an answer, or all turns of an episode.

    token_ids: i64[n] exactly as sampled, the end-of-turn token included when there is one; logps: f32[n] under the
    sampler at the sampling temperature; versions: i32[n], -1 of an answer that a row brought; text: decoded, special
    tokens removed, stop string kept (of an episode its last reply);
    finish: "eos", "stop", or "length" (truncated by max_tokens); raw: decoded with its special tokens, without those
    that end it; None where it is the same as `text`. sampled: bool[n], False at tokens of an episode that nobody
    sampled (answers of tools, headers), whose logps are 0 and whose versions are -1; None where all were. episode: of
    an environment, else None. media: what stands in token_ids. forks: the sequences of an episode before its last, in
    the order in which they were sampled; the arrays above are the last one's.
    """

    token_ids: np.ndarray
    logps: np.ndarray
    versions: np.ndarray
    text: str
    finish: Literal["eos", "stop", "length"]
    raw: str | None = None
    sampled: np.ndarray | None = None
    episode: Episode | None = None
    media: tuple[Medium, ...] = ()
    forks: tuple[Fork, ...] = ()

    @property
    def truncated(self) -> bool:
        """Whether `max_tokens`, or a budget of the episode, cut it off."""
        return self.finish == "length"

    @property
    def length(self) -> int:
        """Sampled tokens."""
        return sum(int(np.count_nonzero(one.sampled)) for one in self.sequences)

    @property
    def sequences(self) -> tuple[Fork, ...]:
        """All token sequences, in the order in which they were sampled; the last is the completion's own."""
        sampled = np.ones(len(self.token_ids), bool) if self.sampled is None else self.sampled
        return *self.forks, Fork(self.token_ids, self.logps, self.versions, sampled, self.media)

    @property
    def lost(self) -> bool:
        """Whether it stands for an episode of which nothing is left."""
        return self.episode is not None and self.length == 0

    @property
    def sampled_versions(self) -> np.ndarray:
        """i32[length]: the version that sampled each sampled token."""
        return np.concatenate([one.versions[one.sampled] for one in self.sequences])

    @property
    def sampled_ids(self) -> np.ndarray:
        """i64[length]: the tokens that were sampled."""
        return np.concatenate([one.token_ids[one.sampled] for one in self.sequences])

    @property
    def sampled_logps(self) -> np.ndarray:
        """f32[length]: the sampler's log-probability of each."""
        return np.concatenate([one.logps[one.sampled] for one in self.sequences])


@dataclass(frozen=True, slots=True)
class Group:
    """The G completions of one prompt, drawn by one engine; fewer where episodes of it were lost."""

    prompt: PromptItem
    completions: tuple[Completion, ...]


@dataclass(frozen=True, slots=True)
class FailedPrompt:
    """A prompt that cannot be sampled (too long for the engine, ...): a fault of the data, not of an engine.

    cause: one word or two, the same for all prompts that fail in this way; message: one sentence with the numbers.
    """

    prompt: PromptItem
    cause: str
    message: str


def group_seed(run_seed: int, stage_id: str, group_id: int) -> int:
    """63-bit seed of a group. Consecutive seeds would share random streams in vLLM (child i of n uses seed + i)."""
    digest = hashlib.blake2b(f"{run_seed}|{stage_id}|{group_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Fleet(Protocol):
    """The engines, as one."""

    async def publish(self, publication: Publication) -> Metrics:
        """Returns when every live engine holds the version and its digest was compared. Requests that are running
        finish on the version they began with (adapters), or are drained first (whole weights)."""
        ...

    def stream(
        self, prompts: Sequence[PromptItem], group_size: int, sampling: Sampling
    ) -> AsyncIterator[Group | FailedPrompt]:
        """Every prompt exactly once, in the order in which groups finish.

        The whole list is admitted at once, so that with one engine and nothing else running, which sequences are
        computed together is a function of the list alone (bit-equal runs at staleness 0). Several streams may be open
        at once. Engines that die are restarted, and the groups they held are reissued with the same ids and seeds on
        the newest version; the caller sees it in `metrics` only. A stream that is cancelled or closed gives its
        requests up.

        Raises EngineError when engines cannot be kept alive.
        """
        ...

    async def generate(self, prompts: Sequence[PromptItem], group_size: int, sampling: Sampling) -> list[Group]:
        """All of `stream`, in the order of prompts, for evaluation. Raises DataError for a prompt that fails."""
        ...

    async def probe(self, prompt: PromptItem, sampling: Sampling) -> list[Group]:
        """One completion of `prompt` by every engine that serves now, beside whatever else it draws; none by an engine
        that cannot draw it."""
        ...

    def metrics(self) -> Metrics:
        """Counters since the last call, by flat name: "rollout/restarts", seconds lost, groups reissued, ..."""
        ...

    async def close(self) -> None:
        """End the engines; closing twice is harmless."""
        ...
