"""Fronts: which models no other one beats on every objective, how much of the space they dominate, and how sure that
is, by a bootstrap over prompts.

Everything here is maximised: a cost enters as its negative, and is shown with its own sign. Intervals are percentiles
over resampled prompts (Efron, 1979), the same prompts for every model, because all of them answered the same ones: what
is common to models goes out of their comparison. The hypervolume (Zitzler and Thiele, 1999) is that of the union of
boxes between the reference point and the points beyond it; over resamples it is larger on average than for the whole
set, as any maximum of noisy values is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from align.errors import RunFolderError, UserError
from align.experiments.runs import Judged
from align.objectives.pareto import dominated, hypervolume

LEVEL = 0.95
_MARGIN = 0.1  # of the points' range, from the worst to the default reference point


@dataclass(frozen=True)
class Front:
    """N models, R objectives. mean, low, high: f64[N, R] with the objectives' own signs, over the prompts that have a
    score; missing: f64[N, R], shares; best: bool[N], on the front; often: f64[N], the share of resamples in which it
    is; reference: f64[R], own signs; hypervolume with the ends of its interval."""

    models: tuple[Judged, ...]
    names: tuple[str, ...]
    kinds: tuple[str, ...]
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    missing: np.ndarray
    best: np.ndarray
    often: np.ndarray
    reference: np.ndarray
    hypervolume: tuple[float, float, float]
    prompts: int
    resamples: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """For programs: JSON values only, own signs."""
        points = [
            {
                "label": model.label,
                "run": str(model.run),
                "of": model.of,
                "weights": dict(model.weights),
                "on_front": bool(self.best[n]),
                "on_front_share": float(self.often[n]),
                "mean_length": float(model.lengths.mean()),
                "objectives": {
                    name: {
                        "mean": float(self.mean[n, k]),
                        "low": float(self.low[n, k]),
                        "high": float(self.high[n, k]),
                        "missing": float(self.missing[n, k]),
                    }
                    for k, name in enumerate(self.names)
                },
            }
            for n, model in enumerate(self.models)
        ]
        value, low, high = self.hypervolume
        return {
            "objectives": dict(zip(self.names, self.kinds, strict=True)),
            "points": points,
            "hypervolume": {"value": value, "low": low, "high": high},
            "reference": dict(zip(self.names, map(float, self.reference), strict=True)),
            "prompts": self.prompts,
            "resamples": self.resamples,
            "seed": self.seed,
            "level": LEVEL,
        }


def front(
    models: Sequence[Judged],
    objectives: Sequence[str] = (),
    *,
    reference: Mapping[str, float] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Front:
    """The front of `models` on `objectives` (default: all that they share).

    reference: by objective, with its own sign; default: a tenth of the models' range worse than the worst of them.
    Raises RunFolderError where models were not examined alike, UserError for objectives that there are not.
    """
    names, kinds = _objectives(models, objectives)
    columns = [[model.names.index(name) for name in names] for model in models]
    scores = np.stack([model.scores[:, own] for model, own in zip(models, columns, strict=True)])  # f64[N, P, R]
    _refuse_unscored(models, names, scores)
    sign = np.array([-1.0 if kind == "cost" else 1.0 for kind in kinds])
    whole = _means(scores, np.ones((1, scores.shape[1])))[0]  # f64[N, R]
    worst = _reference(whole * sign, names, sign, reference or {})
    draws = np.random.default_rng(seed).multinomial(scores.shape[1], [1 / scores.shape[1]] * scores.shape[1], resamples)
    means = _means(scores, draws.astype(np.float64))
    means = means[np.isfinite(means).all(axis=(1, 2))]  # a draw in which an objective of a model has no score
    low, high = np.percentile(means, _ENDS, axis=0)
    ends = np.percentile([hypervolume(one, worst) for one in means * sign], _ENDS)
    return Front(
        models=tuple(models),
        names=names,
        kinds=kinds,
        mean=whole,
        low=low,
        high=high,
        missing=np.isnan(scores).mean(axis=1),
        best=~dominated(whole * sign),
        often=np.mean([~dominated(one) for one in means * sign], axis=0),
        reference=worst * sign,
        hypervolume=(hypervolume(whole * sign, worst), float(ends[0]), float(ends[1])),
        prompts=scores.shape[1],
        resamples=len(means),
        seed=seed,
    )


_ENDS = (50 * (1 - LEVEL), 50 * (1 + LEVEL))


def _means(scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """f64[N, P, R] with NaN, f64[B, P] -> f64[B, N, R]: means over prompts, each as often as counted, NaN left out."""
    known = ~np.isnan(scores)
    sums = np.einsum("bp,npr->bnr", counts, np.where(known, scores, 0.0), optimize=True)
    numbers = np.einsum("bp,npr->bnr", counts, known.astype(np.float64), optimize=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(sums / numbers)


def _reference(values: np.ndarray, names: Sequence[str], sign: np.ndarray, given: Mapping[str, float]) -> np.ndarray:
    """f64[R], in the sense that more is better."""
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise UserError(
            f"no objective is called {unknown[0]!r}", where="--reference", remedy=f"those here: {', '.join(names)}"
        )
    span = np.ptp(values, axis=0)
    worst = values.min(axis=0) - _MARGIN * np.where(span > 0, span, 1.0)
    return np.array([given[name] * sign[k] if name in given else worst[k] for k, name in enumerate(names)])


def _objectives(models: Sequence[Judged], wanted: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names and kinds. Refuses models of other prompts, or other objectives."""
    first = models[0]
    for model in models:
        if model.prompts != first.prompts:
            raise RunFolderError(
                f"{model.label!r} and {first.label!r} answered other prompts: they cannot be compared",
                where=model.run,
                remedy="examine all runs on the same held-out data, in the same order",
            )
    kinds = [dict(zip(model.names, model.kinds, strict=True)) for model in models]
    shared = [name for name in first.names if all(name in own for own in kinds)]
    missing = [name for name in wanted if name not in shared]
    if missing:
        raise UserError(
            f"no objective {missing[0]!r} was judged in all of these",
            where="--objectives",
            remedy=f"choose among: {', '.join(shared) or 'none'}",
        )
    names = tuple(wanted or shared)
    if len(names) < 2:
        raise UserError(
            f"a front needs two objectives, and these runs share {', '.join(names) or 'none'}",
            where=first.run,
            remedy="give the evaluate stage a second reward, and run it again with --from-stage",
        )
    for model, own in zip(models, kinds, strict=True):
        for name in names:
            if own[name] != kinds[0][name]:
                raise RunFolderError(
                    f"{name!r} is a {own[name]} here and a {kinds[0][name]} in {first.run}",
                    where=model.run,
                    remedy="judge all runs by the same rewards",
                )
    return names, tuple(kinds[0][name] for name in names)


def _refuse_unscored(models: Sequence[Judged], names: Sequence[str], scores: np.ndarray) -> None:
    for n, k in np.argwhere(np.isnan(scores).all(axis=1)):
        raise RunFolderError(
            f"{models[n].label!r} has no score at all on {names[k]!r}",
            where=models[n].run,
            remedy="see failures.jsonl in its evaluate stage's rewards/, or leave the objective out with --objectives",
        )
