"""Frozen weights in four bits (QLoRA, 2305.14314), computed with in the model's dtype.

A block of `blocksize` weights shares one scale, and of each weight four bits are kept: which of the 16 values of NF4
(quantiles of a normal distribution) or FP4 it is nearest to. With `double` the scales are stored in eight bits too.
bitsandbytes packs and unpacks, on CPUs and GPUs; a weight is unpacked for each product and thrown away after it, in
forward and again in backward.

Which layers: the linear layers of the language model, and those of a tower that takes LoRA. Embeddings, the head and
norms keep the model's dtype, as in the paper. The same folder, dtype and options give the same weights again, so that
an adapter's folder says what it was trained on in a few words (`align.recipe.adapter_folder`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from align.errors import Unsupported
from align.model.adapter_config import HEAD
from align.model.parts import parts_of
from align.recipe.adapter import Part, Quant


class Packed:
    """A frozen weight [out, in] in four bits. Autograd and `save_for_backward` see an object, no tensor."""

    requires_grad = False

    def __init__(self, weight: Any):
        self._weight = weight

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self._weight.quant_state.shape)

    @property
    def dtype(self) -> torch.dtype:
        """What it was packed from and is computed with."""
        dtype: torch.dtype = self._weight.quant_state.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        device: torch.device = self._weight.device
        return device

    def dense(self) -> Tensor:
        """[out, in] in its dtype, a new tensor."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self._weight.data, self._weight.quant_state)


def dense(weight: Tensor | Packed) -> Tensor:
    return weight.dense() if isinstance(weight, Packed) else weight


class _PackedLinear(torch.autograd.Function):
    """y = x W' + bias; W is unpacked twice and kept never."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.dense().to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        return grad @ ctx.weight.dense().to(grad.dtype), None, None


class QuantisedLinear(nn.Linear):
    """A frozen linear layer whose weight is packed. `weight` is bitsandbytes' Params4bit, which peft unpacks for DoRA.

    bitsandbytes' own layer repacks its weight for a CPU's inference kernels at the first forward in eval mode, and
    computes something else from then on than it trains with.
    """

    @classmethod
    def of(cls, linear: nn.Linear, quant: Quant, device: torch.device, dtype: torch.dtype) -> QuantisedLinear:
        """`linear` with its weight packed on `device`, from `dtype`; its bias stays as it is, frozen."""
        from bitsandbytes.nn import Params4bit

        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.in_features, made.out_features = linear.in_features, linear.out_features
        bare: Any = Params4bit(
            linear.weight.data.to(dtype),
            requires_grad=False,
            blocksize=quant.blocksize,
            compress_statistics=quant.double,
            quant_type=quant.type,
        )
        made.weight = bare.to(device=device)
        made.bias = None if linear.bias is None else nn.Parameter(linear.bias.data, requires_grad=False)
        made.train(linear.training)
        return made

    @property
    def packed(self) -> Packed:
        return Packed(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _PackedLinear.apply(x, self.packed, self.bias)
        return y


def linear_weight(linear: Any) -> Tensor | Packed:
    """Of a linear layer, packed or not: its weight as it is stored."""
    return linear.packed if isinstance(linear, QuantisedLinear) else linear.weight


def quantise(
    model: Any, quant: Quant, parts: tuple[Part, ...], *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> list[str]:
    """Pack the linear layers of `parts` of a model, rounded to `dtype` first, one at a time, on `device`; their paths.

    The model may stand on another device: only packed weights arrive. Raises Unsupported where most weights of the
    language model are in no linear layer (stacked experts, GPT-2's convolutions).
    """
    of, head = parts_of(model), model.get_output_embeddings()
    places = [
        path
        for path, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and path.partition(".")[0] != HEAD and of.of(path) in parts
    ]
    _require_most(model, places)
    for path in places:
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, name, QuantisedLinear.of(getattr(owner, name), quant, torch.device(device), dtype))
    _leave_the_file(model)
    return places


def _leave_the_file(model: Any) -> None:
    """Copy what was not packed out of the checkpoint's file: one tensor that is left keeps all of it mapped."""
    for parameter in model.parameters():
        if getattr(parameter, "quant_state", None) is None and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def _require_most(model: Any, places: list[str]) -> None:
    """Whoever asks for four bits wants most of the blocks' weights in them."""
    outside = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module}
    of = parts_of(model)
    every = {name: p for name, p in model.named_parameters() if id(p) not in outside and of.of(name) == "language"}
    packed = sum(every[f"{path}.weight"].numel() for path in places if f"{path}.weight" in every)
    total = sum(parameter.numel() for parameter in every.values())
    if 2 * packed < total:
        raise Unsupported(
            f"`quant` packs linear layers, which hold {packed:,} of the {total:,} weights of {type(model).__name__}'s "
            "blocks (stacked experts are none)",
            where="adapter.kind",
            remedy="use `kind: lora` with `model.dtype: bfloat16`",
        )


def quantised_layers(model: nn.Module) -> dict[str, QuantisedLinear]:
    """By path, packed layers inside LoRA layers included."""
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantisedLinear)}
