"""RMS norm (1910.07467) without its intermediate results: keeps its input and one number per row.

Models write it in a few ways that differ in what is rounded when: Llama multiplies with the weight in the model's
dtype, OLMo and Gemma in float32 before they round; Gemma's weights are around zero, and 1 is added in float32. Each
fused norm computes as the one that it replaces does; a norm whose code is none of those below keeps its own.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from align.model.fused.forms import FUSED, known_method, replaced


class _RmsNorm(torch.autograd.Function):
    """y = (w + offset) x / sqrt(mean(x^2) + eps); statistics in float32. late: multiplied with the weight in float32,
    then rounded; else rounded before."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, late: bool) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        ctx.offset, ctx.late = offset, late
        y = x * inverse
        return (y if late else y.to(x.dtype)).mul_(_scale(weight, offset, y.dtype if late else x.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        grad_x = grad_weight = None
        dtype = inverse.dtype if ctx.late else x.dtype
        wide = grad.to(dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (wide * x).mul_(inverse).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            weighted = wide * _scale(weight, ctx.offset, dtype)
            along = torch.linalg.vecdot(weighted, x.to(dtype)).unsqueeze(-1) * (inverse**3 / -x.shape[-1])
            grad_x = (weighted * inverse).addcmul_(x, along).to(x.dtype)
        return grad_x, grad_weight, None, None, None


def _scale(weight: Tensor, offset: float, dtype: torch.dtype) -> Tensor:
    """w + offset in `dtype`: bfloat16 has no number between 1 and 1.0078."""
    weight = weight.to(dtype)
    return weight + offset if offset else weight


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, late: bool = False) -> Tensor:
    """x [..., D], weight [D] of one dtype -> [..., D]. offset 1.0: Gemma's form, where weights are around zero."""
    if x.is_cuda:  # torch has a kernel of its own there, which rounds once
        wide = torch.promote_types(x.dtype, torch.float32) if offset else x.dtype
        return F.rms_norm(x.to(wide), weight.shape, _scale(weight, offset, wide), eps).to(x.dtype)
    out: Tensor = _RmsNorm.apply(x, weight, eps, offset, late)
    return out


class Form(NamedTuple):
    """What sets a known norm apart. epsilon: the attribute that holds it. scaled: the attribute that must be true."""

    epsilon: str
    offset: float = 0.0
    late: bool = False
    scaled: str | None = None


# models' norms, as they are written there
class _Llama:
    def forward(self: Any, hidden_states: Any) -> Any:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class _Olmo:
    def forward(self: Any, hidden_states: Any) -> Any:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return (self.weight * hidden_states).to(input_dtype)


class _Helium:
    def forward(self: Any, hidden_states: Any) -> Any:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return (self.weight.to(torch.float32) * hidden_states).to(input_dtype)


class _Norm:
    def _norm(self: Any, x: Any) -> Any:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class _Gemma(_Norm):
    def forward(self: Any, x: Any) -> Any:
        output = self._norm(x.float())
        output = output * (1.0 + self.weight.float())
        return output.type_as(x)


class _Moshi(_Norm):
    def forward(self: Any, x: Any) -> Any:
        output = self._norm(x.float())
        output = output * self.weight.float()
        return output.type_as(x)


class _Llama4(_Norm):
    def forward(self: Any, x: Any) -> Any:
        output = self._norm(x.float()).type_as(x)
        return output * self.weight


class _Gemma4:
    def _norm(self: Any, hidden_states: Any) -> Any:
        mean_squared = hidden_states.pow(2).mean(-1, keepdim=True) + self.eps
        return hidden_states * torch.pow(mean_squared, -0.5)

    def forward(self: Any, hidden_states: Any) -> Any:
        normed_output = self._norm(hidden_states.float())
        if self.with_scale:
            normed_output = normed_output * self.weight.float()
        return normed_output.type_as(hidden_states)


FORMS: dict[type, Form] = {
    _Llama: Form("variance_epsilon"),
    _Olmo: Form("variance_epsilon", late=True),
    _Helium: Form("variance_epsilon", late=True),
    _Gemma: Form("eps", offset=1.0, late=True),
    _Moshi: Form("eps", late=True),
    _Llama4: Form("eps"),
    _Gemma4: Form("eps", late=True, scaled="with_scale"),
}


def looks_like_norm(module: nn.Module) -> bool:
    """A norm by its name: whether it is one that is known is for `norm_class` to say."""
    return "norm" in type(module).__name__.lower() and not isinstance(module, (nn.LayerNorm, nn.GroupNorm))


def norm_class(module: Any) -> type[nn.Module] | str:
    """The fused class for a module, or why it keeps its own code."""
    known = known_method(type(module), FORMS)
    if known is None or replaced(module):
        return "its code is no RMS norm that is known"
    kind: Any = type(module)
    form = FORMS[known]
    if form.scaled is not None and not getattr(module, form.scaled):
        return "it has no weight"
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 1 or set(module._parameters) != {"weight"} or module._modules:
        return "it has other parameters than one vector"
    if type(getattr(module, form.epsilon, None)) is not float:
        return f"its {form.epsilon} is no number"
    return fused_norm(kind, form)


@functools.cache
def fused_norm(kind: Any, form: Form) -> type[nn.Module]:
    """A subclass of a model's own norm with the fused forward; its own for inputs of another dtype than the weight."""

    @functools.wraps(kind.forward)
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        weight = self.weight
        if hidden_states.dtype != weight.dtype or hidden_states.shape[-1:] != weight.shape:
            plain: Tensor = kind.forward(self, hidden_states)
            return plain
        return rms_norm(hidden_states, weight, getattr(self, form.epsilon), form.offset, form.late)

    return type(f"Fused{kind.__name__}", (kind,), {"forward": forward, FUSED: True})
