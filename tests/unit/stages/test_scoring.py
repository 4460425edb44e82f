"""Scores that arrive in parts are those of one call."""

from __future__ import annotations

import math

import numpy as np
import pytest

from align.protocols.fleet import Group
from align.protocols.scorer import Failure, ScoreTable
from align.stages.scoring import MetricTotals, join_tables, split_table
from tests.unit.stages.plain import PlainFleet, prompt


def groups(*sizes: int) -> list[Group]:
    fleet = PlainFleet()
    fleet.version = 0
    return [fleet._group(prompt(n), size) for n, size in enumerate(sizes)]


def table(scored: list[Group], **more) -> ScoreTable:
    rows = sum(len(group.completions) for group in scored)
    scores = np.arange(2 * rows, dtype=np.float32).reshape(rows, 2)
    scores[1, 0] = math.nan
    infos = tuple({"row": n} for n in range(rows))
    return ScoreTable(("a", "b"), scores, ("reward", "cost"), infos=infos, **more)


def test_joining_the_rows_of_each_group_undoes_splitting_them() -> None:
    scored = groups(2, 3, 1)
    failures = (Failure(2, 0, "a", "raised", "no"), Failure(0, 1, "a", "timeout", "slow"))
    whole = table(scored, failures=failures, dropped=(1,))
    parts = split_table(scored, whole)
    assert [len(part.scores) for part in parts] == [2, 3, 1]
    assert [part.dropped for part in parts] == [(), (0,), ()]
    assert [[f.cause for f in part.failures] for part in parts] == [["timeout"], [], ["raised"]]
    again = join_tables(parts, {"x": 1.0})
    np.testing.assert_array_equal(again.scores, whole.scores)
    assert (again.objectives, again.kinds, again.dropped, again.infos) == (
        ("a", "b"),
        ("reward", "cost"),
        (1,),
        whole.infos,
    )
    assert set(again.failures) == set(failures) and again.metrics == {"x": 1.0}


def test_over_the_calls_of_a_step_sums_add_up_and_means_are_weighted() -> None:
    totals = MetricTotals()
    for errors, samples in ((1, 4), (0, 12)):
        metrics = {
            "reward/a/errors": float(errors),
            "reward/a/error_rate": errors / samples,
            "reward/a/words": 10.0 * samples,
        }
        counts = {"reward/a/error_rate": float(samples), "reward/a/words": 1.0}
        totals.add(table(groups(2), metrics=metrics, counts=counts))
    assert totals.metrics() == {
        "reward/a/errors": 1.0,
        "reward/a/error_rate": pytest.approx(1 / 16),
        "reward/a/words": pytest.approx(80.0),
    }


def test_over_the_calls_of_a_step_percentiles_are_taken_of_all_numbers() -> None:
    totals = MetricTotals()
    for numbers in ([1.0, 2.0, 3.0], [4.0], []):
        totals.add(table(groups(2), series={"reward/a/latency": numbers}))
    assert totals.metrics() == {
        "reward/a/latency_mean": pytest.approx(2.5),
        "reward/a/latency_p50": pytest.approx(2.5),
        "reward/a/latency_p95": pytest.approx(3.85),
    }
    assert split_table(groups(2), table(groups(2), series={"reward/a/latency": [1.0]}))[0].series == {}
