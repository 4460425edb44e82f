"""Who sees whom in a packed row: made once per microbatch, used by every layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from align.types import TokenBatch


@dataclass
class AttentionPlan:
    """Who sees whom in one row of tokens, for every layer of a microbatch.

    segments: (query_start, query_end, parent_start, parent_end) of each; parent bounds are 0, 0 for a trunk.
    blocks: (start, end) of runs of tokens that see each other both ways, each inside one segment (Gemma 3's images).
    device: the batch's. kernel: one of KERNELS. What a kernel derives from the segments (indices, masks) is kept by
    `derived`.
    """

    segments: list[tuple[int, int, int, int]]
    device: torch.device
    kernel: str = "sdpa"
    blocks: tuple[tuple[int, int], ...] = ()
    cache: dict[str, Any] = field(default_factory=dict)

    def derived(self, name: str, make: Callable[[AttentionPlan], Any]) -> Any:
        """What `make` derives from this plan, computed once per microbatch."""
        if name not in self.cache:
            self.cache[name] = make(self)
        return self.cache[name]

    def blocks_in(self, start: int, end: int) -> tuple[tuple[int, int], ...]:
        """The blocks of a segment, counted from its start."""
        return tuple((a - start, b - start) for a, b in self.blocks if start <= a and b <= end)


def plan_attention(batch: TokenBatch, kernel: str = "sdpa", blocks: tuple[tuple[int, int], ...] = ()) -> AttentionPlan:
    """The plan of a packed batch."""
    rows = torch.stack([batch.query_start, batch.query_end, batch.parent_start, batch.parent_end], dim=1).tolist()
    segments = [(a, b, max(c, 0), d if c >= 0 else 0) for a, b, c, d in rows]
    return AttentionPlan(segments, batch.token_ids.device, kernel, blocks)
