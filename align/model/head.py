"""The fused head: log-probability, entropy and sum of squared probabilities of scored tokens; logits are never kept.

Hidden states of N scored tokens are multiplied with the output embedding tile by tile, rows of tokens by columns of
the vocabulary. Each tile is folded into a few numbers per token (log-sum-exp online, 1805.02867) and thrown away, so
memory is one tile and not N x V, whatever the number of tokens and the size of the vocabulary.

With z = logits / temperature, p = softmax(z), q = softmax(2z):
    log p(y)        = z_y - lse(z)                  d/dz = onehot(y) - p
    entropy H       = lse(z) - sum p z              d/dz = -p (log p + H)
    log sum p^2     = lse(2z) - 2 lse(z)            d/dz = 2 (q - p)

Backward, where only hidden states learn and only log-probabilities are used (LoRA): d log p(y) / d hidden is one
vector per token, W_y - sum p W, and is folded in the forward pass beside the log-sum-exp, as attention folds its
values. Two products with the embedding instead of three, and nothing is computed again. Everything else (a trained
head, a gradient of the entropy) computes the tiles again in backward.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from align.model.tiles import TILE_ELEMENTS
from align.types import HeadOutputs

# Elements of a tile, and its largest width. On a CPU a tile should stay in the cache between its passes.
TILE = {"cpu": (TILE_ELEMENTS["cpu"], 1 << 11), "cuda": (TILE_ELEMENTS["cuda"], 1 << 18)}
STATISTICS = ("entropy", "log_sum_sq")


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its logits after the output embedding: logits = softcap * tanh(scale * x / softcap)."""

    temperature: float = 1.0
    scale: float = 1.0
    softcap: float | None = None

    def apply(self, raw: Tensor) -> Tensor:
        """raw [n, v], which may be overwritten -> float32 (or float64) logits over temperature [n, v]."""
        x = raw.to(torch.promote_types(raw.dtype, torch.float32))
        if self.softcap is not None:
            x = x.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        elif self.scale != self.temperature:
            x = x.mul_(self.scale / self.temperature)
        return x

    def slope(self, transformed: Tensor) -> Tensor | float:
        """d apply(raw) / d raw where `transformed = apply(raw)`."""
        constant = self.scale / self.temperature
        if self.softcap is None:
            return constant
        return constant * (1 - (transformed * (self.temperature / self.softcap)) ** 2)


@dataclass(frozen=True)
class _Head:
    """What a tile is computed from. hidden [N, D], weight [V, D], labels i64[N], bias [V] or None."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None
    transform: LogitTransform

    def rows(self) -> Iterator[slice]:
        elements, width = TILE.get(self.hidden.device.type, TILE["cpu"])
        step = max(1, elements // min(width, self.weight.shape[0]))
        yield from (slice(i, i + step) for i in range(0, self.hidden.shape[0], step))

    def columns(self) -> Iterator[slice]:
        width = TILE.get(self.hidden.device.type, TILE["cpu"])[1]
        yield from (slice(i, i + width) for i in range(0, self.weight.shape[0], width))

    def tile(self, rows: slice, columns: slice) -> Tensor:
        bias = None if self.bias is None else self.bias[columns]
        return self.transform.apply(linear(self.hidden[rows], self.weight[columns], bias))

    def pick(self, rows: slice, columns: slice, tile: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the rows have their label in this tile (bool[n]), and the tile's entries at the labels f[n]."""
        local = self.labels[rows] - columns.start
        inside = (local >= 0) & (local < tile.shape[1])
        return inside, tile.gather(1, local.clamp(0, tile.shape[1] - 1)[:, None])[:, 0]


