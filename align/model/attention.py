"""Attention over packed trees: a trunk attends causally to itself, a branch to its trunk and causally to itself.

Registered with transformers as the attention implementation `align_packed`. No mask function is registered for it,
so the models build none: who sees whom is described by segments, and no T x T mask exists anywhere. The plan is made
once per microbatch and used by every layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from align.errors import Unsupported
from align.model.attention_sdpa import sdpa_attention
from align.types import TokenBatch

NAME = "align_packed"


@dataclass
class AttentionPlan:
    """Who sees whom in one row of tokens, for every layer of a microbatch.

    segments: (query_start, query_end, parent_start, parent_end) of each; parent bounds are 0, 0 for a trunk.
    device: the batch's. What a kernel derives from the segments (indices, masks) is kept by `derived`.
    """

    segments: list[tuple[int, int, int, int]]
    device: torch.device
    cache: dict[str, Any] = field(default_factory=dict)

    def derived(self, name: str, make: Callable[[AttentionPlan], Any]) -> Any:
        """What `make` derives from this plan, computed once per microbatch."""
        if name not in self.cache:
            self.cache[name] = make(self)
        return self.cache[name]


def plan_attention(batch: TokenBatch) -> AttentionPlan:
    """The plan of a packed batch."""
    rows = torch.stack([batch.query_start, batch.query_end, batch.parent_start, batch.parent_end], dim=1).tolist()
    segments = [(a, b, max(c, 0), d if c >= 0 else 0) for a, b, c, d in rows]
    return AttentionPlan(segments, batch.token_ids.device)


def packed_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    align_plan: AttentionPlan | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """transformers' attention signature: query [1, Hq, T, D], key and value [1, Hkv, T, D] -> [1, T, Hq, D]."""
    if align_plan is None:
        raise RuntimeError(f"attention implementation {NAME!r} needs `align_plan`: call the model through PolicyModule")
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise Unsupported(
                f"attention with {name!r} ({type(module).__name__}) has no packed implementation in this version",
                remedy="use a model without it",
            )
    return sdpa_attention(
        query, key, value, align_plan, scaling=scaling, dropout=dropout, sliding_window=sliding_window
    ), None


AttentionInterface.register(NAME, packed_attention_forward)
