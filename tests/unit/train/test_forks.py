"""Episodes that began anew, through a model: every sampled token is scored with the context in which it was sampled,
in every layout, and a whole update is that of its turns computed one by one."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from align.data.packing import collate, global_counts
from align.losses import configure
from align.losses.base import LossInputs
from align.protocols.trees import REPEATED, Segment, Tree
from align.stages.updates import carrying
from align.train.trainer import PolicyTrainer
from align.types import HeadOutputs
from tests.unit.core.families import make_family
from tests.unit.train.test_trainer import FULL, make_spec

LOSSES: list[dict[str, Any]] = [
    {},
    {"ratio": "sequence", "aggregation": "sequence"},
    {"ratio": "sequence", "aggregation": "sequence_sum"},
    {"aggregation": "constant", "constant_length": 16, "correction": {"level": "sequence", "cap": 1.3}},
    {"off_policy_threshold": 0.02, "correction": "off"},
]


def branch(rng: np.random.Generator, sizes: tuple[int, int], *, follows: bool, advantage: float) -> Segment:
    """sizes: tokens that are repeated, and those that are sampled; two of an answer follow."""
    repeated, said = sizes
    n = repeated + said + 2
    mask = (np.arange(n) >= repeated) & (np.arange(n) < repeated + said)
    versions = np.where(mask, 0, np.where(np.arange(n) < repeated, REPEATED, -1)).astype(np.int32)
    return Segment(
        rng.integers(0, 97, n),
        mask,
        advantages=np.where(mask, np.float32(advantage), np.float32(0)),
        behavior_logps=np.where(mask, rng.normal(-4.5, 0.2, n), 0).astype(np.float32),
        versions=versions,
        follows=follows,
    )


def episodes(seed: int = 2) -> list[Tree]:
    rng = np.random.default_rng(seed)
    trees = []
    for number in range(3):
        branches = []
        for turns in (1, 3, 2):
            advantage = float(rng.normal())
            sizes = [(0 if t == 0 else int(rng.integers(2, 9)), int(rng.integers(1, 7))) for t in range(turns)]
            branches += [branch(rng, one, follows=t > 0, advantage=advantage) for t, one in enumerate(sizes)]
        trunk = Segment(rng.integers(0, 97, 6), np.zeros(6, bool))
        trees.append(Tree(5 * number + 2, trunk, tuple(branches)))
    return trees


def each_alone(trees: list[Tree]) -> list[Tree]:
    """Every branch behind its trunk, in a tree of one segment without anything shared."""
    found = []
    for tree in trees:
        for one in tree.branches:
            whole: dict[str, Any] = {}
            for name in ("token_ids", "loss_mask", "advantages", "behavior_logps", "versions"):
                own = getattr(one, name)
                head = getattr(tree.trunk, name)
                head = np.zeros(len(tree.trunk), own.dtype) if head is None else head
                whole[name] = np.concatenate([head, own])
            found.append(Tree(len(found), Segment(**whole)))
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for family in ("qwen3", "qwen3_5_text"):
        found[family] = tmp_path_factory.mktemp(family)
        make_family(family).save_pretrained(found[family])
    return found


@pytest.mark.parametrize("layout", ["shared", "padded", "alone"])
@pytest.mark.parametrize("max_tokens", [1, 10_000])
def test_log_probabilities_are_those_of_each_turn_with_its_own_context(
    folders: dict[str, Path], layout: Any, max_tokens: int
) -> None:
    family = "qwen3_5_text" if layout == "padded" else "qwen3"
    trainer = PolicyTrainer(make_spec(folders[family], "grpo", FULL, max_tokens=max_tokens))
    trainer.module.double()
    trainer.module.use(layout, trainer.module.attention)
    trees = episodes()
    found = [values for tree in trainer.logps(trees) for values in tree]
    expected = [values for tree in trainer.logps(each_alone(trees)) for values in tree]
    assert len(found) == len(expected) == sum(len(tree.branches) for tree in trees)
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-6)


def flat(trainer: PolicyTrainer) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in trainer.module.parameters() if p.grad is not None])


@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_loss_and_gradient_are_those_of_each_turn_computed_alone(folders: dict[str, Path], options: Any) -> None:
    """In float64: every turn runs alone with its own context; the loss then sees all their tokens at once."""
    trainer = PolicyTrainer(make_spec(folders["qwen3"], "grpo", FULL))
    trainer.module.double()
    trainer.module.eval()
    trees, loss = episodes(), configure("grpo", options)
    counts = global_counts(trees)
    assert counts.sequences == 9
    batch = collate(trees)
    batch.advantages, batch.behavior_logps = batch.advantages.double(), batch.behavior_logps.double()

    def values(outputs: HeadOutputs) -> tuple[float, torch.Tensor]:
        trainer.module.zero_grad()
        start = outputs.logps.detach() + 0.05 * torch.sin(batch.labels.double())
        proximal = start if loss.needs.ratio == "proximal" else None
        result = loss(LossInputs(outputs, batch, counts, None, proximal))
        result.loss.backward()
        return result.loss.item(), flat(trainer)

    names = loss.needs.head
    together = values(trainer.module(batch, names))
    rows = [trainer.module(collate([tree]), names) for tree in each_alone(trees)]
    apart = values(
        HeadOutputs(
            torch.cat([row.logps for row in rows]),
            **{name: torch.cat([getattr(row, name) for row in rows]) for name in names},
        )
    )
    assert together[0] == pytest.approx(apart[0], rel=1e-6)
    assert float(together[1].norm()) > 1e-3
    assert float((together[1] - apart[1]).norm() / apart[1].norm()) < 1e-5


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_text"])
def test_an_update_is_the_same_in_any_microbatches(folders: dict[str, Path], family: str) -> None:
    def updated(max_tokens: int) -> dict[str, float]:
        spec = make_spec(folders[family], "grpo", FULL, loss_options=LOSSES[1], max_tokens=max_tokens)
        trainer = PolicyTrainer(spec)
        trees = episodes()
        proximal = [carrying(t, v) for t, v in zip(trees, trainer.logps(trees), strict=True)]
        return trainer.step(proximal, step=0, progress=0.0)

    one, many = updated(10_000), updated(1)
    assert many["train/microbatches"] == 9 > one["train/microbatches"] == 1
    assert one["policy/ratio"] == pytest.approx(1, abs=1e-5)
    for name in ("loss/total", "optim/grad_norm", "mismatch/kl", "mismatch/ess"):
        assert math.isfinite(one[name])
        assert many[name] == pytest.approx(one[name], rel=2e-4, abs=1e-6), name


def test_a_part_of_an_episode_changes_what_its_losses_say() -> None:
    """What the tests above would not see if branches were sequences: here they are, and the counts differ."""
    trees = episodes()
    apart = [replace(t, branches=tuple(replace(b, follows=False) for b in t.branches)) for t in trees]
    assert global_counts(apart).sequences == 18
