"""Rotary embeddings whose frequencies depend on how long the row is (rope types `dynamic` and `longrope`).

Beyond the length that a model was first trained with, transformers gives all tokens of a row other frequencies: a
sequence beside a longer one would be rotated as that one is. What a sequence is by itself is what it is trained as: a
batch with a sequence beyond that length is computed one sequence at a time, each with its own frequencies.

Which modules these are, and from which length on, is found by asking them, not by their type's name.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from align.types import TokenBatch

FIRST = 8  # positions that are looked at
FAILURES = (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError, AssertionError)


@dataclass
class RotaryLengths:
    """limit: the longest row whose frequencies are those of a short one. paths: of the modules that have another then.

    start: what a module holds after a short row; one that has grown would not shrink at once.
    """

    limit: int
    paths: tuple[str, ...]
    modules: list[nn.Module]
    start: list[dict[str, Any]]

    @property
    def words(self) -> str:
        return (
            f"a batch with a sequence of more than {self.limit} tokens is computed one sequence at a time: frequencies "
            f"of {self.paths[0]} depend on the length of the row from there on"
        )

    def reached_by(self, batch: TokenBatch) -> bool:
        """Whether a sequence of the batch is longer than the limit."""
        return int(batch.position_ids.max()) + 1 > self.limit

    def forget(self) -> None:
        """As after a short row."""
        for module, held in zip(self.modules, self.start, strict=True):
            _restore(module, held)

    def of(self, model: nn.Module) -> RotaryLengths:
        """The same of another copy of the model."""
        modules = [model.get_submodule(path) for path in self.paths]
        return RotaryLengths(self.limit, self.paths, modules, [*map(_short, modules)])


def lengths_of(backbone: Any, prefix: str = "") -> RotaryLengths | None:
    """What the rotary modules of a text backbone depend on; None where a row's length changes nothing."""
    found: list[tuple[int, str, nn.Module]] = []
    longest = int(getattr(backbone.config, "max_position_embeddings", 0) or 0)
    for path, module in backbone.named_modules():
        if not path or not _takes_positions(module):
            continue
        limits = [limit for kind in _kinds(module) if (limit := _limit(module, kind, longest)) is not None]
        if limits:
            found.append((min(limits), prefix + path, module))
    if not found:
        return None
    modules = [module for *_, module in found]
    return RotaryLengths(
        min(limit for limit, *_ in found), tuple(p for _, p, _ in found), modules, [*map(_short, modules)]
    )


def _takes_positions(module: nn.Module) -> bool:
    """A module of frequencies: takes a tensor, and the positions of its tokens."""
    if not any(name.endswith("inv_freq") for name in module._buffers):
        return False
    return {"x", "position_ids"} <= set(inspect.signature(module.forward).parameters)


def _kinds(module: nn.Module) -> list[dict[str, str]]:
    """Arguments for each kind of layer that the module has frequencies for."""
    if "layer_type" not in inspect.signature(module.forward).parameters:
        return [{}]
    kinds = {
        name.removesuffix("_inv_freq").removesuffix("_original")
        for name in module._buffers
        if name.endswith("_inv_freq")
    }
    return [{"layer_type": kind} for kind in sorted(kinds) if kind]


def _limit(module: nn.Module, kind: dict[str, str], longest: int) -> int | None:
    """The longest row in which the first positions have the frequencies that they have alone."""
    far = max(4 * longest, 1 << 12)
    try:
        alone = _first(module, kind, FIRST)
        if torch.equal(alone, _first(module, kind, far)):
            return None
        low, high = FIRST, far  # equal at low, another at high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if torch.equal(alone, _first(module, kind, middle)) else (low, middle)
        return low
    except FAILURES:
        return None  # it is asked in another way: what it makes is in the probe's trace


def _first(module: nn.Module, kind: dict[str, str], length: int) -> Tensor:
    """Cosines of the first positions in a row of `length` tokens; the module is as before."""
    with _as_before(module):
        return _cosines(module, kind, length)[..., : FIRST - 1, :]


@torch.no_grad()
def _cosines(module: nn.Module, kind: dict[str, str], length: int) -> Tensor:
    """Of the first positions and the last of a row of `length` tokens, which the module remembers."""
    device = next(b.device for b in module.buffers())
    positions = torch.tensor([[*range(FIRST - 1), length - 1]], device=device)
    cos: Tensor
    cos, _ = module(torch.zeros(1, 1, 1, device=device), positions, **kind)
    return cos


@contextmanager
def _as_before(module: nn.Module) -> Iterator[None]:
    held = _held(module)
    try:
        yield
    finally:
        _restore(module, held)


def _short(module: nn.Module) -> dict[str, Any]:
    """What a module holds after a short row: a longer one before may have left it grown."""
    for kind in _kinds(module):
        _cosines(module, kind, FIRST)
    return _held(module)


def _held(module: nn.Module) -> dict[str, Any]:
    """Attributes and buffers of a module; tensors are exchanged by it, never written into."""
    own = {k: v for k, v in module.__dict__.items() if not k.startswith("_") and k != "training"}
    return {"own": own, "buffers": dict(module._buffers)}


def _restore(module: nn.Module, held: dict[str, Any]) -> None:
    for name in [n for n in module.__dict__ if not n.startswith("_") and n != "training" and n not in held["own"]]:
        del module.__dict__[name]
    module.__dict__.update(held["own"])
    module._buffers.clear()
    module._buffers.update(held["buffers"])
