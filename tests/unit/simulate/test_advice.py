"""Recommendations: the smallest staleness that is enough, and how devices are divided."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from align.errors import RecipeError
from align.simulate.advice import best_split, smallest_sufficient, splits
from align.simulate.lengths import LogNormal
from align.simulate.stage import Outcome, simulate
from align.simulate.workload import EngineModel, Workload


def outcome(staleness: int, step_s: float) -> Outcome:
    return Outcome(staleness, 4, 10, step_s, 0.0, 0.5, 0.5, 0.5, {staleness: 1.0}, {}, {})


@pytest.mark.parametrize(
    ("steps", "chosen"),
    [((10.0, 6.0, 5.8), 1), ((10.0, 6.0, 5.6), 2), ((5.2, 5.0, 5.0), 0), ((10.0, 5.0, 5.3), 1)],
)
def test_the_smallest_staleness_within_5_percent_of_the_fastest_is_recommended(
    steps: Sequence[float], chosen: int
) -> None:
    assert smallest_sufficient([outcome(s, step_s) for s, step_s in enumerate(steps)]).staleness == chosen


def test_devices_go_where_the_work_is() -> None:
    def work(train_s: float) -> Workload:
        lengths = LogNormal(500, 0.5, limit=2000, group_size=4)
        return Workload(16, 4, 1, EngineModel.of(50, 400, 16), lengths, train_s=train_s)

    def run(divided: Workload) -> list[Outcome]:
        return [simulate(divided, 1, turns=10)]

    little, much = (splits(work(train_s), 8, run) for train_s in (10.0, 500.0))
    assert [(s.trainers, s.engines) for s in little] == [(n, 8 - n) for n in range(1, 8)]
    assert best_split(little).trainers < best_split(much).trainers
    faster = splits(work(500.0), 8, run, measured_with=2)
    assert faster[0].recommended.step_s > much[0].recommended.step_s, "the time measured was that of two trainers"


def test_many_devices_are_tried_at_some_splits_and_one_at_none() -> None:
    seen: list[int] = []

    def run(divided: Workload) -> list[Outcome]:
        seen.append(divided.engines)
        return [outcome(0, 1.0)]

    work = Workload(1, 2, 1, EngineModel(1, 1.0, 0.0), LogNormal(1, 0, 1, 2))
    assert len(splits(work, 64, run)) == 8 and max(seen) == 63 and min(seen) == 1
    assert [s.engines for s in splits(work, 2, run)] == [1]
    with pytest.raises(RecipeError, match="1 devices cannot be divided"):
        splits(work, 1, run)
