"""Values by sequence are the same whether rows that begin alike are computed as one tree or each alone, for everyone
who asks for them: reference passes, reward models, the classify verb, and losses over the whole batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from align.data.packing import collate
from align.data.prefixes import placed, share_prefixes
from align.protocols.trees import Segment, Tree
from align.train.prepass import run_prepass
from align.train.spec import scoring_spec
from align.train.trainer import PolicyTrainer
from align.types import HeadOutputs, TokenBatch
from tests.unit.core.test_forward import make_model
from tests.unit.core.trees import conversation, pair, segment, unpaired
from tests.unit.train.test_trainer import make_spec


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_model("qwen3")
    model.config.pad_token_id = 0  # by which a score head's users find the end of a sequence
    folder = tmp_path_factory.mktemp("base") / "model"
    model.save_pretrained(folder)
    return folder


def alike(kind: str, rows: int = 7) -> list[Tree]:
    """Rows of which the first four begin with the same 12 tokens, two of those with 9 more, and the others with
    nothing; ids stand in another order than the rows, and two rows are equal."""
    rng = np.random.default_rng(6)
    start, more = segment(rng, 12, scored=False).token_ids, segment(rng, 9, scored=False).token_ids
    trees = []
    for n in range(rows):
        head = [start, more] if n in (1, 3) else [start] if n < 4 else [segment(rng, 3, scored=False).token_ids]
        if kind == "unpaired":
            tree = unpaired(rng, 0)
            ids = np.concatenate([*head, tree.trunk.token_ids])
            tree = replace(tree, trunk=Segment(ids, np.zeros(len(ids), bool)))
        else:
            tail = conversation(rng, 0).trunk
            ids = np.concatenate([*head, tail.token_ids])
            mask = np.concatenate([np.zeros(len(ids) - len(tail), bool), tail.loss_mask])
            tree = Tree(0, Segment(ids, mask))
        trees.append(replace(tree, id=(5 * n + 3) % 11))
    return [*trees, replace(trees[2], id=40)]


def asked(trainer: PolicyTrainer, trees: list[Tree], what: str) -> list[list[np.ndarray]]:
    return trainer.logps(trees) if what == "logps" else trainer.scores(trees)


CASES = [
    ("logps", "conversation", "sft", {}),
    ("logps", "unpaired", "kto", {"variant": "apo_zero_unpaired"}),
    ("logps", "unpaired", "kto", {}),
    ("scores", "conversation", "classify", {}),
]


@pytest.mark.parametrize("max_tokens", [10_000, 30])
@pytest.mark.parametrize(("what", "kind", "loss", "options"), CASES)
def test_values_of_rows_that_begin_alike_are_those_of_each_row_alone(
    base: Path,
    what: str,
    kind: str,
    loss: str,
    options: dict[str, str],
    max_tokens: int,
) -> None:
    spec = make_spec(base, loss, loss_options=options, reference="cached" if loss == "kto" else None)
    if loss == "classify":
        spec = scoring_spec(base, None, dtype="float32", device="cpu", gpu=False)
    trainer = PolicyTrainer(replace(spec, max_tokens=max_tokens))
    trees = alike(kind)
    assert trainer.packer.shares_prefixes and len(share_prefixes(trees)) < len(trees)
    together = asked(trainer, trees, what)
    for tree, own in zip(trees, together, strict=True):
        [alone] = asked(trainer, [tree], what)
        assert len(own) == len(alone) == 1 and own[0].shape == alone[0].shape
        np.testing.assert_allclose(own[0], alone[0], rtol=1e-4, atol=2e-6)
    backwards = asked(trainer, trees[::-1], what)
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(together, backwards[::-1], strict=True))


@pytest.mark.parametrize("max_tokens", [10_000, 1])
def test_values_of_pairs_and_of_groups_cut_between_branches_keep_their_order(
    base: Path,
    max_tokens: int,
) -> None:
    rng = np.random.default_rng(4)
    trees = [replace(pair(rng, i), id=9 - i) for i in range(4)]
    wide = Tree(20, segment(rng, 6, scored=False), tuple(segment(rng, 2 + k, scored=True) for k in range(5)))
    trainer = PolicyTrainer(make_spec(base, "grpo", max_tokens=max_tokens))
    found = trainer.logps([*trees, wide])
    for tree, own in zip([*trees, wide], found, strict=True):
        assert [len(values) for values in own] == [len(branch) for branch in tree.branches]
        for k, branch in enumerate(tree.branches):
            [[alone]] = trainer.logps([replace(tree, branches=(branch,))])
            np.testing.assert_allclose(own[k], alone, rtol=1e-4, atol=2e-6)


def test_a_pass_over_the_whole_batch_knows_each_rows_tree_when_rows_are_joined() -> None:
    """`Prepass.ids` is what a loss of scope "batch" finds its rows by."""
    trees = alike("unpaired")
    joined = share_prefixes(trees)
    assert len(joined) < len(trees)

    def forward(batch: TokenBatch) -> HeadOutputs:
        return HeadOutputs(-batch.labels.float())

    found, apart = (run_prepass([(collate(some), True)], forward, lambda batch: None) for some in (joined, trees))
    assert torch.equal(found.ids, apart.ids) and torch.equal(found.logps, apart.logps)
    assert found.ids.tolist() == sorted(tree.id for tree in trees)


def test_a_sequence_keeps_its_place_through_joining_and_rendering_apart() -> None:
    trees = [placed(tree) for tree in alike("conversation")]
    assert [tree.trunk.place for tree in trees] == [(tree.id, 0) for tree in trees]
    places = [s.place for tree in share_prefixes(trees) for s in tree.sequences]
    assert sorted(place for place in places if place) == sorted((tree.id, 0) for tree in trees)
    assert all(tree.trunk.place is None for tree in share_prefixes(trees) if tree.branches)
