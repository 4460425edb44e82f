"""One run per weight vector, in runs/<name>/sweep/<weights>/. Stages before the one that is swept are run once, in
sweep/shared/, and taken over by every run as stages that it has finished."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import RunFolderError
from align.experiments.children import Child
from align.experiments.grid import Weights, label
from align.experiments.runs import SHARED, SWEEP
from align.recipe.load import dump_recipe
from align.recipe.schema import Recipe
from align.stages.files import make_folder, write_json
from align.stages.fingerprint import changes, fingerprint
from align.stages.lock import FolderLock
from align.stages.media_inputs import changed_media
from align.stages.runfolder import RECIPE, RUN, SUMMARY
from align.stages.state import read_state, read_summary, write_summary


@dataclass(frozen=True)
class Planned:
    """A run of the sweep: its recipe, and the recipe of the stages that it shares (None where it shares none)."""

    label: str
    weights: Weights
    seed: int
    recipe: Recipe
    shared: Recipe | None


def plan(recipe: Recipe, stage_id: str, vectors: Sequence[Weights], seeds: Sequence[int]) -> list[Planned]:
    """A run for each vector and seed (none given: the recipe's own), in that order. Equal vectors are one."""
    root = str(recipe.run_folder / SWEEP)
    before = [stage.id for stage in recipe.before(stage_id)]
    planned: dict[str, Planned] = {}
    for seed in seeds or [recipe.seed]:
        shared = None
        if before:
            name = f"{SHARED}_seed-{seed}" if seeds else SHARED
            shared = _changed(recipe, name=name, output=root, seed=seed, only=before)
        for weights in vectors:
            name = label(weights, seed if seeds else None)
            own = _changed(recipe, name=name, output=root, seed=seed, weights={stage_id: weights})
            planned[name] = Planned(name, weights, seed, own, shared)
    return list(planned.values())


def _changed(
    recipe: Recipe,
    *,
    only: Sequence[str] = (),
    weights: Mapping[str, Weights] | None = None,
    **values: Any,
) -> Recipe:
    data = recipe.model_dump(mode="json", by_alias=True) | values
    data["stages"] = [stage for stage in data["stages"] if not only or stage["id"] in only]
    for stage in data["stages"]:
        if stage["id"] in (weights or {}):
            stage["objectives"]["weights"] = dict((weights or {})[stage["id"]])
    return Recipe.model_validate(data)


def child_of(recipe: Recipe, recipes: Path) -> Child:
    """Write a run's recipe to `recipes`/<name>.yaml; the run that it makes."""
    recipes.mkdir(parents=True, exist_ok=True)
    path = recipes / f"{recipe.name}.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    return Child(recipe.name, path, recipe.run_folder)


def is_done(recipe: Recipe, plugins: Mapping[str, str], folder: Path | None = None) -> bool:
    """Whether its run has finished every stage, from the same recipe, data and plugins.

    plugins: source hash of each reward by its `use`. folder: where plugins are looked for.
    """
    run = recipe.run_folder
    if not (run / RUN).is_file() or not (run / RECIPE).is_file():
        return False
    entries = read_state(run / RUN)["stages"]
    for stage in recipe.stages:
        entry = entries.get(stage.id)
        if entry is None or entry["state"] != "finished":
            return False
        mark = fingerprint(recipe, stage, plugins, folder)
        if changes(entry["fingerprint"], mark) or changed_media(run / stage.id):
            return False
    return True


def take_over(run: Path, shared: Recipe) -> None:
    """Give a run that has not begun the finished stages of a shared one: their artefacts stay where they are.

    Raises RunFolderError where another driver works in the run's folder.
    """
    if (run / RUN).is_file():
        return
    make_folder(run)
    lock = FolderLock.take(run)
    try:
        if not (run / RUN).is_file():  # another sweep may have done it since
            _take_over(run, shared)
    finally:
        lock.release()


def _take_over(run: Path, shared: Recipe) -> None:
    source = shared.run_folder
    if (source / "base").is_dir() and not (run / "base").is_symlink():
        (run / "base").symlink_to(os.path.relpath(source / "base", run))
    ids = [stage.id for stage in shared.stages]
    entries, summary = read_state(source / RUN)["stages"], read_summary(source / SUMMARY)["stages"]
    for name in ids:
        if name not in entries or name not in summary:
            raise RunFolderError(f"the shared run has no stage {name!r}", where=source, remedy="run it with --resume")
    write_summary(run / SUMMARY, {"stages": {name: summary[name] for name in ids}})
    write_json(run / RUN, {"stages": {name: entries[name] for name in ids}, "starts": 0, "processes": []})
