"""Rows that begin alike are computed as one tree, and stay the rows they were."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.packing import global_counts
from align.data.prefixes import LEAST, share_prefixes
from align.protocols.trees import Medium, Segment, Tree

Row = tuple[tuple[int, ...], tuple[bool, ...], tuple[tuple[str, int], ...], tuple[tuple[str, float], ...]]


def row(id: int, tokens: list[int], scored: int = 2, **columns: float) -> Tree:
    """A conversation whose last `scored` tokens are."""
    mask = np.arange(len(tokens)) >= len(tokens) - scored
    return Tree(id, Segment(np.array(tokens), mask, columns=columns), origin=f"rows:{id}")


def rows_of(trees: list[Tree]) -> list[Row]:
    """Every sequence as its tokens, what is scored of them, its media and its columns."""
    found: list[Row] = []
    for tree in trees:
        for branch in tree.branches or (None,):
            parts = [tree.trunk] if branch is None else [tree.trunk, branch]
            tokens = np.concatenate([part.token_ids for part in parts])
            mask = np.concatenate([part.loss_mask for part in parts])
            media, offset = [], 0
            for part in parts:
                media += [(medium.key, medium.start + offset) for medium in part.media]
                offset += len(part)
            columns = tuple(sorted(parts[-1].columns.items()))
            found.append((tuple(tokens.tolist()), tuple(mask.tolist()), tuple(media), columns))
    return sorted(found)


def computed(trees: list[Tree]) -> int:
    return sum(tree.tokens for tree in trees)


def test_questions_under_one_beginning_are_one_tree() -> None:
    beginning = list(range(100, 130))
    trees = [row(n, [*beginning, n, 50, 60 + n], desirable=float(n)) for n in range(4)]
    [joined] = share_prefixes(trees[::-1])
    assert (joined.id, joined.origin) == (0, "rows:0")
    assert joined.trunk.token_ids.tolist() == beginning and not joined.trunk.columns
    assert [branch.token_ids[0] for branch in joined.branches] == [0, 1, 2, 3], "branches stand in order of id"
    assert rows_of([joined]) == rows_of(trees)
    assert joined.tokens == 30 + 4 * 3


def test_short_beginnings_stay_apart() -> None:
    trees = [row(n, [*range(LEAST - 1), 90 + n, 50, 60]) for n in range(3)]
    assert share_prefixes(trees) == trees


def test_what_is_scored_is_never_shared() -> None:
    same = [*range(100, 140)]
    early = replace(row(0, same), trunk=Segment(np.array(same), np.arange(40) >= 20))
    [joined] = share_prefixes([early, row(1, same)])
    assert len(joined.trunk) == 20 and not joined.trunk.loss_mask.any()
    assert global_counts([joined]).tokens == 20 + 2


def test_tokens_of_the_nll_term_count_as_scored() -> None:
    same = np.arange(100, 140)
    trees = [Tree(n, Segment(same, np.arange(40) >= 38, nll_mask=np.arange(40) >= 25)) for n in range(2)]
    [joined] = share_prefixes(trees)
    assert len(joined.trunk) == 25
    assert all(branch.nll_mask is not None and branch.nll_mask.all() for branch in joined.branches)


def test_equal_placeholders_of_other_pictures_are_another_beginning() -> None:
    tokens = [1, 2, *[7] * 20, 3, *range(30, 50), 60]

    def with_picture(id: int, key: str) -> Tree:
        tree = row(id, [*tokens, id])
        return replace(tree, trunk=replace(tree.trunk, media=(Medium("image", key, "store", 2, 20, 80),)))

    trees = [with_picture(0, "a"), with_picture(1, "b"), with_picture(2, "a")]
    joined = share_prefixes(trees)
    assert [len(tree.sequences) for tree in joined] == [2, 1]
    assert [medium.key for medium in joined[0].media] == ["a"], "the picture is computed once"
    assert rows_of(joined) == rows_of(trees)


def test_one_tree_for_all_or_several_deeper_ones_whichever_computes_less() -> None:
    system, deep = list(range(100, 120)), list(range(200, 300))
    few = [row(n, [*system, *deep, n, 1, 2]) for n in range(3)]
    assert [len(t.sequences) for t in share_prefixes([*few, row(9, [*system, 9, 1, 2])])] == [3, 1]
    many = [row(10 + n, [*system, 10 + n, 1, 2]) for n in range(30)]
    assert [len(t.sequences) for t in share_prefixes([*few[:1], *many])] == [31]


def test_a_prompt_and_its_completions_join_with_their_values() -> None:
    prompt = Segment(np.arange(100, 120), np.zeros(20, dtype=bool))
    ones = np.ones(3, dtype=bool)
    trees = [
        Tree(
            n,
            prompt,
            (
                Segment(
                    np.array([1, 2, 10 + n]),
                    ones,
                    reference_logps=np.full(3, -float(n + 1), dtype=np.float32),
                    columns={"desirable": float(n)},
                ),
            ),
        )
        for n in range(2)
    ]
    [joined] = share_prefixes(trees)
    assert rows_of([joined]) == rows_of(trees)
    given = [branch.reference_logps for branch in joined.branches]
    assert [values.tolist() for values in given if values is not None] == [[-1.0] * 3, [-2.0] * 3]


def test_pairs_and_groups_stay_as_they_are() -> None:
    prompt = Segment(np.arange(100, 120), np.zeros(20, dtype=bool))
    branch = Segment(np.array([1, 2]), np.ones(2, dtype=bool))
    pair = Tree(3, prompt, (branch, branch))
    assert share_prefixes([pair, Tree(4, prompt, (branch, branch))])[0] is pair


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=2, max_size=7), st.integers(0, 2)), min_size=1, max_size=7),
    st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_every_row_is_kept_and_no_token_more_is_computed(drawn: list, order) -> None:  # type: ignore[type-arg, no-untyped-def]
    trees = [row(n, tokens, scored=min(scored, len(tokens) - 1)) for n, (tokens, scored) in enumerate(drawn)]
    joined = share_prefixes(trees, least=1)
    assert rows_of(joined) == rows_of(trees)
    shuffled = trees[:]
    order.shuffle(shuffled)
    again = share_prefixes(shuffled, least=1)
    assert [t.trunk.token_ids.tolist() for t in again] == [t.trunk.token_ids.tolist() for t in joined]
    assert computed(joined) <= min(computed(trees), _as_one_tree(trees))


def _as_one_tree(trees: list[Tree]) -> int:
    """Tokens of all rows under one trunk, of all that they share."""
    members = [tree.trunk for tree in trees]
    ends = [min(int(m.loss_mask.argmax()) if m.loss_mask.any() else len(m), len(m) - 1) for m in members]
    shared = 0
    while shared < min(ends) and len({m.token_ids[shared] for m in members}) == 1:
        shared += 1
    return computed(trees) - (len(trees) - 1) * shared
