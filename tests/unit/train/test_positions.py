"""What a loss makes of several rows may be longer than any of them, and than the model's positions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from align.data.prefixes import cut
from align.protocols.trees import Medium, Segment, Tree
from align.recipe.adapter import Adapter
from align.train.prepass import within
from align.train.trainer import PolicyTrainer
from tests.unit.core.trees import segment
from tests.unit.train.test_trainer import make_spec

POSITIONS = 32


def row(rng: np.random.Generator, id: int, prompt: int, answer: int) -> Tree:
    branch = replace(segment(rng, answer, scored=True), columns={"desirable": float(id % 2)})
    return Tree(id, segment(rng, prompt, scored=False), (branch,))


def moved(trainer: PolicyTrainer, trees: list[Tree], seed: int) -> float:
    """The mean log-ratio of the trees' answers under an adapter drawn from `seed`."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in trainer.parameters:
            parameter.normal_(0, 0.5)
    policy = trainer.logps(trees)
    with trainer.policy.reference():
        reference = trainer.logps(trees)
    return float(np.mean([(p[0] - r[0]).sum() for p, r in zip(policy, reference, strict=True)]))


def test_ktos_reference_point_needs_no_positions_that_the_model_has_not(tmp_path: Path) -> None:
    """A table of positions ends: the step failed where a long completion was matched with a long prompt."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_embd=16, n_layer=2, n_head=2, n_positions=POSITIONS, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    spec = make_spec(tmp_path, "kto", Adapter(rank=2, targets=("c_attn",)), reference="start", loss_options={"beta": 1})
    trainer = PolicyTrainer(spec)
    rng = np.random.default_rng(1)
    trees = [row(rng, 0, 24, 6), row(rng, 1, 3, 25), row(rng, 2, 5, 20)]
    made = [
        replace(own, branches=(cut(other.branches[0], 0, room),))
        for own, other, room in zip(trees, [*trees[1:], trees[0]], (8, 20, 6), strict=True)
    ]
    estimate = next(mean for seed in range(20) if (mean := moved(trainer, made, seed)) > 0.05)
    found = trainer.step(trees, step=0, progress=0.0)["policy/reference_point"]
    np.testing.assert_allclose(found, estimate, rtol=1e-4)


def test_what_fits_and_a_model_without_a_limit_are_left_as_they_are() -> None:
    rng = np.random.default_rng(0)
    trees = [row(rng, 0, 24, 8), row(rng, 1, 3, 29)]
    for limit in (POSITIONS, None):
        assert [tree.tokens for tree in within(trees, limit)] == [32, 32]
    assert [tree.tokens for tree in within(trees, 25)] == [25, 25]
    assert [len(tree.branches[0]) for tree in within(trees, 20)] == [1, 17]  # no completion is lost


def test_a_cut_through_a_picture_leaves_the_picture_out() -> None:
    ids, pictures = np.arange(20), (Medium("image", "a", "/store", 2, 3, 4), Medium("image", "b", "/store", 8, 6, 4))
    shown = Segment(ids, ids > 15, media=pictures)
    for start, end, length, places in ((0, 10, 8, [2]), (0, 14, 14, [2, 8]), (8, 20, 12, [0])):
        part = cut(shown, start, end)
        assert (len(part), [medium.start for medium in part.media]) == (length, places)
