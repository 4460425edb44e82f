"""Fewer passes over memory in what is not a matrix product: LoRA's sum and RMS norms (and `align.model.fused_mlp`).

transformers and peft compute these as chains of element-wise operations, each of which reads and writes every
activation and keeps an intermediate for backward. Here each is one autograd function that works in place, keeps its
inputs and a few numbers per token, and folds LoRA's scale and sum into the matrix products.

`fuse` exchanges the classes of modules that it recognises by their parts, and only where random numbers come out the
same (of norms their gradients too): a model that computes something else under the same names keeps its own code.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from align.model.bitsandbytes_import import import_bitsandbytes
from align.model.quantised import Packed, QuantisedLinear, dense, linear_weight
from align.model.tiles import FOLD_FROM

import_bitsandbytes()
from peft.tuners.lora.layer import Linear as LoraLinear  # noqa: E402 (it imports bitsandbytes)

log = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------- LoRA


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
        return y.view(*x.shape[:-1], y.shape[-1])

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


class FusedLoraLinear(LoraLinear):
    """peft's LoRA layer: the fused product where one plain adapter is active, peft's own code for everything else.

    given: an input and the result for it, from a product with other layers (`align.model.fused_qkv`).
    """

    given: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given, self.given = self.given, None
        if given is not None and given[0] is x and not args and not kwargs:
            return given[1]
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
        if self.merged or type(base) not in (nn.Linear, QuantisedLinear):
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


# ------------------------------------------------------------------------------------------------- RMS norm


class _RmsNorm(torch.autograd.Function):
    """y = (w + offset) x / sqrt(mean(x^2) + eps), 1910.07467; statistics in float32. Keeps x and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        ctx.offset = offset
        return (x * inverse).to(x.dtype).mul_(weight + offset if offset else weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * x).mul_(inverse).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            weighted = grad * (weight + ctx.offset if ctx.offset else weight)
            along = torch.linalg.vecdot(weighted, x).unsqueeze(-1) * (inverse**3 / -x.shape[-1])
            grad_x = (weighted * inverse).addcmul_(x, along).to(x.dtype)
        return grad_x, grad_weight, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x [..., D], weight [D] of one dtype -> [..., D]. offset 1.0: Gemma's form, where weights are around zero."""
    if x.is_cuda:  # torch has a kernel of its own there
        return F.rms_norm(x, weight.shape, weight + offset if offset else weight, eps)
    out: Tensor = _RmsNorm.apply(x, weight, eps, offset)
    return out


def fused_norm(kind: type[nn.Module], offset: float) -> type[nn.Module]:
    """A subclass of a model's own norm with the fused forward; its own for inputs of another dtype than the weight."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != self.weight.dtype:
            plain: Tensor = kind.forward(self, hidden_states)
            return plain
        return rms_norm(hidden_states, self.weight, _epsilon(self), offset)

    return type(f"Fused{kind.__name__}", (kind,), {"forward": forward})


def _epsilon(norm: Any) -> float:
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


# ------------------------------------------------------------------------------------------------- exchange


def fuse(model: nn.Module) -> Counter[str]:
    """Exchange what can be; returns how many modules of each of the models' classes were."""
    from align.model.fused_mlp import computes_gated_silu, fused_mlp, looks_like_mlp
    from align.model.fused_rotary import calls_rotation, fused_rotary

    exchanged: Counter[str] = Counter()
    known: dict[type[nn.Module], type[nn.Module] | None] = {LoraLinear: FusedLoraLinear}
    # from the inside out: a feed-forward is judged by what its projections have become
    for module in reversed(list(model.modules())):
        kind = type(module)
        if kind not in known:
            if _looks_like_norm(module):
                known[kind] = _equal_norm(module)
            elif looks_like_mlp(module):
                known[kind] = fused_mlp(kind) if computes_gated_silu(module) else None
            elif calls_rotation(module):
                known[kind] = fused_rotary(kind)
            else:
                continue
        fused = known[kind]
        if fused is not None:
            module.__class__ = fused
            exchanged[kind.__name__] += 1
    return exchanged


def _looks_like_norm(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters())
    only_weight = set(parameters) == {"weight"} and parameters["weight"].ndim == 1
    has_epsilon = hasattr(module, "variance_epsilon") or hasattr(module, "eps")
    return only_weight and has_epsilon and not type(module).__name__.startswith("Fused")


def _equal_norm(module: Any) -> type[nn.Module] | None:
    """The fused class whose values and gradients are those of `module` on random numbers, or None."""
    single: Any = copy.deepcopy(module).to("cpu", torch.float32).requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(3, single.weight.shape[0], generator=generator) for _ in range(2))
    try:
        expected = _values(single, x, grad)
        for offset in (0.0, 1.0):
            fused = fused_norm(type(module), offset)
            single.__class__ = fused
            found = _values(single, x, grad)
            if all(torch.allclose(a, b, atol=1e-5, rtol=1e-5) for a, b in zip(found, expected, strict=True)):
                return fused
            single.__class__ = type(module)
    except (TypeError, RuntimeError, AttributeError) as error:  # another signature: not a plain norm
        log.debug("%s keeps its own forward: %s", type(module).__name__, error)
        return None
    log.debug("%s keeps its own forward: it computes something else", type(module).__name__)
    return None


def _values(norm: Any, x: Tensor, grad: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = norm(x)
    return [y, *torch.autograd.grad(y, [x, norm.weight], grad)]
