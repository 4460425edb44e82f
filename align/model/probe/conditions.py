"""What the probe computes under: windows short enough to reach beyond, and adapters that are not all zeros."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from align.errors import UserError

WINDOW = 4  # of layers with a sliding window, for the time of the probe
WINDOWS = (
    "sliding_window", "attention_chunk_size", "attention_window_size", "local_attention", "window_size", "index_topk",
    "keep_window_size",
)  # fmt: skip
LORA_SIZE = 5e-3  # of the entries of an adapter's product, where a fresh one is woken for the probe
# what a forward may raise that a model was not written for
FAILURES = (UserError, RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError, AssertionError)


@contextmanager
def woken_adapters(model: Any) -> Iterator[None]:
    """A fresh adapter is all zeros, and would hide what is computed with it: inside the block it has small values."""
    changed: list[tuple[nn.Parameter, Tensor]] = []
    generator = torch.Generator().manual_seed(0)
    try:
        for module in model.modules():
            for name, up in (getattr(module, "lora_B", None) or {}).items():
                weight, down = getattr(up, "weight", None), getattr(module.lora_A[name], "weight", None)
                if weight is None or down is None or weight.count_nonzero().item():
                    continue
                size = (
                    LORA_SIZE * down.shape[1] ** 0.5 / (abs(module.scaling[name]) * down.float().norm().item() + 1e-12)
                )
                changed.append((weight, weight.data))
                drawn = size * torch.randn(weight.shape, generator=generator)
                weight.data = drawn.to(weight.device, weight.dtype)
        yield
    finally:
        for parameter, data in changed:
            parameter.data = data


@contextmanager
def small_windows(backbone: Any) -> Iterator[None]:
    """Sliding windows and attention chunks of WINDOW tokens, wherever a text backbone and its configuration have longer
    ones; a vision tower's windows are of other things."""
    owners = {
        id(owner): owner for m in backbone.modules() for owner in (m, getattr(m, "config", None)) if owner is not None
    }
    changed: list[tuple[Any, str, int]] = []
    try:
        for owner in owners.values():
            for name in WINDOWS:
                value = getattr(owner, name, None)
                if type(value) is int and value > WINDOW:
                    changed.append((owner, name, value))
                    setattr(owner, name, WINDOW)
        yield
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)
