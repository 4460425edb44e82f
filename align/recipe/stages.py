"""The kinds of stages, each with its own keys and the checks that need only itself."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from align.plugins import known_module
from align.recipe.adapter import Adapter
from align.recipe.inputs import DataField
from align.recipe.labels import Labels, Problem
from align.recipe.objectives import Objectives
from align.recipe.parts import Eval, LossField, LossTerm, Optim, Packing, RewardField, Rollout, Save
from align.recipe.strict import Fraction, PositiveInt, Strict

RUNS_OWN = frozenset({"base", "logs", "shared", "sources", "sweep", "tensorboard", "wandb"})
"""What a run keeps in its folder beside its stages."""


class StageBase(Strict):
    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=100)]
    from_: str | None = Field(default=None, alias="from")

    @field_validator("id")
    @classmethod
    def _a_folder_of_its_own(cls, value: str) -> str:
        if value.lower() in RUNS_OWN:
            own = ", ".join(sorted(RUNS_OWN))
            raise ValueError(f"{value!r} names a folder that the run itself writes ({own}); call the stage otherwise")
        return value


class ReferencePath(Strict):
    path: str
    revision: str | None = None
    adapter: str | None = None


class TrainStage(StageBase):
    adapter: Adapter | None = None
    data: DataField
    packing: Packing = Packing()
    optim: Optim = Optim()
    epochs: Annotated[float, Field(gt=0, le=1e6)] | None = None
    steps: PositiveInt | None = None
    eval: Eval | None = None
    save: Save = Save()
    reference: Literal["start", "base", "cached"] | ReferencePath | None = None

    @model_validator(mode="after")
    def _one_length(self) -> TrainStage:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give `epochs` or `steps`, not both")
        return self


class SequenceBatch(Strict):
    sequences: PositiveInt = 32


class PairBatch(Strict):
    pairs: PositiveInt | None = None
    sequences: PositiveInt | None = None


class GroupBatch(Strict):
    groups: PositiveInt = 16
    group_size: Annotated[int, Field(ge=2)] = 8


class SftStage(TrainStage):
    kind: Literal["sft"]
    loss: LossField = (LossTerm(name="sft"),)
    batch: SequenceBatch = SequenceBatch()


class PairObjectives(Strict):
    """A pair's margin is the weighted sum of its differences in score; an objective that is not named has weight 1."""

    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)


class PreferenceStage(TrainStage):
    """rewards: judge chosen and rejected before the stage; `objectives.weights` make their scores the pair's margin,
    for losses that read one (modpo)."""

    kind: Literal["preference"]
    loss: LossField = (LossTerm(name="dpo"),)
    batch: PairBatch = PairBatch()
    rewards: RewardField = ()
    objectives: PairObjectives = PairObjectives()

    @model_validator(mode="after")
    def _objectives_of_rewards(self) -> PreferenceStage:
        if self.objectives.weights and not self.rewards:
            raise ValueError(
                "`objectives.weights` weigh what `rewards` score, and the stage has none: add `rewards: [...]`"
            )
        return self


class RewardModelStage(TrainStage):
    """A language model with a score head in place of its own, on preference pairs."""

    kind: Literal["reward_model"]
    loss: LossField = (LossTerm(name="reward_model"),)
    batch: PairBatch = PairBatch()


def _names(value: Any) -> Any:
    """YAML reads `[1, 2, 3]` as numbers, which are names here; a truth value is a slip."""
    items = value if isinstance(value, list | tuple) else [value]
    if any(isinstance(item, bool) for item in items):
        raise ValueError('YAML takes true and false for truth values: put them in quotes, `labels: ["false", "true"]`')
    return [str(item) if isinstance(item, int) else item for item in items]


class ClassifyStage(TrainStage):
    """A language model with a score head of one output per label, on labelled texts.

    labels: their names, in the order of the outputs; num_labels: only how many (they are LABEL_0, ...; of a regression
    one, unless given). problem: one label a row, any number of them, or numbers.
    """

    kind: Literal["classify"]
    loss: LossField = (LossTerm(name="classify"),)
    batch: SequenceBatch = SequenceBatch()
    labels: Annotated[tuple[str, ...], BeforeValidator(_names), Field(min_length=1)] | None = None
    num_labels: PositiveInt | None = None
    problem: Problem = "single_label"

    @model_validator(mode="after")
    def _one_meaning_of_outputs(self) -> ClassifyStage:
        if self.labels is not None and self.num_labels not in (None, len(self.labels)):
            raise ValueError(
                f"`labels` names {len(self.labels)} and `num_labels` is {self.num_labels}; give one of them"
            )
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            raise ValueError("two of `labels` have the same name")
        if self.labels is None and self.num_labels is None and self.problem != "regression":
            raise ValueError("give `labels: [names]`, or `num_labels`: how many outputs the head has")
        if self.problem == "single_label" and len(self.head.names) < 2:
            raise ValueError("one label of one is no choice: name two at least, or say `problem: regression`")
        return self

    @property
    def head(self) -> Labels:
        if self.labels is not None:
            return Labels(self.labels, self.problem)
        return Labels.numbered(self.num_labels or 1, self.problem)


