"""The output embedding as one matrix product, with whatever adapter is on it, for the fused head.

LoRA: logits = W h + s B (A h). In float32 the update is added to the weight. In half precision its rounding would
swallow a small update, so the product is made wider instead: [W, B] [h, s A h], which keeps both apart.

DoRA (2402.09353): logits = m / |W + s B A| (W + s B A) h, the length of each row without a gradient (section 4.3), in
float32 throughout: a magnitude near 1 would be lost in a half precision weight too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from align.errors import Unsupported


class Output(NamedTuple):
    """logits = weight [V, K] rows + bias [V], where rows [N, K] are the hidden states, perhaps with more columns."""

    rows: Tensor
    weight: Tensor
    bias: Tensor | None


def output_of(model: Any, hidden: Tensor, autocast: torch.dtype | None = None) -> Output:
    """What the head multiplies for hidden states [N, D]: all of one dtype, that of the head's weight or `autocast`.

    Gradients reach the weights, A, B and magnitudes. Raises Unsupported for an adapter that is more than these.
    """
    head = model.get_output_embeddings()
    base = head if isinstance(head, nn.Linear) else head.get_base_layer()
    dtype = autocast or base.weight.dtype
    rows, weight, bias = hidden.to(dtype), base.weight.to(dtype), base.bias
    if base is not head and not head.disable_adapters and not head.merged:
        active = [name for name in head.active_adapters if name in head.lora_A]
        for name in active:
            rows, weight, bias = _with(head, name, Output(rows, weight, bias), hidden, alone=len(active) == 1)
    return Output(rows, weight, None if bias is None else bias.to(rows.dtype))


def _with(head: Any, name: str, base: Output, hidden: Tensor, *, alone: bool) -> Output:
    """`base` with one adapter on it."""
    a, b, scaling = head.lora_A[name].weight, head.lora_B[name], head.scaling[name]
    chance = float(getattr(head.lora_dropout[name], "p", 0.0)) if head.training else 0.0
    bias = base.bias if b.bias is None else scaling * b.bias + (0 if base.bias is None else base.bias)
    if name in head.lora_variant:
        vectors = head.lora_magnitude_vector
        if name not in vectors or chance or not alone or b.bias is not None:
            what = "DoRA with dropout, or beside another adapter," if name in vectors else "this kind of adapter"
            raise Unsupported(
                f"{what} on the language model head", remedy="set adapter.dropout to 0, or take the head out of targets"
            )
        return _dora(base, a, b.weight, scaling, vectors[name].weight)
    dtype = base.weight.dtype
    if dtype in (torch.float32, torch.float64) and not chance:
        return base._replace(weight=base.weight + (scaling * (b.weight @ a)).to(dtype), bias=bias)
    narrow = (dropout(hidden.to(dtype), chance) @ a.to(dtype).T) * scaling
    return Output(torch.cat([base.rows, narrow], 1), torch.cat([base.weight, b.weight.to(dtype)], 1), bias)


def _dora(base: Output, a: Tensor, b: Tensor, scaling: float, magnitudes: Tensor) -> Output:
    wide = torch.promote_types(base.weight.dtype, torch.float32)
    weight = base.weight.to(wide) + scaling * (b @ a).to(wide)
    lengths = torch.linalg.vector_norm(weight.detach(), dim=1)
    return base._replace(rows=base.rows.to(wide), weight=weight * (magnitudes.to(wide) / lengths)[:, None])
