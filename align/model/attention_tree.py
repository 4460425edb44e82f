"""Attention over packed trees on a CPU: own part and trunk part apart, joined by their log-sum-exps.

A branch attends to its trunk and, causally, to itself. Computed as one call over [trunk ; branch] that needs a mask,
half of whose square is thrown away, and a copy of the trunk's keys for every branch. Here every segment attends
causally to itself, the branches of a tree attend to their trunk together without any mask, and both results join as
blocks of a flash attention do (2205.14135, 2309.17453 section 3): with l = logaddexp(l_own, l_trunk),

    out = exp(l_own - l) out_own + exp(l_trunk - l) out_trunk

Backward needs nothing new: the flash kernel's own backward, given the joined output and the joined l, yields each
part's exact share of the gradient, because P = exp(s - l) is then the weight among all keys.

Long segments are slices of the row, read where they stand. Short ones, which would cost a call each, are gathered
into batches of similar length, padded at their ends with keys that no real query sees. Query heads that share a key
head are one more dimension with stride zero, so keys are never repeated in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from align.model.attention import AttentionPlan

SHORT = 128  # longest segment that is gathered into a batch with others
STEP = 16  # lengths are rounded up to a multiple of it

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Batch:
    """B short segments of up to L tokens. gather i64[B*L]: their tokens, the last one repeated up to L; real i64[n]:
    which of the B*L places are no repetition; tokens i64[n]: the token at each of these."""

    size: int
    length: int
    gather: Tensor
    real: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class TreePlan:
    """slices: long segments (start, end); batches: short ones; trunks: (trunk start, end, branches' start, end)."""

    slices: list[tuple[int, int]]
    batches: list[Batch]
    trunks: list[tuple[int, int, int, int]]


def plan_trees(plan: AttentionPlan) -> TreePlan | None:
    """Sort the segments of a row; None where the branches of a trunk do not stand side by side."""
    slices: list[tuple[int, int]] = []
    short: dict[int, list[tuple[int, int]]] = {}
    trunks: dict[tuple[int, int], list[int]] = {}
    for start, end, parent_start, parent_end in plan.segments:
        if end - start > SHORT:
            slices.append((start, end))
        else:
            short.setdefault(-(-(end - start) // STEP) * STEP, []).append((start, end))
        if parent_end > parent_start:
            span = trunks.setdefault((parent_start, parent_end), [start, start])
            if span[1] != start:
                return None
            span[1] = end
    batches = [_batch(members, length) for length, members in sorted(short.items())]
    return TreePlan(slices, batches, [(*trunk, span[0], span[1]) for trunk, span in trunks.items()])


def _batch(members: list[tuple[int, int]], length: int) -> Batch:
    bounds = torch.tensor(members)
    places = bounds[:, :1] + torch.arange(length)
    inside = places < bounds[:, 1:]
    gather = torch.minimum(places, bounds[:, 1:] - 1)
    return Batch(len(members), length, gather.flatten(), inside.flatten().nonzero()[:, 0], places[inside])


def tree_attention(query: Tensor, key: Tensor, value: Tensor, plan: TreePlan, scaling: float | None) -> Tensor:
    """query [1, Hq, T, D], key and value [1, Hkv, T, D] on a CPU -> [1, T, Hq, D].

    Half precision is computed in float32: torch's CPU kernel is slower in bfloat16 (measured: 5.4 ms against 4.4 ms
    for forward and backward of 262 queries on 148 + 262 keys), and less exact.
    """
    single = (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x for x in (query, key, value))
    out: Tensor = _TreeAttention.apply(*single, plan, scaling)
    return out.to(query.dtype)


def _grouped(x: Tensor, heads: int) -> Tensor:
    """[1, H, T, D] -> [Hkv, H / Hkv, T, D], a view."""
    return x[0].unflatten(0, (heads, -1))


class _TreeAttention(torch.autograd.Function):
    """Heads are [Hkv, R, ...] throughout, R query heads to a key head; log-sum-exps are f32[Hkv, R, T]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: TreePlan, scaling: float | None) -> Tensor:
        heads, tokens = key.shape[1], query.shape[2]
        q, (k, v) = _grouped(query, heads), (_shared(x, query.shape[1] // heads) for x in (key, value))
        joined = query.new_empty(tokens, query.shape[1], query.shape[3])
        out = joined.unflatten(1, (heads, -1)).permute(1, 2, 0, 3)
        lse = query.new_empty(heads, tokens, q.shape[1]).transpose(1, 2)
        for start, end in plan.slices:
            own = slice(start, end)
            out[:, :, own], lse[:, :, own] = _flash(q[:, :, own], k[:, :, own], v[:, :, own], 0.0, True, scale=scaling)
        for batch in plan.batches:
            part, sums = _flash(*(_gathered(x, batch) for x in (q, k, v)), 0.0, True, scale=scaling)
            joined.index_copy_(0, batch.tokens, part.transpose(1, 2).flatten(0, 1).index_select(0, batch.real))
            sums = sums.transpose(1, 2).flatten(0, 1).index_select(0, batch.real)
            lse.permute(2, 0, 1).index_copy_(0, batch.tokens, sums.unflatten(1, (heads, -1)))
        for trunk_start, trunk_end, start, end in plan.trunks:
            trunk, own = slice(trunk_start, trunk_end), slice(start, end)
            part, sums = _flash(q[:, :, own], k[:, :, trunk], v[:, :, trunk], 0.0, False, scale=scaling)
            both = torch.logaddexp(lse[:, :, own], sums)
            out[:, :, own].mul_((lse[:, :, own] - both).exp_().unsqueeze(-1))
            out[:, :, own].addcmul_(part, (sums - both).exp_().unsqueeze(-1))
            lse[:, :, own] = both
        ctx.save_for_backward(query, key, value, joined, lse)
        ctx.plan, ctx.scaling = plan, scaling
        return joined.unsqueeze(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, joined, lse = ctx.saved_tensors
        plan, heads, scaling = ctx.plan, key.shape[1], ctx.scaling
        q, (k, v) = _grouped(query, heads), (_shared(x, query.shape[1] // heads) for x in (key, value))
        out, g = (x.unflatten(1, (heads, -1)).permute(1, 2, 0, 3) for x in (joined, grad[0]))
        rows = [torch.empty_like(joined), *(key.new_empty(key.shape[2], heads, key.shape[3]) for _ in "kv")]
        dq = rows[0].unflatten(1, (heads, -1)).permute(1, 2, 0, 3)
        dk, dv = (x.transpose(0, 1) for x in rows[1:])

        def part(queries: slice, keys: slice, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
            of = (x[:, :, queries] for x in (g, q))
            a, b, c = _flash_backward(
                *of, k[:, :, keys], v[:, :, keys], out[:, :, queries], lse[:, :, queries], 0.0, causal, scale=scaling
            )
            return a, b.sum(1), c.sum(1)

        for start, end in plan.slices:
            own = slice(start, end)
            dq[:, :, own], dk[:, own], dv[:, own] = part(own, own, True)
        for batch in plan.batches:
            found = _batch_backward(batch, g, q, k, v, out, lse, scaling)
            for into, one in zip(rows, found, strict=True):
                into.index_copy_(0, batch.tokens, one)
        for trunk_start, trunk_end, start, end in plan.trunks:
            trunk, own = slice(trunk_start, trunk_end), slice(start, end)
            for into, one in zip((dq[:, :, own], dk[:, trunk], dv[:, trunk]), part(own, trunk, False), strict=True):
                into += one
        return *(x.transpose(0, 1).unsqueeze(0) for x in rows), None, None


def _shared(x: Tensor, repeat: int) -> Tensor:
    """Keys or values [1, Hkv, T, D] for R query heads each: [Hkv, R, T, D] with stride zero."""
    return x[0].unsqueeze(1).expand(-1, repeat, -1, -1)


def _gathered(x: Tensor, batch: Batch) -> Tensor:
    """[Hkv, R, T, D] -> [B, Hkv * R, L, D]: the batch's segments."""
    rows = x.flatten(0, 1).index_select(1, batch.gather)
    return rows.unflatten(1, (batch.size, batch.length)).transpose(0, 1)


def _batch_backward(
    batch: Batch, g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scaling: float | None
) -> list[Tensor]:
    """Gradients of the own part of a batch's queries [n, Hq, D], keys and values [n, Hkv, D]. Repeated places get a
    gradient of zero, and give none."""
    grad = _gathered(g, batch)
    padding = torch.ones(batch.size * batch.length, dtype=torch.bool).index_fill_(0, batch.real, False)
    grad.masked_fill_(padding.view(batch.size, 1, batch.length, 1), 0)
    own = [_gathered(x, batch) for x in (q, k, v, out, lse.unsqueeze(-1))]
    found = _flash_backward(grad, *own[:4], own[4].squeeze(-1), 0.0, True, scale=scaling)
    rows = [x.transpose(1, 2).flatten(0, 1).index_select(0, batch.real) for x in found]
    heads = k.shape[0]
    return [rows[0], *(x.unflatten(1, (heads, -1)).sum(2) for x in rows[1:])]
