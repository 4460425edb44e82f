"""What crosses processes, and the three protocols that stages speak to. Standard library and numpy only.

Stages know Trees, Groups and score tables. Who packs them, on which device and in which process they are computed,
is the business of whoever implements `Trainer`, `Scorer` and `Fleet`: Ray actors in a run, plain classes in a test,
a virtual clock in the simulator.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

# ---------------------------------------------------------------------------------------------------- trees


@dataclass(frozen=True, slots=True)
class Medium:
    """An image, a video's frames or a sound that stands in a segment: a reference. Its tensors lie in a media store
    (`align.mediastore`) and are read where they are computed with.

    kind: "image", "video" or "audio". key: hash of content, limits and processor; equal keys, equal tensors.
    store: folder of the store. start: first of its tokens in the segment; length: how many tokens of the segment stand
    for it, marks that its processor writes around and inside it included. patches: what its tower computes for it, in
    the tower's own units (a patch budget counts these).
    """

    kind: Literal["image", "video", "audio"]
    key: str
    store: str
    start: int
    length: int
    patches: int

    @property
    def identity(self) -> tuple[str, str, int, int]:
        """What it shows, and where: media that agree in it are one, whichever store holds them."""
        return self.kind, self.key, self.start, self.length


# the first column of a row's label: see `align.recipe.labels.Labels.columns`
FIRST_LABEL_COLUMNS = ("class", "labels/0", "targets/0")


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens of one tree: its trunk, or one of its branches.

    token_ids: i64[n]
    loss_mask: bool[n]; True where the token is scored by the loss. A trunk of an offline conversation has its
        assistant tokens here, a prompt has none, a completion has all of them (its end-of-turn token included).
    nll_mask: bool[n] or None (= loss_mask); tokens of the negative log-likelihood term, where a loss has one.
    advantages: f32[n] or None; behavior_logps: f32[n] or None, the sampler's log-probabilities;
    versions: i32[n] or None, the policy version that sampled each token.
    reference_logps: f32[n] or None, log-probabilities under the reference where they are known before the stage
        (`reference: cached`); 0 where no token is scored. They belong to this segment after this trunk and no other.
    proximal_logps: f32[n] or None, log-probabilities under the policy at the start of a batch that makes several
        updates; 0 where no token is scored.
    columns: one float per name for this sequence (desirable, weight, score, a label's...).
    media: what stands in it, in order of `start`; no token of it is scored.
    place: (id of a tree, number of a sequence in it) where this is, or ends, a sequence of a tree that was given and
        now stands in another: rows that begin alike are computed as one tree, and groups are cut between branches.
    """

    token_ids: np.ndarray
    loss_mask: np.ndarray
    nll_mask: np.ndarray | None = None
    advantages: np.ndarray | None = None
    behavior_logps: np.ndarray | None = None
    versions: np.ndarray | None = None
    reference_logps: np.ndarray | None = None
    proximal_logps: np.ndarray | None = None
    columns: Mapping[str, float] = field(default_factory=dict)
    media: tuple[Medium, ...] = ()
    place: tuple[int, int] | None = None

    def __len__(self) -> int:
        return int(self.token_ids.shape[0])

    def same_input(self, other: Segment) -> bool:
        """Whether a model is shown the same: the same tokens, and the same media in the same places. Tokens alone do
        not say so: all pictures have the same."""
        return np.array_equal(self.token_ids, other.token_ids) and [m.identity for m in self.media] == [
            m.identity for m in other.media
        ]

    @property
    def labelled(self) -> bool:
        """Whether it carries a label: what is scored then is the sequence, and none of its tokens."""
        return any(name in self.columns for name in FIRST_LABEL_COLUMNS)


@dataclass(frozen=True, slots=True)
class Tree:
    """One training example: a trunk that is computed once, and the branches that continue it.

    A conversation is a trunk alone (one sequence: the trunk itself). A pair is a trunk with two branches, chosen
    first. A GRPO group is a trunk with G branches; an unpaired completion is a trunk with one.

    id: unique in its stage; packing lays trees in order of it, so results do not depend on arrival.
    columns: one float per name for the tree (a pair's margin, for instance).
    origin: "file:line" of the row it came from, for error messages and reports.
    """

    id: int
    trunk: Segment
    branches: tuple[Segment, ...] = ()
    columns: Mapping[str, float] = field(default_factory=dict)
    origin: str = ""

    @property
    def tokens(self) -> int:
        """Tokens that a packed forward computes for this tree (the trunk counted once)."""
        return len(self.trunk) + sum(len(b) for b in self.branches)

    @property
    def media(self) -> tuple[Medium, ...]:
        """In the order in which packing lays their tokens: the trunk's, then each branch's."""
        return tuple(medium for segment in (self.trunk, *self.branches) for medium in segment.media)

    @property
    def patches(self) -> int:
        """Patches that a packed forward computes for this tree (the trunk's media counted once)."""
        return sum(medium.patches for medium in self.media)

    @property
    def sequences(self) -> tuple[Segment, ...]:
        """What losses count as one: each branch, or the trunk where it stands alone."""
        return self.branches or (self.trunk,)


