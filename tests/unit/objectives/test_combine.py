"""Advantages: a float64 oracle written sample by sample, and the rules of multi-objective scores."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.errors import RecipeError, RewardError
from align.objectives import combine
from align.recipe.objectives import Objectives

NAN = math.nan


def run(scores, group_ids, names=None, kinds=None, **config):
    scores = np.array(scores, np.float32)
    names = names or [chr(ord("a") + k) for k in range(scores.shape[1])]
    kinds = kinds or ["reward"] * len(names)
    return combine(scores, np.array(group_ids, np.int64), names, kinds, Objectives(**config), {}, 0)


def advantages(scores, group_ids, **config):
    return run(scores, group_ids, **config)[0].tolist()


# ------------------------------------------------------------------------------------------------ the oracle


def spread(values, min_std):
    return max(statistics.stdev(values) if len(values) > 1 else 0.0, min_std) + 1e-4


def over_mean(centred, mean, config):
    return centred / max(mean, config.min_std, 1e-4) if mean > 0 else 0.0


def oracle(scores, group_ids, weights, signs, config):
    """Straight from the definitions, one sample at a time, in Python's own floats."""
    count, width = len(scores), len(signs)
    if config.baseline == "batch":
        group_ids = [0] * count

    def members(i, k):
        return [j for j in range(count) if group_ids[j] == group_ids[i] and not math.isnan(scores[j][k])]

    def centred(i, k):
        if math.isnan(scores[i][k]):
            return 0.0
        others = [j for j in members(i, k) if config.baseline != "leave_one_out" or j != i]
        if not others:
            return 0.0
        return signs[k] * (scores[i][k] - math.fsum(scores[j][k] for j in others) / len(others))

    alive = [not all(math.isnan(v) for v in row) for row in scores]
    out = []
    for i in range(count):
        parts = [weights[k] * centred(i, k) for k in range(width)]
        if config.combine == "decoupled" and config.scale == "std":
            parts = [p / spread([scores[j][k] for j in members(i, k)], config.min_std) for k, p in enumerate(parts)]
        if config.scale == "mean":
            means = [math.fsum(scores[j][k] for j in members(i, k)) / max(len(members(i, k)), 1) for k in range(width)]
            if config.combine == "decoupled":
                parts = [over_mean(p, s * m, config) for p, s, m in zip(parts, signs, means, strict=True)]
            else:
                mean = math.fsum(w * s * m for w, s, m in zip(weights, signs, means, strict=True))
                parts = [over_mean(math.fsum(parts), mean, config)]
        out.append(math.fsum(parts))
    if config.combine == "weighted_sum" and config.scale == "std":
        sums = list(out)
        for i in range(count):
            group = [sums[j] for j in range(count) if group_ids[j] == group_ids[i] and alive[j]]
            out[i] = sums[i] / spread(group, config.min_std)
    if config.whiten or (config.whiten is None and config.combine == "decoupled"):
        known = [a for a, live in zip(out, alive, strict=True) if live]
        centre = math.fsum(known) / len(known) if known else 0.0
        out = [(a - centre) / spread(known, config.min_std) for a in out]
    return [a if live else NAN for a, live in zip(out, alive, strict=True)]


SETTINGS = [
    {"combine": c, "baseline": b, "scale": s, "whiten": w}
    for c, b, s, w in itertools.product(
        ("weighted_sum", "decoupled"), ("group", "leave_one_out", "batch"), ("std", "mean", "none"), (None, True, False)
    )
    if s != "mean" or b == "group"
]


