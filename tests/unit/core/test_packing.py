"""Packing lays trees down once and loses nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.packing import collate, global_counts, plan_microbatches
from align.errors import DataError
from align.protocols import Segment, Tree
from tests.unit.core.trees import conversation, group, pair


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 12), budget=st.integers(10, 60))
def test_every_sequence_is_in_exactly_one_microbatch_within_the_budget(seed: int, n: int, budget: int) -> None:
    rng = np.random.default_rng(seed)
    trees = [group(rng, i, size=int(rng.integers(1, 6))) for i in range(n)]
    microbatches = plan_microbatches(trees, budget, keep_together=False)
    found = [(tree.id, branch.token_ids.tobytes()) for mb in microbatches for tree in mb for branch in tree.branches]
    expected = [(tree.id, branch.token_ids.tobytes()) for tree in trees for branch in tree.branches]
    assert sorted(found) == sorted(expected)
    for mb in microbatches:
        size = sum(tree.tokens for tree in mb)
        single = len(mb) == 1 and len(mb[0].branches) == 1
        assert size <= budget or single, "only one completion that cannot be split may exceed the budget"


def test_packing_does_not_depend_on_the_order_of_arrival() -> None:
    rng = np.random.default_rng(0)
    trees = [conversation(rng, i) for i in range(20)]
    plan = [[tree.id for tree in mb] for mb in plan_microbatches(trees, 40, keep_together=False)]
    shuffled = [trees[i] for i in rng.permutation(20)]
    assert plan == [[tree.id for tree in mb] for mb in plan_microbatches(shuffled, 40, keep_together=False)]


def test_pairs_stay_together_even_over_the_budget() -> None:
    rng = np.random.default_rng(1)
    plan = plan_microbatches([pair(rng, i) for i in range(6)], 5, keep_together=True)
    assert [len(mb) for mb in plan] == [1] * 6
    assert all(len(mb[0].branches) == 2 for mb in plan)


def test_a_trunk_stands_once_and_branches_continue_its_positions() -> None:
    tree = Tree(
        0,
        Segment(np.array([5, 6, 7]), np.zeros(3, bool)),
        (Segment(np.array([8, 9]), np.ones(2, bool)), Segment(np.array([10]), np.ones(1, bool))),
    )
    batch = collate([tree])
    assert batch.token_ids.tolist() == [5, 6, 7, 8, 9, 10]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 3]
    assert batch.labels.tolist() == [8, 9, 10]
    assert batch.predict_at.tolist() == [2, 3, 2], "a branch's first token is predicted by the trunk's last"
    assert batch.sequence_ids.tolist() == [0, 0, 1]
    assert batch.parent_start.tolist() == [-1, 0, 0] and batch.parent_end.tolist() == [-1, 3, 3]
    assert batch.pairs.tolist() == [[0, 1]]


def test_scoring_the_very_first_token_is_refused_with_its_row() -> None:
    tree = Tree(0, Segment(np.array([1, 2]), np.ones(2, bool)), origin="rows.jsonl:7")
    with pytest.raises(DataError, match=r"rows\.jsonl:7"):
        collate([tree])


def test_counts_are_of_the_whole_update_and_a_masked_completion_is_no_sequence() -> None:
    rng = np.random.default_rng(2)
    tree = group(rng, 0, size=3)
    masked = replace(tree.branches[0], loss_mask=np.zeros(len(tree.branches[0]), bool))
    tree = replace(tree, branches=(masked, *tree.branches[1:]))
    counts = global_counts([tree])
    assert counts.sequences == 2
    assert counts.tokens == sum(len(b) for b in tree.branches[1:])
