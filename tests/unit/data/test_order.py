"""Which rows each step sees."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.data.order import BatchPlan, epoch_order
from align.recipe.stages import PreferenceStage, SftStage


def test_an_epoch_is_a_permutation_fixed_by_seed_and_epoch() -> None:
    order = epoch_order(8, seed=1, epoch=0)
    assert order.dtype == np.int64 and sorted(order.tolist()) == list(range(8))
    assert order.tolist() == [1, 5, 0, 3, 4, 7, 2, 6], "changed orders break the resumption of existing runs"
    assert not np.array_equal(epoch_order(100, 1, 0), epoch_order(100, 1, 1))
    assert not np.array_equal(epoch_order(100, 1, 0), epoch_order(100, 2, 0))


def test_permutations_are_spread_evenly() -> None:
    first = np.array([epoch_order(10, seed, 0)[0] for seed in range(5000)])
    counts = np.bincount(first, minlength=10)
    chi_square = float(((counts - 500) ** 2 / 500).sum())
    assert chi_square < 33.7  # 9 degrees of freedom, p = 1e-4


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 3), st.integers(0, 3))
def test_every_epoch_sees_every_row_once_and_no_batch_is_too_small(n: int, size: int, epochs: int, seed: int) -> None:
    minimum = min(2, size, n)
    plan = BatchPlan(n, size, seed, epochs=epochs, minimum=minimum)
    assert plan.total == epochs * plan.per_epoch
    for epoch in range(epochs):
        batches = [plan.batch(epoch * plan.per_epoch + k) for k in range(plan.per_epoch)]
        assert sorted(np.concatenate(batches).tolist()) == list(range(n))
        assert all(minimum <= len(b) <= size + plan.joined for b in batches)
        assert all(len(b) == size for b in batches[:-1])


def test_a_last_batch_below_the_minimum_joins_the_one_before() -> None:
    plan = BatchPlan(9, 4, 0, epochs=1, minimum=2)
    assert [len(plan.batch(k)) for k in range(plan.total)] == [4, 5] and plan.joined == 1
    plan = BatchPlan(9, 4, 0, epochs=1)
    assert [len(plan.batch(k)) for k in range(plan.total)] == [4, 4, 1] and plan.joined == 0


def test_steps_and_fractions_of_epochs_give_the_length() -> None:
    assert BatchPlan(10, 4, 0, epochs=0.5).total == 2
    assert BatchPlan(10, 4, 0, epochs=0.01).total == 1
    assert BatchPlan(10, 4, 0, steps=7).total == 7
    assert len(BatchPlan(10, 4, 0, steps=7).batch(6)) == 4
    with pytest.raises(ValueError, match="`epochs` or `steps`"):
        BatchPlan(10, 4, 0)
    with pytest.raises(ValueError, match="need rows"):
        BatchPlan(0, 4, 0, steps=1)


def test_plans_follow_the_recipes_stage() -> None:
    sft = SftStage.model_validate({"id": "s", "kind": "sft", "data": "x", "batch": {"sequences": 4}, "epochs": 2})
    assert BatchPlan.of(sft, 10, 7) == BatchPlan(10, 4, 7, epochs=2)
    dpo = PreferenceStage.model_validate({"id": "p", "kind": "preference", "data": "x", "batch": {"pairs": 3}})
    assert BatchPlan.of(dpo, 10, 7) == BatchPlan(10, 3, 7, epochs=1.0)
    steps = dpo.model_copy(update={"steps": 5})
    assert BatchPlan.of(steps, 10, 7, minimum=2) == BatchPlan(10, 3, 7, steps=5, minimum=2)
