"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from align.recipe.schema import Optim


def make_optimizer(parameters: Iterable[torch.nn.Parameter], optim: Optim) -> torch.optim.Optimizer:
    """AdamW (1711.05101) with decay on matrices only: biases, norms and other vectors are left alone."""
    matrices: list[torch.nn.Parameter] = []
    vectors: list[torch.nn.Parameter] = []
    for p in parameters:
        (matrices if p.ndim > 1 else vectors).append(p)
    groups = [
        {"params": matrices, "weight_decay": optim.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    assert optim.lr is not None, "the learning rate was resolved before training"
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True
    )


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
