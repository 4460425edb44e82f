"""Packing lays trees down once and loses nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.microbatches import plan_microbatches, plan_ranks
from align.data.packing import collate, global_counts
from align.errors import DataError
from align.protocols.trees import Medium, Segment, Tree
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


def pictured(tree: Tree, patches: int, in_branches: int = 0) -> Tree:
    """The tree with a picture in its trunk, and one in each branch where `in_branches` is more than 0."""

    def medium(n: int) -> tuple[Medium, ...]:
        return (Medium("image", f"{tree.id}-{n}", "/store", 0, 1, n),) if n else ()

    branches = tuple(replace(branch, media=medium(in_branches)) for branch in tree.branches)
    return replace(tree, trunk=replace(tree.trunk, media=medium(patches)), branches=branches)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 12), limit=st.integers(4, 40), ranks=st.integers(1, 3))
def test_no_microbatch_has_more_patches_than_its_budget_unless_it_cannot_be_split(
    seed: int, n: int, limit: int, ranks: int
) -> None:
    rng = np.random.default_rng(seed)
    trees = [pictured(group(rng, i, 3), int(rng.integers(0, 5)), int(rng.integers(0, 3))) for i in range(n)]
    plan = plan_ranks(trees, 60, keep_together=False, ranks=ranks, max_patches=limit)
    parts = [part.trees for share in plan for part in share if part.counted]
    found = sorted((tree.id, id(branch.token_ids)) for part in parts for tree in part for branch in tree.branches)
    assert found == sorted((tree.id, id(branch.token_ids)) for tree in trees for branch in tree.branches)
    for together in zip(*plan, strict=True):  # towers run on every rank, or on none
        busy = [bool(part.idle_media) or any(tree.media for tree in part.trees) for part in together]
        assert len(set(busy)) == 1
        assert not any(part.idle_media and any(tree.media for tree in part.trees) for part in together)
    for part in parts:
        single = len(part) == 1 and len(part[0].branches) == 1
        assert single or (sum(t.patches for t in part) <= limit and sum(t.tokens for t in part) <= 60)


def test_a_group_whose_picture_exceeds_the_patch_budget_is_not_split_for_it() -> None:
    """Every part would compute the picture again."""
    tree = pictured(group(np.random.default_rng(0), 0, 6), 50)
    [[whole]] = plan_microbatches([tree], 1000, keep_together=False, max_patches=8)
    assert whole is tree
    [[alone], [other]] = plan_microbatches(
        [tree, pictured(group(np.random.default_rng(1), 1, 2), 4)], 1000, keep_together=False, max_patches=8
    )
    assert alone is tree and other.id == 1


def test_a_row_says_where_its_media_stand() -> None:
    def segment(n: int, *starts: int) -> Segment:
        media = tuple(Medium("image", f"k{start}", "/store", start, 2, 4) for start in starts)
        return Segment(np.arange(n), np.zeros(n, bool), media=media)

    batch = collate([Tree(0, segment(6, 1, 3), (segment(4), segment(5, 2))), Tree(1, segment(4, 0))]).to("cpu")
    assert [medium.key for medium in batch.media] == ["k1", "k3", "k2", "k0"]
    assert batch.media_at == (1, 3, 12, 15)


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
