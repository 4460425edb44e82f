"""Optimizers by name (`optim.name`): what each reads of the recipe and asks of memory, and where it is made. No torch.

A further one is a function in a file under `align/train/`, `(parameter groups, Optim) -> torch.optim.Optimizer`, and
one line of `OPTIMIZERS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Optimizer:
    """made_by: `package.module:function`. state_bytes: of what it remembers of each trained number.

    fields: keys of `optim` that it reads beyond those of every optimizer (lr, schedule, warmup, weight_decay,
    max_grad_norm). step_copies: of the largest tensor in float32, what a step takes in passing on a CPU. package: that
    it needs, and that comes with no installation of align. whole: why its moments cannot be spread over ranks, ""
    where they can. saves: the optimizer that it is with smaller moments; it is proposed where that one does not fit.
    """

    made_by: str
    state_bytes: float
    fields: tuple[str, ...] = ()
    step_copies: float = 0.0
    package: str | None = None
    whole: str = ""
    saves: str | None = None


OPTIMIZERS: Mapping[str, Optimizer] = {
    "adamw": Optimizer("align.train.optim:adamw", 8.0, ("betas", "eps")),  # two moments in float32
    "adamw_8bit": Optimizer(
        "align.train.optim:adamw_8bit",
        2 + 2 * 4 / 256,  # two moments: a byte each, and a scale for 256
        ("betas", "eps"),
        step_copies=5.5,  # moments, gradient, denominator, its root, and a part of packing them
        package="bitsandbytes",
        whole="moments in blocks of eight bits cannot be spread over ranks",
        saves="adamw",
    ),
}


def known_optimizer(name: str) -> str:
    """`name`; ValueError where no optimizer has it."""
    if name not in OPTIMIZERS:
        raise ValueError(f"{name!r} is no optimizer: use {' or '.join(OPTIMIZERS)}")
    return name
