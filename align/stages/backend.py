"""What the pipeline asks for and does not know how to make: trainers, engines, scorers, and jobs on model files.

`align.actors.build.RayBackend` answers with Ray actors and tasks; a test answers with plain objects. Jobs are plain
data. Nothing here knows Ray, torch or vLLM.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from align.episodes.spec import EpisodeSpec
from align.protocols.fleet import Fleet, PromptItem
from align.protocols.scorer import Scorer
from align.protocols.trainer import Trainer
from align.recipe.adapter import Adapter, Part, Rate
from align.recipe.chat_files import ChatFiles
from align.recipe.environment import Environment
from align.recipe.inputs import Media, Model
from align.recipe.labels import Labels
from align.recipe.parts import LossTerm, Optim, Packing, ReferencePath, Reward, Rollout
from align.stages.processes import ProcessId


@dataclass(frozen=True)
class Start:
    """Weights a stage begins with: a model folder, and a peft folder on top or none.

    config: the adapter configuration that training uses (the stage's own, or inherited).
    """

    base: Path
    adapter: Path | None
    config: Adapter

    @property
    def artefact(self) -> Literal["adapter", "model"]:
        return "model" if self.config.kind == "full" else "adapter"


@dataclass(frozen=True)
class TrainerJob:
    """A policy to train. total: the stage's updates; rollout: how engines sample it, None offline; seed: of fresh
    adapter weights and dropout; trainable False: forward only, for evaluation; rates: of the model's parts, where they
    are not `optim`'s; labels: of a classifier's head; chat: what is written beside the weights."""

    stage_id: str
    model: Model
    start: Start
    losses: tuple[LossTerm, ...]
    optim: Optim
    total: int
    packing: Packing
    seed: int
    reference: Literal["start", "base", "cached"] | ReferencePath | None = None
    rollout: Rollout | None = None
    trainable: bool = True
    labels: Labels | None = None
    rates: Mapping[Part, Rate] = field(default_factory=dict)
    chat: ChatFiles | None = None


@dataclass(frozen=True)
class FleetJob:
    """Engines to start. adapter_rank: 0 where whole weights or nothing is published; longest_prompt: tokens; versions:
    how many may be in use at once; end_ids: tokens that end a turn under the run's template; media: the largest number
    of each kind in one prompt; pixels: min_pixels and max_pixels where the recipe sets them; environment: what
    completions take turns with."""

    stage_id: str
    model: Model
    base: Path
    rollout: Rollout
    group_size: int
    adapter_rank: int
    longest_prompt: int
    seed: int
    versions: int = 1
    end_ids: tuple[int, ...] = ()
    media: Mapping[str, int] = field(default_factory=dict)
    pixels: Mapping[str, int] = field(default_factory=dict)
    environment: EpisodeSpec | None = None


@dataclass(frozen=True)
class ScorerJob:
    """Rewards to run. folder: the recipe's, where plugins are looked for; logs: folder for what they print and where
    they fail; cache: file of scores that runs share; number: of this scorer in its stage."""

    stage_id: str
    rewards: tuple[Reward, ...]
    folder: Path
    seed: int
    logs: Path
    number: int = 0
    cache: Path | None = None


@dataclass(frozen=True)
class Needs:
    """What a stage runs at the same time: a trainer, a reference of its own, engines, scorers, work on model files.
    overlap: engines sample while the trainer steps, instead of taking turns with it."""

    trainer: bool = False
    reference: bool = False
    engines: int = 0
    scorers: int = 0
    files: bool = False
    overlap: bool = False


class Backend(Protocol):
    """Everything it makes is closed by whoever asked for it; `close` ends what is left."""

    def places(self, needs: Needs) -> AbstractAsyncContextManager[None]:
        """Reserve what `needs` says; trainers, fleets and scorers are made inside. Raises PlacementError."""
        ...

    def expect(self, needs: Needs, engine: str | None = None) -> None:
        """A trainer or fleet of these needs will be asked for next, with engines of this name: what takes time and no
        decision may begin. Does nothing that a caller would notice; one that never comes costs nothing but memory."""
        ...

    async def trainer(self, job: TrainerJob) -> Trainer: ...

    async def fleet(self, job: FleetJob) -> Fleet: ...

    async def scorer(self, job: ScorerJob) -> Scorer: ...

    async def describe_environment(self, rules: Environment, folder: Path) -> Mapping[str, Any]:
        """What an environment says of itself: name, tools (schemas), objectives, has. folder: the recipe's. Raises
        PluginError where it cannot be loaded."""
        ...

    def gpus(self) -> float:
        """GPUs of the machines that the run is on, all together."""
        ...

    async def multiplied(self, inner: int, outer: int) -> Mapping[str, float]:
        """GFLOP/s of a CPU in a linear layer of these sides, by dtype (see `align.model.speed`)."""
        ...

    async def write_base(self, model: Model, folder: Path, seed: int) -> None:
        """Write config and weights of a model from scratch beside its tokenizer."""
        ...

    async def merge(
        self, base: Path, adapter: Path, out: Path, *, dtype: str, seed: int, chat: ChatFiles
    ) -> Mapping[str, Any]: ...

    async def export(self, folder: Path, out: Path, *, format: str, dtype: str) -> Mapping[str, Any]: ...

    def processes(self) -> list[ProcessId]:
        """What runs now, for run.json: a later `--resume` ends it if this process could not."""
        ...

    def threads(self) -> Mapping[str, int]:
        """Computing threads by role, for run.json: results depend on them in the last bit."""
        ...

    async def close(self) -> None: ...


def longest_prompt(prompts: Sequence[PromptItem]) -> int:
    return max((len(prompt.token_ids) for prompt in prompts), default=1)


def most_media(prompts: Sequence[PromptItem]) -> dict[str, int]:
    """The largest number of each kind of media in one prompt; {} where all are text."""
    most: Counter[str] = Counter()
    for prompt in prompts:
        most |= Counter(medium.kind for medium in prompt.media)
    return dict(most)


def pixel_limits(media: Media) -> dict[str, int]:
    """min_pixels and max_pixels where the recipe sets them."""
    limits = {"min_pixels": media.min_pixels, "max_pixels": media.max_pixels}
    return {name: limit for name, limit in limits.items() if limit is not None}
