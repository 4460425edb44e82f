"""Losses by name. Each is one file here exporting `Config`, `needs(config)` and `loss(inputs, config)`, or a user's
`pkg.mod:module` / `file.py` found through `align.plugins`. Loading one imports no torch."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from align.errors import PluginError, RecipeError
from align.losses.base import LossConfig, Needs

_HELPERS = {"base", "pairs", "reduce"}


def names() -> tuple[str, ...]:
    """Names of the losses that this package has."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _HELPERS))


def load(name: str) -> ModuleType:
    """The module of a loss. Raises PluginError listing the choices."""
    if name not in names():
        raise PluginError(f"there is no loss named {name!r}", remedy=f"choose one of: {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")


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