@pytest.mark.parametrize("config", SETTINGS, ids=lambda c: "-".join(str(v) for v in c.values()))
def test_every_combiner_equals_the_oracle_on_ragged_groups_with_missing_values(config):
    random = np.random.default_rng(0)
    for _ in range(20):
        count = int(random.integers(2, 24))
        group_ids = random.integers(0, 5, count)
        scores = random.normal(size=(count, 3)).astype(np.float32)
        scores[random.random(scores.shape) < 0.25] = NAN
        scores[group_ids == 1, 1] = 0.5  # a dead objective
        weights = dict(zip("abc", random.uniform(0, 2, 3).tolist(), strict=True))
        kinds = ["reward", "cost", "reward"]
        got, _, _ = run(scores, group_ids, kinds=kinds, weights=weights, **config)
        want = oracle(
            scores.astype(np.float64).tolist(), group_ids.tolist(), list(weights.values()), [1, -1, 1],
            Objectives(weights=weights, **config),
        )  # fmt: skip
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)
        assert got.dtype == np.float32


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_advantages_do_not_depend_on_the_order_of_samples_or_objectives(data):
    count = data.draw(st.integers(2, 12))
    values = st.one_of(st.just(NAN), st.floats(-5, 5, width=32))
    scores = np.array(data.draw(st.lists(st.tuples(values, values), min_size=count, max_size=count)), np.float32)
    ids = np.array(data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count)))
    order = np.array(data.draw(st.permutations(range(count))))
    kind = data.draw(st.sampled_from(["weighted_sum", "decoupled"]))
    config = {"combine": kind, "weights": {"a": 0.7, "b": 0.2}}
    straight = run(scores, ids, **config)[0]
    shuffled = run(scores[order][:, ::-1], ids[order], names=["b", "a"], **config)[0]
    np.testing.assert_allclose(straight[order], shuffled, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ the rules


def test_grpo_by_hand():
    # mean 0.5, standard deviation of (1, 0, 0, 1) with n - 1 below: sqrt(1 / 3)
    a = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    assert advantages([[1], [0], [0], [1]], [7, 7, 7, 7]) == pytest.approx([a, -a, -a, a], rel=1e-6)
    assert advantages([[1], [0], [0], [1]], [7] * 4, scale="none") == [0.5, -0.5, -0.5, 0.5]


@pytest.mark.parametrize(("size", "rate"), [(2, 0.3), (4, 0.05), (6, 0.5)])
def test_over_the_mean_the_expected_gradient_is_that_of_log_pass_rate_expanded(size, rate):
    """MaxRL (2602.02710): grad p (1 + q + ... + q^(G - 2)), q = 1 - p, for a policy with one logit, grad p = p q."""
    found = 0.0
    for outcomes in itertools.product([0.0, 1.0], repeat=size):
        chance = math.prod(rate if one else 1 - rate for one in outcomes)
        taught = advantages([[one] for one in outcomes], [0] * size, scale="mean")
        found += chance * sum(a * (one - rate) for a, one in zip(taught, outcomes, strict=True)) / size
    wanted = rate * (1 - rate) * sum((1 - rate) ** k for k in range(size - 1))
    assert found == pytest.approx(wanted, rel=1e-5)


def test_leave_one_out_by_hand():
    got = advantages([[3], [1], [2]], [0, 0, 0], baseline="leave_one_out", scale="none")
    assert got == pytest.approx([3 - 1.5, 1 - 2.5, 2 - 2])


def test_equal_advantages_summed_but_one_to_two_decoupled():
    """GDPO's example: totals (0, 1), (0, 2), (1, 2) in groups of two."""
    scores = [[0, 0], [1, 0], [0, 0], [1, 1], [1, 0], [1, 1]]
    ids = [0, 0, 1, 1, 2, 2]
    summed = np.array(advantages(scores, ids))
    assert np.allclose(np.abs(summed), np.abs(summed[0]), rtol=1e-3)
    split = np.array(advantages(scores, ids, combine="decoupled"))
    assert split[1::2] / split[1] == pytest.approx([1, 2, 1], rel=1e-3)


def test_a_missing_value_is_left_out_and_never_a_zero():
    got = advantages([[4, 1], [2, NAN], [NAN, 3]], [0, 0, 0], scale="none")
    assert got == pytest.approx([1 - 1, -1, 1])


def test_a_sample_without_any_value_is_not_trained_and_moves_nobody():
    with_it = advantages([[4.0], [2.0], [NAN]], [0, 0, 0])
    without = advantages([[4.0], [2.0]], [0, 0])
    assert with_it[:2] == without and math.isnan(with_it[2])


def test_min_std_keeps_noise_small_by_default():
    got = advantages([[0.499], [0.501]] * 2, [0, 0, 0, 0])
    assert max(map(abs, got)) < 0.15
    assert max(map(abs, advantages([[0.499], [0.501]] * 2, [0] * 4, combine="decoupled", whiten=False))) < 0.15


def test_a_constant_objective_is_dead_in_its_group_only():
    scores = [[1, 0.1], [1, 0.2], [1, 0.1], [0, 0.1]]
    got, _, metrics = run(scores, [0, 0, 1, 1], combine="decoupled", whiten=False)
    assert metrics["objective/a/dead"] == 0.5 and metrics["objective/b/dead"] == 0.5
    assert metrics["advantage/dead_groups"] == 0.0
    assert np.abs(got).min() > 0.1


def test_rounding_in_a_constant_group_is_no_signal():
    got, _, metrics = run([[0.1]] * 7, [0] * 7, min_std=0.0)
    assert got.tolist() == [0.0] * 7
    assert metrics["advantage/dead_groups"] == 1.0 and metrics["objective/a/dead"] == 1.0


def test_a_group_of_one_has_no_advantage():
    for baseline in ("group", "leave_one_out"):
        for kind in ("weighted_sum", "decoupled"):
            assert advantages([[5.0], [1.0], [2.0]], [0, 1, 1], combine=kind, baseline=baseline, whiten=False)[0] == 0.0


def test_a_cost_enters_with_its_sign_turned_and_is_logged_with_its_own():
    got, _, metrics = run([[2.0], [4.0]], [0, 0], kinds=["cost"], scale="none")
    assert got.tolist() == [1.0, -1.0]
    assert metrics["objective/a/mean"] == 3.0 and metrics["objective/a/correlation"] == pytest.approx(-1.0)


def test_weights_are_by_name_and_one_by_default():
    scores, ids = [[1, 0], [0, 1]], [0, 0]
    assert advantages(scores, ids, weights={"b": 3.0}, scale="none") == [-1.0, 1.0]
    with pytest.raises(RecipeError, match=r"'brevty'.*\n.*a, b") as caught:
        run(scores, ids, weights={"brevty": 1.0})
    assert caught.value.where == "objectives.weights.brevty"


def test_one_infinite_score_is_an_error():
    with pytest.raises(RewardError, match=r"sample 1 \(group 4\) on 'a' is inf"):
        run([[1.0], [math.inf]], [4, 4])


def test_whitening_is_over_the_samples_that_are_trained():
    got = np.array(advantages([[1], [0], [3], [0], [NAN]], [0, 0, 1, 1, 1], scale="none", whiten=True))
    assert math.isnan(got[4])
    assert got[:4].mean() == pytest.approx(0, abs=1e-6) and got[:4].std(ddof=1) == pytest.approx(1, rel=1e-3)


def test_metrics_say_what_was_missing_and_how_scores_vary():
    _, state, metrics = run([[1, NAN], [0, 2], [NAN, NAN], [1, 2]], [0, 0, 1, 1])
    assert metrics["objective/a/mean"] == pytest.approx(2 / 3)
    assert metrics["objective/a/std"] == pytest.approx(math.sqrt(2 / 9))
    assert metrics["objective/a/missing"] == 0.25 and metrics["objective/b/missing"] == 0.5
    assert metrics["objective/b/dead"] == 1.0 and metrics["advantage/missing"] == 0.25
    assert metrics["advantage/dead_groups"] == 0.5
    assert state == {} and all(math.isfinite(v) for v in metrics.values())


def test_an_empty_step_and_a_step_of_failures_have_no_advantage_and_finite_metrics():
    got, _, metrics = run(np.zeros((0, 2)), [])
    assert got.shape == (0,) and metrics == {"objective/a/weight": 1.0, "objective/b/weight": 1.0}
    got, _, metrics = run([[NAN], [NAN]], [0, 0], combine="decoupled")
    assert np.isnan(got).all()
    assert metrics == {"objective/a/missing": 1.0, "advantage/missing": 1.0, "objective/a/weight": 1.0}


def test_the_state_is_passed_on():
    _, state, _ = combine(np.zeros((2, 1)), np.zeros(2, np.int64), ["a"], ["reward"], Objectives(), {"x": 1}, 3)
    assert state == {"x": 1}
