"""A model computed in float32 without a float32 copy of it: a layer at a time, and a head of a few hundred tokens.

bfloat16 weights are float32 numbers too, so that float32 arithmetic on them is what a low-precision forward is an
approximation of: the truth that its own error and another computation's are measured against. A layer's parameters are
widened when its forward begins and are as they were when it ends; never is more than one layer held twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

NARROW = (torch.bfloat16, torch.float16)
MOST_LAYERS = 8
CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """By path, the outermost modules that stand in lists: decoder layers, and those of a tower. What an adapter keeps
    in lists of its own, on a projection outside of all layers (Gemma 4 has one), is none."""
    found: dict[str, nn.Module] = {}

    def walk(module: nn.Module, path: str, listed: bool) -> None:
        for name, child in module.named_children():
            inner = f"{path}.{name}" if path else name
            if isinstance(child, CONTAINERS):
                walk(child, inner, True)
            elif listed:
                found[inner] = child
            elif not hasattr(child, "lora_A"):
                walk(child, inner, False)

    walk(model, "", False)
    return found


class Widened:
    """Parameters and buffers of some modules in float32, until `back`."""

    def __init__(self, modules: Iterator[nn.Module] | list[nn.Module]):
        self._data: list[tuple[nn.Parameter, Tensor]] = []
        self._buffers: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        for module in modules:
            for parameter in module._parameters.values():
                if parameter is not None and parameter.dtype in NARROW:
                    self._data.append((parameter, parameter.data))
                    parameter.data = parameter.data.float()
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.dtype in NARROW:
                    wide = buffer.float()
                    self._buffers.append((module, name, buffer, wide))
                    module._buffers[name] = wide

    def back(self) -> None:
        for parameter, data in reversed(self._data):
            parameter.data = data
        for module, name, buffer, wide in reversed(self._buffers):
            if module._buffers.get(name) is wide:  # a module that exchanged its buffer meanwhile keeps the new one
                module._buffers[name] = buffer
        self._data, self._buffers = [], []


@contextmanager
def widened(module: nn.Module) -> Iterator[None]:
    """One module, whole, in float32 inside the block."""
    held = Widened(module.modules())
    try:
        yield
    finally:
        held.back()


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Inside the block the model's forward computes in float32, whatever its parameters are kept in.

    Embeddings stay narrow, and what they look up is widened: it is the same numbers. What stands in no list of layers
    (norms, a projector, the head) is wide throughout.
    """
    layers = list(layers_of(model).values())
    inside = {id(module) for layer in layers for module in layer.modules()}
    outside = [module for module in model.modules() if id(module) not in inside]
    handles: list[Any] = []
    held: dict[int, Widened] = {}

    def widen(layer: nn.Module, args: Any) -> None:
        if id(layer) not in held:
            held[id(layer)] = Widened(layer.modules())

    def narrow(layer: nn.Module, args: Any, out: Any) -> None:
        one = held.pop(id(layer), None)
        if one is not None:
            one.back()

    def wide_output(module: nn.Module, args: Any, out: Any) -> Any:
        return out.float() if isinstance(out, Tensor) and out.dtype in NARROW else out

    rest = Widened([module for module in outside if not isinstance(module, nn.Embedding)])
    try:
        for layer in layers:
            handles.append(layer.register_forward_pre_hook(widen, prepend=True))
            handles.append(layer.register_forward_hook(narrow, always_call=True))
        handles += [m.register_forward_hook(wide_output) for m in outside if isinstance(m, nn.Embedding)]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for one in held.values():
            one.back()
        rest.back()


@contextmanager
def head_of(model: Any, rows: Tensor | None) -> Iterator[None]:
    """Inside the block the language model head has the outputs `rows` i64[V'] alone; None: all that it has."""
    head = None if rows is None else model.get_output_embeddings()
    if head is None:
        yield
        return
    own = dict(head._parameters)
    try:
        for name, parameter in own.items():
            if parameter is not None:
                head._parameters[name] = nn.Parameter(parameter.data[rows], requires_grad=False)
        yield
    finally:
        head._parameters.update(own)


def head_rows(model: Any, tokens: list[int], most: int = 512) -> Tensor | None:
    """Which outputs of the head to keep: those of `tokens`, first and in order, and others spread over the vocabulary.
    None where the head is no plain linear layer, or small."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(head) is not nn.Linear or head.weight.shape[0] <= most:
        return None
    own = torch.tensor(sorted(set(tokens)))
    spread = torch.linspace(0, head.weight.shape[0] - 1, most - len(own)).long()
    others = spread[~torch.isin(spread, own)]
    return torch.cat([own, others]).to(head.weight.device)


def kinds_of(backbone: Any) -> int:
    """How many of the first layers to keep for one of each kind, two at least and MOST_LAYERS at most; 0 where the
    backbone has no list of layers. Layers are of one kind whose modules are of the same classes."""
    layers = list(_listed(backbone))
    if not layers:
        return 0
    types = list(getattr(backbone.config, "layer_types", None) or [])
    first: dict[Any, int] = {}
    for n, layer in enumerate(layers):
        inside = tuple((path, type(module).__qualname__) for path, module in layer.named_modules())
        first.setdefault((inside, types[n] if n < len(types) else None), n)
    return min(max(2, 1 + max(first.values())), MOST_LAYERS, len(layers))


def _listed(backbone: nn.Module) -> nn.ModuleList:
    found = [m for m in backbone.children() if isinstance(m, nn.ModuleList)]
    return max(found, key=len, default=nn.ModuleList())


@contextmanager
def first_layers(backbone: nn.Module, number: int) -> Iterator[None]:
    """Inside the block the backbone has its first layers alone: a short model with the real weights."""
    whole = _listed(backbone)
    name = next(name for name, module in backbone.named_children() if module is whole)
    backbone._modules[name] = nn.ModuleList(list(whole)[:number])
    try:
        yield
    finally:
        backbone._modules[name] = whole
