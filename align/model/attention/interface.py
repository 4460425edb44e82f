"""Attention over packed trees: a trunk attends causally to itself, a branch to its trunk and causally to itself.

Where a model says so, the tokens of an image also see each other both ways. Registered with transformers as the
attention implementation `align_packed`. No mask function is registered for it, so the models build none: who sees whom
is described by segments (`AttentionPlan`), and no T x T mask exists anywhere.

Four kernels compute the same: `sdpa` (anywhere), `varlen` (flash attention, NVIDIA, half precision) and `flex`
(FlexAttention, NVIDIA); on the CPU, soft-capping and sinks go through a softmax that is written out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from align.errors import Unsupported
from align.model.attention.flex import flex_attention_over
from align.model.attention.plan import AttentionPlan
from align.model.attention.sdpa import sdpa_attention
from align.model.attention.softmax import softmax_attention
from align.model.attention.varlen import varlen_attention

NAME = "align_packed"
KERNELS = ("sdpa", "varlen", "flex")


def kernels_for(wanted: str, device: torch.device, dtype: torch.dtype, *, dropout: bool = False) -> tuple[str, ...]:
    """Kernels to try, best first, for the recipe's word. Raises Unsupported where the word asks for what cannot be.

    dropout: whether attention weights are dropped in training, which only sdpa does.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    if wanted == "auto":
        return ("varlen", "flex", "sdpa") if device.type == "cuda" and half and not dropout else ("sdpa",)
    if wanted not in KERNELS:
        raise Unsupported(
            f"`model.attention: {wanted}` is no attention of this version",
            where="model.attention",
            remedy=f"one of auto, {', '.join(KERNELS)}",
        )
    if wanted != "sdpa" and device.type != "cuda":
        raise Unsupported(
            f"`model.attention: {wanted}` needs an NVIDIA GPU, and the model is on {device.type}",
            where="model.attention",
            remedy="use auto",
        )
    if wanted != "sdpa" and dropout:
        raise Unsupported(
            f"`model.attention: {wanted}` drops no attention weights, and the model's config asks for it",
            where="model.attention",
            remedy="use auto, or set `attention_dropout` to 0 in its config.json",
        )
    if wanted == "varlen" and not half:
        raise Unsupported(
            f"`model.attention: varlen` computes in bfloat16 or float16, not in {str(dtype).removeprefix('torch.')}",
            where="model.attention",
            remedy="set `model.dtype: bfloat16`, or use auto",
        )
    return (wanted,)


def packed_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    align_plan: AttentionPlan | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """transformers' attention signature: query [1, Hq, T, D], key and value [1, Hkv, T, D] -> [1, T, Hq, D].

    softcap: scores become softcap * tanh(scores / softcap). s_aux [Hq]: attention sinks, a score that takes part in
    the softmax and has no value.
    """
    if align_plan is None:
        raise RuntimeError(
            f"attention implementation {NAME!r} was called without `align_plan`: either not through PolicyModule, or "
            "the layers of this architecture do not hand on what they were not written for"
        )
    _refuse(module, attention_mask, kwargs)
    kernel = align_plan.kernel
    if kernel != "sdpa":  # under autocast, rotations leave queries and keys in float32, which these kernels do not mix
        query, key = query.to(value.dtype), key.to(value.dtype)
    shared: dict[str, Any] = {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window}
    if kernel == "flex":
        out = flex_attention_over(query, key, value, align_plan, softcap=softcap, sinks=s_aux, **shared)
    elif softcap is not None or s_aux is not None:
        if kernel == "varlen":
            raise Unsupported(
                f"varlen attention has no {'soft-capping' if softcap is not None else 'sinks'}, which "
                f"{type(module).__name__} uses",
                where="model.attention",
                remedy="use auto",
            )
        out = softmax_attention(query, key, value, align_plan, softcap=softcap, sinks=s_aux, **shared)
    else:
        compute = varlen_attention if kernel == "varlen" else sdpa_attention
        out = compute(query, key, value, align_plan, **shared)
    for witness in _witnesses:
        witness(_units_off(out, query, key, value, align_plan, softcap=softcap, sinks=s_aux, **shared))
    return out, None


_witnesses: list[Callable[[float], None]] = []


@contextmanager
def witnessed(witness: Callable[[float], None]) -> Iterator[None]:
    """Inside the block, of each attention `witness` is told how far its kernel is from float32 on the same queries,
    keys and values: the largest difference, in units in the last place of the largest output."""
    _witnesses.append(witness)
    try:
        yield
    finally:
        _witnesses.remove(witness)


def _units_off(out: Tensor, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, **how: Any) -> float:
    softcap, sinks = how.pop("softcap"), how.pop("sinks")
    plain = AttentionPlan(plan.segments, plan.device, "sdpa", plan.blocks)
    q, k, v = query.float(), key.float(), value.float()
    if softcap is not None or sinks is not None:
        exact = softmax_attention(
            q, k, v, plain, softcap=softcap, sinks=None if sinks is None else sinks.float(), **how
        )
    else:
        exact = sdpa_attention(q, k, v, plain, **how)
    unit = torch.finfo(out.dtype).eps * exact.abs().max().clamp(min=1e-30)
    return float((out.float() - exact).abs().max() / unit)


def _refuse(module: torch.nn.Module, mask: Tensor | None, kwargs: dict[str, object]) -> None:
    """Raise Unsupported for what the segments do not describe."""
    both_ways = kwargs.get("is_causal", getattr(module, "is_causal", True)) is False
    for found, what in (
        (mask is not None, "a mask of its own"),
        (kwargs.get("position_bias") is not None, "a position bias"),
        (both_ways, "a view of what comes after"),
    ):
        if found:
            raise Unsupported(
                f"{type(module).__name__} attends with {what}, which has no packed implementation in this version",
                remedy="use a model with plain causal attention",
            )


AttentionInterface.register(NAME, packed_attention_forward)
