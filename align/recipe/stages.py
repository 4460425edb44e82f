"""The kinds of stages, each with its own keys, the checks that need only itself, and the facts of its kind.

What is done with a stage hangs on what its class can do (`align.recipe.capabilities`) and on these facts, never on the
name of its kind: a new kind is a class here, its name in the union below, and a driver in `align.stages.pipeline`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from align.plugins import known_module
from align.recipe.capabilities import (
    Defaults,
    FolderStage,
    JudgingStage,
    SamplingStage,
    ScoringStage,
    StageBase,
    TrainStage,
)
from align.recipe.labels import Labels, Problem
from align.recipe.objectives import Objectives
from align.recipe.parts import (
    LossField,
    LossTerm,
    PairBatch,
    PairObjectives,
    Reward,
    RewardField,
    SequenceBatch,
)
from align.recipe.strict import PositiveInt


class SftStage(TrainStage):
    defaults = Defaults(adapter_lr=1e-4, whole_lr=2e-5)
    records = ("conversation",)
    kind: Literal["sft"]
    loss: LossField = (LossTerm(name="sft"),)
    batch: SequenceBatch = SequenceBatch()


class PreferenceStage(TrainStage):
    """rewards: judge chosen and rejected before the stage; `objectives.weights` make their scores the pair's margin,
    for losses that read one (modpo)."""

    defaults = Defaults(adapter_lr=5e-6, whole_lr=5e-7)
    records = ("pair", "unpaired")
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

    @property
    def rewarded_by(self) -> tuple[Reward, ...]:
        return self.rewards

    @property
    def weighed(self) -> Objectives | None:
        return Objectives(weights=self.objectives.weights)

    @property
    def judges_pairs(self) -> bool:
        return bool(self.rewards)


class RewardModelStage(ScoringStage):
    """A language model with a score head in place of its own, on preference pairs."""

    makes = "a reward model"
    evaluated = "with pairs: it reports accuracies"
    language_kind = "preference"
    defaults = Defaults(adapter_lr=1e-4, whole_lr=1e-5)
    records = ("pair",)
    kind: Literal["reward_model"]
    loss: LossField = (LossTerm(name="reward_model"),)
    batch: PairBatch = PairBatch()


def _names(value: Any) -> Any:
    """YAML reads `[1, 2, 3]` as numbers, which are names here; a truth value is a slip."""
    items = value if isinstance(value, list | tuple) else [value]
    if any(isinstance(item, bool) for item in items):
        raise ValueError('YAML takes true and false for truth values: put them in quotes, `labels: ["false", "true"]`')
    return [str(item) if isinstance(item, int) else item for item in items]


class ClassifyStage(ScoringStage):
    """A language model with a score head of one output per label, on labelled texts.

    labels: their names, in the order of the outputs; num_labels: only how many (they are LABEL_0, ...; of a regression
    one, unless given). problem: one label a row, any number of them, or numbers.
    """

    makes = "a classifier"
    evaluated = "or use `align classify`"
    language_kind = "sft"
    defaults = Defaults(adapter_lr=1e-4, whole_lr=1e-5)
    records = ("labelled",)
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
        if self.problem == "single_label" and len(self.score_head.names) < 2:
            raise ValueError("one label of one is no choice: name two at least, or say `problem: regression`")
        return self

    @property
    def score_head(self) -> Labels:
        if self.labels is not None:
            return Labels(self.labels, self.problem)
        return Labels.numbered(self.num_labels or 1, self.problem)

    @property
    def head_words(self) -> str:
        return f"a score head: {self.score_head.words}"


class OnlineStage(SamplingStage):
    defaults = Defaults(adapter_lr=1e-5, whole_lr=1e-6, schedule="constant")
    kind: Literal["online"]
    loss: LossField = (LossTerm(name="grpo"),)


class EvaluateStage(JudgingStage):
    kind: Literal["evaluate"]


class MergeStage(FolderStage):
    does = "merges"
    kind: Literal["merge"]
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


def _export_format(name: str) -> str:
    return known_module(name, "align.export.formats", "export format")


class ExportStage(FolderStage):
    does = "exports"
    for_others = True
    kind: Literal["export"]
    format: Annotated[str, AfterValidator(_export_format)] = "safetensors"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


TrainedStage = SftStage | PreferenceStage | RewardModelStage | ClassifyStage | OnlineStage
Stage = Annotated[TrainedStage | EvaluateStage | MergeStage | ExportStage, Field(discriminator="kind")]


def kinds_for(record: str, *, scoring: bool | None = None) -> list[str]:
    """Kinds of stages that train on such records, in the order of the union; with `scoring`, those that train a score
    head, or those that do not."""
    fits = [one for one in get_args(TrainedStage) if record in one.records]
    return [kind_of(one) for one in fits if scoring in (None, issubclass(one, ScoringStage))]


def kind_of(stage: type[StageBase]) -> str:
    """The word for a class of stages in a recipe."""
    return str(get_args(stage.model_fields["kind"].annotation)[0])
