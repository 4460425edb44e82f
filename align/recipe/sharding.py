"""`placement.trainer.strategy`: how the trainer's parameters are spread over its ranks. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from align.recipe.strict import Strict

KEEP_WHOLE = 100_000
Held = Literal["moments", "gradients", "parameters"]


@dataclass(frozen=True)
class Strategy:
    """made_by: `package.module:Class`, an `align.train.strategy.Strategy`. spreads: what each rank holds a part of.
    reads: options of `strategy` that mean something to it. copy_bytes: of each trained number, what it keeps beside
    weights and moments. package: that it needs, and that comes with no installation of align."""

    made_by: str
    spreads: tuple[Held, ...] = ()
    reads: tuple[str, ...] = ()
    copy_bytes: float = 0.0
    package: str | None = None


_WHOLE = Strategy("align.train.strategy:Replicated")


def _zero(spreads: tuple[Held, ...], *reads: str) -> Strategy:
    """DeepSpeed's: it steps a flat float32 copy of what is trained."""
    return Strategy("align.train.zero:Zero", spreads, ("offload.optimizer", *reads), 4.0, "deepspeed")


STRATEGIES: Mapping[str, Strategy] = {
    "auto": _WHOLE,
    "replicated": _WHOLE,
    "zero0": _WHOLE,
    "zero1": _zero(("moments",)),
    "zero2": _zero(("moments", "gradients")),
    "zero3": _zero(("moments", "gradients", "parameters"), "offload.parameters", "keep_whole"),
}
"""A further strategy is a class in a file under `align/train/`, and one line here."""

_ZERO = "use zero1, zero2 or zero3"
_REFUSED = {
    **dict.fromkeys(("fsdp", "fsdp1", "fsdp2"), f"FSDP is not offered by this version: {_ZERO}, which shard the same"),
    **dict.fromkeys(("tensor", "tp", "tensor_parallel"), f"tensor parallelism is not offered by this version: {_ZERO}"),
    **dict.fromkeys(
        ("sequence", "sp", "ulysses", "context", "cp"),
        "sequence parallelism is not offered by this version: lower `packing.max_tokens`, or use "
        "`model.gradient_checkpointing: true`",
    ),
    **dict.fromkeys(
        ("pipeline", "pp", "pipeline_parallel"), f"pipeline parallelism is not offered by this version: {_ZERO}"
    ),
    **dict.fromkeys(("expert", "ep"), f"expert parallelism is not offered by this version: {_ZERO}"),
    "ddp": "data parallelism with everything on every rank is called replicated",
    "deepspeed": f"DeepSpeed is chosen by its stage: {_ZERO}",
}


def _known(value: Any) -> Any:
    """A strategy that is known and not offered is refused by its name."""
    if not isinstance(value, str):
        return value
    word = value.lower().replace("-", "").replace("zero_", "zero")
    if word not in STRATEGIES:
        raise ValueError(_REFUSED.get(word, f"{value!r} is no strategy: use {', '.join(STRATEGIES)}"))
    return word


class Offload(Strict):
    """What waits in the host's memory: the optimizer (moments and their update), and ZeRO-3's parameters."""

    optimizer: Literal["none", "cpu"] = "none"
    parameters: Literal["none", "cpu"] = "none"


class Sharding(Strict):
    """auto and zero0 are replicated: every rank holds everything. zero1 spreads the optimizer's moments over ranks,
    zero2 gradients too, zero3 parameters too.

    keep_whole: parameters of no more elements than this are not spread by zero3: gathering them costs more than it
    saves.
    """

    name: Annotated[str, BeforeValidator(_known)] = "auto"
    offload: Offload = Offload()
    keep_whole: Annotated[int, Field(ge=0)] = KEEP_WHOLE

    @property
    def facts(self) -> Strategy:
        return STRATEGIES[self.name]

    @model_validator(mode="after")
    def _where_it_means_something(self) -> Sharding:
        given = {
            "offload.optimizer": self.offload.optimizer != "none",
            "offload.parameters": self.offload.parameters != "none",
            "keep_whole": self.keep_whole != KEEP_WHOLE,
        }
        for option, there in given.items():
            if there and option not in self.facts.reads:
                *others, last = [name for name, one in STRATEGIES.items() if option in one.reads]
                readers = f"{', '.join(others)} or {last}" if others else last
                raise ValueError(f"`{option}` needs {readers}, and the strategy is {self.name}")
        return self


def _named(value: Any) -> Any:
    """`zero2` is short for `{name: zero2}`."""
    return {"name": value} if isinstance(value, str) else value


ShardingField = Annotated[Sharding, BeforeValidator(_named)]
