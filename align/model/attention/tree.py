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

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from align.model.attention.plan import AttentionPlan

SHORT = 128  # longest segment that is gathered into a batch with others
STEP = 16  # lengths are rounded up to a multiple of it

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Batch:
    """B short segments of up to L tokens. gather i64[B, L]: their tokens, the last one repeated up to L; padding
    bool[B, L]: which places are such repetitions, or None where none is."""

    size: int
    length: int
    gather: Tensor
    padding: Tensor | None
    _by_heads: dict[int, tuple[Tensor, Tensor | None]] = field(default_factory=dict, init=False, repr=False)

    def by_heads(self, heads: int) -> tuple[Tensor, Tensor | None]:
        """Made once, for every layer. i64[B * Hkv * L]: in a row of tokens by key heads, [T * Hkv, ...], where each
        place is; and i64: which of these places are no repetition, or None where all are."""
        if heads not in self._by_heads:
            places = (self.gather[:, None] * heads + torch.arange(heads)[:, None]).flatten()
            kept = None
            if self.padding is not None:
                kept = (~self.padding[:, None].expand(-1, heads, -1)).flatten().nonzero()[:, 0]
            self._by_heads[heads] = places, kept
        return self._by_heads[heads]


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
    padding = places >= bounds[:, 1:]
    gather = torch.minimum(places, bounds[:, 1:] - 1)
    return Batch(len(members), length, gather, padding if bool(padding.any()) else None)


def tree_attention(query: Tensor, key: Tensor, value: Tensor, plan: TreePlan, scaling: float | None) -> Tensor:
    """query [1, Hq, T, D], key and value [1, Hkv, T, D] on a CPU -> [1, T, Hq, D].

    Half precision is computed in float32: torch's CPU kernel is slower in bfloat16 (measured: 5.4 ms against 4.4 ms
    for forward and backward of 262 queries on 148 + 262 keys), and less exact.
    """
    single = (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x for x in (query, key, value))
    out: Tensor = _TreeAttention.apply(*single, plan, scaling)
    return out.to(query.dtype)


def _rows(x: Tensor, heads: int) -> Tensor:
    """[1, H, T, D] -> [T * Hkv, H / Hkv * D], in the order of memory where that is by token: then a view."""
    return x[0].transpose(0, 1).reshape(x.shape[2] * heads, -1)


def _keys(rows: Tensor, heads: int, repeat: int) -> Tensor:
    """[T * Hkv, D] -> [Hkv, R, T, D], a view with stride zero over R"""
    x = rows.view(-1, heads, rows.shape[1]).transpose(0, 1)
    return x.unsqueeze(1).expand(-1, repeat, -1, -1)


