"""`placement.trainer.strategy`: how the trainer's parameters are spread over its ranks. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from align.recipe.strict import Strict

NAMES = ("auto", "replicated", "zero0", "zero1", "zero2", "zero3")
KEEP_WHOLE = 100_000

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

    name: Literal["auto", "replicated", "zero0", "zero1", "zero2", "zero3"] = "auto"
    offload: Offload = Offload()
    keep_whole: Annotated[int, Field(ge=0)] = KEEP_WHOLE

    @property
    def stage(self) -> int:
        """Of ZeRO; 0 where nothing is spread."""
        return int(self.name[-1]) if self.name.startswith("zero") else 0

    @model_validator(mode="after")
    def _where_it_means_something(self) -> Sharding:
        if self.offload.optimizer != "none" and self.stage == 0:
            raise ValueError(f"`offload.optimizer` needs zero1, zero2 or zero3, and the strategy is {self.name}")
        if self.offload.parameters != "none" and self.stage != 3:
            raise ValueError(f"`offload.parameters` needs zero3, and the strategy is {self.name}")
        if self.keep_whole != KEEP_WHOLE and self.stage != 3:
            raise ValueError(f"`keep_whole` needs zero3, and the strategy is {self.name}")
        return self


def _named(value: Any) -> Any:
    """`zero2` is short for `{name: zero2}`; a strategy that is known and not offered is refused by its name."""
    found = value.get("name") if isinstance(value, dict) else value
    if not isinstance(found, str):
        return value
    word = found.lower().replace("-", "").replace("zero_", "zero")
    if word not in NAMES:
        raise ValueError(_REFUSED.get(word, f"{found!r} is no strategy: use {', '.join(NAMES)}"))
    return {**(value if isinstance(value, dict) else {}), "name": word}


ShardingField = Annotated[Sharding, BeforeValidator(_named)]
