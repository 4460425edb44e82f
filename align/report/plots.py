"""Learning curves of a run, from its metrics files, and what an evaluation found, drawn to `<run>/report.png`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from align.report.logs import read_metrics

LINE, MEAN, EVALUATION = "#9db8d9", "#1f4e8c", "#c44e52"
_WIDTH, _HEIGHT, _COLUMNS = 3.2, 2.2, 4  # inches of a panel; panels in a row
_LOG_RANGE = 10.0  # a loss that falls by more than this factor is drawn on a logarithmic axis


@dataclass(frozen=True)
class Panel:
    """One curve: a metric's name, its title, and how its axis reads."""

    metric: str
    title: str
    whole: bool = False  # a share: the axis is [0, 1]


def panels(names: set[str]) -> list[Panel]:
    """What is worth a look, of the metrics that a stage logged."""
    chosen = [Panel("loss/total", "loss")]
    chosen += [Panel("rewards/accuracies", "pairs in order (share)", whole=True), Panel("rewards/margins", "margin")]
    chosen += [
        Panel(name, f"{name.split('/')[1]} (mean)")
        for name in sorted(names)
        if name.startswith("objective/") and name.endswith("/mean")
    ]
    chosen += [Panel("completion/mean_length", "completion length (tokens)"), Panel("policy/entropy", "entropy")]
    return [panel for panel in chosen if panel.metric in names]


def write_report(run_folder: Path, summary: Mapping[str, Any]) -> Path | None:
    """Draws `<run>/report.png` and returns its path; None where no stage logged a curve.

    summary: the content of summary.json; accuracy and mean length of evaluated stages become bars.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: no display, no global state
    from matplotlib.figure import Figure

    draws: list[Draw] = []
    for stage in summary["stages"]:
        curves = _curves(run_folder / stage)
        draws += [_curve(stage, panel, curves) for panel in panels(set(curves))]
    bars = _evaluated(summary)
    if bars:
        draws += [_bars("accuracy", bars, "{:.2f}", top=1.0), _bars("mean_length", bars, "{:.1f}")]
    if not draws:
        return None
    columns = min(_COLUMNS, len(draws))
    rows = -(-len(draws) // columns)
    figure = Figure(figsize=(_WIDTH * columns, _HEIGHT * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis in axes[len(draws) :]:
        axis.set_axis_off()
    for axis, draw in zip(axes, draws, strict=False):
        draw(axis)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    path = run_folder / "report.png"
    figure.savefig(path, dpi=110)
    return path


Draw = Callable[[Any], None]


def _curves(stage_folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """metric -> (steps i64[n], values f64[n]), for stages of more than one step; null becomes NaN, a gap."""
    lines = read_metrics(stage_folder)
    names = {name for line in lines for name in line} - {"step", "time"}
    curves = {}
    for name in names:
        points = [(line["step"], np.nan if line[name] is None else line[name]) for line in lines if name in line]
        steps, values = np.array(points, np.float64).T
        if len(steps) > 1:
            curves[name] = (steps.astype(np.int64), values)
    return curves if panels(set(curves)) else {}


def _curve(stage: str, panel: Panel, curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Draw:
    def draw(axis: Any) -> None:
        steps, values = curves[panel.metric]
        axis.plot(steps, values, color=LINE, linewidth=0.8)
        half = len(values) // 40
        if half:
            axis.plot(steps, _smooth(values, half), color=MEAN, linewidth=1.4)
        evaluated = curves.get(f"eval/{panel.metric.partition('/')[2]}") or curves.get(f"eval/{panel.metric}")
        if evaluated is not None:
            axis.plot(*evaluated, color=EVALUATION, marker="o", markersize=2.5, linewidth=1.0, label="held out")
            axis.legend(fontsize=7, frameon=False)
        axis.set_title(f"{stage}: {panel.title}", fontsize=8, loc="left")
        axis.margins(x=0.01)
        if panel.whole:
            axis.set_ylim(0, 1.02)
        elif panel.metric == "loss/total" and _falls_far(values):
            axis.set_yscale("log")

    return draw


def _falls_far(values: np.ndarray) -> bool:
    known = values[np.isfinite(values)]
    return bool(known.size and known.min() > 0 and known.max() > _LOG_RANGE * known.min())


def _smooth(values: np.ndarray, half: int) -> np.ndarray:
    """Mean of the finite values among up to `half` neighbours on each side, at every step."""
    return np.array([_mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")


def _evaluated(summary: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    entries = {stage: entry.get("metrics", {}) for stage, entry in summary["stages"].items()}
    finite = {
        stage: all(math.isfinite(metrics.get(name, math.nan)) for name in ("accuracy", "mean_length"))
        for stage, metrics in entries.items()
    }
    return {stage: entries[stage] for stage in entries if finite[stage]}


def _bars(metric: str, stages: Mapping[str, Mapping[str, float]], form: str, top: float | None = None) -> Draw:
    def draw(axis: Any) -> None:
        values = [stages[stage][metric] for stage in stages]
        axis.bar(list(stages), values, color=MEAN, width=0.6)
        for x, value in enumerate(values):
            axis.annotate(form.format(value), (x, value), ha="center", va="bottom", fontsize=8)
        axis.set_title(f"held out: {metric.replace('_', ' ')}", fontsize=8, loc="left")
        axis.set_ylim(0, (top or max(values)) * 1.15)

    return draw