@dataclass(frozen=True)
class Counts:
    """Global numbers over all ranks and microbatches of one update; what losses divide by. tokens, nll_tokens: those in
    `loss_mask` and `nll_mask`; sequences: those with a scored token or a label; pairs: trees of two branches."""

    tokens: int
    nll_tokens: int
    sequences: int
    pairs: int


# ---------------------------------------------------------------------------------------------------- rollouts


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
    weight: the row's; what the advantages of its completions are multiplied by.
    """

    group_id: int
    token_ids: np.ndarray
    seed: int
    messages: tuple[Mapping[str, Any], ...] = ()
    row: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""
    media: tuple[Medium, ...] = ()
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled completion.

    token_ids: i64[n] exactly as sampled, the end-of-turn token included when there is one; logps: f32[n] under the
    sampler at the sampling temperature; versions: i32[n]; text: decoded, special tokens removed, stop string kept;
    finish: "eos", "stop", or "length" (truncated by max_tokens); raw: decoded with its special tokens, without those
    that end it; None where it is the same as `text`.
    """

    token_ids: np.ndarray
    logps: np.ndarray
    versions: np.ndarray
    text: str
    finish: Literal["eos", "stop", "length"]
    raw: str | None = None

    @property
    def truncated(self) -> bool:
        """Whether `max_tokens` cut it off."""
        return self.finish == "length"


@dataclass(frozen=True, slots=True)
class Group:
    """The G completions of one prompt, drawn by one engine."""

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


@dataclass(frozen=True, slots=True)
class Failure:
    """A score that could not be had: which sample and objective, the cause, and the first lines of the error."""

    group_id: int
    sample: int
    plugin: str
    cause: str
    message: str


