"""What a stage starts from: `from:` resolved to folders and an adapter configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import ModelError, RecipeError, RunFolderError
from align.recipe.adapter import Adapter
from align.recipe.adapter_folder import described, quantised_base
from align.recipe.capabilities import BEFORE_ANY, StageBase, TrainStage
from align.recipe.schema import Recipe
from align.recipe.stages import Stage
from align.recipe.support import BASE_BESIDE_ADAPTER
from align.stages.backend import Start

# compared with `model.adapter` before it is loaded; its targets afterwards, which can be spelled in several ways
_SHAPE = ("kind", "rank", "alpha", "dropout", "rslora", "quant")


@dataclass(frozen=True)
class Origin:
    """The model before the first stage: its folder, and the recipe's `model.adapter` if it has one."""

    base: Path
    adapter: Path | None


def adapter_of(recipe: Recipe, stage: StageBase, origin: Origin | None = None) -> Adapter:
    """The adapter configuration a training stage uses: its own, else that of the nearest stage it builds on, else that
    of the adapter the recipe starts from, else LoRA as the grammar defaults it.

    A merge or export passes the configuration on: a stage after it trains a fresh adapter of the same kind.
    """
    at: StageBase | None = stage
    while at is not None:
        if isinstance(at, TrainStage) and at.adapter is not None:
            return at.adapter
        at = recipe.stage(at.from_.partition("@")[0]) if at.from_ else None
    return adapter_in(origin.adapter) if origin is not None and origin.adapter is not None else Adapter()


def adapter_in(folder: Path) -> Adapter:
    """The configuration of a peft folder, as far as a recipe can say it; whoever loads it checks the rest."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise ModelError("the folder has no adapter_config.json", where=folder, remedy="give a peft adapter")
    return described(json.loads(path.read_text(encoding="utf-8")), quantised_base(folder))


def trained_by(recipe: Recipe, name: str) -> Stage:
    """The stage that trained what stage `name` hands on."""
    source = recipe.stage(name.partition("@")[0])
    while source.makes_folder and source.from_:
        source = recipe.stage(source.from_.partition("@")[0])
    return source


def check_adapters(recipe: Recipe, origin: Origin | None = None) -> None:
    """Refuse a stage that would continue an adapter under another configuration. Without `origin`, the adapter that
    the recipe starts from is not looked at."""
    for stage in recipe.stages:
        if not isinstance(stage, TrainStage) or stage.adapter is None:
            continue
        own = stage.adapter
        inherited, name = _inherited(recipe, stage, origin)
        if inherited is None or inherited.kind == "full":
            continue
        ours, theirs = own.model_dump(), inherited.model_dump()
        compared = ours if stage.from_ else _SHAPE
        keys = ", ".join(f"{k}: {theirs[k]!r} -> {ours[k]!r}" for k in compared if ours[k] != theirs[k])
        if not keys:
            continue
        raise RecipeError(
            f"stage {stage.id!r} continues the adapter of {name} under another configuration ({keys})",
            where=f"stages.{stage.id}.adapter",
            remedy=f"put a merge stage {'between them' if stage.from_ else 'in front'}, or leave `adapter:` out to go "
            "on with that one",
        )


def _inherited(recipe: Recipe, stage: TrainStage, origin: Origin | None) -> tuple[Adapter | None, str]:
    """The configuration of the adapter that `stage` would continue, None where it continues none, and whose it is."""
    if stage.from_:
        source = recipe.stage(stage.from_.partition("@")[0])
        return (None if source.makes_folder else adapter_of(recipe, source, origin)), f"stage {source.id!r}"
    if origin is None or origin.adapter is None:
        return None, ""
    return adapter_in(origin.adapter), "model.adapter"


def start_of(recipe: Recipe, stage: StageBase, origin: Origin, done: Mapping[str, Mapping[str, Any]]) -> Start:
    """Folders that `stage` (any kind but evaluate) starts from.

    done: run.json's entry per finished stage; its "start" says on which folders it was built, its "artefacts" what
    it left. Raises RunFolderError where `X@best` is asked of a stage that chose no best checkpoint.
    """
    config = adapter_of(recipe, stage, origin)
    if stage.from_ is None:
        return Start(origin.base, origin.adapter, config)
    name, _, which = stage.from_.partition("@")
    return weights_of(recipe, name, which, done, config)


def weights_of(recipe: Recipe, name: str, which: str, done: Mapping[str, Mapping[str, Any]], config: Adapter) -> Start:
    """Folders of finished stage `name`, under `config`: its last weights, or its best where `which` is "best"."""
    source, entry = recipe.stage(name), done[name]
    artefacts = entry["artefacts"]
    if source.makes_folder:
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
    adapter = Path(artefacts[f"{prefix}adapter"])
    own = adapter / BASE_BESIDE_ADAPTER
    return Start(own if own.is_dir() else Path(entry["start"]["base"]), adapter, config)


def judged_start(recipe: Recipe, name: str, origin: Origin, done: Mapping[str, Mapping[str, Any]]) -> Start:
    """Folders of what an evaluate stage names in `of`: a finished stage, its best (`X@best`), or the model as it was
    before any stage (`base`)."""
    if name == BEFORE_ANY:
        return Start(origin.base, origin.adapter, model_adapter(origin))
    stage_id, _, which = name.partition("@")
    return weights_of(recipe, stage_id, which, done, adapter_of(recipe, recipe.stage(stage_id), origin))


def model_adapter(origin: Origin) -> Adapter:
    """The configuration of the adapter that the recipe starts from; whole weights where there is none."""
    return adapter_in(origin.adapter) if origin.adapter is not None else Adapter(kind="full")
