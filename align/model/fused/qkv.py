"""Queries, keys and values in one product.

Attention multiplies one input with three weights, two of them narrow where heads share keys: over many rows one product
with the three, side by side, runs faster than each alone, and backward adds up no gradients of the input. Adapters are
in the weight (`LowRank`), so this holds where that does: frozen float32 weights and many rows; elsewhere each
projection computes itself.

The model's own forward stays as it is. Before it runs, its three projections are given what they will be asked for;
each answers with it once, if asked for that very input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from align.model.fused.lora import FusedLoraLinear, LowRank, folds, save, saved, version_of
from align.model.quantised import Packed, dense

NAMES = ("q_proj", "k_proj", "v_proj")


class _Sizes(NamedTuple):
    """Of each map: its outputs, and its scale or None where no adapter is on."""

    wide: tuple[int, ...]
    scalings: tuple[float | None, ...]


def _joined(tensors: Sequence[Any], sizes: _Sizes) -> Tensor:
    """W + s B A of each, one below the other: [sum of outputs, in]."""
    weights = [dense(weight) for weight in tensors[0::3]]
    whole = weights[0].new_empty(sum(sizes.wide), weights[0].shape[1])
    for place, weight, a, b, scaling in zip(
        whole.split(sizes.wide), weights, tensors[1::3], tensors[2::3], sizes.scalings, strict=True
    ):
        if a is None or b is None or scaling is None:
            place.copy_(weight)
        else:
            torch.addmm(weight, b, a, alpha=scaling, out=place)
    return whole


class _Joint(torch.autograd.Function):
    """tensors: weight [out, in], a [r, in] and b [out, r] (or None twice) of each map. Gradients of x, A and B."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, sizes: _Sizes, *tensors: Tensor | Packed | None
    ) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        y = F.linear(rows, _joined(tensors, sizes), bias).view(*x.shape[:-1], -1)
        save(ctx, rows, *tensors)
        ctx.sizes = sizes
        return tuple(part.data for part in y.split(sizes.wide, dim=-1))  # as lora.py's

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, *tensors = saved(ctx)
        sizes: _Sizes = ctx.sizes
        grad = torch.cat(grads, dim=-1)
        shape = (*grad.shape[:-1], rows.shape[1])
        grad = grad.view(-1, grad.shape[-1])
        grad_x = (grad @ _joined(tensors, sizes)).view(shape) if ctx.needs_input_grad[0] else None
        found: list[Tensor | None] = []
        for own, a, b, scaling in zip(
            grad.split(sizes.wide, dim=1), tensors[1::3], tensors[2::3], sizes.scalings, strict=True
        ):
            found.append(None)
            if a is None or b is None or scaling is None:
                found += [None, None]
            else:
                found.append((own @ b).mul_(scaling).T @ rows)
                found.append(own.T @ (rows @ a.T).mul_(scaling))
        return grad_x, None, None, *found


def projects_jointly(module: nn.Module) -> bool:
    """Whether its three projections are layers that can be given their results."""
    return all(isinstance(getattr(module, name, None), FusedLoraLinear) for name in NAMES)


def give(module: Any, x: Tensor) -> None:
    """Compute the three projections of x [..., T, in] where one product holds, and leave each with its result."""
    projections = [getattr(module, name) for name in NAMES]
    parts = [projection.source(x) for projection in projections]
    found = [part for part in parts if part is not None]
    if len(found) < len(NAMES) or x.device.type != "cpu" or not all(map(_frozen, found)):
        return
    if not all(folds(x.numel() // x.shape[-1], part.weight) for part in found):
        return
    biases = [part.bias for part in found]
    if any((bias is None) != (biases[0] is None) for bias in biases):
        return
    bias = torch.cat([one for one in biases if one is not None]) if biases[0] is not None else None
    sizes = _Sizes(
        tuple(part.weight.shape[0] for part in found),
        tuple(None if part.a is None else part.scaling for part in found),
    )
    tensors = [tensor for part in found for tensor in (part.weight, part.a, part.b)]
    for projection, y in zip(projections, _Joint.apply(x, bias, sizes, *tensors), strict=True):
        projection.given = (x, version_of(x), y)


def withdraw(module: Any) -> None:
    """Forget what was not asked for."""
    for name in NAMES:
        getattr(module, name).given = None


def _frozen(part: LowRank) -> bool:
    of_base = (part.weight, part.bias)
    same = all(one is None or one.dtype == part.weight.dtype for one in (part.a, part.b))
    return same and not any(one is not None and one.requires_grad for one in of_base)
