"""Attention over packed trees by FlexAttention: one compiled kernel a layer, with soft-capping and sinks.

Five numbers per token say what it sees: where its segment begins, where its trunk begins and ends, its place in its
sequence, and the last token that it sees. The block mask is laid out from the segments, block by block; nothing of
size T x T is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from align.errors import Unsupported

if TYPE_CHECKING:
    from align.model.attention.plan import AttentionPlan

BLOCK = 128


@dataclass
class FlexPlan:
    """starts, parent_starts, parent_ends, places i64[T]: of each token's segment, its trunk, and its place in its
    sequence; lasts i64[T]: the last token that it sees, itself or its block's last one; masks: block masks by window,
    made once."""

    starts: Tensor
    parent_starts: Tensor
    parent_ends: Tensor
    places: Tensor
    lasts: Tensor
    masks: dict[int | None, BlockMask] = field(default_factory=dict)

    def visible(self, window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """FlexAttention's mask_mod."""
        starts, parent_starts, parent_ends, places = self.starts, self.parent_starts, self.parent_ends, self.places
        lasts = self.lasts

        def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return ((k >= starts[q]) & (k <= lasts[q])) | ((k >= parent_starts[q]) & (k < parent_ends[q]))

        if window is None:
            return sees
        unseen = places - window  # a tensor, and no number in the closure: dynamic shapes would make a symbol of it

        def sees_near(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return sees(batch, head, q, k) & (places[k] > unseen[q])

        return sees_near

    def mask(self, plan: AttentionPlan, window: int | None) -> BlockMask:
        if window not in self.masks:
            tokens = int(self.starts.shape[0])
            touched, whole = touched_blocks(plan.segments, tokens, window)
            for start, end in plan.blocks:
                touched[start // BLOCK : -(-end // BLOCK), start // BLOCK : -(-end // BLOCK)] = True
            self.masks[window] = BlockMask.from_kv_blocks(
                *_listed(touched & ~whole, plan.device),
                *_listed(whole, plan.device),
                BLOCK_SIZE=BLOCK,
                mask_mod=self.visible(window),
                seq_lengths=(tokens, tokens),
            )
        return self.masks[window]


def plan_flex(plan: AttentionPlan) -> FlexPlan:
    """What each token sees. Tensors are on the batch's device."""
    bounds = torch.tensor(plan.segments)
    lengths = bounds[:, 1] - bounds[:, 0]
    starts, _, parent_starts, parent_ends = bounds.repeat_interleave(lengths, dim=0).T
    places = torch.arange(len(starts)) - starts + parent_ends - parent_starts
    lasts = torch.arange(len(starts))
    for start, end in plan.blocks:
        lasts[start:end] = end - 1
    columns = {"starts": starts, "parent_starts": parent_starts, "parent_ends": parent_ends}
    columns |= {"places": places, "lasts": lasts}
    return FlexPlan(**{name: x.contiguous().to(plan.device) for name, x in columns.items()})


def _listed(blocks: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """bool[nq, nk] as FlexAttention wants it: number of blocks i32[1, 1, nq], and their places i32[1, 1, nq, nk]."""
    dense = torch.as_tensor(blocks).int()[None, None]
    order = torch.argsort(dense, dim=-1, descending=True, stable=True)
    return dense.sum(-1).to(device, torch.int32), order.to(device, torch.int32)


def touched_blocks(
    segments: list[tuple[int, int, int, int]], tokens: int, window: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Two bool[nq, nk], blocks of queries by blocks of keys: which hold a pair that sees each other, and which surely
    hold nothing else (the kernel asks no mask there)."""
    n = -(-tokens // BLOCK)
    touched, whole = np.zeros((n, n), dtype=bool), np.zeros((n, n), dtype=bool)
    for start, end, parent_start, parent_end in segments:
        before = parent_end - parent_start
        for block in range(start // BLOCK, -(-end // BLOCK)):
            first, last = max(start, block * BLOCK), min(end, (block + 1) * BLOCK) - 1
            # places in the sequence from which on the first query sees, and all queries of the block see
            some, all_ = (0 if window is None else max(0, before + q - start - window + 1) for q in (first, last))
            touched[block, max(start, start + some - before) // BLOCK : last // BLOCK + 1] = True
            if parent_start + some < parent_end:
                touched[block, (parent_start + some) // BLOCK : -(-parent_end // BLOCK)] = True
            if last - first + 1 == BLOCK:
                whole[block, -(-max(start, start + all_ - before) // BLOCK) : first // BLOCK] = True
                whole[block, -(-(parent_start + all_) // BLOCK) : parent_end // BLOCK] = True
    return touched, whole


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)


def flex_attention_over(
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

    On the CPU it runs without a compiler and makes T x T scores: for tests.
    """
    if dropout > 0:
        raise Unsupported(
            "FlexAttention has no dropout on attention weights", where="model.attention", remedy="use auto"
        )
    own: FlexPlan = plan.derived("flex", plan_flex)

    cap = plan.derived(f"cap {softcap}", lambda plan: torch.tensor(softcap or 1.0, device=plan.device))

    def capped(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    compute = _compiled() if query.is_cuda else flex_attention
    options = {} if sinks is None else {"return_aux": AuxRequest(lse=True)}
    found = compute(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=own.mask(plan, sliding_window),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        **options,
    )
    if sinks is None:
        out: Tensor = found
    else:
        out, aux = found
        # exp(lse) / (exp(lse) + exp(sink)): the sink joins the denominator after the fact
        out = out * torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype)[None, :, None])[..., None].to(out.dtype)
    return out.transpose(1, 2)
