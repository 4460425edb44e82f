"""Attention over packed trees by torch's scaled_dot_product_attention, segment by segment: the path of the CPU and MPS.

Segments of equal shape are computed as one batched call: a batch of short conversations costs a few kernel launches
per layer, not one per conversation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from align.model.attention.tree import plan_trees, tree_attention

if TYPE_CHECKING:
    from align.model.attention.plan import AttentionPlan


@dataclass(frozen=True)
class Shape:
    """Lq queries and Lk keys of a segment (Lk - Lq of them the parent's), and its blocks, counted from its start."""

    queries: int
    keys: int
    blocks: tuple[tuple[int, int], ...] = ()


def visible(shape: Shape, window: int | None, device: torch.device) -> Tensor:
    """bool[Lq, Lk]: causal, aligned bottom-right, and both ways inside a block; of all that what the window holds."""
    queries, keys = shape.queries, shape.keys
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    seen = distance >= 0
    for start, end in shape.blocks:
        seen[start:end, start + keys - queries : end + keys - queries] = True
    return seen if window is None else seen & (distance < window)


@dataclass(frozen=True)
class Bucket:
    """B segments of one shape."""

    size: int
    shape: Shape


@dataclass
class SdpaPlan:
    """Where each segment's queries and keys stand in the row.

    query_index i64[T]: tokens ordered bucket by bucket; key_index i64[sum B*Lk]: the keys of each bucket's segments,
    the parent's first; restore i64[T]: undoes query_index; masks: bool[Lq, Lk] by shape and window, made once.
    """

    buckets: list[Bucket]
    query_index: Tensor
    key_index: Tensor
    restore: Tensor
    masks: dict[tuple[Shape, int | None], Tensor | None] = field(default_factory=dict)

    def mask(self, shape: Shape, window: int | None) -> Tensor | None:
        """What is visible, or None where SDPA's own causal flag (or no mask) says the same."""
        window = None if window is None or window >= shape.keys else window
        if window is None and not shape.blocks and (shape.queries == shape.keys or shape.queries == 1):
            return None
        key = (shape, window)
        if key not in self.masks:
            self.masks[key] = visible(shape, window, self.query_index.device)
        return self.masks[key]


def plan_sdpa(plan: AttentionPlan) -> SdpaPlan:
    """Group the segments of a batch by shape. Indices are on the batch's device."""
    shapes: dict[Shape, list[tuple[int, int, int, int]]] = {}
    for start, end, parent_start, parent_end in plan.segments:
        shape = Shape(end - start, end - start + parent_end - parent_start, plan.blocks_in(start, end))
        shapes.setdefault(shape, []).append((start, end, parent_start, parent_end))
    buckets, query_parts, key_parts = [], [], []
    for shape, members in shapes.items():
        buckets.append(Bucket(len(members), shape))
        for start, end, parent_start, parent_end in members:
            own = torch.arange(start, end)
            query_parts.append(own)
            joined = [torch.arange(parent_start, parent_end), own]
            key_parts.append(own if shape.keys == shape.queries else torch.cat(joined))
    query_index = torch.cat(query_parts)
    restore = torch.empty_like(query_index)
    restore[query_index] = torch.arange(query_index.numel())
    return SdpaPlan(buckets, query_index.to(plan.device), torch.cat(key_parts).to(plan.device), restore.to(plan.device))


def _segments(x: Tensor, index: Tensor, sizes: list[tuple[int, int]]) -> list[Tensor]:
    """Gather rows of x[1, H, T, D] by index and cut them into buckets: a list of [B, H, L, D].

    One gather and one split: their backwards are one scatter and one concatenation, where slicing would fill a zero
    tensor of all tokens for every bucket.
    """
    rows = x.squeeze(0).transpose(0, 1).index_select(0, index)
    parts = rows.split([count * length for count, length in sizes])
    return [
        part.view(count, length, *rows.shape[1:]).transpose(1, 2)
        for part, (count, length) in zip(parts, sizes, strict=True)
    ]


def longest_sequence(plan: AttentionPlan) -> int:
    """Tokens of the longest sequence: of a branch, its trunk's too."""
    return max(end - start + last - first for start, end, first, last in plan.segments)


def sdpa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    *,
    scaling: float | None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
) -> Tensor:
    """query [1, Hq, T, D], key and value [1, Hkv, T, D] -> [1, T, Hq, D].

    sliding_window w: a token sees itself and the w - 1 before it, its trunk's among them, and what comes after it in
    its block.
    """
    if sliding_window is not None and sliding_window >= plan.derived("longest", longest_sequence):
        sliding_window = None  # it reaches to the beginning of every sequence
    if sliding_window is None and dropout == 0.0 and query.device.type == "cpu" and not plan.blocks:
        trees = plan.derived("trees", plan_trees)
        if trees is not None and query.dtype == key.dtype == value.dtype and query.shape[-1] == value.shape[-1]:
            return tree_attention(query, key, value, trees, scaling)
    own = plan.derived("sdpa", plan_sdpa)
    queries = _segments(query, own.query_index, [(b.size, b.shape.queries) for b in own.buckets])
    keys = _segments(key, own.key_index, [(b.size, b.shape.keys) for b in own.buckets])
    values = _segments(value, own.key_index, [(b.size, b.shape.keys) for b in own.buckets])
    repeat = query.shape[1] // key.shape[1]
    outputs: list[Tensor] = []
    for bucket, q, k, v in zip(own.buckets, queries, keys, values, strict=True):
        if repeat > 1:
            k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        mask = own.mask(bucket.shape, sliding_window)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            scale=scaling,
            is_causal=mask is None and bucket.shape.queries > 1,
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, own.restore).unsqueeze(0)
