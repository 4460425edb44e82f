"""How long everything took in a finished run: its metrics.jsonl and the lengths in its rollout files.

Metrics give what training, publishing and the loop itself cost a turn, and what a scoring call took. Engines are told
from a synchronous stage: there a turn's generation is an engine's whole work on one list of prompts, which is linear in
the steps that its longest completions take, in the tokens, and in the prompts (`workload.EngineModel`). Over the turns
that differ in their lengths, the three costs are those of least squares, none below 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from align.errors import RunFolderError
from align.jsonl import read_lines
from align.recipe.capabilities import SamplingStage
from align.recipe.engines import facts_of
from align.recipe.load import load_recipe
from align.recipe.schema import Recipe
from align.stages.rollout_log import read_table

WARM_UP = 2
"""Turns at a stage's start that are left out: kernels are compiled, engines are new."""
_OUTLIER = 3.0  # times the median
_ROUNDS = 8
_TIMES = ("step", "generate", "score", "train", "publish", "group_score")


@dataclass(frozen=True)
class Measured:
    """Means of a run's stage, as `Workload` and `EngineModel` name them; lengths: f64[G] of each group, in tokens;
    steps_per_minute: of the run itself, evaluations and checkpoints left out; environment_s: that a group's slowest
    episode waits for its environment, 0 of answers; groups: of a turn; trained: completions
    that a turn goes over, each as often as `updates_per_batch` says; ranks: of the trainer. fixed_s,
    per_sequence_s, prompt_s: None where the stage was asynchronous, whose turns do not tell what an engine takes."""

    steps_per_minute: float
    groups: int
    trained: int
    ranks: int
    lengths: tuple[np.ndarray, ...]
    reward_s: float
    train_s: float
    publish_s: float
    loop_s: float
    silent: float
    environment_s: float = 0.0
    fixed_s: float | None = None
    per_sequence_s: float | None = None
    prompt_s: float | None = None


def read_run(run: Path, stage_id: str | None = None) -> Measured:
    """What a run's online stage (its only one, or `stage_id`) measured. Raises RunFolderError where it did not."""
    if not (run / "recipe.yaml").is_file():
        raise RunFolderError("no run: there is no recipe.yaml", where=run, remedy="give a run folder, runs/<name>")
    recipe = load_recipe(run / "recipe.yaml")
    stage = online_stage(recipe, stage_id, str(run))
    folder = run / stage.id
    turns = {line["step"]: line for line in _lines(folder / "metrics.jsonl") if line["step"] > WARM_UP}
    if len(turns) < 2:
        raise RunFolderError(
            f"stage {stage.id!r} has {len(turns)} turns after the first {WARM_UP}, too few to measure",
            where=folder,
            remedy="give a run of at least 4 steps",
        )
    _require_times(turns.values(), folder)
    turns = _undisturbed(turns)
    step_s, generate, score, train_s, publish_s, reward_s = (
        float(np.mean([line[f"time/{name}"] for line in turns.values()])) for name in _TIMES
    )
    drawn = _drawn(folder / "rollouts", episodes=bool(stage.worlds))
    lengths = {step: {group: one[:, 0] for group, one in groups.items()} for step, groups in drawn.items()}
    waits = {step: {group: float(one[:, 1].max()) for group, one in groups.items()} for step, groups in drawn.items()}
    costs = _engine_costs(stage, turns, lengths, waits) if stage.staleness == 0 else (None, None, None)
    return Measured(
        steps_per_minute=60 / step_s,
        groups=stage.batch.groups,
        trained=trained_completions(stage),
        ranks=recipe.placement.trainer.ranks,
        lengths=tuple(group for step in sorted(lengths) for group in lengths[step].values()),
        reward_s=reward_s,
        train_s=train_s,
        publish_s=publish_s,
        loop_s=max(0.0, step_s - generate - score - train_s - publish_s),
        silent=float(np.mean([line["groups/dead"] / line["groups/total"] for line in turns.values()])),
        environment_s=float(np.mean([wait for groups in waits.values() for wait in groups.values()])),
        fixed_s=costs[0],
        per_sequence_s=costs[1],
        prompt_s=costs[2],
    )


def online_stage(recipe: Recipe, stage_id: str | None, where: str) -> SamplingStage:
    """The recipe's online stage, or the one of that id. Raises RunFolderError with those that there are."""
    found = {stage.id: stage for stage in recipe.stages if isinstance(stage, SamplingStage)}
    if stage_id is None and len(found) == 1:
        return next(iter(found.values()))
    if stage_id not in found:
        what = f"no online stage {stage_id!r}" if stage_id else f"{len(found)} online stages"
        names = ", ".join(found) or "none: only online stages are simulated"
        raise RunFolderError(what, where=where, remedy=f"--stage chooses among: {names}")
    return found[stage_id]


def trained_completions(stage: SamplingStage) -> int:
    """Completions that a turn's updates go over, each as often as they do."""
    return stage.batch.groups * stage.batch.group_size * stage.updates_per_batch


def slots_of(stage: SamplingStage) -> int:
    """Sequences that an engine of the stage samples at once."""
    return facts_of(stage.rollout.name).slots_with(stage.rollout.engine)


# ------------------------------------------------------------------------------------------------- files


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise RunFolderError("the stage was not run: no metrics", where=path, remedy="give a run that finished it")
    return read_lines(path, numbered="step")[0]


