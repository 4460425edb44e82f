"""Attention over packed trees with the softmax written out, for what SDPA has not: soft-capping and sinks.

Segment by segment, so that scores are Lq x Lk of one segment and never T x T.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from align.model.attention.sdpa import Shape, visible
from align.model.attention.varlen import Keys, plan_keys

if TYPE_CHECKING:
    from align.model.attention.plan import AttentionPlan


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    *,
    scaling: float | None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """query [1, Hq, T, D], key and value [1, Hkv, T, D], sinks [Hq] or None -> [1, T, Hq, D].

    Scores are capped as in Gemma 2 (2408.00118, section 2); a sink is gpt-oss's (2508.10925, section 2.2): a score in
    the denominator alone.
    """
    keys: Keys = plan.derived("keys", plan_keys)
    heads, kv_heads, width = query.shape[1], key.shape[1], query.shape[-1]
    scaling = width**-0.5 if scaling is None else scaling
    q_all = query.squeeze(0).transpose(0, 1).split(keys.query_lengths)
    k_all, v_all = (keys.gather(x.squeeze(0).transpose(0, 1)).split(keys.key_lengths) for x in (key, value))
    outputs = []
    for (start, end, *_), q, k, v in zip(plan.segments, q_all, k_all, v_all, strict=True):
        grouped = q.transpose(0, 1).reshape(kv_heads, heads // kv_heads, *q.shape[::2])  # [Hkv, G, Lq, D]
        scores = (grouped @ k.permute(1, 2, 0)[:, None]) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        shape = Shape(len(q), len(k), plan.blocks_in(start, end))
        scores = scores.masked_fill(~visible(shape, sliding_window, q.device), float("-inf"))
        if sinks is None:
            weights = scores.softmax(-1, dtype=torch.float32)
        else:
            sink = sinks.reshape(kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
            weights = torch.cat([scores, sink.to(scores.dtype)], dim=-1).softmax(-1, dtype=torch.float32)[..., :-1]
        weights = F.dropout(weights.to(q.dtype), dropout, training=dropout > 0)
        out = weights @ v.transpose(0, 1)[:, None]
        outputs.append(out.flatten(0, 1).transpose(0, 1))
    return torch.cat(outputs).unsqueeze(0)
