"""Optimizers and learning-rate schedule. Which there are, and what they ask for: `align.recipe.optimizers`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from align.plugins import of_ours
from align.recipe.adapter import Part, Rate
from align.recipe.optimizers import OPTIMIZERS
from align.recipe.parts import Optim


def make_optimizer(
    parts: Mapping[Part, Sequence[torch.nn.Parameter]], optim: Optim, rates: Mapping[Part, Rate]
) -> torch.optim.Optimizer:
    """The optimizer that the recipe names, with decay on matrices only: biases, norms and other vectors are left alone.

    parts: what is trained of each part of the model, at its own rates or else `optim`'s. Each group keeps its learning
    rate as "peak_lr": what the schedule multiplies.
    """
    assert optim.lr is not None, "the learning rate was resolved before training"
    groups = []
    for part, parameters in parts.items():
        rate = rates.get(part, Rate(optim.lr, optim.weight_decay))
        settings = {"lr": rate.lr, "peak_lr": rate.lr, "part": part}
        matrices = [p for p in parameters if p.ndim > 1]
        vectors = [p for p in parameters if p.ndim <= 1]
        groups += [
            {"params": matrices, "weight_decay": rate.weight_decay, **settings},
            {"params": vectors, "weight_decay": 0.0, **settings},
        ]
    groups = [group for group in groups if group["params"]]
    made: torch.optim.Optimizer = of_ours(OPTIMIZERS[optim.name].made_by)(groups, optim)
    return made


def adamw(groups: list[dict[str, Any]], optim: Optim) -> torch.optim.Optimizer:
    """AdamW (1711.05101)."""
    assert optim.lr is not None
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def adamw_8bit(groups: list[dict[str, Any]], optim: Optim) -> torch.optim.Optimizer:
    """bitsandbytes' (2110.02861): moments in eight bits by blocks of 256, on CPUs and GPUs; tensors of fewer than 4096
    numbers keep them in float32."""
    from bitsandbytes.optim import AdamW8bit

    made: torch.optim.Optimizer = AdamW8bit(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
    return made


def set_rates(optimizer: torch.optim.Optimizer, multiplier: float) -> dict[str, float]:
    """Every group's learning rate at `multiplier` of its peak; the rates that it comes to, as metrics."""
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        group["lr"] = multiplier * group["peak_lr"]
        rates[group["part"]] = group["lr"]
    metrics = {"optim/lr": rates.get("language", max(rates.values()))}
    if len(set(rates.values())) > 1:
        metrics |= {f"optim/lr_{part}": lr for part, lr in rates.items()}
    return metrics


def lr_multiplier(schedule: str, warmup: float, progress: float) -> float:
    """Factor on the learning rate at `progress` in (0, 1), the middle of an update: no update is wasted at zero.

    Linear warm-up over the first `warmup` of the stage, then constant, linear to 0, or half a cosine to 0.
    """
    assert 0.0 < progress <= 1.0, progress
    if progress < warmup:
        return progress / warmup
    if schedule == "constant":
        return 1.0
    rest = (progress - warmup) / max(1.0 - warmup, 1e-12)
    if schedule == "linear":
        return 1.0 - rest
    assert schedule == "cosine", schedule
    return 0.5 * (1.0 + math.cos(math.pi * rest))
