"""The gated feed-forward, down(silu(gate x) * (up x)) (2002.05202), a slice of rows at a time.

Its inner activations are the widest of a layer, and element-wise work on them runs at the speed of memory. A slice of
rows stays in the cache from one product to the next: what is only passed on (the product that `down` reads, and in
backward the gradients of both branches) is never written out. Kept for backward are the input, gate and up; without a
gradient nothing is. LoRA on any of the three is folded into the products, as in `align.model.fused.lora`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import SiLUActivation

from align.model.fused.forms import FUSED, known_method, replaced, watched
from align.model.fused.lora import FusedLoraLinear, LowRank, save, saved
from align.model.head import add_product
from align.model.quantised import Packed, QuantisedLinear, linear_weight
from align.model.tiles import SLICE_ELEMENTS

MIN_ROWS = 128
NAMES = ("gate_proj", "up_proj", "down_proj")
SILU = (nn.SiLU, SiLUActivation)


class _Grads:
    """Gradients of one part's parameters, added up over slices in float32."""

    def __init__(self, part: LowRank, needs: tuple[bool, bool, bool]):
        self.part = part
        tensors = (part.weight, part.a, part.b)
        self.sums = [
            torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32))
            if on and isinstance(t, Tensor)
            else None
            for t, on in zip(tensors, needs, strict=True)
        ]

    def add(self, x: Tensor, grad: Tensor) -> None:
        weight, a, b = self.sums
        if weight is not None:
            add_product(weight, grad.T, x)
        if a is not None and self.part.b is not None:
            add_product(a, (grad @ self.part.b).mul_(self.part.scaling).T, x)
        if b is not None and self.part.a is not None:
            add_product(b, grad.T, (x @ self.part.a.T).mul_(self.part.scaling))


def _slices(rows: int, width: int, like: Tensor) -> Iterator[slice]:
    """On a CPU, slices whose inner activation fits the cache; elsewhere all rows."""
    step = rows
    if like.device.type == "cpu":
        step = max(MIN_ROWS, SLICE_ELEMENTS // max(width, 1))
    yield from (slice(i, i + step) for i in range(0, rows, max(step, 1)))


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scalings: tuple[float, float, float], *tensors: Tensor | Packed | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        gate, up, down = _parts(tensors, scalings, rows)
        width = gate.weight.shape[0]
        y = rows.new_empty(len(rows), down.weight.shape[0])
        keep = any(ctx.needs_input_grad)
        kept = [rows.new_empty(len(rows), width) for _ in range(2)] if keep else []
        for some in _slices(len(rows), width, rows):
            g, u = (part.apply(rows[some], out=kept[n][some] if keep else None) for n, part in enumerate((gate, up)))
            down.apply(F.silu(g).mul_(u), out=y[some])
        save(ctx, rows, *kept, *tensors)
        ctx.scalings, ctx.shape = scalings, x.shape
        return y.view(*x.shape[:-1], y.shape[-1]).data  # as lora.py's

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        rows, gates, ups, *tensors = saved(ctx)
        gate, up, down = parts = _parts(tensors, ctx.scalings, rows)
        needs_x, _, *needs = ctx.needs_input_grad
        sums = [_Grads(part, tuple(needs[3 * n : 3 * n + 3])) for n, part in enumerate(parts)]
        grad = grad.reshape(-1, grad.shape[-1])
        grad_x = torch.empty_like(rows) if needs_x else None
        for some in _slices(len(rows), gates.shape[1], rows):
            x, g, u, dy = rows[some], gates[some], ups[some], grad[some]
            activated = F.silu(g)
            dh = down.pull(dy)
            sums[2].add(activated * u, dy)
            du = activated.mul_(dh)
            dg = torch.ops.aten.silu_backward(dh.mul_(u), g)
            sums[0].add(x, dg)
            sums[1].add(x, du)
            if grad_x is not None:
                grad_x[some] = up.pull(du, gate.pull(dg))
        found = [
            None if total is None else total.to(tensor.dtype)
            for one, own in zip(sums, zip(*[iter(tensors)] * 3, strict=True), strict=True)
            for total, tensor in zip(one.sums, own, strict=True)
        ]
        return None if grad_x is None else grad_x.view(ctx.shape), None, *found


def _parts(tensors: Any, scalings: tuple[float, float, float], rows: Tensor) -> tuple[LowRank, LowRank, LowRank]:
    """Gate, up and down, for products with as many rows."""
    each = zip(*[iter(tensors)] * 3, scalings, strict=True)
    gate, up, down = (LowRank(weight, None, a, b, scaling).over(rows) for weight, a, b, scaling in each)
    return gate, up, down


def _source(linear: Any, x: Tensor) -> LowRank | None:
    """The map of a linear layer with or without one plain adapter; None for anything else, and under hooks."""
    if watched(linear):
        return None
    if type(linear) in (nn.Linear, QuantisedLinear):
        return LowRank(linear_weight(linear), linear.bias)
    return linear.source(x) if isinstance(linear, FusedLoraLinear) else None


def _fused(module: Any, x: Tensor) -> Tensor | None:
    """The fused product, or None where it does not hold: other dtypes, biases, several adapters, dropout, autocast."""
    if torch.is_autocast_enabled(x.device.type) or type(module.act_fn) not in SILU or watched(module.act_fn):
        return None
    found = [_source(getattr(module, name), x) for name in NAMES]
    sources = [one for one in found if one is not None and one.bias is None and one.weight.dtype == x.dtype]
    if len(sources) < len(NAMES):
        return None
    tensors = [tensor for one in sources for tensor in (one.weight, one.a, one.b)]
    out: Tensor = _GatedMlp.apply(x, tuple(one.scaling for one in sources), *tensors)
    return out


@functools.cache
def fused_mlp(kind: Any) -> type[nn.Module]:
    """A subclass of a model's own feed-forward; its own forward where the fused one does not hold."""

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        fused = _fused(self, args[0]) if len(args) == 1 and not kwargs else None
        if fused is not None:
            return fused
        plain: Tensor = kind.forward(self, *args, **kwargs)
        return plain

    return type(f"Fused{kind.__name__}", (kind,), {"forward": forward, FUSED: True})


# models' gated feed-forwards, as they are written there
class _Named:
    def forward(self: Any, x: Any) -> Any:
        down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return down_proj  # noqa: RET504


class _Returned:
    def forward(self: Any, x: Any) -> Any:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def looks_like_mlp(module: nn.Module) -> bool:
    """It has a gate: whether it is one that is known is for `mlp_class` to say."""
    return hasattr(module, "gate_proj") and hasattr(module, "down_proj")


def mlp_class(module: Any) -> type[nn.Module] | str:
    """The fused class for a feed-forward, or why it keeps its own code."""
    if replaced(module) or known_method(type(module), (_Named, _Returned)) is None:
        return "its code is no gated feed-forward that is known"
    if type(module.act_fn) not in SILU:
        return f"its activation is {type(module.act_fn).__name__}, not SiLU"
    for name in NAMES:
        layer = getattr(module, name)
        base = layer.get_base_layer() if isinstance(layer, FusedLoraLinear) else layer
        if type(base) not in (nn.Linear, QuantisedLinear):
            return f"its {name} is a {type(base).__name__}"
        if base.bias is not None:
            return f"its {name} has a bias"
    kind: Any = type(module)
    return fused_mlp(kind)
