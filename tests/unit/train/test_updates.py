"""Several updates on one batch by a real trainer: the ratio is exactly 1 before the first, and moves after it; and what
a correction of the mismatch with the sampler does to an update."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from align.protocols.trainer import Metrics
from align.protocols.trees import Tree
from align.recipe.adapter import Adapter
from align.recipe.inputs import Model
from align.stages.updates import UpdatePlan, Updates, carrying
from align.train.trainer import PolicyTrainer
from tests.unit.core.test_forward import make_model
from tests.unit.train.test_trainer import FULL, LORA, make_spec, trees_for, weights

EXACT = {"clip_low": 0.0, "clip_high": 0.0}  # any ratio but 1 would be clipped somewhere


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    make_model("qwen3").save_pretrained(folder)
    return folder


class Shell:
    """A PolicyTrainer behind coroutines, as an actor's proxy is; keeps the metrics of each update."""

    def __init__(self, trainer: PolicyTrainer) -> None:
        self.trainer = trainer
        self.updates: list[Metrics] = []

    async def step(self, trees: Sequence[Tree], *, step: int, progress: float) -> Metrics:
        self.updates.append(self.trainer.step(trees, step=step, progress=progress))
        return self.updates[-1]

    async def logps(self, trees: Sequence[Tree]) -> list[list[np.ndarray]]:
        return self.trainer.logps(trees)


def from_here(trainer: PolicyTrainer, trees: list[Tree]) -> list[Tree]:
    """The groups with the log-probabilities of the policy as it is now."""
    return [carrying(tree, logps) for tree, logps in zip(trees, trainer.logps(trees), strict=True)]


