"""What a stage can be: classes of stages by what they do, from which `align.recipe.stages` makes the kinds.

Other rooms ask for these, and for the facts that stand on them, never for the name of a kind.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from align.recipe.adapter import Adapter, Part, Rate
from align.recipe.environment import Environment, EnvironmentField
from align.recipe.inputs import DataField, DataSource, Mix
from align.recipe.labels import Labels
from align.recipe.objectives import Objectives
from align.recipe.parts import (
    DynamicSampling,
    Eval,
    GroupBatch,
    LossField,
    LossTerm,
    Optim,
    Packing,
    PairBatch,
    ReferencePath,
    Reward,
    RewardField,
    Rollout,
    Save,
    SequenceBatch,
)
from align.recipe.sampled import problems_of_sampling
from align.recipe.strict import Fraction, PositiveInt, Strict

BEFORE_ANY = "base"  # in `of`: the model before any stage; no stage has this id
RUNS_OWN = frozenset({BEFORE_ANY, "logs", "shared", "sources", "sweep", "tensorboard", "wandb"})
"""What a run keeps in its folder beside its stages."""


class Defaults(NamedTuple):
    """Where a recipe gives none: the learning rates of an adapter and of whole weights, schedule and warm-up. The rates
    are what TRL, ms-swift and the LoRA papers use as starting points."""

    adapter_lr: float
    whole_lr: float
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.05


class StageBase(Strict):
    """What stages have in common, and the facts of one that neither trains nor samples nor writes.

    trains: it makes updates, has checkpoints and goes on from them; others start over. makes_folder: it writes one
    plain model folder, on which a later stage trains a fresh adapter. makes_model: another stage can build on it.
    records: what its losses may learn from."""

    trains: ClassVar[bool] = False
    makes_folder: ClassVar[bool] = False
    makes_model: ClassVar[bool] = True
    records: ClassVar[tuple[str, ...]] = ()

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=100)]
    from_: str | None = Field(default=None, alias="from")

    @field_validator("id")
    @classmethod
    def _a_folder_of_its_own(cls, value: str) -> str:
        if value.lower() in RUNS_OWN:
            own = ", ".join(sorted(RUNS_OWN))
            raise ValueError(f"{value!r} names a folder that the run itself writes ({own}); call the stage otherwise")
        return value

    @property
    def losses(self) -> tuple[LossTerm, ...]:
        """Its losses: those that it trains or evaluates by."""
        return ()

    @property
    def datasets(self) -> dict[str, tuple[DataSource, ...]]:
        """The sources of its rows, by the key that names them."""
        return {}

    @property
    def judged(self) -> tuple[str, ...]:
        """The stages, or bests of them (`X@best`), that it evaluates; the model before any stage is none."""
        return ()

    @property
    def rewarded_by(self) -> tuple[Reward, ...]:
        """The rewards that score what it samples or trains on."""
        return ()

    @property
    def every_reward(self) -> tuple[Reward, ...]:
        """Those, and its evaluation's own."""
        return self.rewarded_by

    @property
    def weighed(self) -> Objectives | None:
        """How scores are made one number; None where they are reported as they are."""
        return None

    @property
    def judges_pairs(self) -> bool:
        """Whether rewards judge its pairs before it, for their margins."""
        return False

    @property
    def engines(self) -> Rollout | None:
        """How its engines sample; None where it samples nothing."""
        return None

    @property
    def sampled_tokens(self) -> int:
        """Tokens that a completion may add to its prompt, or an episode with what its environment answers; 0 where
        nothing is sampled."""
        if self.engines is None:
            return 0
        turn = self.engines.max_tokens
        return max((world.context_tokens(turn) for world in self.worlds), default=turn)

    @property
    def trained_tokens(self) -> int:
        """Tokens that are trained on, which a completion, or an episode in all its sequences, may add to its prompt."""
        if self.engines is None:
            return 0
        turn = self.engines.max_tokens
        return max((world.trained_tokens(turn) for world in self.worlds), default=turn)

    @property
    def worlds(self) -> tuple[Environment, ...]:
        """What completions take turns with, each with one of these; () where each is an answer."""
        return ()

    @property
    def score_head(self) -> Labels | None:
        """What the score head means that it trains; None where it trains a language model."""
        return None


