"""The reward model's loss against its formula in float64, pair by pair, and against finite differences."""

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


def pairs(n: int, margins: list[float] | None = None) -> list[Tree]:
    trees = [pair(np.random.default_rng(i), i) for i in range(n)]
    return [replace(t, columns={"margin": m}) for t, m in zip(trees, margins, strict=True)] if margins else trees


def run(options: dict[str, Any], trees: list[Tree], scores: torch.Tensor) -> LossOutput:
    loss = configure("reward_model", options)
    assert (loss.needs.record, loss.needs.reference, loss.needs.head) == ("pair", False, ("scores",))
    outputs = HeadOutputs(logps=torch.zeros(0), scores=scores)
    output: LossOutput = loss(LossInputs(outputs, collate(trees), global_counts(trees)))
    return output


def random_scores(n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    return (3 * torch.randn(2 * n, 1, generator=generator, dtype=torch.float64)).requires_grad_()


@pytest.mark.parametrize("centre", [0.0, 0.05])
@pytest.mark.parametrize("margins", [None, [0.0, 1.5, -0.5, 3.0]], ids=["plain", "margins"])
def test_the_loss_is_the_mean_over_pairs_of_the_papers_formula(margins: list[float] | None, centre: float) -> None:
    trees, scores = pairs(4, margins), random_scores(4)
    out = run({"centre": centre}, trees, scores)
    rows = scores.detach().numpy().reshape(4, 2)
    expected = [
        math.log1p(math.exp(-(c - r - m))) + centre * (c + r) ** 2
        for (c, r), m in zip(rows, margins or [0.0] * 4, strict=True)
    ]
    assert out.loss.item() == pytest.approx(np.mean(expected), abs=1e-9)
    means = {name: float(metric.sum / metric.count) for name, metric in out.metrics.items()}
    assert means == pytest.approx(
        {
            "loss/total": np.mean(expected),
            "rewards/chosen": rows[:, 0].mean(),
            "rewards/rejected": rows[:, 1].mean(),
            "rewards/margins": (rows[:, 0] - rows[:, 1]).mean(),
            "rewards/accuracies": (rows[:, 0] > rows[:, 1]).mean(),
        }
    )


@pytest.mark.parametrize("centre", [0.0, 0.05])
def test_the_gradient_equals_finite_differences(centre: float) -> None:
    trees, scores = pairs(3, [0.5, 0.0, 1.0]), random_scores(3)
    assert torch.autograd.gradcheck(lambda s: run({"centre": centre}, trees, s).loss, (scores,))


def test_equal_scores_cost_ln_2_and_are_no_success() -> None:
    out = run({}, pairs(2), torch.ones(4, 1, dtype=torch.float64))
    assert out.loss.item() == pytest.approx(math.log(2))
    assert float(out.metrics["rewards/accuracies"].sum) == 0


def test_a_pair_whose_row_gives_no_margin_has_margin_0_beside_others_that_have_one() -> None:
    mixed = [pairs(2, [1.0, 1.0])[0], pairs(2)[1]]
    scores = random_scores(2)
    assert run({}, mixed, scores).loss.item() == pytest.approx(run({}, pairs(2, [1.0, 0.0]), scores).loss.item())


@pytest.mark.parametrize("far", [-1e4, 1e4])
def test_scores_far_apart_give_finite_values_and_gradients(far: float) -> None:
    scores = torch.tensor([[far], [0.0]], dtype=torch.float64, requires_grad=True)
    loss = run({}, pairs(1), scores).loss
    loss.backward()
    assert math.isfinite(loss.item()) and torch.isfinite(scores.grad).all()


def test_microbatches_add_up_to_the_whole() -> None:
    trees, scores = pairs(5, [0.1, 0.2, 0.3, 0.4, 0.5]), random_scores(5)
    loss = configure("reward_model", {"centre": 0.1})
    counts = global_counts(trees)
    shares = [
        loss(LossInputs(HeadOutputs(torch.zeros(0), scores=scores[2 * a : 2 * b]), collate(trees[a:b]), counts)).loss
        for a, b in ((0, 1), (1, 4), (4, 5))
    ]
    whole = run({"centre": 0.1}, trees, scores).loss
    torch.testing.assert_close(sum(shares), whole)
    torch.testing.assert_close(*(torch.autograd.grad(x, scores, retain_graph=True)[0] for x in (sum(shares), whole)))


def test_a_centre_below_0_and_an_unknown_option_are_refused() -> None:
    with pytest.raises(RecipeError, match="centre"):
        configure("reward_model", {"centre": -1})
    with pytest.raises(RecipeError, match="its options are: centre"):
        configure("reward_model", {"center": 0.1})
