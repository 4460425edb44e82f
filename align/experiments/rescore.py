"""Old rollouts under other weights: what would the advantages have been?

Nothing is sampled and nothing scored: a run's rollouts have every objective's score of every completion, and go through
`combine` again, step by step, as they did. That tells what the first update under the new weights would have been; a
policy trained under them would soon have sampled others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from align.errors import RunFolderError
from align.objectives import combine
from align.recipe.capabilities import SamplingStage
from align.recipe.objectives import Objectives
from align.stages.groups import TRUNCATED
from align.stages.rollout_log import Rollouts, read_rollouts

NO_SIGNAL = 2e-7  # advantages of a group that lie closer together differ by rounding


@dataclass(frozen=True)
class Rescored:
    """rollouts: those that were combined, with `truncated` as an objective where the stage penalises it; before, after:
    advantages f64[S], NaN where a completion has none; trained: bool[S], those that the run trained on; replaced:
    groups that dynamic sampling had taken out before (not among `rollouts`); replayed: largest difference between the
    run's advantages and those that its own settings give today; weights: of each objective, in the run and now."""

    rollouts: Rollouts
    before: np.ndarray
    after: np.ndarray
    trained: np.ndarray
    replaced: int
    replayed: float
    weights: tuple[dict[str, float], dict[str, float]]

    @property
    def correlation(self) -> float | None:
        """Pearson's, of the old and the new advantages of trained completions."""
        return correlation(self.before[self.trained], self.after[self.trained])

    @property
    def turned(self) -> float:
        """Share of the trained completions whose advantage has the other sign."""
        a, b = self.before[self.trained], self.after[self.trained]
        return float(np.mean(a * b < 0)) if len(a) else 0.0

    def dead(self, advantages: np.ndarray) -> int:
        """Groups whose trained completions have all the same advantage: nothing is learned from them."""
        known = [values[np.isfinite(values)] for values in (advantages[rows] for rows in self.groups())]
        return sum(not len(values) or bool(np.ptp(values) <= NO_SIGNAL) for values in known)

    def groups(self) -> Iterator[np.ndarray]:
        """Rows of each group's trained completions."""
        ids = np.stack([self.rollouts.columns["step"], self.rollouts.columns["group_id"]])
        for index in _parts(np.unique(ids, axis=1, return_inverse=True)[1].reshape(-1)):
            yield index[self.trained[index]]


def rescore(folder: Path, stage: SamplingStage, objectives: Objectives) -> Rescored:
    """A stage's rollouts in `folder` under `objectives`. Raises RunFolderError where there are none, RecipeError for a
    weight of an objective that they do not have."""
    found = read_rollouts(folder)
    found, replaced = _without_replaced(found)
    own = stage.objectives
    if stage.rollout.truncated == "penalise":
        found = _with_truncated(found)
        weight = {TRUNCATED: stage.rollout.truncated_penalty or 0.0}
        own = own.model_copy(update={"weights": {**own.weights, **weight}})
        objectives = objectives.model_copy(update={"weights": {**weight, **objectives.weights}})
    before = found.columns["advantage"]
    replayed = _combined(found, own)
    both = np.isfinite(before) & np.isfinite(replayed)
    if (np.isfinite(before) != np.isfinite(replayed)).any():
        raise RunFolderError(
            "the run's own settings no longer give its advantages: other completions have one",
            where=folder,
            remedy="rescore with the version that made the run",
        )
    return Rescored(
        rollouts=found,
        before=before,
        after=_combined(found, objectives),
        trained=found.columns["trained"].astype(bool),
        replaced=replaced,
        replayed=float(np.abs(before - replayed)[both].max(initial=0.0)),
        weights=(_weights(found, own), _weights(found, objectives)),
    )


def _weights(found: Rollouts, config: Objectives) -> dict[str, float]:
    return {name: config.weights.get(name, 1.0) for name in found.names}


def _combined(found: Rollouts, objectives: Objectives) -> np.ndarray:
    """f64[S]: `combine` over the steps in order, each with the state that the one before left."""
    advantages = np.full(len(found), np.nan)
    state: dict[str, object] = {}
    steps, ids = found.columns["step"], found.columns["group_id"]
    for rows in _parts(steps):
        turn = int(steps[rows[0]]) - 1  # the log counts turns from 1
        advantages[rows], state, _ = combine(
            found.scores[rows], ids[rows], found.names, found.kinds, objectives, state, turn
        )
    return advantages


def _parts(keys: np.ndarray) -> Iterator[np.ndarray]:
    """Rows of equal key, in order of the keys."""
    order = np.argsort(keys, kind="stable")
    yield from np.split(order, np.flatnonzero(np.diff(keys[order])) + 1)


def _without_replaced(found: Rollouts) -> tuple[Rollouts, int]:
    """Leave out groups that dynamic sampling replaced: they have scores, and never had an advantage."""
    unused = ~np.isnan(found.scores).all(axis=1) & np.isnan(found.columns["advantage"])
    keys = found.columns["step"].astype(np.int64), found.columns["group_id"].astype(np.int64)
    gone = {(int(s), int(g)) for s, g in zip(keys[0][unused], keys[1][unused], strict=True)}
    kept = np.array([(int(s), int(g)) not in gone for s, g in zip(*keys, strict=True)], dtype=bool)
    columns = {name: column[kept] for name, column in found.columns.items()}
    return Rollouts(found.names, found.kinds, found.scores[kept], columns), len(gone)


def _with_truncated(found: Rollouts) -> Rollouts:
    """The objective that `align.stages.groups.penalise_truncated` adds."""
    cut = (found.columns["finish"] == "length").astype(np.float64)
    cut[np.isnan(found.scores).all(axis=1)] = np.nan
    scores = np.concatenate([found.scores, cut[:, None]], axis=1)
    return Rollouts((*found.names, TRUNCATED), (*found.kinds, "cost"), scores, found.columns)


def correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Pearson's, over the rows where both are known; None where one of them does not vary."""
    both = np.isfinite(x) & np.isfinite(y)
    x, y = x[both], y[both]
    if x.size < 2 or np.ptp(x) <= NO_SIGNAL or np.ptp(y) <= NO_SIGNAL:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def write(rescored: Rescored, path: Path) -> None:
    """A Parquet file, whole or not at all: step, group_id, sample, version, each objective, advantage (the run's),
    rescored (the new one), trained."""
    import pyarrow
    import pyarrow.parquet

    found = rescored.rollouts
    columns = {name: found.columns[name] for name in ("step", "group_id", "sample", "version")}
    columns |= {f"objective/{name}": found.scores[:, k] for k, name in enumerate(found.names)}
    columns |= {"advantage": rescored.before, "rescored": rescored.after, "trained": rescored.trained}
    aside = path.with_name(f".writing-{path.name}")
    arrays = {name: pyarrow.array(column, from_pandas=True) for name, column in columns.items()}  # NaN is null
    pyarrow.parquet.write_table(pyarrow.table(arrays), aside, compression="zstd")
    os.replace(aside, path)