def sampled_with(trainer: PolicyTrainer, trees: list[Tree], shift: float = 0.0) -> list[Tree]:
    """The groups as sampled by this policy, whose sampler reports log-probabilities `shift` below the trainer's."""
    return [
        replace(
            tree,
            branches=tuple(replace(b, behavior_logps=v - shift) for b, v in zip(tree.branches, logps, strict=True)),
        )
        for tree, logps in zip(trees, trainer.logps(trees), strict=True)
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("max_tokens", [10_000, 40, 12], ids=["together", "in microbatches", "groups cut"])
@pytest.mark.parametrize("adapter", [LORA, FULL], ids=["lora", "full"])
def test_before_any_update_the_ratio_to_the_log_probs_of_the_same_packing_is_exactly_one(
    base: Path, adapter: Adapter, max_tokens: int, dtype: str
) -> None:
    spec = make_spec(base, "grpo", adapter, loss_options={**EXACT, "kl": 0.1}, reference="start", max_tokens=max_tokens)
    trainer = PolicyTrainer(replace(spec, model=Model(path=str(base), dtype=dtype)))
    for _ in range(2):  # also from weights that were trained
        metrics = trainer.step(from_here(trainer, trees_for("grpo")), step=0, progress=0.0)
        assert metrics["policy/ratio"] == 1.0 and metrics["policy/clip_fraction"] == 0.0


def test_a_batch_of_one_update_needs_no_log_probs_of_its_start(base: Path) -> None:
    one, other = (PolicyTrainer(make_spec(base, "grpo", max_tokens=30)) for _ in range(2))
    trees = trees_for("grpo")
    metrics = [one.step(trees, step=0, progress=0.0), other.step(from_here(other, trees), step=0, progress=0.0)]
    assert metrics[0]["loss/total"] == metrics[1]["loss/total"] != 0
    after = weights(other)
    assert all(torch.equal(value, after[name]) for name, value in weights(one).items())


def test_the_second_update_is_measured_against_the_first_ones_start(base: Path) -> None:
    trainer = PolicyTrainer(make_spec(base, "grpo"))
    trees = from_here(trainer, trees_for("grpo"))
    trainer.step(trees, step=0, progress=0.0)
    now = trainer.logps(trees)
    moved = [
        np.exp(v - b.proximal_logps) for t, logps in zip(trees, now, strict=True)
        for b, v in zip(t.branches, logps, strict=True) if b.proximal_logps is not None
    ]  # fmt: skip
    metrics = trainer.step(trees, step=0, progress=0.0)
    assert metrics["policy/ratio"] == pytest.approx(float(np.concatenate(moved).mean()), rel=1e-5)
    assert metrics["policy/clip_fraction"] > 0


def test_the_mismatch_with_the_sampler_is_that_of_the_start_in_every_update(base: Path) -> None:
    """The batch's own updates are no mismatch: the ratio has them."""
    shell = Shell(PolicyTrainer(make_spec(base, "grpo")))
    trees = sampled_with(shell.trainer, trees_for("grpo"), shift=0.05)
    asyncio.run(Updates(shell, UpdatePlan(passes=3, proximal=True)).train(trees, step=0, total=1))  # type: ignore[arg-type]
    assert [u["mismatch/max_abs"] for u in shell.updates] == pytest.approx([0.05] * 3, abs=1e-5)
    assert [u["mismatch/correction"] for u in shell.updates] == pytest.approx([np.exp(0.05)] * 3, abs=1e-5)
    assert shell.updates[0]["policy/ratio"] == 1.0 != shell.updates[1]["policy/ratio"]


def test_minibatches_start_at_a_ratio_of_one_and_later_ones_have_moved(base: Path) -> None:
    shell = Shell(PolicyTrainer(make_spec(base, "grpo", max_tokens=40)))
    plan = UpdatePlan(passes=2, minibatches=2, proximal=True)
    metrics = asyncio.run(Updates(shell, plan).train(trees_for("grpo"), step=0, total=1))  # type: ignore[arg-type]
    ratios = [u["policy/ratio"] for u in shell.updates]
    assert len(ratios) == 4 and ratios[0] == 1.0 and all(r != 1.0 for r in ratios[1:])
    assert metrics["policy/ratio"] == pytest.approx(np.mean(ratios))
    scored = sum(int(b.loss_mask.sum()) for t in trees_for("grpo") for b in t.branches)
    assert metrics["tokens/scored"] == 2 * scored, "each pass counts"


def test_each_minibatch_divides_by_its_own_counts(base: Path) -> None:
    whole, split = (Shell(PolicyTrainer(make_spec(base, "grpo"))) for _ in range(2))
    trees = trees_for("grpo", 4)
    updates = Updates(split, UpdatePlan(minibatches=2, seed=1, proximal=True))  # type: ignore[arg-type]
    parts = updates.parts(trees, 0)
    asyncio.run(updates.train(trees, step=0, total=1))
    alone = whole.trainer.step(parts[0], step=0, progress=0.0)
    assert split.updates[0]["loss/total"] == alone["loss/total"]
    assert split.updates[0]["tokens/scored"] == alone["tokens/scored"]


def test_a_mismatch_beyond_the_clip_range_silences_an_uncorrected_update_and_not_a_corrected_one(base: Path) -> None:
    """A sampler that reports e^-0.5 of each probability: every ratio to it is 1.65."""
    norms = {}
    for name, correction in (("off", "off"), ("token", {"cap": 2.0}), ("agreeing", {"cap": 2.0})):
        trainer = PolicyTrainer(make_spec(base, "grpo", loss_options={"correction": correction}))
        trees = sampled_with(trainer, positive(trees_for("grpo")), shift=0.0 if name == "agreeing" else 0.5)
        norms[name] = trainer.step(trees, step=0, progress=0.0)["optim/grad_norm"]
    assert norms["off"] == 0.0
    assert norms["token"] == pytest.approx(np.exp(0.5) * norms["agreeing"], rel=1e-4)


def positive(trees: list[Tree]) -> list[Tree]:
    def good(tree: Tree) -> Tree:
        return replace(tree, branches=tuple(replace(b, advantages=abs(b.advantages)) for b in tree.branches))  # type: ignore[arg-type]

    return [good(tree) for tree in trees]


RAGGED: list[dict[str, Any]] = [
    {},
    {"correction": {"mode": "mask", "cap": 1.5, "floor": 0.5}, "aggregation": "sequence"},
    {"correction": {"level": "sequence", "mode": "mask", "cap": 1.5, "floor": 0.2}, "ratio": "sequence"},
    {"correction": {"level": "sequence"}, "aggregation": "sequence_sum", "kl": 0.1},
]


@pytest.mark.parametrize("options", RAGGED)
def test_groups_of_any_size_with_masked_and_single_completions_update_alike_in_any_packing(
    base: Path, options: dict[str, Any]
) -> None:
    """Empty completions left their groups, truncated ones are masked: what an online stage hands over."""
    rng = np.random.default_rng(3)
    trees = trees_for("grpo", 5)
    silent = replace(trees[1].branches[0], loss_mask=np.zeros(len(trees[1].branches[0]), bool))
    trees[1] = replace(trees[1], branches=(silent, *trees[1].branches[1:]))  # one of a group is masked
    trees[2] = replace(trees[2], branches=trees[2].branches[:1])  # a group of one
    trees[3] = replace(trees[3], branches=(replace(silent),))  # and one without a scored token
    trees = [with_noise(tree, rng) for tree in trees]
    found = []
    for max_tokens in (10_000, 12):
        reference = "start" if "kl" in options else None
        spec = make_spec(base, "grpo", loss_options=options, max_tokens=max_tokens, reference=reference)
        trainer = PolicyTrainer(spec)
        carried = from_here(trainer, trees)
        found.append((trainer.step(carried, step=0, progress=0.0), trainer.step(carried, step=0, progress=0.1)))
    for one, other in zip(*found, strict=True):
        for name in one:
            if name.split("/")[0] in ("loss", "policy", "mismatch"):
                assert one[name] == pytest.approx(other[name], rel=2e-3, abs=1e-4), name
    assert found[0][0]["policy/ratio"] == found[1][0]["policy/ratio"] == 1.0


def with_noise(tree: Tree, rng: np.random.Generator) -> Tree:
    """Sampler log-probabilities about the model's own (a uniform guess), so that weights lie on both sides of 1."""
    branches = tuple(
        replace(b, behavior_logps=(-np.log(97) + 0.4 * rng.standard_normal(len(b))).astype(np.float32))
        for b in tree.branches
    )
    return replace(tree, branches=branches)
