"""Attention over packed trees: a trunk attends causally to itself, a branch to its trunk and causally to itself.

Registered with transformers as the attention implementation `align_packed`. No mask function is registered for it,
so the models build none: who sees whom is described by segments, and no T x T mask exists anywhere. The plan is made
once per microbatch and used by every layer.

Segments of equal shape are computed as one batched call: a batch of short conversations costs a few kernel launches
per layer, not one per conversation.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

from align.errors import Unsupported
from align.types import TokenBatch

NAME = "align_packed"


@dataclass(frozen=True)
class Bucket:
    """B segments of Lq queries and Lk keys each (Lk - Lq of them the parent's)."""

    size: int
    queries: int
    keys: int


@dataclass
class AttentionPlan:
    """Where each segment's queries and keys stand in the row.

    query_index i64[T]: tokens ordered bucket by bucket; key_index i64[sum B*Lk]: the keys of each bucket's segments,
    the parent's first; restore i64[T]: undoes query_index; masks: bool[Lq, Lk] by shape and window, made once.
    """

    buckets: list[Bucket]
    query_index: Tensor
    key_index: Tensor
    restore: Tensor
    masks: dict[tuple[int, int, int | None], Tensor | None] = field(default_factory=dict)

    def mask(self, queries: int, keys: int, window: int | None) -> Tensor | None:
        """Bottom-right aligned causal mask, or None where SDPA's own causal flag (or no mask) says the same."""
        window = None if window is None or window >= keys else window
        if window is None and (queries == keys or queries == 1):
            return None
        key = (queries, keys, window)
        if key not in self.masks:
            device = self.query_index.device
            distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
            visible = distance >= 0
            self.masks[key] = visible if window is None else visible & (distance < window)
        return self.masks[key]


def plan_attention(batch: TokenBatch) -> AttentionPlan:
    """Group the segments of a batch by shape. Indices are on the batch's device."""
    rows = torch.stack([batch.query_start, batch.query_end, batch.parent_start, batch.parent_end], dim=1).tolist()
    shapes: dict[tuple[int, int], list[tuple[int, int, int, int]]] = {}
    for start, end, parent_start, parent_end in rows:
        parent = parent_end - parent_start if parent_start >= 0 else 0
        shapes.setdefault((end - start, end - start + parent), []).append((start, end, parent_start, parent_end))
    buckets, query_parts, key_parts = [], [], []
    for (queries, keys), members in shapes.items():
        buckets.append(Bucket(len(members), queries, keys))
        for start, end, parent_start, parent_end in members:
            own = torch.arange(start, end)
            query_parts.append(own)
            key_parts.append(own if keys == queries else torch.cat([torch.arange(parent_start, parent_end), own]))
    query_index = torch.cat(query_parts)
    restore = torch.empty_like(query_index)
    restore[query_index] = torch.arange(query_index.numel())
    device = batch.token_ids.device
    return AttentionPlan(buckets, query_index.to(device), torch.cat(key_parts).to(device), restore.to(device))


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
    plan = align_plan
    queries = _segments(query, plan.query_index, [(b.size, b.queries) for b in plan.buckets])
    keys = _segments(key, plan.key_index, [(b.size, b.keys) for b in plan.buckets])
    values = _segments(value, plan.key_index, [(b.size, b.keys) for b in plan.buckets])
    repeat = query.shape[1] // key.shape[1]
    outputs: list[Tensor] = []
    for bucket, q, k, v in zip(plan.buckets, queries, keys, values, strict=True):
        if repeat > 1:
            k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        mask = plan.mask(bucket.queries, bucket.keys, sliding_window)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling, is_causal=mask is None and bucket.queries > 1
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, plan.restore).unsqueeze(0), None


AttentionInterface.register(NAME, packed_attention_forward)
