"""Giving back what `align.model.fused` exchanged, where it computes something else than the model's own."""

from __future__ import annotations

from typing import Any

from torch import nn


def give_back(model: nn.Module, path: str | None) -> dict[type[nn.Module], int]:
    """Have modules of the class at `path` (None: of every class) that was exchanged keep their own forward again; how
    many there were, by class. Empty where nothing there was exchanged."""
    wanted = None if path is None else type(model.get_submodule(path))
    found: dict[type[nn.Module], int] = {}
    for module in model.modules():
        kind = type(module)
        if kind.__name__.startswith("Fused") and wanted in (None, kind):
            own: Any = kind.__mro__[1]
            module.__class__ = own
            found[own] = found.get(own, 0) + 1
    return found


def class_names(kinds: dict[type[nn.Module], int]) -> str:
    return ", ".join(f"{count} x {kind.__name__}" for kind, count in kinds.items())


def given_back_words(kinds: dict[type[nn.Module], int], reason: str) -> str:
    return f"{class_names(kinds)} keep their own, slower forward: when exchanged, {reason}"


def exchange_again(model: nn.Module, exchanged: type[nn.Module], kinds: dict[type[nn.Module], int]) -> None:
    """Undo `give_back` of one class."""
    for module in model.modules():
        if type(module) in kinds:
            module.__class__ = exchanged