@dataclass(frozen=True, slots=True)
class ScoreTable:
    """Scores of every completion of a list of groups, in order (S = sum of group sizes).

    objectives: R names; scores: f32[S, R], NaN where missing (not applicable, or failed: see failures);
    kinds: "reward" or "cost" per objective (a cost enters the combiners with its sign flipped);
    dropped: indices of groups that an `on_error: drop_group` policy removed; metrics: flat names to numbers; counts:
    by metric name, for each metric that is a mean, of how many numbers. A metric without a count is a sum: over
    several tables of one step it adds up, where means are weighted by their counts. series: numbers of which a step
    reports <name>_mean, <name>_p50 and <name>_p95 (the seconds of each call to a reward). notes: by a name of what they
    are about, lines for the user, of which a stage shows the first of each name. infos: what rewards noted beside the
    scores of each sample, () where none could.
    """

    objectives: tuple[str, ...]
    scores: np.ndarray
    kinds: tuple[str, ...]
    failures: tuple[Failure, ...] = ()
    dropped: tuple[int, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    infos: tuple[Mapping[str, Any], ...] = ()
    counts: Mapping[str, float] = field(default_factory=dict)
    series: Mapping[str, Sequence[float]] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ErrorBudget:
    """Of what a reward's `max_error_rate` is a share: calls with the same id share one budget over `samples` samples,
    however many of them each call brings. A step is scored in as many calls as its groups finish in."""

    id: int
    samples: int


# ---------------------------------------------------------------------------------------------------- weights


@dataclass(frozen=True, slots=True)
class Publication:
    """One version of the policy, ready for engines to load.

    version: the stage's step. kind: "adapter" (peft layout folder), "weights" (safetensors of whole parameters) or
    "base" (nothing to load: the engine's own folder is the policy). path: of the folder. digest: `digest_arrays` of
    what an engine must hold after loading. rank: the adapter's LoRA rank.
    """

    version: int
    kind: Literal["adapter", "weights", "base"]
    path: str
    digest: str
    rank: int = 0


def digest_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes, in order of name: equal digests mean bit-equal weights."""
    h = hashlib.sha256()
    for name in sorted(arrays):
        a = np.ascontiguousarray(arrays[name])
        h.update(f"{name}|{a.shape}|{a.dtype.str}|".encode())
        h.update(a.view(np.uint8).reshape(-1).data if a.size else b"")
    return h.hexdigest()


def group_seed(run_seed: int, stage_id: str, group_id: int) -> int:
    """63-bit seed of a group. Consecutive seeds would share random streams in vLLM (child i of n uses seed + i)."""
    digest = hashlib.blake2b(f"{run_seed}|{stage_id}|{group_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


# ---------------------------------------------------------------------------------------------------- protocols

Metrics = dict[str, float]


class Trainer(Protocol):
    """The policy: forward, update, publish, save. Packs trees itself. All methods are coroutines.

    `step` runs one optimizer update over all trees (any number of microbatches); counts are global over them.
    `progress` is the fraction of the stage's updates done before this one, in [0, 1). The trainer adds half an update,
    so that neither the first nor the last update is spent at a learning rate of zero.
    """

    async def step(self, trees: Sequence[Tree], *, step: int, progress: float) -> Metrics:
        """One update; its metrics by flat name. Raises NonFiniteError after several in a row whose loss or gradient is
        not finite (those leave the weights alone), LostError where a process is gone."""
        ...

    async def evaluate(self, trees: Sequence[Tree]) -> Metrics:
        """The losses' metrics of `trees` as one batch, without gradient and dropout."""
        ...

    async def logps(self, trees: Sequence[Tree]) -> list[list[np.ndarray]]:
        """Per tree, per sequence: f32[n] log-probabilities of its scored tokens under the policy, in order; those of
        a trunk come before its first branch's. Computed without dropout in the packing of a `step` over the same trees,
        so that before an update they are that step's own, to the bit."""
        ...

    async def numerics(self) -> dict[str, Any]:
        """What log-probabilities depend on beside weights and tokens, as plain JSON: dtype, device, temperature,
        versions of libraries and code. Values stored under it are never taken for those of another computation."""
        ...

    async def forward(self) -> dict[str, Any]:
        """How sequences are computed, as plain JSON. layout, attention: the module's; words: both for a person; slower:
        what was given up that costs speed, and why; notes: what else a user may want to know."""
        ...

    async def publish(self, folder: Path, version: int) -> Publication:
        """Write what engines load of this version into `folder`, with the digest of what they must then hold."""
        ...

    async def save(self, folder: Path) -> None:
        """Write model, optimizer and random state into an existing empty folder; the caller commits it."""
        ...

    async def restore(self, folder: Path) -> None:
        """Continue from what `save` wrote, on any number of ranks. Raises CheckpointError where it does not fit."""
        ...

    async def write_model(self, folder: Path) -> None:
        """Write what a user loads: the adapter in peft layout, or the whole model in transformers layout."""
        ...

    async def close(self) -> None:
        """End its processes; closing twice is harmless."""
        ...


class Scorer(Protocol):
    """The rewards of a stage, as one."""

    async def score(self, groups: Sequence[Group], budget: ErrorBudget | None = None) -> ScoreTable:
        """Several calls may run at once. budget None: these groups are all there is, and have a budget of their own.

        Raises RewardError where a reward fails more often than it may, PluginError where it cannot be loaded.
        """
        ...

    async def close(self) -> None:
        """End its processes; closing twice is harmless."""
        ...


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


def end_ids(folder: Path, tokenizer_eos: int | None, template: Sequence[int] = ()) -> frozenset[int]:
    """Token ids that end a turn: the tokenizer's, those of generation_config.json (else config.json), and those that a
    chat template ends turns with."""
    found = {*template, *(() if tokenizer_eos is None else (tokenizer_eos,))}
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        ids = config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id"))
        if ids is not None:
            return frozenset(found.union(ids if isinstance(ids, list) else [ids]))
    return frozenset(found)


def texts_of(
    token_ids: Sequence[int], ends: frozenset[int], decode: Callable[[list[int], bool], str]
) -> tuple[str, str | None]:
    """(text, raw) of a `Completion`. ends: ids that end a turn, which belong to neither; decode: ids to text, with or
    without special tokens (True: without)."""
    last = len(token_ids)
    while last and token_ids[last - 1] in ends:
        last -= 1
    spoken = list(token_ids[:last])
    text, raw = decode(spoken, True), decode(spoken, False)
    return text, None if raw == text else raw


def special_tokens(tokenizer: Any) -> frozenset[str]:
    """The texts that a tokenizer of transformers leaves out where it skips special tokens."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return frozenset(text for text in added.union(tokenizer.all_special_tokens) if text)
