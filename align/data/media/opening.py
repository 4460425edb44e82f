"""The library of a recipe's model, where the model takes media."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.data.media.library import Library
from align.errors import RecipeError
from align.recipe.inputs import Media
from align.recipe.schema import Recipe


def takes_media(config: Mapping[str, Any]) -> bool:
    """Whether a model's config.json describes one that sees."""
    return "vision_config" in config


def store_of(recipe: Recipe) -> Path:
    """Where a recipe's processed media lie: runs side by side share it, for it is keyed by content."""
    return Path(recipe.output) / ".cache" / "media"


def open_library(recipe: Recipe, folder: Path) -> Library | None:
    """The library for the model in `folder`, to be closed; None where it takes text alone. It starts no process yet."""
    file = folder / "config.json"
    if not file.is_file() or not takes_media(json.loads(file.read_text(encoding="utf-8"))):
        return None
    return Library(recipe.media, folder, store_of(recipe), trust_remote_code=recipe.model.trust_remote_code)


def refuse_media_settings(recipe: Recipe, config: Mapping[str, Any]) -> None:
    """Raise RecipeError for `media:` beside a model that takes text alone: it would have no effect."""
    if recipe.media != Media() and not takes_media(config):
        raise RecipeError(
            f"`media` beside a {config.get('model_type') or 'text'} model, which takes text alone",
            where="media",
            remedy="leave it out, or use a vision-language model",
        )
