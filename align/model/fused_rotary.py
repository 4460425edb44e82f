"""Rotary position embeddings (2104.09864) without the halves being negated, joined and added in passes of their own.

transformers rotates by x cos + rotate_half(x) sin, a function of the model's module that attention calls by its global
name. Here x cos is made once, and both halves of x sin are multiplied into it in place; backward does the same with
the halves exchanged, and keeps nothing but cos and sin.

An attention class gets the rotation by a copy of its own forward, whose global name means this function; the model's
module, and whoever else uses it in the process, keep theirs. It does so only if values and gradients on random numbers
are those of its own rotation.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from align.model.fused_qkv import give, projects_jointly, withdraw

NAME = "apply_rotary_pos_emb"


class _Rotate(torch.autograd.Function):
    """x [B, T, H, D], cos and sin [B, T, 1, D] of one dtype: y = x cos + [-x2, x1] sin, x1 and x2 the halves of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        (first, second), (sin_first, sin_second) = x.chunk(2, -1), sin.chunk(2, -1)
        y = x * cos
        low, high = y.chunk(2, -1)
        low.addcmul_(second, sin_first, value=-1)
        high.addcmul_(first, sin_second)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        (first, second), (sin_first, sin_second) = grad.chunk(2, -1), sin.chunk(2, -1)
        grad_x = grad * cos
        low, high = grad_x.chunk(2, -1)
        low.addcmul_(second, sin_second)
        high.addcmul_(first, sin_first, value=-1)
        return grad_x, None, None


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """transformers' `apply_rotary_pos_emb`: q [B, Hq, T, D], k [B, Hkv, T, D], cos and sin [B, T, D] without gradient.

    unsqueeze_dim: the axis of the heads, 1 or 2 ([B, T, H, D]).
    """
    heads_first = unsqueeze_dim == 1
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    turned: list[Tensor] = []
    for x in (q, k):
        # element by element in the order of memory, which is by token
        out: Tensor = _Rotate.apply(x.transpose(1, 2) if heads_first else x, cos, sin)
        turned.append(out.transpose(1, 2) if heads_first else out)
    return turned[0], turned[1]


def calls_rotation(module: nn.Module) -> bool:
    """Whether this module's own forward calls the rotation by its usual name."""
    forward = getattr(type(module), "forward", None)
    return (
        isinstance(forward, types.FunctionType)
        and NAME in forward.__code__.co_names
        and callable(forward.__globals__.get(NAME))
        and not type(module).__name__.startswith("Fused")
    )


def fused_rotary(kind: type[nn.Module]) -> type[nn.Module] | None:
    """A subclass of an attention class that rotates by `rotate`, or None where its own rotation is another one."""
    own: Any = kind.forward
    if not _equal(own.__globals__[NAME]):
        return None
    names = {**own.__globals__, NAME: _whole_heads(own.__globals__[NAME])}
    turned: Any = types.FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    turned.__kwdefaults__ = own.__kwdefaults__

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not projects_jointly(self):
            return turned(self, hidden_states, *args, **kwargs)
        give(self, hidden_states)
        try:
            return turned(self, hidden_states, *args, **kwargs)
        finally:
            withdraw(self)

    return type(f"Fused{kind.__name__}", (kind,), {"forward": forward})


def _whole_heads(own: Callable[..., Any]) -> Callable[..., Any]:
    """`rotate`, and the model's own rotation where only a part of each head is turned."""

    def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        whole = q.shape[-1] == k.shape[-1] == cos.shape[-1]
        return (rotate if whole else own)(q, k, cos, sin, *args, **kwargs)

    return turn


def _equal(own: Callable[..., Any]) -> bool:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q, k = draw(1, 2, 3, 8).requires_grad_(), draw(1, 1, 3, 8).requires_grad_()
    cos, sin, grads = draw(1, 3, 8), draw(1, 3, 8), (draw(1, 2, 3, 8), draw(1, 1, 3, 8))
    found = []
    for function in (own, rotate):
        try:
            turned = function(q, k, cos, sin)
            found.append([*turned, *torch.autograd.grad(turned, (q, k), grads)])
        except (TypeError, ValueError, RuntimeError):  # another signature: another rotation
            return False
    return all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in zip(*found, strict=True))
