"""LoRA's sum without passes of its own: its scale and sum are folded into the matrix products."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from align.model.bitsandbytes_import import import_bitsandbytes
from align.model.fused.forms import watched
from align.model.quantised import Packed, QuantisedLinear, dense, linear_weight
from align.model.tiles import FOLD_FROM

import_bitsandbytes()
from peft.tuners.lora.layer import Linear as LoraLinear  # noqa: E402 (it imports bitsandbytes)


def folds(rows: int, weight: Tensor | Packed) -> bool:
    """Whether W + s B A should be made for a product with so many rows: it costs a product of the weight's size, and
    saves thin ones over all rows. Never in half precision, whose rounding would swallow a small update."""
    wide, width = weight.shape
    return weight.dtype in (torch.float32, torch.float64) and rows * (wide + width) >= FOLD_FROM * wide * width


class LowRank(NamedTuple):
    """One linear map with its adapter, y = x W' + bias + s (x A') B'. weight [out, in], perhaps in four bits; a [r, in]
    and b [out, r], or None. folded: W + s B A, where that was worth making."""

    weight: Tensor | Packed
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 1.0
    folded: Tensor | None = None

    def over(self, rows: Tensor) -> LowRank:
        """For a product with rows [n, in]: the weight unpacked; A and B, float32 masters of a bfloat16 base perhaps, in
        their dtype."""
        weight = dense(self.weight)
        if self.a is None or self.b is None:
            return self._replace(weight=weight)
        a, b = self.a.to(rows.dtype), self.b.to(rows.dtype)
        folded = torch.addmm(weight, b, a, alpha=self.scaling) if folds(rows.shape[0], weight) else None
        return self._replace(weight=weight, a=a, b=b, folded=folded)

    def apply(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [n, in] -> [n, out]; into `out`, without the bias, where there is one."""
        weight = dense(self.weight) if self.folded is None else self.folded
        y = F.linear(x, weight, self.bias) if out is None else torch.mm(x, weight.T, out=out)
        if self.a is not None and self.b is not None and self.folded is None:
            y.addmm_(x @ self.a.T, self.b.T, alpha=self.scaling)
        return y

    def pull(self, grad: Tensor, into: Tensor | None = None) -> Tensor:
        """Gradient of the input [n, in]; added to `into` where there is one."""
        weight = dense(self.weight) if self.folded is None else self.folded
        into = grad @ weight if into is None else into.addmm_(grad, weight)
        if self.a is not None and self.b is not None and self.folded is None:
            into.addmm_(grad @ self.b, self.a, alpha=self.scaling)
        return into


def save(ctx: Any, *tensors: Tensor | Packed | None) -> None:
    """Keep what backward needs; packed weights are no tensors, and nothing may be kept of them but themselves."""
    ctx.packed = [tensor if isinstance(tensor, Packed) else None for tensor in tensors]
    ctx.save_for_backward(*(None if isinstance(tensor, Packed) else tensor for tensor in tensors))


def saved(ctx: Any) -> list[Any]:
    return [tensor if packed is None else packed for tensor, packed in zip(ctx.saved_tensors, ctx.packed, strict=True)]


class _LoraLinear(torch.autograd.Function):
    """y = x W' + b + s (x A') B': the sum is in the weight, or the multiplication itself adds the low-rank product."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | Packed, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = LowRank(weight, bias, a, b, scaling).over(rows).apply(rows)
        save(ctx, rows, weight, a, b)
        ctx.scaling, ctx.has_bias = scaling, bias is not None
        return y.view(*x.shape[:-1], y.shape[-1]).data  # to autograd no view: a model may change it in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b = saved(ctx)
        needs_x, needs_weight, needs_bias, needs_a, needs_b, _ = ctx.needs_input_grad
        shape = (*grad.shape[:-1], rows.shape[-1])
        grad = grad.reshape(-1, grad.shape[-1])
        grad_x = LowRank(weight, None, a, b, ctx.scaling).over(rows).pull(grad).view(shape) if needs_x else None
        grad_narrow = (grad @ b.to(grad.dtype)).mul_(ctx.scaling) if needs_a else None
        narrow = (rows @ a.to(rows.dtype).T).mul_(ctx.scaling) if needs_b else None
        return (
            grad_x,
            grad.T @ rows if needs_weight else None,
            grad.sum(0) if ctx.has_bias and needs_bias else None,
            None if grad_narrow is None else (grad_narrow.T @ rows).to(a.dtype),
            None if narrow is None else (grad.T @ narrow).to(b.dtype),
            None,
        )


def version_of(x: Tensor) -> int:
    """How often a tensor was changed in place; of one made in inference mode nothing is counted."""
    return -1 if x.is_inference() else x._version


class FusedLoraLinear(LoraLinear):
    """peft's LoRA layer: the fused product where one plain adapter is active, peft's own code for everything else.

    given: an input, its version (it may be changed in place) and the result for it, from a product with other layers
    (`align.model.fused.qkv`).
    """

    is_fused = True
    given: tuple[Tensor, int, Tensor] | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given, self.given = self.given, None
        if given is not None and given[0] is x and given[1] == version_of(x) and not args and not kwargs:
            return given[2]
        source = self.source(x) if not args and not kwargs else None
        if source is None or source.a is None:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        fused: Tensor = _LoraLinear.apply(x, source.weight, source.bias, source.a, source.b, source.scaling)
        return fused

    def source(self, x: Tensor) -> LowRank | None:
        """The map that is on, its adapter's matrices as they are kept. None: several adapters are active, dropout is
        on, a variant (DoRA), autocast, another dtype than the input's."""
        base = self.get_base_layer()
        if self.merged or type(base) not in (nn.Linear, QuantisedLinear) or watched(base):
            return None
        weight = linear_weight(base)
        if x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type):
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or not active:
            return LowRank(weight, base.bias)
        name = active[0]
        if len(active) > 1 or self.lora_variant or self.lora_bias[name]:
            return None
        if self.training and getattr(self.lora_dropout[name], "p", 0.0):
            return None
        return LowRank(weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight, float(self.scaling[name]))
