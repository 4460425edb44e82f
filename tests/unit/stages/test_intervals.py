"""Half the width of a 95 % interval: against scipy-free textbook values, and by what it promises on draws."""

from __future__ import annotations

import math

import numpy as np
import pytest

from align.protocols.scorer import ScoreTable
from align.stages.intervals import half_width, of_losses, of_scores, share_half_width


def test_of_a_share_it_is_wilsons() -> None:
    low, high = 0.404, 0.596  # 50 of 100, as tables give Wilson's
    assert share_half_width(0.5, 100) == pytest.approx((high - low) / 2, abs=5e-4)
    assert half_width(np.asarray([0.0, 1.0] * 50)) == share_half_width(0.5, 100)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_rows_that_are_all_alike_leave_doubt(share: float) -> None:
    assert 0.1 < share_half_width(share, 10) < 0.2
    assert share_half_width(share, 10_000) < 3e-4


def test_of_other_numbers_it_is_normal_and_of_one_there_is_none() -> None:
    values = np.asarray([0.0, 0.5, 1.0, 0.25])
    assert half_width(values) == pytest.approx(1.96 * values.std(ddof=1) / 2, rel=1e-4)
    assert math.isinf(half_width(np.asarray([0.5])))


def test_the_true_mean_lies_inside_in_95_of_100_draws() -> None:
    rng = np.random.default_rng(0)
    draws = rng.choice([0.0, 0.5, 1.0], p=[0.2, 0.3, 0.5], size=(2000, 150))
    inside = [abs(draw.mean() - 0.65) <= half_width(draw) for draw in draws]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.02)


def test_a_missing_score_is_left_out_and_an_objective_without_scores_has_no_interval() -> None:
    nan = np.nan
    scores = np.asarray([[1.0, nan, nan], [0.0, nan, 0.3], [1.0, nan, 0.7], [nan, nan, 0.5]], dtype=np.float32)
    found = of_scores(ScoreTable(("right", "never", "length"), scores, ("reward",) * 3))
    assert set(found) == {"right/ci95", "length/ci95"}
    assert found["right/ci95"] == pytest.approx(share_half_width(2 / 3, 3))
    assert found["length/ci95"] == pytest.approx(half_width(np.asarray([0.3, 0.7, 0.5])), rel=1e-6)


def test_of_loss_metrics_shares_of_rows_have_one() -> None:
    found = of_losses({"eval/loss": 0.4, "eval/accuracies": 0.75}, rows=40)
    assert found == {"eval/accuracies/ci95": share_half_width(0.75, 40)}