class TrainStage(StageBase):
    """A stage that trains: adapter or weights by updates, with checkpoints to go on from."""

    trains: ClassVar[bool] = True
    defaults: ClassVar[Defaults]

    adapter: Adapter | None = None
    data: DataField
    mix: Mix | None = None
    packing: Packing = Packing()
    optim: Optim = Optim()
    epochs: Annotated[float, Field(gt=0, le=1e6)] | None = None
    steps: PositiveInt | None = None
    eval: Eval | None = None
    save: Save = Save()
    reference: Literal["start", "base", "cached"] | ReferencePath | None = None
    kind: str
    loss: LossField
    batch: SequenceBatch | PairBatch | GroupBatch

    @model_validator(mode="after")
    def _one_length(self) -> TrainStage:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give `epochs` or `steps`, not both")
        return self

    @model_validator(mode="after")
    def _mixes_by_weights(self) -> TrainStage:
        if self.mix is not None and not all(source.weight for source in self.data):
            raise ValueError(
                "`mix` says how long an epoch of weighted sources is: give all of `data` a `weight`, or leave it out"
            )
        return self

    @property
    def streams(self) -> bool:
        """Whether its rows are read as it goes."""
        return any(source.stream for source in self.data)

    @property
    def losses(self) -> tuple[LossTerm, ...]:
        return self.loss

    @property
    def datasets(self) -> dict[str, tuple[DataSource, ...]]:
        return {"data": self.data} | ({"eval.data": self.eval.data} if self.eval else {})

    @property
    def every_reward(self) -> tuple[Reward, ...]:
        return (*self.rewarded_by, *(self.eval.rewards if self.eval else ()))

    def optim_for(self, adapter: Adapter) -> Optim:
        """The optimizer settings with every value filled in."""
        lr = self.defaults.whole_lr if adapter.kind == "full" else self.defaults.adapter_lr
        return self.optim.model_copy(
            update={
                "lr": lr if self.optim.lr is None else self.optim.lr,
                "schedule": self.optim.schedule or self.defaults.schedule,
                "warmup": self.defaults.warmup if self.optim.warmup is None else self.optim.warmup,
            }
        )

    def rates_for(self, adapter: Adapter) -> dict[Part, Rate]:
        """Learning rate and weight decay of each part that is trained. A part without its own has the stage's; where
        the stage leaves its learning rate open too, a part that is trained whole has what whole models have by default.
        """
        optim = self.optim_for(adapter)
        assert optim.lr is not None
        rates: dict[Part, Rate] = {}
        for part, mode in adapter.modes.items():
            if mode == "frozen":
                continue
            own, lr = getattr(adapter.tune, part), optim.lr
            if self.optim.lr is None and mode == "full":
                lr = self.defaults.whole_lr
            own_lr, own_decay = (own.lr, own.weight_decay) if own is not None else (None, None)
            rates[part] = Rate(lr if own_lr is None else own_lr, optim.weight_decay if own_decay is None else own_decay)
        return rates


class ScoringStage(TrainStage):
    """A stage that trains a language model with a score head in place of its own. In messages, makes: what comes of it;
    evaluated: how that is; language_kind: the kind of stage that trains a language model on the same rows."""

    makes: ClassVar[str]
    evaluated: ClassVar[str]
    language_kind: ClassVar[str]

    @property
    def score_head(self) -> Labels:
        return Labels.numbered(1)

    @property
    def head_words(self) -> str:
        return "a score head"


class SamplingStage(TrainStage):
    """A stage that trains on groups of completions which engines sample as it goes.

    updates_per_batch: how often every group is trained on before new ones are sampled; minibatches: equal parts of a
    batch of groups, one optimizer update each. A step makes updates_per_batch * minibatches updates and one publish.

    staleness: versions that a group may be behind when it is trained on; 0 is synchronous and on-policy. overdue:
    what becomes of a group that would be older; wait for it in time, or drop it, which favours short completions.
    max_failed_prompts: of a step's prompts, the share that the engines may refuse; at least one where it is not 0."""

    records = ("group",)
    batch: GroupBatch = GroupBatch()
    updates_per_batch: PositiveInt = 1
    minibatches: PositiveInt = 1
    staleness: Annotated[int, Field(ge=0)] = 0
    overdue: Literal["wait", "drop"] = "wait"
    dynamic_sampling: DynamicSampling | None = None
    max_failed_prompts: Fraction = 0.02
    rollout: Rollout = Rollout()
    environment: EnvironmentField = ()
    rewards: RewardField = ()
    objectives: Objectives = Objectives()

    @model_validator(mode="after")
    def _goes_together(self) -> SamplingStage:
        for problem in problems_of_sampling(self):
            raise ValueError(problem)
        return self

    @property
    def rewarded_by(self) -> tuple[Reward, ...]:
        return self.rewards

    @property
    def weighed(self) -> Objectives | None:
        return self.objectives

    @property
    def engines(self) -> Rollout | None:
        return self.rollout

    @property
    def worlds(self) -> tuple[Environment, ...]:
        return self.environment

    def turns(self, rows: int) -> int:
        """Turns of the stage: `steps`, or as many as its epochs (one by default) take of `rows` prompts, rounded up."""
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil((self.epochs or 1.0) * rows / self.batch.groups - 1e-9))


class JudgingStage(StageBase):
    """A stage that examines what others made (`of`; `base` is the model before any stage): greedy completions scored by
    `rewards`; without rewards, the metrics of `loss` on the training forward."""

    makes_model = False
    records = ("conversation", "pair", "unpaired")
    kind: str
    of: tuple[str, ...]
    data: DataField
    environment: EnvironmentField = ()
    rewards: RewardField = ()
    rollout: Rollout = Rollout(temperature=0.0)
    loss: LossField = (LossTerm(name="sft"),)
    packing: Packing = Packing()

    @property
    def losses(self) -> tuple[LossTerm, ...]:
        return self.loss

    @property
    def datasets(self) -> dict[str, tuple[DataSource, ...]]:
        return {"data": self.data}

    @property
    def judged(self) -> tuple[str, ...]:
        return tuple(name for name in self.of if name != BEFORE_ANY)

    @property
    def rewarded_by(self) -> tuple[Reward, ...]:
        return self.rewards

    @property
    def worlds(self) -> tuple[Environment, ...]:
        return self.environment

    @property
    def engines(self) -> Rollout | None:
        return self.rollout if self.rewards or self.environment else None


class FolderStage(StageBase):
    """A stage that writes one plain model folder. does: the word for it. for_others: what it writes is for programs
    that know nothing of this one, and has to load in them."""

    makes_folder = True
    does: ClassVar[str]
    for_others: ClassVar[bool] = False
    kind: str