@dataclass
class _Folded:
    """Running sums over the columns seen, relative to the running maximum m: s = sum e^(z-m), and so on; all f[n]."""

    m: Tensor
    s: Tensor
    z_label: Tensor
    zs: Tensor | None = None  # sum e^(z-m) (z-m)
    ss: Tensor | None = None  # sum e^(2(z-m))
    pw: Tensor | None = None  # sum e^(z-m) slope W, f[n, D]

    @classmethod
    def empty(cls, like: Tensor, n: int, want: Collection[str], width: int | None) -> _Folded:
        dtype = torch.promote_types(like.dtype, torch.float32)
        zeros = like.new_zeros(n, dtype=dtype)
        return cls(
            # finite, so that the first rescaling multiplies zeros with zero and not with NaN
            m=torch.full_like(zeros, torch.finfo(dtype).min / 4),
            s=zeros.clone(),
            z_label=zeros.clone(),
            zs=zeros.clone() if "entropy" in want else None,
            ss=zeros.clone() if "log_sum_sq" in want else None,
            pw=None if width is None else like.new_zeros(n, width, dtype=dtype),
        )

    def rescale(self, top: Tensor) -> None:
        """Make all sums relative to a new maximum."""
        shift = self.m - top
        factor = shift.exp()
        if self.zs is not None:
            self.zs = torch.where(self.s > 0, factor * (self.zs + self.s * shift), self.zs)
        self.s = self.s * factor
        if self.ss is not None:
            self.ss = self.ss * factor * factor
        if self.pw is not None:
            self.pw *= factor[:, None]
        self.m = top


