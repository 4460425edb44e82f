"""What a stage starts from: `from:` resolved to folders and an adapter configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import RecipeError, RunFolderError
from align.recipe.schema import Adapter, Recipe
from align.stages.backend import Start

DEFAULT_ADAPTER = Adapter()


@dataclass(frozen=True)
class Origin:
    """The model before the first stage: its folder, and the recipe's `model.adapter` if it has one."""

    base: Path
    adapter: Path | None


def adapter_of(recipe: Recipe, stage: Any) -> Adapter:
    """The adapter configuration a training stage uses: its own, or that of the nearest stage it builds on.

    A merge or export passes the configuration on: a stage after it trains a fresh adapter of the same kind.
    """
    while stage is not None:
        own = getattr(stage, "adapter", None)
        if own is not None:
            return Adapter.model_validate(own)
        stage = recipe.stage(stage.from_.partition("@")[0]) if stage.from_ else None
    return DEFAULT_ADAPTER


def check_adapters(recipe: Recipe) -> None:
    """Refuse a stage that would continue an adapter under another configuration. Needs the recipe only."""
    for stage in recipe.stages:
        own = getattr(stage, "adapter", None)
        if own is None or not stage.from_:
            continue
        source = recipe.stage(stage.from_.partition("@")[0])
        if source.kind in ("merge", "export"):
            continue
        inherited = adapter_of(recipe, source)
        if inherited.kind == "full" or inherited == own:
            continue
        ours, theirs = own.model_dump(), inherited.model_dump()
        keys = ", ".join(f"{k}: {theirs[k]!r} -> {ours[k]!r}" for k in ours if ours[k] != theirs[k])
        raise RecipeError(
            f"stage {stage.id!r} continues the adapter of {source.id!r} under another configuration ({keys})",
            where=f"stages.{stage.id}.adapter",
            remedy=f"put a merge stage between them, or leave `adapter:` out to continue {source.id!r}'s",
        )


def start_of(recipe: Recipe, stage: Any, origin: Origin, done: Mapping[str, Mapping[str, Any]]) -> Start:
    """Folders that `stage` (any kind but evaluate) starts from.

    done: run.json's entry per finished stage; its "start" says on which folders it was built, its "artefacts" what
    it left. Raises RunFolderError where `X@best` is asked of a stage that chose no best checkpoint.
    """
    config = adapter_of(recipe, stage)
    if stage.from_ is None:
        return Start(origin.base, origin.adapter, config)
    name, _, which = stage.from_.partition("@")
    return weights_of(recipe, name, which, done, config)


def weights_of(
    recipe: Recipe, name: str, which: str, done: Mapping[str, Mapping[str, Any]], config: Adapter | None = None
) -> Start:
    """Folders of finished stage `name`: its last weights, or its best where `which` is "best"."""
    source, entry = recipe.stage(name), done[name]
    artefacts = entry["artefacts"]
    config = adapter_of(recipe, source) if config is None else config
    if source.kind in ("merge", "export"):
        return Start(Path(artefacts["model"]), None, config)
    prefix = "best_" if which else ""
    if which not in ("", "best") or (which and not any(key.startswith("best_") for key in artefacts)):
        raise RunFolderError(
            f"stage {name!r} has no weights called {which!r}",
            where=f"from: {name}@{which}",
            remedy=f"add `save: {{best: {{metric: ...}}}}` and `eval:` to {name!r}, or write `from: {name}`",
        )
    if f"{prefix}model" in artefacts:
        return Start(Path(artefacts[f"{prefix}model"]), None, config)
    return Start(Path(entry["start"]["base"]), Path(artefacts[f"{prefix}adapter"]), config)
