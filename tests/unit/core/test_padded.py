"""A row a sequence: rows of similar length together, little padding, and every hidden state found again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from align.data.packing import collate, mark_nll
from align.model.padded import MAX_PADDING, blocks_of, hidden_states, sequences_of
from align.model.policy_module import PolicyModule
from align.protocols.trees import Segment, Tree
from tests.unit.core.families import make_family
from tests.unit.core.trees import conversation, group, pair, unpaired


def some_trees() -> list[Tree]:
    rng = np.random.default_rng(2)
    no_trunk = Tree(3, Segment(np.zeros(0, np.int64), np.zeros(0, bool)), (conversation(rng, 0).trunk,))
    return [pair(rng, 0), conversation(rng, 1), group(rng, 2), no_trunk, unpaired(rng, 4)]


def test_every_sequence_is_a_row_trunk_first() -> None:
    trees = some_trees()
    batch = collate(trees)
    wanted = [
        [*tree.trunk.token_ids, *(branch.token_ids if branch else ())]
        for tree in trees
        for branch in tree.branches or (None,)
    ]
    rows = sequences_of(batch)
    assert [batch.token_ids[row].tolist() for row in rows] == wanted
    assert all(batch.position_ids[row].tolist() == list(range(len(row))) for row in rows)


def test_rows_are_computed_together_only_where_padding_stays_small() -> None:
    rng = np.random.default_rng(0)
    rows = [torch.arange(int(n)) for n in rng.integers(1, 2000, 60)]
    blocks, order = blocks_of(rows)
    assert sorted(order) == list(range(60)) and len(blocks) < 40
    lengths = iter(len(rows[n]) for n in order)
    for block in blocks:
        real = (block.past == 0).sum(1)
        assert [int(n) for n in real] == [next(lengths) for _ in range(len(real))]
        assert block.index.shape[1] <= (1 + MAX_PADDING) * int(real.min())


@pytest.mark.parametrize("nll", ["none", "prompt_and_chosen"])
def test_any_tokens_hidden_states_are_found_in_any_order(nll: str) -> None:
    """Scored prompts (ORPO), and a shuffled selection with repetitions, as the shared layout has them."""
    module = PolicyModule(make_family("qwen3"))
    batch = collate([mark_nll(tree, nll) for tree in some_trees()])
    backbone = module.model.base_model
    at = torch.randint(0, batch.token_ids.numel(), (50,), generator=torch.Generator().manual_seed(0))
    shared, logps = module._hidden(batch, at, torch.zeros_like(at)), module(batch).logps
    module.use("padded", "sdpa")
    torch.testing.assert_close(hidden_states(backbone, batch, at), shared, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(module(batch).logps, logps, atol=1e-5, rtol=1e-5)
    assert hidden_states(backbone, batch, at[:0]).shape == (0, 32)
