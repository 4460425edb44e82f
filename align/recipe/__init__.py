"""The recipe: YAML in, strict types out. `from align.recipe import Recipe, load_recipe`.

The two are imported when they are asked for: every process of a run takes some parts of a recipe, few read one.

In the order of reading:

    schema.py, stages.py, parts.py, strict.py: the grammar: the whole, the kinds of stages, what they share
    inputs.py, adapter.py, objectives.py, labels.py, environment.py, placement.py, sharding.py: its parts
    load.py, document.py, overrides.py, paths.py, problems.py, grammar.py: from text to types, and errors in words
    peers.py, peer_sentences.py, later.py: words of other trainers, and what is not offered
    capabilities.py, sampled.py, optimizers.py, engines.py, support.py, served.py, families.py: what goes together
    adapter_folder.py, trained_on.py, chat_files.py, model_folder.py: what folders of weights say of themselves
    shipping.py: a recipe and its files, to be sent
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
