"""Episodes that began anew: several branches of a tree are one sequence for every loss over groups, to float64.

What is compared with: the episode as if each of its turns had been sampled in one branch. The forward of these tests
gives a token a value by its own number, so that losses see the same values either way and must give the same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from align.data.microbatches import plan_microbatches, plan_ranks
from align.data.packing import collate, global_counts, mark_nll, twins
from align.losses import configure
from align.losses.base import LossInputs
from align.protocols.fleet import Completion, Episode, Fork, Group, PromptItem
from align.protocols.scorer import ScoreTable
from align.protocols.trees import REPEATED, Segment, Tree
from align.stages.groups import group_metrics, to_trees
from align.stages.rollout_log import RolloutLog, read_table
from align.train.metrics import MetricSums
from align.train.prepass import run_prepass
from align.types import HeadOutputs, TokenBatch
from tests.unit.losses.test_splits import CASES

VOCABULARY = 4096
GROUP = [(name, options) for name in ("grpo", "echo") for options in CASES[name]]


def turns(rng: np.random.Generator, count: int, first: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Sampled ids of each turn and what the environment answers; every token of an episode has a number of its own."""
    found, at = [], first
    for _ in range(count):
        said, told = int(rng.integers(1, 6)), int(rng.integers(1, 4))
        found.append((np.arange(at, at + said), np.arange(at + said, at + said + told)))
        at += said + told
    return found


def sequence(parts: Sequence[tuple[np.ndarray, int]]) -> Fork:
    """Of (ids, version); those that were sampled have a version from 0 on."""
    ids = np.concatenate([ids for ids, _ in parts])
    versions = np.concatenate([np.full(len(ids), version, np.int32) for ids, version in parts])
    logps = np.where(versions >= 0, -0.01 * (ids % 53), 0.0).astype(np.float32)
    return Fork(ids, logps, versions, versions >= 0)


def completion(sequences: Sequence[Fork]) -> Completion:
    *forks, last = sequences
    return Completion(last.token_ids, last.logps, last.versions, "", "eos", sampled=last.sampled, forks=tuple(forks))


def plain(said: Sequence[tuple[np.ndarray, np.ndarray]]) -> Completion:
    """Every turn behind the one before it, in one sequence. The versions of turns differ: they are stale."""
    parts = [part for t, (ids, told) in enumerate(said) for part in ((ids, t), (told, -1))]
    return completion([sequence(parts)])


def forked(said: Sequence[tuple[np.ndarray, np.ndarray]]) -> Completion:
    """A new sequence at each turn: earlier turns are written anew there, in other and fewer tokens."""
    sequences = []
    for t, (ids, told) in enumerate(said):
        before = [(np.arange(5) + 4000, REPEATED)] if t else []
        observed = [(said[t - 1][1], -1)] if t else []
        after = [(told, -1)] if t == len(said) - 1 else []
        sequences.append(sequence([*before, *observed, (ids, t), *after]))
    return completion(sequences)


def groups(make: Any, seed: int = 3) -> list[Group]:
    rng = np.random.default_rng(seed)
    found = []
    for number in range(4):
        said = [turns(rng, 1 + (number + i) % 4, 900 * i + 100) for i in range(4)]
        prompt = PromptItem(3 * number + 1, np.arange(7) + 10, 5)
        found.append(Group(prompt, tuple(make(one) for one in said)))
    return found


def trees_of(make: Any) -> list[Tree]:
    advantages = np.random.default_rng(8).normal(size=16).astype(np.float32)
    masked = np.arange(16) == 5
    return to_trees(groups(make), advantages, masked)


def noise(batch: TokenBatch, salt: float) -> Tensor:
    """f64[N] in (0, 1) by a token's number and its tree: the same in whatever context."""
    trees = batch.group_ids[batch.sequence_ids].double()
    return (43758.5453 * torch.sin(12.9898 * batch.labels + 37.719 * trees + salt)).frac().abs()


def outputs_of(batch: TokenBatch, head: Sequence[str]) -> dict[str, Tensor]:
    made = {"logps": -3 * noise(batch, 1.0) - 0.05}
    made |= {name: 2 * noise(batch, 2.0) + 0.1 for name in head}
    for leaf in made.values():
        leaf.requires_grad_()
    return made


def run(
    name: str, options: dict[str, Any], trees: Sequence[Tree], max_tokens: int
) -> tuple[float, dict[Any, float], dict[str, float], int]:
    """Loss, gradient by token, metrics and number of microbatches of one update."""
    loss = configure(name, options)
    trees = [mark_nll(tree, loss.needs.nll) for tree in trees]
    counts, sums = global_counts(trees), MetricSums()

    def packed(what: Sequence[Tree]) -> list[TokenBatch]:
        batches = [collate(part) for part in plan_microbatches(what, max_tokens, keep_together=False)]
        for batch in batches:
            batch.behavior_logps = -3 * noise(batch, 1.0) - 0.05 + 0.6 * (noise(batch, 5.0) - 0.5)
            batch.advantages = batch.advantages.double()
        return batches

    stats = {}
    if loss.needs.scope == "batch":
        given = [(batch, True) for batch in packed(trees)]
        found = run_prepass(given, lambda b: HeadOutputs(**outputs_of(b, loss.needs.head)), lambda b: None)
        stats = loss.batch_stats(found)
    total, gradient = 0.0, dict[Any, float]()
    batches = packed(trees)
    for batch in batches:
        leaves = outputs_of(batch, loss.needs.head)
        start = -3 * noise(batch, 1.0) - 0.05
        reference = start + 0.8 * (noise(batch, 4.0) - 0.4) if loss.needs.reference else None
        proximal = start + 0.3 * (noise(batch, 7.0) - 0.5) if loss.needs.ratio == "proximal" else None
        result = loss(LossInputs(HeadOutputs(**leaves), batch, counts, reference, proximal, stats))
        result.loss.backward()
        total += result.loss.item()
        sums.add(result.metrics)
        keys = zip(batch.group_ids[batch.sequence_ids].tolist(), batch.labels.tolist(), strict=True)
        for place, key in enumerate(keys):
            for leaf, value in leaves.items():
                if value.grad is not None:
                    assert (leaf, key) not in gradient, "a token is scored once"
                    gradient[leaf, key] = value.grad[place].item()
    return total, gradient, sums.result(), len(batches)


