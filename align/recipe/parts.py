"""What stages of a recipe share: optimizer, packing, checkpoints, evaluation, rewards, losses, rollout."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from align.recipe.engines import known_engine
from align.recipe.inputs import DataField
from align.recipe.optimizers import OPTIMIZERS, known_optimizer
from align.recipe.strict import Fraction, Name, PositiveInt, Strict

Beta = Annotated[float, Field(ge=0, lt=1)]


class Optim(Strict):
    """name: AdamW (1711.05101); adamw_8bit keeps its moments in eight bits (2110.02861): 2 bytes a weight, not 8. The
    others: `align.recipe.optimizers`."""

    name: Annotated[str, AfterValidator(known_optimizer)] = "adamw"
    lr: Annotated[float, Field(gt=0)] | None = None
    schedule: Literal["cosine", "linear", "constant"] | None = None
    warmup: Fraction | None = None
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: Annotated[float, Field(ge=0)] = 1e-8
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0

    @model_validator(mode="after")
    def _options_are_read(self) -> Optim:
        own = {field for one in OPTIMIZERS.values() for field in one.fields} - {*OPTIMIZERS[self.name].fields}
        for field in sorted(own):
            if getattr(self, field) != type(self).model_fields[field].default:  # a resolved copy spells defaults out
                raise ValueError(f"`{field}` has no effect on `name: {self.name}`: leave it out")
        return self


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
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= 10**9:
        raise ValueError(f"give a number of steps or a percentage such as 10%, got {value!r}")
    return value


Every = Annotated[int | str, BeforeValidator(_every)]


_LESS_IS_BETTER = frozenset({"mse", "mae", "kl", "truncated", "missing", "error_rate", "failed_calls"})


class Best(Strict):
    """`mode`: whether the largest or the smallest value of `metric` is the best. Where the recipe says nothing its name
    does: losses, errors and shares of what went wrong are the better the smaller they are."""

    metric: str = "eval/accuracies"
    mode: Literal["max", "min"] = "max"

    @model_validator(mode="before")
    @classmethod
    def _mode_of_the_name(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("mode") is not None or not isinstance(given.get("metric"), str):
            return given
        words = given["metric"].removeprefix("eval/").split("/")
        return given | {"mode": "min" if words[0] == "loss" or words[-1] in _LESS_IS_BETTER else "max"}


class Save(Strict):
    """`every`: steps, or a percentage of the stage. `keep`: newest checkpoints kept beside the best one."""

    every: Every = "10%"
    keep: PositiveInt = 2
    best: Best | None = None


class Reward(Strict):
    """A reward plugin: `use` is one of ours by bare name, an entry point, `pkg.mod:attr` or `file.py:attr`.

    scope: whether a call may hold any samples, whole groups (`batch`), or one group; text: whether the plugin reads
    completions `stripped` of special tokens, or `raw`, as they were generated.
    """

    use: str
    as_: Name | None = Field(default=None, alias="as")
    args: dict[str, Any] = Field(default_factory=dict)
    scope: Literal["sample", "batch", "group"] | None = None
    text: Literal["stripped", "raw"] | None = None
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


class Eval(Strict):
    data: DataField
    every: Every = "10%"
    at_start: bool = False
    rewards: RewardField = ()


def _loss_list(value: Any) -> Any:
    items = value if isinstance(value, list) else [value]
    return [{"name": item} if isinstance(item, str) else item for item in items]


class LossTerm(BaseModel):
    """`name` and `weight` here; the loss's own options are validated by its `Config`."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)
    name: str
    weight: Annotated[float, Field(gt=0)] = 1.0

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


LossField = Annotated[tuple[LossTerm, ...], BeforeValidator(_loss_list), Field(min_length=1)]


class Rollout(Strict):
    """Generation. Only what is listed may change the sampling distribution.

    name: an engine of ours, or one's own as `package.module:Class` (`align.engines`).

    truncated: what becomes of a completion that max_tokens cut off. mask: it is not trained on, and leaves every
    denominator. keep: it is one like any other. penalise: it is kept, and the stage gets one more objective
    `truncated`, a cost of 1 for such a completion, whose weight is `truncated_penalty`. With combine weighted_sum that
    is a reward lowered by the penalty; with decoupled, as for every objective there, its scale in the group goes first.

    publish: whether whole weights wait for the requests that run (drain), or take over between two of their tokens
    (in_flight). With an adapter, requests always finish on the version they began with.

    heartbeat_s: an engine whose process does not answer for so long is killed and restarted; request_timeout_s: one
    that answers, has work, and finishes no step for so long is too.
    """

    name: Annotated[str, AfterValidator(known_engine)] = "vllm"
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


class ReferencePath(Strict):
    path: str
    revision: str | None = None
    adapter: str | None = None


DEFAULT_BATCH = 32  # sequences or pairs, where the recipe gives none


class SequenceBatch(Strict):
    sequences: PositiveInt = DEFAULT_BATCH

    @property
    def rows(self) -> int:
        """Rows of the data in one batch."""
        return self.sequences


class PairBatch(Strict):
    pairs: PositiveInt | None = None
    sequences: PositiveInt | None = None

    @property
    def rows(self) -> int:
        return self.sequences or self.pairs or DEFAULT_BATCH


class GroupBatch(Strict):
    groups: PositiveInt = 16
    group_size: Annotated[int, Field(ge=2)] = 8

    @property
    def rows(self) -> int:
        return self.groups


class PairObjectives(Strict):
    """A pair's margin is the weighted sum of its differences in score; an objective that is not named has weight 1."""

    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)


class DynamicSampling(Strict):
    """Groups without signal (every completion scored alike) are replaced by fresh prompts (DAPO, 2503.14476).
    max_factor: a step samples at most so many times its groups; what then is without signal is trained as it is."""

    max_factor: Annotated[float, Field(gt=1)] = 3.0
