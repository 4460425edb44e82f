"""Rotary position embeddings (2104.09864) without the halves being negated, joined and added in passes of their own.

transformers rotates by x cos + rotate_half(x) sin, a function of the model's module that attention calls by its global
name. Here x cos is made once, and both halves of x sin are multiplied into it in place; backward does the same with
the halves exchanged, and keeps nothing but cos and sin.

An attention class gets the rotation by a copy of its own forward, whose global name means this function; the model's
module, and whoever else uses it in the process, keep theirs. It does so only if its own rotation is one of those that
are written out below, and each call only where whole heads are turned; dtypes come out as from the model's own.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from align.model.fused.forms import FUSED, replaced, same_function
from align.model.fused.qkv import NAMES, give, projects_jointly, withdraw

NAME = "apply_rotary_pos_emb"


class _Rotate(torch.autograd.Function):
    """x [B, T, H, D], cos and sin [B, T, 1, D]: y = x cos + [-x2, x1] sin, x1 and x2 the halves of x. Of two dtypes the
    wider is that of y, as torch has it."""

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


def rotate_half(x: Any) -> Any:
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


# models' rotations, as they are written there
def _llama(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: Any = 1) -> Any:
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return q_embed, k_embed


def _partial(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: Any = 1) -> Any:
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    rotary_dim = cos.shape[-1]
    q_rot, q_pass = q[..., :rotary_dim], q[..., rotary_dim:]
    k_rot, k_pass = k[..., :rotary_dim], k[..., rotary_dim:]
    q_embed = (q_rot * cos) + (rotate_half(q_rot) * sin)
    k_embed = (k_rot * cos) + (rotate_half(k_rot) * sin)
    q_embed = torch.cat([q_embed, q_pass], dim=-1)
    k_embed = torch.cat([k_embed, k_pass], dim=-1)
    return q_embed, k_embed


def _phi(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: Any = 1) -> Any:
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    rotary_dim = cos.shape[-1]
    q_rot, q_pass = q[..., :rotary_dim], q[..., rotary_dim:]
    k_rot, k_pass = k[..., :rotary_dim], k[..., rotary_dim:]
    q_embed = torch.cat([(q_rot * cos) + (rotate_half(q_rot) * sin), q_pass], dim=-1)
    k_embed = torch.cat([(k_rot * cos) + (rotate_half(k_rot) * sin), k_pass], dim=-1)
    return q_embed, k_embed


def _nemotron(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: Any = 1) -> Any:
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    rot_dim = cos.shape[-1]
    q, q_pass = q[..., :rot_dim], q[..., rot_dim:]
    k, k_pass = k[..., :rot_dim], k[..., rot_dim:]
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return torch.cat((q_embed, q_pass), dim=-1), torch.cat((k_embed, k_pass), dim=-1)


def _olmo(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: Any = 1) -> Any:
    q_type, k_type = q.dtype, k.dtype
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return q_embed.to(q_type), k_embed.to(k_type)


def _modernbert(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: Any = 1) -> Any:
    original_dtype = q.dtype
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = (q.float() * cos) + (rotate_half(q.float()) * sin)
    k_embed = (k.float() * cos) + (rotate_half(k.float()) * sin)
    return q_embed.to(original_dtype), k_embed.to(original_dtype)


def _rotate_back(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """`rotate`, its results in the dtypes of q and k."""
    turned = rotate(q, k, cos, sin, unsqueeze_dim)
    return turned[0].to(q.dtype), turned[1].to(k.dtype)


def _rotate_wide(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """`rotate` in float32, its results in the dtype of q."""
    turned = rotate(q.float(), k.float(), cos, sin, unsqueeze_dim)
    return turned[0].to(q.dtype), turned[1].to(q.dtype)


FORMS: tuple[tuple[Callable[..., Any], Callable[..., tuple[Tensor, Tensor]]], ...] = (
    (_llama, rotate),
    (_partial, rotate),
    (_phi, rotate),
    (_nemotron, rotate),
    (_olmo, _rotate_back),
    (_modernbert, _rotate_wide),
)


def calls_rotation(module: nn.Module) -> bool:
    """Whether this module's own forward calls the rotation by its usual name."""
    forward = getattr(type(module), "forward", None)
    return isinstance(forward, types.FunctionType) and NAME in forward.__code__.co_names


def rotary_class(module: nn.Module) -> type[nn.Module] | str:
    """The fused class for a module that calls a rotation, or why it keeps its own code."""
    kind: Any = type(module)
    if replaced(module):
        return "its forward was replaced"
    own = kind.forward.__globals__.get(NAME)
    fused = next((fused for known, fused in FORMS if same_function(own, known)), None)
    return "its rotation is none that is known" if fused is None else fused_rotary(kind, own, fused)


@functools.cache
def fused_rotary(kind: Any, own_rotation: Any, fused: Any) -> type[nn.Module]:
    """A subclass of an attention class that rotates by `fused`, a `rotate`."""
    own: Any = kind.forward
    names = {**own.__globals__, NAME: whole_heads(own_rotation, fused)}
    turned: Any = types.FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    turned.__kwdefaults__ = own.__kwdefaults__
    asks_all = set(NAMES) <= set(own.__code__.co_names)

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs.get("hidden_states")
        if not asks_all or not isinstance(x, Tensor) or not projects_jointly(self):
            return turned(self, *args, **kwargs)
        give(self, x)
        try:
            return turned(self, *args, **kwargs)
        finally:
            withdraw(self)

    return type(f"Fused{kind.__name__}", (kind,), {"forward": forward, FUSED: True})


def whole_heads(own: Callable[..., Any], fused: Callable[..., Any]) -> Callable[..., Any]:
    """`fused`, and the model's own rotation where only a part of each head is turned, or angles are learned."""

    def turn(q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
        axis = args[0] if args else kwargs.get("unsqueeze_dim", 1)
        usual = all(isinstance(x, Tensor) for x in (q, k, cos, sin)) and q.ndim == k.ndim == cos.ndim + 1 == 4
        whole = usual and q.shape[-1] == k.shape[-1] == cos.shape[-1] and sin.shape == cos.shape
        fixed = whole and not cos.requires_grad and not sin.requires_grad and axis in (1, 2)
        return (fused if fixed else own)(q, k, cos, sin, *args, **kwargs)

    return turn