@pytest.mark.parametrize("max_tokens", [1, 60, 10_000])
@pytest.mark.parametrize(("name", "options"), [pytest.param(*c, id=f"{c[0]}-{c[1]}") for c in GROUP])
def test_losses_count_an_episode_that_began_anew_as_one_sequence(
    name: str, options: dict[str, Any], max_tokens: int
) -> None:
    loss, gradient, metrics, _ = run(name, options, trees_of(plain), 10_000)
    other, other_gradient, other_metrics, parts = run(name, options, trees_of(forked), max_tokens)
    assert (parts > 1) == (max_tokens < 10_000)
    assert other == pytest.approx(loss, abs=1e-12)
    assert other_gradient.keys() == gradient.keys()
    assert max(abs(value) for value in gradient.values()) > 1e-4
    assert max(abs(gradient[key] - other_gradient[key]) for key in gradient) < 1e-12
    assert other_metrics == pytest.approx(metrics, rel=1e-6, abs=1e-9)


def test_counts_lengths_and_ages_are_those_of_episodes() -> None:
    assert global_counts(trees_of(forked)) == global_counts(trees_of(plain))
    assert global_counts(trees_of(forked)).sequences == 15, "one of sixteen is masked"
    zeros, kept = np.ones(16, np.float32), np.zeros(16, bool)
    assert group_metrics(groups(forked), zeros, kept, 9) == group_metrics(groups(plain), zeros, kept, 9)
    for one, other in zip(groups(forked), groups(plain), strict=True):
        for a, b in zip(one.completions, other.completions, strict=True):
            assert a.length == b.length and a.sampled_ids.tolist() == b.sampled_ids.tolist()
            assert a.sampled_versions.tolist() == b.sampled_versions.tolist()
            assert a.sampled_logps.tolist() == b.sampled_logps.tolist()


def test_the_log_keeps_every_sequence(tmp_path: Path) -> None:
    [group] = [Group(g.prompt, (replace(g.completions[2], episode=Episode()),)) for g in groups(forked)[:1]]
    log = RolloutLog(tmp_path)
    log.cut_back(0)
    table = ScoreTable(("right",), np.ones((1, 1), np.float32), ("reward",))
    log.add(1, [group], ["p"], table, np.zeros(1, np.float32), np.ones(1, bool))
    log.close_file()
    [row] = read_table(tmp_path / "step-000001.parquet").to_pylist()
    [completion] = group.completions
    kept = json.loads(row["forks"])
    assert [one["token_ids"] for one in kept] == [f.token_ids.tolist() for f in completion.forks] and len(kept) == 2
    assert [one["sampled"] for one in kept] == [f.sampled.tolist() for f in completion.forks]
    assert row["token_ids"] == completion.token_ids.tolist() and row["version"] == 0
    assert row["mean_logp"] == pytest.approx(completion.sampled_logps.mean())


@pytest.mark.parametrize("ranks", [1, 3])
def test_no_microbatch_holds_part_of_an_episode(ranks: int) -> None:
    trees = trees_of(forked)
    plan = plan_ranks(trees, 1, keep_together=False, ranks=ranks)
    seen = [b for own in plan for part in own if part.counted for tree in part.trees for b in tree.branches]
    assert len(seen) == sum(len(tree.branches) for tree in trees)
    for own in plan:
        for part in own:
            for tree in part.trees:
                assert len(tree.units) == 1 and not tree.branches[0].follows


def test_rows_and_sequences_of_a_packed_group() -> None:
    [tree] = [tree for tree in trees_of(forked) if tree.id == 4]
    batch = collate([tree])
    assert batch.sequences == 4 == len(batch.score_at) == len(twins([tree]))
    assert batch.rows == len(tree.branches) == 2 + 3 + 4 + 1
    assert batch.row_owners is not None and batch.row_owners.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2, 3]
    assert torch.equal(batch.row_owners[batch.rows_of_tokens], batch.sequence_ids)
    assert collate(trees_of(plain)).row_owners is None


def test_equal_tokens_that_begin_anew_elsewhere_are_no_twins() -> None:
    ids, mask = np.arange(4), np.ones(4, bool)
    trunk = Segment(np.arange(3), np.zeros(3, bool))
    first, second = Segment(ids, mask), Segment(ids + 4, mask, follows=True)
    one = Tree(0, trunk, (first, second))
    whole = Tree(1, trunk, (Segment(np.arange(8), np.ones(8, bool)),))
    again = replace(one, id=2)
    a, b, c = twins([one, whole, again]).tolist()
    assert a == c != b
