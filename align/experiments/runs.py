"""Run folders as studies read them: their recipes, stages of one kind, and held-out scores of each prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from align.errors import RunFolderError
from align.recipe.capabilities import JudgingStage, SamplingStage, StageBase
from align.recipe.load import load_recipe
from align.recipe.schema import Recipe
from align.stages.files import read_object, sha256_file
from align.stages.rollout_log import read_rollouts, read_table
from align.stages.runfolder import RECIPE, RUN
from align.stages.state import read_state

SWEEP, SHARED = "sweep", "shared"  # runs/<name>/sweep/<weights>/, and shared/ beside them
_ADD = (
    "add `{id: exam, kind: evaluate, of: [<stage>], data: <held-out>, rewards: [...]}` to the recipe and run it with "
    "--resume: finished stages are kept"
)
Stage = TypeVar("Stage", bound=StageBase)


def read_recipe(run: Path) -> Recipe:
    """A run's resolved recipe. Raises RunFolderError where the folder is no run, or the recipe is not what it wrote."""
    if not (run / RECIPE).is_file():
        raise RunFolderError(f"no run: there is no {RECIPE}", where=run, remedy="give a run folder, runs/<name>")
    noted = read_object(run / RUN).get("recipe") if (run / RUN).is_file() else None  # versions before noted none
    if noted is not None and noted != sha256_file(run / RECIPE):
        raise RunFolderError(
            "it is not the recipe by which the run was made: something in it was changed",
            where=run / RECIPE,
            remedy="restore it from a copy, or have --resume write it again",
        )
    return load_recipe(run / RECIPE)


def online_stages(recipe: Recipe) -> list[SamplingStage]:
    return [stage for stage in recipe.stages if isinstance(stage, SamplingStage)]


def exams(recipe: Recipe) -> list[JudgingStage]:
    """The stages that have rewards, or an environment, judge completions."""
    return [stage for stage in recipe.stages if isinstance(stage, JudgingStage) and stage.engines]


def chosen(stages: Sequence[Stage], stage_id: str | None, what: str, where: Path | str) -> Stage:
    """The stage of that id, or the only one. Raises RunFolderError with those that there are."""
    found = {stage.id: stage for stage in stages}
    if stage_id is None and len(found) == 1:
        return next(iter(found.values()))
    if stage_id in found:
        return found[stage_id]
    if not found:
        remedy = _ADD if what == "evaluate stage" else "give a recipe or run that has one"
        raise RunFolderError(f"there is no {what} with rewards", where=where, remedy=remedy)
    said = f"there are {len(found)} of kind {what}" if stage_id is None else f"there is no {what} {stage_id!r}"
    raise RunFolderError(said, where=where, remedy=f"--stage chooses among: {', '.join(found)}")


def run_folders(given: Sequence[Path]) -> list[Path]:
    """Runs as given; of a folder that is none itself, those of the sweep in it, or right below it.

    Raises RunFolderError where there is none.
    """
    found: list[Path] = []
    for folder in given:
        if (folder / RUN).is_file():
            found.append(folder)
            continue
        place = folder / SWEEP if (folder / SWEEP).is_dir() else folder
        below = sorted(p.parent for p in place.glob(f"*/{RUN}") if not p.parent.name.startswith(SHARED))
        if not below:
            raise RunFolderError("neither a run nor a folder of runs", where=folder, remedy="give runs/<name>")
        found += below
    return list(dict.fromkeys(found))


# ------------------------------------------------------------------------------------------------- held-out scores


@dataclass(frozen=True)
class Judged:
    """What an evaluate stage found of one model. scores: f64[P, R] of P prompts, NaN where missing, with the
    objectives' own signs; prompts: their texts; lengths: tokens i64[P]; weights: of the run's online stage."""

    label: str
    run: Path
    of: str
    names: tuple[str, ...]
    kinds: tuple[str, ...]
    scores: np.ndarray
    prompts: tuple[str, ...]
    lengths: np.ndarray
    weights: Mapping[str, float]


def is_finished(run: Path, stage_id: str) -> bool:
    entry = read_state(run / RUN)["stages"].get(stage_id, {}) if (run / RUN).is_file() else {}
    return bool(entry.get("state") == "finished")


def judged(run: Path, stage: JudgingStage, of: str, label: str) -> Judged:
    """The scores that `stage` of a run gave to what stage `of` made. Raises RunFolderError where it did not."""
    if of not in stage.of:
        raise RunFolderError(
            f"{stage.id!r} does not evaluate {of!r}", where=run, remedy=f"--of chooses among: {', '.join(stage.of)}"
        )
    if not is_finished(run, stage.id):
        raise RunFolderError(f"{stage.id!r} is not finished", where=run, remedy="align run ... --resume finishes it")
    found = read_rollouts(run / stage.id / "rollouts" / of)
    return Judged(
        label=label,
        run=run,
        of=of,
        names=found.names,
        kinds=found.kinds,
        scores=found.scores,
        prompts=tuple(found.columns["prompt"]),
        lengths=np.array([len(ids) for ids in found.columns["token_ids"]], dtype=np.int64),
        weights=_weights(read_recipe(run), of),
    )


def _weights(recipe: Recipe, of: str) -> Mapping[str, float]:
    """Those of the online stage that a model comes from; {} where none does."""
    stage = recipe.stage(of.partition("@")[0])
    while not isinstance(stage, SamplingStage) and stage.from_:
        stage = recipe.stage(stage.from_.partition("@")[0])
    return dict(stage.objectives.weights) if isinstance(stage, SamplingStage) else {}


def prompts_in(folder: Path) -> set[str]:
    """Every prompt of a rollouts folder; none where there is no such folder."""
    files = sorted(folder.glob("step-*.parquet"))
    return {text for file in files for text in read_table(file, columns=["prompt"])["prompt"].to_pylist()}


def notes(run: Path, recipe: Recipe, stage: JudgingStage) -> list[str]:
    """What speaks against calling an exam held out: prompts or rewards of training."""
    found = []
    for trained in online_stages(recipe):
        seen = prompts_in(run / trained.id / "rollouts")
        asked = prompts_in(run / stage.id / "rollouts" / stage.of[-1])
        if seen & asked:
            count = f"{len(seen & asked)} of the {len(asked)} prompts of {stage.id!r}"
            found.append(f"{count} are among those that {trained.id!r} trained on")
        if stage.rewards and {r.use for r in stage.rewards} <= {r.use for r in trained.rewards}:
            found.append(
                f"{stage.id!r} judges by rewards that {trained.id!r} trains on; held-out rewards would tell more"
            )
    return found
