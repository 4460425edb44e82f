"""The recipe: YAML in, strict types out. `from align.recipe import Recipe, load_recipe`.

The two are imported when they are asked for: every process of a run takes some parts of a recipe, few read one.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.recipe.load import load_recipe
    from align.recipe.schema import Recipe

__all__ = ["Recipe", "load_recipe"]
_HOMES = {"Recipe": "align.recipe.schema", "load_recipe": "align.recipe.load"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
