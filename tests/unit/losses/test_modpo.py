"""MODPO against its formula in float64, pair by pair, against finite differences, and as DPO where it is DPO."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from align.data.packing import collate, global_counts
from align.errors import RecipeError
from align.losses import configure
from align.losses.base import LossInputs, LossOutput
from align.protocols.trees import Tree
from align.types import HeadOutputs
from tests.unit.core.trees import pair

OPTIONS = {"beta": 0.3, "preference_weight": 0.4}
MARGINS = [0.5, -1.25, 0.0, 2.0]


def pairs(margins: list[float]) -> list[Tree]:
    return [replace(pair(np.random.default_rng(i), i), columns={"margin": m}) for i, m in enumerate(margins)]


def logps(trees: list[Tree], seed: int) -> torch.Tensor:
    n = sum(len(side) for tree in trees for side in tree.branches)
    drawn = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (-2 * drawn.abs()).requires_grad_()


def run(options: dict[str, Any], trees: list[Tree], policy: torch.Tensor, reference: torch.Tensor) -> LossOutput:
    loss = configure("modpo", options)
    assert (loss.needs.record, loss.needs.reference, loss.needs.margin) == ("pair", True, True)
    inputs = LossInputs(HeadOutputs(policy), collate(trees), global_counts(trees), reference_logps=reference.detach())
    output: LossOutput = loss(inputs)
    return output


def by_side(trees: list[Tree], values: torch.Tensor) -> np.ndarray:
    """f64[P, 2]: sums over each side's tokens, which lie one after another."""
    lengths = [len(side) for tree in trees for side in tree.branches]
    return np.array([float(part.sum()) for part in values.detach().split(lengths)]).reshape(-1, 2)


def test_the_loss_is_the_mean_over_pairs_of_the_papers_formula() -> None:
    trees = pairs(MARGINS)
    policy, reference = logps(trees, 1), logps(trees, 2)
    out = run(OPTIONS, trees, policy, reference)
    rho = by_side(trees, policy) - by_side(trees, reference)
    expected = [
        math.log1p(math.exp(-(0.3 / 0.4 * c - 0.3 / 0.4 * r - m / 0.4))) for (c, r), m in zip(rho, MARGINS, strict=True)
    ]
    assert out.loss.item() == pytest.approx(np.mean(expected), rel=1e-6)  # margins are float32
    means = {name: float(metric.sum / metric.count) for name, metric in out.metrics.items()}
    assert means["policy/margin"] == pytest.approx(np.mean(MARGINS))
    assert means["rewards/margins"] == pytest.approx(0.3 * np.mean(rho[:, 0] - rho[:, 1]))


def test_the_gradient_equals_finite_differences() -> None:
    trees = pairs(MARGINS)
    policy, reference = logps(trees, 1), logps(trees, 2)
    assert torch.autograd.gradcheck(lambda p: run(OPTIONS, trees, p, reference).loss, (policy,))


def test_weight_one_and_no_margin_is_dpo() -> None:
    trees = pairs([0.0] * 4)
    policy, reference = logps(trees, 1), logps(trees, 2)
    loss = configure("dpo", {"beta": 0.3})
    inputs = LossInputs(HeadOutputs(policy), collate(trees), global_counts(trees), reference_logps=reference.detach())
    assert run({"beta": 0.3}, trees, policy, reference).loss.item() == loss(inputs).loss.item()


def test_its_optimum_is_the_policy_of_the_weighted_sum() -> None:
    """One pair, preferred with the Bradley-Terry probability of r_k: at beta delta = w (r_k(c) - r_k(r)) + m the
    gradient, averaged over both orders of the pair, is 0."""
    beta, w, apart, m = 0.5, 0.3, 1.2, 0.7
    tree = pairs([m])[0]
    turned = replace(tree, branches=tree.branches[::-1], columns={"margin": -m})
    chance = 1 / (1 + math.exp(-apart))
    lengths = [len(side) for side in tree.branches]
    delta = torch.tensor((w * apart + m) / beta, dtype=torch.float64, requires_grad=True)
    none = torch.zeros(sum(lengths), dtype=torch.float64)
    options = {"beta": beta, "preference_weight": w}
    one = run(options, [tree], torch.cat([delta.expand(lengths[0]) / lengths[0], none[lengths[0] :]]), none).loss
    other = run(options, [turned], torch.cat([none[: lengths[1]], delta.expand(lengths[0]) / lengths[0]]), none).loss
    (slope,) = torch.autograd.grad(chance * one + (1 - chance) * other, delta)
    assert abs(float(slope)) < 1e-7


@pytest.mark.parametrize("margin", [-1e4, 1e4])
def test_margins_far_apart_give_finite_values_and_gradients(margin: float) -> None:
    trees = pairs([margin])
    policy = logps(trees, 1)
    out = run(OPTIONS, trees, policy, logps(trees, 2)).loss
    out.backward()
    assert math.isfinite(out.item()) and torch.isfinite(policy.grad).all()


def test_weights_of_0_and_unknown_options_are_refused() -> None:
    with pytest.raises(RecipeError, match="preference_weight"):
        configure("modpo", {"preference_weight": 0})
    with pytest.raises(RecipeError, match="its options are: beta, preference_weight"):
        configure("modpo", {"margin": 1})