class DynamicSampling(Strict):
    """Groups without signal (every completion scored alike) are replaced by fresh prompts (DAPO, 2503.14476).
    max_factor: a step samples at most so many times its groups; what then is without signal is trained as it is."""

    max_factor: Annotated[float, Field(gt=1)] = 3.0


class OnlineStage(TrainStage):
    """updates_per_batch: how often every group is trained on before new ones are sampled; minibatches: equal parts of a
    batch of groups, one optimizer update each. A step makes updates_per_batch * minibatches updates and one publish.

    staleness: versions that a group may be behind when it is trained on; 0 is synchronous and on-policy. overdue:
    what becomes of a group that would be older; wait for it in time, or drop it, which favours short completions.
    max_failed_prompts: of a step's prompts, the share that the engines may refuse; at least one where it is not 0."""

    kind: Literal["online"]
    loss: LossField = (LossTerm(name="grpo"),)
    batch: GroupBatch = GroupBatch()
    updates_per_batch: PositiveInt = 1
    minibatches: PositiveInt = 1
    staleness: Annotated[int, Field(ge=0)] = 0
    overdue: Literal["wait", "drop"] = "wait"
    dynamic_sampling: DynamicSampling | None = None
    max_failed_prompts: Fraction = 0.02
    rollout: Rollout = Rollout()
    rewards: Annotated[RewardField, Field(min_length=1)]
    objectives: Objectives = Objectives()

    @model_validator(mode="after")
    def _minibatches_of_whole_groups(self) -> OnlineStage:
        groups, parts = self.batch.groups, self.minibatches
        if groups % parts:
            divisors = ", ".join(str(n) for n in range(1, groups + 1) if groups % n == 0)
            raise ValueError(f"`minibatches: {parts}` does not divide `batch.groups: {groups}`; it takes {divisors}")
        return self

    @model_validator(mode="after")
    def _replaces_at_least_one(self) -> OnlineStage:
        factor, groups = self.dynamic_sampling and self.dynamic_sampling.max_factor, self.batch.groups
        if factor and (factor - 1) * groups < 1 - 1e-9:
            raise ValueError(
                f"`dynamic_sampling.max_factor: {factor:g}` of {groups} groups leaves none to replace; "
                f"at least {1 + 1 / groups:.3g}"
            )
        return self

    @model_validator(mode="after")
    def _drops_where_something_can_be_late(self) -> OnlineStage:
        if self.overdue == "drop" and self.staleness == 0:
            raise ValueError("`overdue: drop` needs `staleness` above 0: a synchronous step waits for all its groups")
        return self

    @model_validator(mode="after")
    def _one_weight_of_truncated(self) -> OnlineStage:
        named = {*self.objectives.weights, *self.objectives.schedule}
        if self.rollout.truncated == "penalise" and "truncated" in named:
            raise ValueError("the weight of the objective `truncated` is `rollout.truncated_penalty`; give it there")
        return self

    @model_validator(mode="after")
    def _replaces_what_the_group_decides(self) -> OnlineStage:
        if self.dynamic_sampling and self.objectives.baseline == "batch":
            raise ValueError(
                "`dynamic_sampling` replaces groups whose scores are equal, and under `objectives.baseline: batch` "
                "they teach as others do; leave it out, or compare within groups (`baseline: group`)"
            )
        return self


class EvaluateStage(StageBase):
    """Greedy completions scored by `rewards`; without rewards, the metrics of `loss` on the training forward."""

    kind: Literal["evaluate"]
    of: tuple[str, ...]
    data: DataField
    rewards: RewardField = ()
    rollout: Rollout = Rollout(temperature=0.0)
    loss: LossField = (LossTerm(name="sft"),)
    packing: Packing = Packing()


class MergeStage(StageBase):
    kind: Literal["merge"]
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


def _export_format(name: str) -> str:
    return known_module(name, "align.export.formats", "export format")


class ExportStage(StageBase):
    kind: Literal["export"]
    format: Annotated[str, AfterValidator(_export_format)] = "safetensors"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


Stage = Annotated[
    SftStage
    | PreferenceStage
    | RewardModelStage
    | ClassifyStage
    | OnlineStage
    | EvaluateStage
    | MergeStage
    | ExportStage,
    Field(discriminator="kind"),
]
