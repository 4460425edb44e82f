"""From what a plugin returned to a table of values, and to one error per score that cannot be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rewards.api import Objective, Score

_FLOAT32_MAX = 3.4028234663852886e38


class WrongLength(Exception):
    """The plugin returned a number of results that is not the number of samples."""


@dataclass
class Verdict:
    """values[i][k]: sample i, objective k; None where missing. errors: (i, k or -1 for all, cause, message);
    a place in `values` that has an error holds None."""

    values: list[list[float | None]]
    errors: list[tuple[int, int, str, str]] = field(default_factory=list)
    infos: dict[int, dict[str, Any]] = field(default_factory=dict)


def judge(results: Any, count: int, objectives: Mapping[str, Objective]) -> Verdict:
    """Check the results of one call for `count` samples. WrongLength where they cannot be told apart by sample."""
    if isinstance(results, str | bytes | Mapping) or not hasattr(results, "__iter__"):
        raise WrongLength(
            f"returned {_short(results)} for {count} samples; a list with one result per sample is needed"
        )
    rows = list(results)
    if len(rows) != count:
        raise WrongLength(f"returned {len(rows)} results for {count} samples")
    names = list(objectives)
    verdict = Verdict([[None] * len(names) for _ in rows])
    for i, row in enumerate(rows):
        _judge_row(i, row, names, objectives, verdict)
    return verdict


def _judge_row(i: int, row: Any, names: Sequence[str], objectives: Mapping[str, Objective], verdict: Verdict) -> None:
    if isinstance(row, Score):
        if row.info:
            verdict.infos[i] = dict(row.info)
        row = row.values
    if isinstance(row, Exception):
        verdict.errors.append((i, -1, "raised", f"{type(row).__name__}: {str(row)[:2000]}"))
        return
    if not isinstance(row, Mapping):
        if len(names) > 1 and row is not None:
            message = f"returned {_short(row)} where a Score with {', '.join(names)} is needed"
            verdict.errors.append((i, -1, "wrong_type", message))
            return
        row = dict.fromkeys(names, row)  # a bare None: none of the objectives applies
    unknown = [n for n in row if n not in objectives]
    if unknown:
        message = f"returned the unknown objective {unknown[0]!r}; declared: {', '.join(names)}"
        verdict.errors.append((i, -1, "unknown_objective", message))
        return
    for k, name in enumerate(names):
        if name not in row:
            verdict.errors.append((i, k, "missing_objective", f"returned no value for {name!r} (None says 'none')"))
            continue
        value, cause, message = _number(row[name], objectives[name])
        verdict.values[i][k] = value
        if cause:
            verdict.errors.append((i, k, cause, message))


def _number(value: Any, objective: Objective) -> tuple[float | None, str, str]:
    if value is None:
        return None, "", ""
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        return None, "wrong_type", f"returned {_short(value)}, which is no number"
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:  # arrays of more than one element, huge integers
        return None, "wrong_type", f"returned {_short(value)}, which is no single number: {error}"
    if not abs(number) <= _FLOAT32_MAX:  # also False for NaN; the table of scores is float32
        return None, "not_finite", f"returned {number:g}, which is no finite float32"
    if objective.range is not None and not objective.range[0] <= number <= objective.range[1]:
        return None, "out_of_range", f"returned {number:g}, outside {list(objective.range)}"
    return number, "", ""


def _short(value: Any) -> str:
    text = f"{type(value).__name__} {value!r}"
    return text if len(text) <= 200 else text[:197] + "..."