def _queries(rows: Tensor, heads: int, repeat: int) -> Tensor:
    """[T * Hkv, R * D] -> [Hkv, R, T, D], a view"""
    return rows.view(-1, heads, repeat, rows.shape[1] // repeat).permute(1, 2, 0, 3)


class _Short:
    """The segments of a batch out of rows [T * Hkv, ...], and results back into them. Places of a key head's segment
    stand side by side, so that a batch is [B * Hkv, R, L, D] and keys are not repeated for the R query heads."""

    def __init__(self, batch: Batch, heads: int, repeat: int):
        self.batch, self.heads, self.repeat = batch, heads, repeat
        self.index, self.kept = batch.by_heads(heads)
        self.target = self.index if self.kept is None else self.index[self.kept]

    def _take(self, rows: Tensor) -> Tensor:
        return rows.index_select(0, self.index).view(self.batch.size * self.heads, self.batch.length, -1)

    def queries(self, rows: Tensor) -> Tensor:
        """[T * Hkv, R * D] -> [B * Hkv, R, L, D]"""
        return self._take(rows).unflatten(2, (self.repeat, -1)).transpose(1, 2)

    def keys(self, rows: Tensor) -> Tensor:
        """[T * Hkv, D] -> [B * Hkv, R, L, D], with stride zero over R"""
        return self._take(rows).unsqueeze(1).expand(-1, self.repeat, -1, -1)

    def put(self, rows: Tensor, found: Tensor) -> None:
        """found [B * Hkv, L, ...] into rows [T * Hkv, ...], repetitions left out."""
        flat = found.reshape(self.index.shape[0], -1)
        rows.index_copy_(0, self.target, flat if self.kept is None else flat.index_select(0, self.kept))

    def without_padding(self, grad: Tensor) -> Tensor:
        """[B * Hkv, R, L, D] with zeros at repetitions: they give no gradient."""
        if self.batch.padding is None:
            return grad
        padding = self.batch.padding.repeat_interleave(self.heads, dim=0)
        return grad.masked_fill(padding[:, None, :, None], 0)


class _TreeAttention(torch.autograd.Function):
    """Rows are [T * Hkv, ...]: a token's R query heads to a key head side by side. Log-sum-exps are f32[T * Hkv, R]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: TreePlan, scaling: float | None) -> Tensor:
        heads, repeat = key.shape[1], query.shape[1] // key.shape[1]
        rows = [_rows(x, heads) for x in (query, key, value)]
        joined, sums = torch.empty_like(rows[0]), rows[0].new_empty(rows[0].shape[0], repeat)
        q, out = (_queries(x, heads, repeat) for x in (rows[0], joined))
        k, v = (_keys(x, heads, repeat) for x in rows[1:])
        lse = _queries(sums, heads, repeat).squeeze(3)
        for start, end in plan.slices:
            own = slice(start, end)
            out[:, :, own], lse[:, :, own] = _flash(q[:, :, own], k[:, :, own], v[:, :, own], 0.0, True, scale=scaling)
        for batch in plan.batches:
            short = _Short(batch, heads, repeat)
            part, found = _flash(
                short.queries(rows[0]), short.keys(rows[1]), short.keys(rows[2]), 0.0, True, scale=scaling
            )
            short.put(joined, part.transpose(1, 2))
            short.put(sums, found.transpose(1, 2))
        for trunk_start, trunk_end, start, end in plan.trunks:
            trunk, own = slice(trunk_start, trunk_end), slice(start, end)
            part, found = _flash(q[:, :, own], k[:, :, trunk], v[:, :, trunk], 0.0, False, scale=scaling)
            both = torch.logaddexp(lse[:, :, own], found)
            out[:, :, own].mul_((lse[:, :, own] - both).exp_().unsqueeze(-1))
            out[:, :, own].addcmul_(part, (found - both).exp_().unsqueeze(-1))
            lse[:, :, own] = both
        ctx.save_for_backward(*rows, joined, sums)
        ctx.plan, ctx.scaling, ctx.heads = plan, scaling, (heads, repeat)
        return joined.view(1, query.shape[2], query.shape[1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *rows, joined, sums = ctx.saved_tensors
        plan, scaling, (heads, repeat) = ctx.plan, ctx.scaling, ctx.heads
        given = grad.reshape(joined.shape)
        g, q, out = (_queries(x, heads, repeat) for x in (given, rows[0], joined))
        k, v = (_keys(x, heads, repeat) for x in rows[1:])
        lse = _queries(sums, heads, repeat).squeeze(3)
        found = [torch.empty_like(x) for x in rows]
        dq = _queries(found[0], heads, repeat)
        dk, dv = (x.view(-1, heads, x.shape[1]).transpose(0, 1) for x in found[1:])

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
            short = _Short(batch, heads, repeat)
            a, b, c = _flash_backward(
                short.without_padding(short.queries(given)),
                short.queries(rows[0]),
                *(short.keys(x) for x in rows[1:]),
                short.queries(joined),
                short.queries(sums).squeeze(3),
                0.0,
                True,
                scale=scaling,
            )
            for into, one in zip(found, (a.transpose(1, 2), b.sum(1), c.sum(1)), strict=True):
                short.put(into, one)
        for trunk_start, trunk_end, start, end in plan.trunks:
            trunk, own = slice(trunk_start, trunk_end), slice(start, end)
            for into, one in zip((dq[:, :, own], dk[:, trunk], dv[:, trunk]), part(own, trunk, False), strict=True):
                into += one
        tokens = grad.shape[1]
        return *(x.view(1, tokens, -1, q.shape[3]).transpose(1, 2) for x in found), None, None
