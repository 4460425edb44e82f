"""A front as a picture: one panel for each pair of objectives, better always to the right and up."""

from __future__ import annotations

import io
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from align.experiments.front import Front

_SIZE, _COLUMNS, _DPI = (5.4, 4.2), 3, 150  # inches of a panel, panels in a row


@dataclass(frozen=True)
class Theme:
    """Colours: of text and axes, of points on the front, of dominated ones, of the dominated region, behind all."""

    ink: str
    best: str
    other: str
    area: str
    paper: str


LIGHT = Theme(ink="#24292f", best="#1f4e8c", other="#8b949e", area="#9db8d9", paper="#ffffff")
DARK = Theme(ink="#d8dee4", best="#8ab8f0", other="#7d8590", area="#2b4a73", paper="#15191f")


def front_png(front: Front, theme: Theme = LIGHT) -> bytes:
    """The picture as PNG. Numbers are those of the table, from 1; bars are the intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: no display, no global state
    from matplotlib.figure import Figure

    pairs = list(itertools.combinations(range(len(front.names)), 2))
    columns = min(_COLUMNS, len(pairs))
    rows = -(-len(pairs) // columns)
    figure = Figure(figsize=(_SIZE[0] * columns, _SIZE[1] * rows), layout="constrained", facecolor=theme.paper)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis in axes[len(pairs) :]:
        axis.set_axis_off()
    for axis, (x, y) in zip(axes, pairs, strict=False):
        _style(axis, theme)
        _panel(axis, front, x, y, theme)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, facecolor=theme.paper)
    return buffer.getvalue()


def write_front(front: Front, path: Path) -> None:
    path.write_bytes(front_png(front))


def _style(axis: Any, theme: Theme) -> None:
    axis.set_facecolor(theme.paper)
    axis.tick_params(labelsize=8, colors=theme.ink)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(theme.ink)
    axis.grid(color=theme.other, alpha=0.25, linewidth=0.6)
    axis.set_axisbelow(True)


def _panel(axis: Any, front: Front, x: int, y: int, theme: Theme) -> None:
    sign = np.array([-1.0 if kind == "cost" else 1.0 for kind in front.kinds])
    if len(front.names) == 2:  # of more objectives a panel is a shadow: its staircase would be another front
        _region(axis, front.mean * sign, front.reference * sign, front.best, sign, theme)
    for flag, colour, label in ((True, theme.best, "on the front"), (False, theme.other, "dominated")):
        rows = np.flatnonzero(front.best == flag)
        if not rows.size:
            continue
        spans = [
            np.stack([front.mean[rows, k] - front.low[rows, k], front.high[rows, k] - front.mean[rows, k]]).clip(0)
            for k in (x, y)
        ]
        axis.errorbar(
            front.mean[rows, x],
            front.mean[rows, y],
            xerr=spans[0],
            yerr=spans[1],
            fmt="o",
            markersize=5.5,
            color=colour,
            markerfacecolor=colour if flag else theme.paper,
            elinewidth=0.9,
            alpha=0.95,
            label=label,
            zorder=3 if flag else 2,
        )
    numbers: dict[tuple[float, float], list[str]] = {}
    for row, (at_x, at_y) in enumerate(front.mean[:, [x, y]].tolist()):
        numbers.setdefault((at_x, at_y), []).append(str(row + 1))
    for place, found in numbers.items():  # equal points share one label
        axis.annotate(
            ", ".join(found),
            place,
            xytext=(5, 5),
            textcoords="offset points",
            fontsize=8,
            color=theme.ink,
            zorder=4,
        )
    for k, name, set_label, invert in (
        (x, front.names[x], axis.set_xlabel, axis.invert_xaxis),
        (y, front.names[y], axis.set_ylabel, axis.invert_yaxis),
    ):
        cost = front.kinds[k] == "cost"
        set_label(f"{name} (cost: less is better)" if cost else name, fontsize=9, color=theme.ink)
        if cost:
            invert()
    axis.margins(0.08)
    axis.legend(fontsize=8, frameon=False, labelcolor=theme.ink, loc="best")


def _region(axis: Any, values: np.ndarray, worst: np.ndarray, best: np.ndarray, sign: np.ndarray, theme: Theme) -> None:
    """What the front dominates, down to the reference point: the hypervolume as an area."""
    points = values[best & (values > worst).all(axis=1)]
    if not len(points):
        return
    points = points[np.argsort(points[:, 0])]
    edge = [(worst[0], points[0, 1])]
    for here, after in itertools.zip_longest(points, points[1:, 1], fillvalue=worst[1]):
        edge += [(here[0], here[1]), (here[0], after)]
    line = np.array(edge) * sign
    ground = np.concatenate([line, [worst * sign]])
    axis.fill(ground[:, 0], ground[:, 1], color=theme.area, alpha=0.25, linewidth=0, zorder=0)
    axis.plot(line[:, 0], line[:, 1], color=theme.area, linewidth=1.4, zorder=1)
    axis.plot(*(worst * sign), marker="+", markersize=9, color=theme.ink, zorder=2)
    axis.annotate("reference", worst * sign, xytext=(6, -3), textcoords="offset points", fontsize=7.5, color=theme.ink)
