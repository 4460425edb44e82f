"""Which runs of a sweep are kept as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.experiments.sweep import is_done
from align.recipe.load import load_recipe
from align.recipe.schema import Recipe
from align.stages.fingerprint import fingerprint

RECIPE = """\
name: one
output: {folder}/runs
model: {{path: owner/name}}
stages:
  - {{id: sft, kind: sft, data: data.jsonl, optim: {{lr: {lr}}}}}
  - {{id: merged, kind: merge, from: sft}}
"""


def recipe_of(folder: Path, lr: float = 1e-4) -> Recipe:
    (folder / "data.jsonl").write_text('{"query": "a", "response": "b"}\n')
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder, lr=lr))
    return load_recipe(folder / "recipe.yaml")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """With the folder of a run that has finished it."""
    made = recipe_of(tmp_path)
    write_run(made, tmp_path)
    return made


def write_run(recipe: Recipe, folder: Path, **states: str) -> None:
    entries: dict[str, Any] = {}
    for stage in recipe.stages:
        mark = dict(fingerprint(recipe, stage, {}, folder))
        state = states.get(stage.id, "finished")
        entries[stage.id] = {"state": state, "fingerprint": mark, "artefacts": {}, "manifest": None}
    recipe.run_folder.mkdir(parents=True, exist_ok=True)
    (recipe.run_folder / "recipe.yaml").write_text("name: one\n")
    run = {"stages": entries, "starts": 1, "processes": [], "name": "one", "seed": 0}
    (recipe.run_folder / "run.json").write_text(json.dumps(run))


def test_a_run_with_every_stage_finished_is_done(recipe: Recipe, tmp_path: Path) -> None:
    assert is_done(recipe, {}, tmp_path)


@pytest.mark.parametrize("missing", ["run.json", "recipe.yaml"])
def test_one_without_its_files_is_not(recipe: Recipe, tmp_path: Path, missing: str) -> None:
    (recipe.run_folder / missing).unlink()
    assert not is_done(recipe, {}, tmp_path)


def test_one_that_stopped_on_the_way_is_not(recipe: Recipe, tmp_path: Path) -> None:
    write_run(recipe, tmp_path, merged="running")
    assert not is_done(recipe, {}, tmp_path)


def test_one_of_another_recipe_is_not(recipe: Recipe, tmp_path: Path) -> None:
    assert not is_done(recipe_of(tmp_path, lr=2e-4), {}, tmp_path)
