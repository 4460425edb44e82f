"""What every module of a forward is given and makes, in short, and where two computations part.

A structural fault shows at the module that makes it, relative to what that module makes: however small weights are,
however long the way to the logits is. Of each output a random projection to a few numbers per token is kept, whose
length is the output's on average (Johnson and Lindenstrauss, 1984): a few kilobytes for a model's whole forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from align.model.probe.float32 import layers_of

WIDTH = 32  # numbers a token
TINY = 1e-2  # of the usual token's length: what a token is measured against at least


class Record(NamedTuple):
    """f32[B, L, WIDTH] of a module's first input and output along the tokens; given None where there is no such."""

    given: Tensor | None
    made: Tensor


Trace = dict[str, Record]  # by path, in the order in which the modules were done; "path#1" is a second call


@cache
def _projection(width: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    return (torch.randn(width, WIDTH, generator=generator) / WIDTH**0.5).to(device)


def sketch(x: Tensor) -> Tensor:
    """[..., D] -> f32[..., WIDTH]"""
    return x.detach().float() @ _projection(x.shape[-1], x.device)


def _along(values: Any, rows: int, tokens: int) -> Tensor | None:
    """The first tensor [rows, tokens, ...] of numbers, flattened to [rows, tokens, D]."""
    for value in values:
        if isinstance(value, Tensor) and value.dim() >= 3 and value.shape[:2] == (rows, tokens):
            return value.flatten(2) if value.is_floating_point() else None
    return None


def parts_of_forward(backbone: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules of a backbone with their paths; what an adapter is made of belongs to the layer that it adapts."""
    adapted: list[str] = []
    for path, module in backbone.named_modules():
        if path and not path.startswith(tuple(adapted)):
            if hasattr(module, "lora_A"):
                adapted.append(f"{path}.")
            yield path, module


@contextmanager
def traced(backbone: nn.Module, rows: int, tokens: int, prefix: str = "") -> Iterator[Trace]:
    """Keep what the modules of `backbone` make of rows [rows, tokens] inside the block. A layer's record is what it
    adds to its input."""
    found: Trace = {}
    layers = {id(module) for module in layers_of(backbone).values()}
    handles = []

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            made = _along(
                (out,) if isinstance(out, Tensor) else out if isinstance(out, tuple | list) else (), rows, tokens
            )
            if made is None:
                return
            given = _along((*args, *kwargs.values()), rows, tokens)
            if id(module) in layers and given is not None and given.shape == made.shape:
                made = made - given
            name, n = path, 0
            while name in found:
                n += 1
                name = f"{path}#{n}"
            found[name] = Record(None if given is None else sketch(given), sketch(made))

        return hook

    try:
        for path, module in parts_of_forward(backbone):
            handles.append(module.register_forward_hook(watch(prefix + path), with_kwargs=True))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def apart(found: Tensor, own: Tensor) -> float:
    """How far tokens [L, WIDTH] are from what they should be, relative to their length: the worst of them."""
    if own.numel() == 0:
        return 0.0
    length = own.norm(dim=-1)
    usual = length.square().mean().sqrt()
    difference = (found - own).norm(dim=-1)
    worst = (difference / (length + TINY * usual).clamp(min=1e-30)).max().item()
    return worst if worst == worst else float("inf")


class Parting(NamedTuple):
    """Where two computations part: the module's path, how far, and how far it may be."""

    path: str
    distance: float
    bound: float

    def __str__(self) -> str:
        return (
            f"{self.path} is {self.distance:.2g} of its size away from the model's own, where {self.bound:.1g} is noise"
        )


def parting(
    pairs: list[tuple[Trace, Trace, Tensor, Tensor, Tensor]], bounds: Mapping[str, float], last_layer: str | None
) -> Parting | None:
    """The first module whose output is another and whose input is not, or else the first whose output is.

    pairs: for each sequence the trace to judge, the model's own, and places i64[L] of the sequence's tokens in each;
    and which of them are read after the last layer (of others nothing need be computed there).
    """
    first: Parting | None = None
    names = dict.fromkeys(name for trace, *_ in pairs for name in trace if name in bounds)
    late = False
    for name in names:
        late = late or (last_layer is not None and name.startswith(last_layer))
        made = given = 0.0
        for trace, own, places, own_places, read in pairs:
            if name not in trace or name not in own:
                continue
            at, own_at = (places[read], own_places[read]) if late else (places, own_places)
            ours, theirs = trace[name], own[name]
            made = max(made, apart(ours.made.flatten(0, 1)[at], theirs.made.flatten(0, 1)[own_at]))
            if ours.given is not None and theirs.given is not None:
                given = max(given, apart(ours.given.flatten(0, 1)[at], theirs.given.flatten(0, 1)[own_at]))
        bound = bounds[name]
        if made > bound:
            fault = Parting(name.partition("#")[0], made, bound)
            if given <= bound:
                return fault
            first = first or fault
    return first
