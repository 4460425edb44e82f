"""What a step's scores and advantages looked like."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from align.objectives.groups import Grouped

_NO_SIGNAL = 1e-7  # what rounding leaves where the terms of a sum cancel


def describe(
    scores: np.ndarray, gated: np.ndarray, advantages: np.ndarray, groups: Grouped, names: Sequence[str]
) -> dict[str, float]:
    """objective/<name>/{mean, std, missing, dead, correlation}: mean and std with the objective's own sign over the
    values there are; missing: share of samples; dead: share of groups whose values are all equal; correlation with the
    advantage. advantage/{std, missing, dead_groups}: shares of samples and groups.

    scores f64[S, R], as rewards gave them; dead is about `gated` f64[S, R], what the gates left of them. advantages
    f64[S]. What is undefined (the mean of no value) is left out.
    """
    metrics: dict[str, float] = {}
    ranges = groups.ranges(gated)  # f64[G, R], NaN where a group has no value
    for k, name in enumerate(names):
        known = scores[~np.isnan(scores[:, k]), k]
        if known.size:
            metrics[f"objective/{name}/mean"] = float(known.mean())
            metrics[f"objective/{name}/std"] = float(known.std())
        present = ranges[~np.isnan(ranges[:, k]), k]
        if present.size:
            metrics[f"objective/{name}/dead"] = float((present == 0).mean())
        if scores.shape[0]:
            metrics[f"objective/{name}/missing"] = 1.0 - known.size / scores.shape[0]
        correlation = _correlation(scores[:, k], advantages)
        if correlation is not None:
            metrics[f"objective/{name}/correlation"] = correlation
    trained = advantages[~np.isnan(advantages)]
    if trained.size:
        metrics["advantage/std"] = float(trained.std())
        signal = groups.sums(np.abs(np.nan_to_num(advantages)) > _NO_SIGNAL)
        metrics["advantage/dead_groups"] = float((signal == 0).mean())
    if scores.shape[0]:
        metrics["advantage/missing"] = 1.0 - trained.size / scores.shape[0]
    return metrics


def _correlation(scores: np.ndarray, advantages: np.ndarray) -> float | None:
    """Pearson's, over the samples that have both; None where one of them does not vary."""
    both = ~(np.isnan(scores) | np.isnan(advantages))
    x, y = scores[both], advantages[both]
    if x.size < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])
