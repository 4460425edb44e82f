"""The gold answer of a sample, shared by the built-ins that compare with one."""

from __future__ import annotations

from typing import Any

from rewards.api import Sample

# In this order: what a prompt loader took off the conversation, then what data sets call it.
COLUMNS = ("reference_answer", "answer", "solution", "ground_truth", "target", "label")


def gold(sample: Sample, column: str | None) -> Any:
    """The row's value in `column`, or in the first of COLUMNS that it has. KeyError names the row's columns."""
    for name in COLUMNS if column is None else (column,):
        if sample.row.get(name) is not None:
            return sample.row[name]
    wanted = f"a column {column!r}" if column else f"one of {', '.join(COLUMNS)}"
    raise KeyError(f"the row needs {wanted}; it has: {', '.join(sample.row) or 'none'}")
