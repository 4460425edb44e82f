"""How sure a mean over rows is: half the width of its 95 % interval."""

from __future__ import annotations

import numpy as np

from align.protocols.scorer import ScoreTable
from align.protocols.trainer import CI95, Metrics

Z = 1.959964  # of a normal distribution, two-sided
_SHARES = ("eval/accuracies", "eval/accuracy")


def half_width(values: np.ndarray) -> float:
    """Half the width of the 95 % interval of the mean of f[N], N > 0.

    Of numbers that are all 0 or 1 it is Wilson's (1927), which is no zero where all are alike; else the normal one from
    the sample's deviation, and infinite for one number.
    """
    values = np.asarray(values, dtype=np.float64)
    if np.isin(values, (0.0, 1.0)).all():
        return share_half_width(float(values.mean()), len(values))
    return float(Z * values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("inf")


def share_half_width(share: float, count: int) -> float:
    """Wilson's: of a share among `count` independent rows."""
    spread = share * (1 - share) / count + Z**2 / (4 * count**2)
    return float(Z * np.sqrt(spread) / (1 + Z**2 / count))


def of_scores(table: ScoreTable) -> Metrics:
    """`<objective>/ci95` over one completion a prompt; missing scores are left out, as they are of the mean."""
    columns = ((name, table.scores[:, k]) for k, name in enumerate(table.objectives))
    known = ((name, column[np.isfinite(column)]) for name, column in columns)
    return {name + CI95: half_width(scores) for name, scores in known if len(scores)}


def of_losses(metrics: Metrics, rows: int) -> Metrics:
    """`<metric>/ci95` of what is a share of rows among the metrics of an evaluation over `rows` pairs or labels."""
    return {name + CI95: share_half_width(metrics[name], rows) for name in _SHARES if name in metrics}
