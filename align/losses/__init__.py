"""Losses by name. Each is one file here exporting `Config`, `needs(config)` and `loss(inputs, config)`, or a user's
`pkg.mod:module` / `file.py` found through `align.plugins`. Loading one imports no torch."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from pydantic import ValidationError

from align.errors import PluginError, RecipeError
from align.losses.base import LossConfig, Needs
from align.plugins import builtin_names, resolve

_HELPERS = ("base", "describe", "dpo_terms", "pairs", "policy_terms", "reduce")


def names() -> tuple[str, ...]:
    """Names of the losses that this package has."""
    return builtin_names(__name__, _HELPERS)


def load(name: str) -> ModuleType:
    """The module of a loss. Raises PluginError listing the choices, or naming what a user's module lacks."""
    module: ModuleType = resolve(name, group=__name__, package=__name__, hidden=_HELPERS)
    missing = [wanted for wanted in ("Config", "needs", "loss") if not hasattr(module, wanted)]
    if missing:
        raise PluginError(
            f"a loss exports Config, needs and loss; this has no {' and no '.join(missing)}",
            where=name,
            remedy="align/losses/sft.py is a short example",
        )
    return module


def configure(name: str, options: dict[str, Any]) -> tuple[ModuleType, LossConfig, Needs]:
    """A loss's module, its validated options, and what it needs. Raises PluginError or RecipeError."""
    module = load(name)
    try:
        config = module.Config(**options)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or name}: {e['msg']}" for e in error.errors())
        known = ", ".join(field.alias or key for key, field in module.Config.model_fields.items())
        raise RecipeError(f"options of loss {name!r}: {problems}", remedy=f"its options are: {known}") from error
    return module, config, module.needs(config)
