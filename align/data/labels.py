"""A row's label as the numbers that a head is trained on, and how often each label occurs."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from align.data.records import RowError
from align.data.values import shown
from align.recipe.labels import Labels

_DIGITS = re.compile("[0-9]{1,9}")


_NOBODY = -100.0  # torch's ignore_index, as NeMo's attributes have it


@dataclass(frozen=True)
class Labelling:
    """How the labels of rows are read. optional: a row may have none."""

    labels: Labels
    optional: bool = False

    def values(self, label: Any) -> list[float]:
        """Of `labels.columns`; NaN for a label that nobody gave. Raises RowError."""
        if label is None and self.optional:
            return [math.nan] * len(self.labels.columns)
        return label_values(label, self.labels)


def label_values(label: Any, labels: Labels) -> list[float]:
    """The values of `labels.columns`. Raises RowError for a label that is not among them.

    One label: its name, or its index. Several: a list of names or indices, or a truth value for each label (true and
    false, or 0 and 1 where that cannot be taken for indices). Regression: a number, or K of them.
    """
    if label is None:
        raise RowError("no `label`")
    if labels.problem == "single_label":
        return [float(_index(label, labels))]
    count = len(labels.names)
    if labels.problem == "multi_label":
        items = [label] if isinstance(label, str) else label
        if not isinstance(items, list | tuple | np.ndarray):
            raise RowError(f"`labels` must be a list of labels, got {shown(label)}")
        return _several(list(items), labels)
    numbers = list(label) if isinstance(label, list | tuple | np.ndarray) else [label]
    if len(numbers) != count:
        raise RowError(f"the label has {len(numbers)} numbers, and the head {count} outputs")
    found = [_number(value) for value in numbers]
    others = [abs(number) for number in found if number != _NOBODY]
    if count > 1 and len(others) < count and max(others, default=0.0) < -_NOBODY / 2:
        raise RowError(
            f"target {labels.names[found.index(_NOBODY)]!r} is -100, which other trainers write where nobody gave one, "
            "and which would be learned as a number here; leave such rows out, or, where it is one, rescale the targets"
        )
    return found


def _index(label: Any, labels: Labels) -> int:
    """Of one label. A name goes before an index; labels that are numbers themselves are only ever names."""
    text = str(int(label)) if _whole(label) else label
    if isinstance(label, bool):  # labels may be called true and false, in either order
        text = next((name for name in labels.names if name.lower() == str(label).lower()), label)
    if isinstance(text, str) and text in labels.names:
        return labels.names.index(text)
    numerals = any(name.lstrip("-").isdigit() for name in labels.names)
    if isinstance(label, bool) and len(labels.names) == 2:
        return int(label)
    if isinstance(text, str) and _DIGITS.fullmatch(text) and not numerals and int(text) < len(labels.names):
        return int(text)
    near = ", ".join(labels.names[:8]) + (", ..." if len(labels.names) > 8 else "")
    known = f"{near}, or an index below {len(labels.names)}" if not numerals else near
    raise RowError(f"unknown label {shown(label)} (known: {known})")


def _several(items: list[Any], labels: Labels) -> list[float]:
    count = len(labels.names)
    if len(items) == count and all(isinstance(item, bool | float) for item in items):
        if any(float(item) not in (0.0, 1.0) for item in items):
            raise RowError(f"a list of truth values must hold 0 and 1, got {shown(items)}")
        return [float(item) for item in items]
    if len(items) == count and all(_whole(item) and int(item) in (0, 1) for item in items):
        if count <= 2:
            raise RowError(f"{shown(items)} may be indices or truth values; write names, or true and false")
        return [float(item) for item in items]  # indices would not repeat
    found = [_index(item, labels) for item in items]
    if len(set(found)) < len(found):
        raise RowError(f"a label stands twice in {shown(items)}")
    return [float(k in found) for k in range(count)]


def _number(value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) < 3.4e38:  # float32, in which losses compute, holds no more
        raise RowError(f"the label must be a number, got {shown(value)}")
    return number


def _whole(value: Any) -> bool:
    """An integer, or a float that CSV or Arrow made of one."""
    if isinstance(value, bool):
        return False
    return isinstance(value, int | np.integer) or (isinstance(value, float) and value.is_integer())


# ------------------------------------------------------------------------------------------------- the report


def distribution(values: np.ndarray, labels: Labels) -> dict[str, Any]:
    """Rows per label by name, of values f32[n, C]; of a regression min, mean and max of each output."""
    known = values[~np.isnan(values[:, 0])] if values.size else values
    if labels.problem == "regression":
        return {
            name: {"min": float(column.min()), "mean": float(column.mean()), "max": float(column.max())}
            for name, column in zip(labels.names, known.T, strict=True)
            if column.size
        }
    if labels.problem == "single_label":
        counts: np.ndarray = np.bincount(known.astype(np.int64).ravel(), minlength=len(labels.names))
    else:
        counts = known.sum(0)
    return {name: int(count) for name, count in zip(labels.names, counts, strict=True)}


def describe(found: dict[str, Any], rows: int) -> list[str]:
    """The distribution for a person, and the labels that no row has."""
    if not found:
        return []
    if any(isinstance(value, dict) for value in found.values()):
        return [
            f"{name}: {value['min']:.4g} to {value['max']:.4g}, mean {value['mean']:.4g}"
            for name, value in found.items()
        ]
    often = sorted(found, key=lambda name: -found[name])
    counted = [f"{name} {found[name]} ({found[name] / max(rows, 1):.0%})" for name in often[:12]]
    lines = ["labels: " + ", ".join(counted) + (f" and {len(often) - 12} more" if len(often) > 12 else "")]
    absent = [name for name in often if not found[name]]
    if absent:
        lines.append(f"no row has {'the label' if len(absent) == 1 else 'one of the labels'} {', '.join(absent[:12])}")
    return lines
