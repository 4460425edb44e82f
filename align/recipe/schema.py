"""The recipe as strict types. Grammar and defaults; no torch, ray, vllm or transformers import.

Every key is spelled out: an unknown one is an error. Cross-checks that need only the recipe live here as validators;
those that need files, templates or plugins belong to `align check`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from align.recipe.adapter import Adapter
from align.recipe.inputs import DataField, Media, Model, TokenizerFromScratch
from align.recipe.labels import Labels, Problem
from align.recipe.objectives import Objectives
from align.recipe.sharding import Sharding, ShardingField
from align.recipe.strict import Fraction, PositiveInt, Strict

# ------------------------------------------------------------------------------------------------- stage parts


class Optim(Strict):
    """name: AdamW (1711.05101); adamw_8bit keeps its moments in eight bits (2110.02861): 2 bytes a weight, not 8."""

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    lr: Annotated[float, Field(gt=0)] | None = None
    schedule: Literal["cosine", "linear", "constant"] | None = None
    warmup: Fraction | None = None
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0


class Packing(Strict):
    """How a batch is computed: microbatches of at most `max_tokens`. "auto" is what computes fastest: on a CPU as much
    as its cache holds of a layer's activations (measured: tests/bench/results), on a GPU what fills it.

    max_patches: of images and video in a microbatch, in the units of the model's vision tower; "auto" is four for each
    token, as many as towers that join 2 x 2 patches make of a row of images alone. media_cache_mb: how much of what
    frozen towers make of images is kept (in memory of the trainer's process) and not computed again; 0 keeps none.
    """

    max_tokens: PositiveInt | Literal["auto"] = "auto"
    max_patches: PositiveInt | Literal["auto"] = "auto"
    media_cache_mb: Annotated[int, Field(ge=0)] = 1024

    def budget(self, gpu: bool) -> int:
        return self.max_tokens if self.max_tokens != "auto" else 16384 if gpu else 4096

    def patches(self, gpu: bool) -> int:
        return self.max_patches if self.max_patches != "auto" else 4 * self.budget(gpu)


def _every(value: Any) -> Any:
    text = value.strip() if isinstance(value, str) else ""
    if text.endswith("%"):
        try:
            share = float(text[:-1])
        except ValueError:
            share = 0.0
        if not 0 < share <= 100:
            raise ValueError(f"a percentage of the stage must be in (0, 100], got {value!r}")
        return f"{share:g}%"
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"give a number of steps or a percentage such as 10%, got {value!r}")
    return value


Every = Annotated[int | str, BeforeValidator(_every)]


class Best(Strict):
    metric: str = "eval/accuracies"
    mode: Literal["max", "min"] = "max"


class Save(Strict):
    """`every`: steps, or a percentage of the stage. `keep`: newest checkpoints kept beside the best one."""

    every: Every = "10%"
    keep: PositiveInt = 2
    best: Best | None = None


class Eval(Strict):
    data: DataField
    every: Every = "10%"
    at_start: bool = False
    rewards: RewardField = ()


class Reward(Strict):
    """A reward plugin: `use` is one of ours by bare name, an entry point, `pkg.mod:attr` or `file.py:attr`."""

    use: str
    as_: str | None = Field(default=None, alias="as")
    args: dict[str, Any] = Field(default_factory=dict)
    timeout_s: Annotated[float, Field(gt=0)] | None = None
    retries: Annotated[int, Field(ge=0)] | None = None
    on_error: str | None = None
    max_error_rate: Fraction | None = None
    batch: PositiveInt | None = None
    concurrency: PositiveInt | None = None
    processes: PositiveInt | None = None
    rate: float | str | None = None
    cache: bool | None = None
    signature: Literal["align", "trl", "swift"] = "align"

    @property
    def name(self) -> str:
        return self.as_ or self.use.rpartition(":")[2].rpartition(".")[2]


def _rewards(value: Any) -> Any:
    items = value if isinstance(value, list | tuple) else [value]
    return [{"use": item} if isinstance(item, str) else item for item in items]


RewardField = Annotated[tuple[Reward, ...], BeforeValidator(_rewards)]


class Rollout(Strict):
    """Generation. Only what is listed may change the sampling distribution.

    truncated: what becomes of a completion that max_tokens cut off. mask: it is not trained on, and leaves every
    denominator. keep: it is one like any other. penalise: it is kept, and the stage gets one more objective
    `truncated`, a cost of 1 for such a completion, whose weight is `truncated_penalty`. With combine weighted_sum that
    is a reward lowered by the penalty; with decoupled, as for every objective there, its scale in the group goes first.

    publish: whether whole weights wait for the requests that run (drain), or take over between two of their tokens
    (in_flight). With an adapter, requests always finish on the version they began with.

    heartbeat_s: an engine whose process does not answer for so long is killed and restarted; request_timeout_s: one
    that answers, has work, and finishes no step for so long is too.
    """

    name: Literal["vllm", "transformers"] = "vllm"
    workers: PositiveInt = 1
    temperature: Annotated[float, Field(ge=0)] = 1.0
    max_tokens: PositiveInt = 512
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    weights: Literal["auto", "adapter", "merged"] = "auto"
    publish: Literal["drain", "in_flight"] = "drain"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: PositiveInt | None = None
    engine: dict[str, Any] = Field(default_factory=dict)
    heartbeat_s: Annotated[float, Field(gt=0)] = 60.0
    request_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    truncated: Literal["mask", "keep", "penalise"] = "mask"
    truncated_penalty: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _penalty_where_it_penalises(self) -> Rollout:
        if (self.truncated == "penalise") != (self.truncated_penalty is not None):
            raise ValueError("`truncated: penalise` and `truncated_penalty` (such as 1.0) go together")
        return self


def _own_resources(value: dict[str, float]) -> dict[str, float]:
    for name in value.keys() & {"CPU", "GPU", "memory", "object_store_memory"}:
        raise ValueError(f"{name!r} is counted by Ray itself: `cpus` and `gpus` ask for processors")
    return value


CustomResources = Annotated[dict[str, Annotated[float, Field(gt=0)]], AfterValidator(_own_resources)]


class Share(Strict):
    """resources: of a node beside CPUs and GPUs, for each process: `{train: 1}` asks for a node that was started with
    `ray start --resources '{"train": 4}'`."""

    resources: CustomResources = Field(default_factory=dict)
    ranks: PositiveInt = 1
    cpus: Annotated[float, Field(ge=0)] | None = None
    gpus: Annotated[float, Field(ge=0)] | None = None
    threads: PositiveInt | None = None


class TrainerShare(Share):
    """ranks: processes that train one policy together; strategy: how its parameters are spread over them."""

    strategy: ShardingField = Sharding()


class RewardShare(Share):
    """count: reward actors, spread over the nodes of a cluster; each runs every plugin for its part of the groups."""

    count: PositiveInt = 1


class Placement(Strict):
    """max_restarts: times that a run goes on from its last checkpoint after it lost a trainer rank or its node; by
    default 3 on a cluster that it joined, and 0 on one machine. replacement_s: how long a place for what was lost is
    waited for, until another node has room or a new one joins."""

    max_restarts: Annotated[int, Field(ge=0)] | None = None
    replacement_s: Annotated[float, Field(gt=0)] = 600.0
    trainer: TrainerShare = TrainerShare()
    reference: Share = Share()
    rollout: Share = Share()
    rewards: RewardShare = RewardShare()

    @property
    def custom(self) -> list[str]:
        """Resources that the recipe names: they are of nodes of a cluster, and no machine has them by itself."""
        shares = (self.trainer, self.reference, self.rollout, self.rewards)
        return sorted({name for share in shares for name in share.resources})


class Report(Strict):
    tensorboard: bool = True
    wandb: dict[str, Any] | None = None


# ------------------------------------------------------------------------------------------------- stages


def _loss_list(value: Any) -> Any:
    items = value if isinstance(value, list) else [value]
    return [{"name": item} if isinstance(item, str) else item for item in items]


class LossTerm(BaseModel):
    """`name` and `weight` here; the loss's own options are validated by its `Config`."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str
    weight: Annotated[float, Field(gt=0)] = 1.0

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


LossField = Annotated[tuple[LossTerm, ...], BeforeValidator(_loss_list), Field(min_length=1)]


class StageBase(Strict):
    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
    from_: str | None = Field(default=None, alias="from")


class ReferencePath(Strict):
    path: str
    revision: str | None = None
    adapter: str | None = None


class TrainStage(StageBase):
    adapter: Adapter | None = None
    data: DataField
    packing: Packing = Packing()
    optim: Optim = Optim()
    epochs: Annotated[float, Field(gt=0)] | None = None
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


class ExportStage(StageBase):
    kind: Literal["export"]
    format: Literal["safetensors"] = "safetensors"
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


class Recipe(Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: Annotated[int, Field(ge=0)] = 0
    output: str = "runs"
    model: Model
    media: Media = Media()
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    placement: Placement = Placement()
    report: Report = Report()

    @field_validator("output")
    @classmethod
    def _output_is_a_folder(cls, value: str) -> str:
        if "://" in value:
            raise ValueError(
                f"{value!r} is a URL, and runs are written to a folder: give a shared path that every node mounts "
                "(a bucket mounted by s3fs, gcsfuse or the like is one)"
            )
        return value

    @property
    def run_folder(self) -> Path:
        return Path(self.output) / self.name

    def stage(self, stage_id: str) -> Any:
        return next(s for s in self.stages if s.id == stage_id)

    def before(self, stage_id: str) -> Iterator[Any]:
        for stage in self.stages:
            if stage.id == stage_id:
                return
            yield stage

    @model_validator(mode="after")
    def _stage_graph(self) -> Recipe:
        seen: dict[str, Any] = {}
        for stage in self.stages:
            if stage.id in seen:
                raise ValueError(f"two stages have the id {stage.id!r}; ids name folders and must differ")
            wanted = [stage.from_.partition("@")[0]] if stage.from_ else []
            wanted += [name.partition("@")[0] for name in getattr(stage, "of", ())]
            for source in wanted:
                if source not in seen:
                    known = ", ".join(seen) or "none"
                    raise ValueError(f"stage {stage.id!r} builds on {source!r}, which is no earlier stage ({known})")
                if seen[source].kind == "evaluate":
                    raise ValueError(f"stage {stage.id!r} builds on {source!r}, an evaluate stage: it makes no model")
            seen[stage.id] = stage
        return self


TokenizerFromScratch.model_rebuild()
Eval.model_rebuild()
Model.model_rebuild()
for _stage in (
    TrainStage,
    SftStage,
    PreferenceStage,
    RewardModelStage,
    ClassifyStage,
    OnlineStage,
    EvaluateStage,
    Recipe,
):
    _stage.model_rebuild()