def _fold(head: _Head, rows: slice, want: Collection[str], direction: bool) -> _Folded:
    """All columns of some rows in one pass; with `direction`, sum p W too. Tiles are overwritten in place."""
    n = head.hidden[rows].shape[0]
    folded = _Folded.empty(head.hidden, n, want, head.hidden.shape[1] if direction else None)
    for columns in head.columns():
        z = head.tile(rows, columns)
        inside, at_label = head.pick(rows, columns, z)
        folded.z_label = torch.where(inside, at_label, folded.z_label)
        folded.rescale(torch.maximum(folded.m, z.amax(dim=1)))
        slope = head.transform.slope(z) if direction else 1.0
        z -= folded.m[:, None]
        e = z.exp() if folded.zs is not None else z.exp_()
        folded.s += e.sum(1)
        if folded.zs is not None:
            folded.zs += z.mul_(e).sum(1)
        if folded.pw is not None:
            weighted = e if isinstance(slope, float) else e * slope
            folded.pw += (weighted.to(head.weight.dtype) @ head.weight[columns]).to(folded.pw.dtype)
        if folded.ss is not None:
            folded.ss += e.square_().sum(1)
    return folded


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        transform: LogitTransform,
        want: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        head = _Head(hidden, weight, labels, bias, transform)
        n, dtype = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
        logps, lse, entropy, log_sum_sq = (torch.zeros(n, dtype=dtype, device=hidden.device) for _ in range(4))
        foldable = ctx.needs_input_grad[0] and not any(ctx.needs_input_grad[1:3])
        direction = torch.empty_like(hidden) if foldable else None
        for rows in head.rows():
            folded = _fold(head, rows, want, foldable)
            lse[rows] = folded.m + folded.s.log()
            logps[rows] = folded.z_label - lse[rows]
            if folded.zs is not None:
                entropy[rows] = folded.s.log() - folded.zs / folded.s
            if folded.ss is not None:
                log_sum_sq[rows] = folded.ss.log() - 2 * folded.s.log()
            if direction is not None:
                direction[rows] = _direction(head, rows, folded)
        ctx.save_for_backward(hidden, weight, bias, labels, lse, entropy, log_sum_sq, direction)
        ctx.transform = transform
        ctx.set_materialize_grads(False)
        return logps, entropy if "entropy" in want else None, log_sum_sq if "log_sum_sq" in want else None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        g_logps, g_entropy, g_squares = grads
        hidden, weight, bias, labels, lse, entropy, log_sum_sq, direction = ctx.saved_tensors
        grad_hidden = None
        if direction is not None and g_logps is not None:
            grad_hidden = direction * g_logps[:, None].to(direction.dtype)
            g_logps = None
        if g_logps is None and g_entropy is None and g_squares is None:
            return grad_hidden, None, None, None, None, None
        head = _Head(hidden, weight, labels, bias, ctx.transform)
        again = _Recomputed(head, ctx.needs_input_grad, (lse, entropy, log_sum_sq), (g_logps, g_entropy, g_squares))
        for rows in head.rows():
            again.add(rows)
        more = again.grad_hidden
        if grad_hidden is not None and more is not None:
            more = more + grad_hidden
        return (
            grad_hidden if more is None else more,
            None if again.grad_weight is None else again.grad_weight.to(weight.dtype),
            None if again.grad_bias is None else again.grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _direction(head: _Head, rows: slice, folded: _Folded) -> Tensor:
    """d log p(y) / d hidden [n, D]: slope_y W_y - sum p slope W."""
    assert folded.pw is not None
    own = head.weight.index_select(0, head.labels[rows]).to(folded.pw.dtype)
    slope = head.transform.slope(folded.z_label)
    own = own * (slope if isinstance(slope, float) else slope[:, None])
    mean = folded.pw / folded.s[:, None]
    if isinstance(slope, float):
        mean = mean * slope  # a constant slope was left out of the sum
    return (own - mean).to(head.hidden.dtype)


class _Recomputed:
    """Gradients by computing the tiles again; those of weight and bias are accumulated in float32."""

    def __init__(
        self,
        head: _Head,
        needs: tuple[bool, ...],
        statistics: tuple[Tensor, Tensor, Tensor],
        grads: tuple[Tensor | None, ...],
    ):
        self.head = head
        self.lse, self.entropy, self.log_sum_sq = statistics
        self.g_logps, self.g_entropy, self.g_squares = grads
        weight, bias, dtype = head.weight, head.bias, self.lse.dtype
        self.grad_hidden = torch.empty_like(head.hidden) if needs[0] else None
        self.grad_weight = torch.zeros_like(weight, dtype=dtype) if needs[1] else None
        self.grad_bias = torch.zeros_like(bias, dtype=dtype) if bias is not None and needs[2] else None

    def add(self, rows: slice) -> None:
        hidden = self.head.hidden[rows]
        total = torch.zeros_like(hidden, dtype=self.lse.dtype) if self.grad_hidden is not None else None
        for columns in self.head.columns():
            grad = self._tile(rows, columns).to(hidden.dtype)
            if total is not None:
                total += (grad @ self.head.weight[columns]).to(total.dtype)
            if self.grad_weight is not None:
                add_product(self.grad_weight[columns], grad.T, hidden)
            if self.grad_bias is not None:
                self.grad_bias[columns] += grad.sum(0, dtype=self.grad_bias.dtype)
        if self.grad_hidden is not None:
            assert total is not None
            self.grad_hidden[rows] = total.to(self.grad_hidden.dtype)

    def _tile(self, rows: slice, columns: slice) -> Tensor:
        """Gradient of raw logits [n, v]; at most three tiles are alive, one where only log-probabilities are used."""
        z = self.head.tile(rows, columns)
        slope = self.head.transform.slope(z)
        log_p = z.sub_(self.lse[rows, None])
        if self.g_entropy is None and self.g_squares is None:
            grad = log_p.exp_().mul_(-self._row(self.g_logps, rows))
        else:
            p = log_p.exp()
            grad = p * -(self._row(self.g_logps, rows) if self.g_logps is not None else 0.0)
            if self.g_squares is not None:
                g = 2 * self._row(self.g_squares, rows)
                grad += torch.exp(2 * log_p - self.log_sum_sq[rows, None]).sub_(p).mul_(g)
            if self.g_entropy is not None:
                grad -= log_p.add_(self.entropy[rows, None]).mul_(p).mul_(self._row(self.g_entropy, rows))
        if self.g_logps is not None:
            local = self.head.labels[rows] - columns.start
            inside = (local >= 0) & (local < grad.shape[1])
            at_label = torch.where(inside, self.g_logps[rows], 0.0)
            grad.scatter_add_(1, local.clamp(0, grad.shape[1] - 1)[:, None], at_label[:, None])
        return grad.mul_(slope)

    @staticmethod
    def _row(values: Tensor | None, rows: slice) -> Tensor:
        assert values is not None
        return values[rows, None]


def add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    """into += a @ b, in place where the dtypes allow it."""
    if into.dtype == a.dtype:
        into.addmm_(a, b)
    else:
        into += a @ b


def fused_head(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform = LogitTransform(),
    want: Collection[str] = (),
) -> HeadOutputs:
    """Statistics of the token distribution at N positions.

    hidden [N, D] and weight [V, D] in one dtype; labels i64[N]; bias [V] or None; want: which of "entropy" and
    "log_sum_sq" beside the log-probabilities. Outputs are float32 (float64 for float64 inputs), with gradients to
    hidden, weight and bias.
    """
    assert hidden.ndim == 2 and labels.shape == hidden.shape[:1], (hidden.shape, labels.shape)
    assert set(want) <= set(STATISTICS), want
    logps, entropy, log_sum_sq = _FusedHead.apply(hidden, weight, bias, labels, transform, tuple(sorted(want)))
    return HeadOutputs(logps=logps, entropy=entropy, log_sum_sq=log_sum_sq)