def _require_times(turns: Iterable[Mapping[str, Any]], folder: Path) -> None:
    for line in turns:
        missing = [f"time/{name}" for name in _TIMES if line.get(f"time/{name}") is None]
        if missing:
            raise RunFolderError(
                f"step {line['step']} has no {', '.join(missing)}: the run is of another version",
                where=folder,
                remedy="give a run of this version, or the numbers as flags",
            )


def _undisturbed(turns: Mapping[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The turns without those in which something else had the machine."""
    usual = float(np.median([line["time/step"] for line in turns.values()]))
    return {step: line for step, line in turns.items() if line["time/step"] <= _OUTLIER * usual}


def _drawn(folder: Path, *, episodes: bool) -> dict[int, dict[int, np.ndarray]]:
    """Of each group's completions f64[G, 2]: sampled tokens, and seconds that an episode waited for its environment; by
    step and group id; of groups that were replaced, too."""
    rows: dict[int, dict[int, list[tuple[int, float]]]] = {}
    own = ["sampled", "waited_seconds"] if episodes else ["token_ids"]
    for file in sorted(folder.glob("step-*.parquet")):
        table = read_table(file, ["step", "group_id", *own])
        tokens = [sum(flags) if episodes else len(flags) for flags in table[own[0]].to_pylist()]
        waits = [wait or 0.0 for wait in table[own[1]].to_pylist()] if episodes else [0.0] * len(tokens)
        found = zip(table["step"].to_pylist(), table["group_id"].to_pylist(), tokens, waits, strict=True)
        for step, group, count, wait in found:
            rows.setdefault(step, {}).setdefault(group, []).append((count, wait))
    if not rows:
        raise RunFolderError("no rollout files", where=folder, remedy="give a run whose rollouts/ was kept")
    return {
        step: {group: np.asarray(drawn, dtype=np.float64) for group, drawn in sorted(groups.items())}
        for step, groups in rows.items()
    }


# ------------------------------------------------------------------------------------------------- engines


def _engine_costs(
    stage: SamplingStage,
    turns: Mapping[int, Mapping[str, Any]],
    lengths: Mapping[int, Mapping[int, np.ndarray]],
    waits: Mapping[int, Mapping[int, float]],
) -> tuple[float, float, float]:
    """(fixed_s, per_sequence_s, prompt_s) by least squares over turns: see the module. A turn takes as long as its
    slowest engine, which is the slowest by the costs found so far: a few rounds settle it. What the slowest episode
    waited for its environment (`waits`, by step and group) is none of the engine's time."""
    known = [step for step in turns if step in lengths]
    work = np.asarray([_work(stage, list(lengths[step].values())) for step in known])  # f64[turns, engines, 3]
    waited = [max(waits[step].values()) for step in known]
    seconds = np.asarray([turns[step]["time/generate"] for step in known], dtype=np.float64) - np.asarray(waited)
    slowest = work[:, :, 0].argmax(axis=1)
    for _ in range(_ROUNDS):
        steps, tokens, prompts = non_negative(work[np.arange(len(known)), slowest], seconds)
        slowest = (work @ (steps, tokens, prompts)).argmax(axis=1)
    if steps + tokens <= 0:
        raise RunFolderError(
            f"the {len(known)} turns of stage {stage.id!r} do not tell what an engine's step takes: the time of their "
            "generation does not grow with their lengths",
            where="time/generate",
            remedy="give --engine-speed and --engine-peak, or a run with more turns",
        )
    return steps, tokens, prompts


def _work(stage: SamplingStage, groups: Sequence[np.ndarray]) -> list[tuple[float, float, float]]:
    """Steps, tokens and prompts of each engine with a list of groups: dealt in turn, and sampled in whole batches or as
    slots become free."""
    slots, whole = slots_of(stage), facts_of(stage.rollout.name).whole_batches
    each = []
    for number in range(stage.rollout.workers):
        own = groups[number :: stage.rollout.workers]
        if not own:
            each.append((0.0, 0.0, 0.0))
            continue
        batches = _batches(own, max(1, slots // len(own[0]))) if whole else [np.concatenate(own)]
        steps = sum(max(float(batch.max()), float(batch.sum()) / slots) for batch in batches)
        each.append((steps, float(sum(batch.sum() for batch in batches)), float(len(own))))
    return each


def _batches(groups: Sequence[np.ndarray], size: int) -> list[np.ndarray]:
    rest = iter(groups)
    found = []
    while batch := list(itertools.islice(rest, size)):
        found.append(np.concatenate(batch))
    return found


def non_negative(columns: np.ndarray, values: np.ndarray) -> tuple[float, ...]:
    """Least squares f64[n, k] x = f64[n] with x >= 0, by trying which columns take part: there are few."""
    count = columns.shape[1]
    best, error = np.zeros(count), float("inf")
    for mask in itertools.product((True, False), repeat=count):
        chosen = np.flatnonzero(mask)
        if not len(chosen):
            continue
        found, _, rank, _ = np.linalg.lstsq(columns[:, chosen], values, rcond=None)
        residual = float(np.sum((columns[:, chosen] @ found - values) ** 2))
        if rank == len(chosen) and np.all(found >= 0) and residual < error * (1 - 1e-9):
            best, error = np.zeros(count), residual
            best[chosen] = found
    return tuple(float(value) for value in best)
