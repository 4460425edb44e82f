"""How well do the completion's boxes fit the gold boxes? Intersection over union, from 0 to 1.

Boxes are [x1, y1, x2, y2] in the units of the gold boxes, x1 < x2 and y1 < y2. With several, predicted and gold boxes
are matched one to one so that the sum of IoUs is greatest; the score is that sum over the larger number of boxes, so
that a box too many costs as much as a box too few.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rewards.api import Objective, Sample, reward
from rewards.builtins._answers import gold, row_gold

Box = tuple[float, float, float, float]

_NUMBER = r"\s*([-+]?\d{1,9}(?:\.\d{1,9})?)\s*"
_FLAT = rf"[\[(]{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}[\])]"  # [x1, y1, x2, y2], bare or as a value of "bbox_2d"
_CORNERS = rf"[\[(]{_NUMBER},{_NUMBER}[\])]\s*,\s*[\[(]{_NUMBER},{_NUMBER}[\])]"  # (x1,y1),(x2,y2) as Qwen-VL writes
_BOX = re.compile(f"{_FLAT}|{_CORNERS}")
_MOST = 1000  # boxes of one completion that are looked at


def _check(threshold: float | None = None) -> None:
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(f"threshold is an IoU above 0 and at most 1, not {threshold}")


def _gold(row: Mapping[str, Any], *, column: str | None = None) -> str:
    return json.dumps([list(box) for box in _gold_boxes(row_gold(row, column))])


@reward(objectives={"box_iou": Objective(range=(0, 1))}, validate=_check, gold=_gold)
def box_iou(samples: Sequence[Sample], *, column: str | None = None, threshold: float | None = None) -> list[float]:
    """The mean IoU of the best matching, or the share of boxes that are matched well enough.

    Every [x1, y1, x2, y2] and (x1,y1),(x2,y2) of the completion counts as a box; with none it scores 0.

    Args:
        column: the row's column with one gold box, or a list of them, each four numbers or {"bbox_2d": [...]}; default:
            the first of reference_answer, answer, solution, ground_truth, target, label that the row has.
        threshold: count a matched pair as 1 where its IoU reaches this, else as 0, instead of its IoU.
    """
    scores = []
    for sample in samples:
        wanted = _gold_boxes(gold(sample, column))
        found = [_box(m) for m, _ in zip(_BOX.finditer(sample.completion), range(_MOST), strict=False)]
        values = [[_value(iou(w, f), threshold) for f in found] for w in wanted]
        scores.append(min(1.0, _best_sum(values) / max(len(wanted), len(found))))  # not above by rounding
    return scores


def _value(overlap: float, threshold: float | None) -> float:
    return overlap if threshold is None else float(overlap >= threshold)


def _box(found: re.Match[str]) -> Box:
    x1, y1, x2, y2 = (float(n) for n in found.groups() if n is not None)
    return x1, y1, x2, y2


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, 0 where either has no area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    common = width * height
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def _gold_boxes(answer: Any) -> list[Box]:
    """ValueError where there is none, or one that is no box."""
    if isinstance(answer, str):
        try:
            answer = json.loads(answer)
        except ValueError as error:
            raise ValueError(f"the gold boxes {answer[:200]!r} are no JSON") from error
    one = isinstance(answer, Mapping) or _is_flat(answer)
    items = [answer] if one else list(answer) if isinstance(answer, list | tuple) else []
    boxes: list[Any] = [item.get("bbox_2d") if isinstance(item, Mapping) else item for item in items]
    for box in boxes or [answer]:
        if not _is_flat(box) or not (box[0] < box[2] and box[1] < box[3]):
            raise ValueError(f"a gold box is {box!r}; [x1, y1, x2, y2] with x1 < x2 and y1 < y2 is needed")
    return [(float(b[0]), float(b[1]), float(b[2]), float(b[3])) for b in boxes]


def _is_flat(value: Any) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 4:
        return False
    return all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in value)


def _best_sum(values: list[list[float]]) -> float:
    """The greatest sum of values[i][j] with every i and j taken at most once: the Hungarian algorithm on -values,
    O(rows² columns)."""
    if not values or not values[0]:
        return 0.0
    if len(values) > len(values[0]):
        values = [list(column) for column in zip(*values, strict=True)]
    rows, columns = len(values), len(values[0])
    row_price, column_price = [0.0] * (rows + 1), [0.0] * (columns + 1)
    taken_by = [0] * (columns + 1)  # row of each column, from 1; 0: free
    for row in range(1, rows + 1):
        taken_by[0], column = row, 0
        least, came_from, done = [math.inf] * (columns + 1), [0] * (columns + 1), [False] * (columns + 1)
        while taken_by[column]:
            done[column], current, step, following = True, taken_by[column], math.inf, 0
            for j in range(1, columns + 1):
                if done[j]:
                    continue
                cost = -values[current - 1][j - 1] - row_price[current] - column_price[j]
                if cost < least[j]:
                    least[j], came_from[j] = cost, column
                if least[j] < step:
                    step, following = least[j], j
            for j in range(columns + 1):
                if done[j]:
                    row_price[taken_by[j]] += step
                    column_price[j] -= step
                else:
                    least[j] -= step
            column = following
        while column:
            taken_by[column] = taken_by[came_from[column]]
            column = came_from[column]
    return math.fsum(values[i - 1][j - 1] for j, i in enumerate(taken_by) if j and i)
