"""Our reward model loss equals that of TRL's RewardTrainer on the same scores: values, gradients and metrics."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from trl.trainer.reward_trainer import RewardTrainer

from align.data.packing import collate, global_counts
from align.losses import configure
from align.losses.base import LossInputs, LossOutput
from align.protocols.trees import Tree
from align.types import HeadOutputs
from tests.parity.stand_in import same, stand_in
from tests.unit.core.trees import pair


def ours(trees: list[Tree], scores: torch.Tensor, centre: float) -> LossOutput:
    loss = configure("reward_model", {"centre": centre})
    outputs = HeadOutputs(torch.zeros(0), scores=scores)
    output: LossOutput = loss(LossInputs(outputs, collate(trees), global_counts(trees)))
    return output


def theirs(
    trees: list[Tree], scores: torch.Tensor, centre: float, margins: list[float] | None
) -> tuple[torch.Tensor, Any]:
    pairs = collate(trees).pairs
    logits = scores[torch.cat([pairs[:, 0], pairs[:, 1]])]  # TRL wants all chosen, then all rejected
    trainer = stand_in(args=SimpleNamespace(center_rewards_coefficient=centre or None), _total_train_tokens=0)
    inputs: dict[str, Any] = {"attention_mask": torch.ones(len(scores), 1)}
    if margins is not None:
        inputs["margin"] = torch.tensor(margins)
    loss = RewardTrainer.compute_loss(trainer, lambda **kwargs: SimpleNamespace(logits=logits), inputs)
    return loss, trainer._metrics["eval"]


@pytest.mark.parametrize("centre", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("margins", [None, [0.0, 1.0, 2.0, 0.5, 3.0]], ids=["plain", "margins"])
def test_the_reward_model_loss_equals_trl(margins: list[float] | None, centre: float) -> None:
    trees = [pair(np.random.default_rng(i), i) for i in range(5)]
    if margins is not None:
        trees = [replace(tree, columns={"margin": m}) for tree, m in zip(trees, margins, strict=True)]
    torch.manual_seed(0)
    scores = (2 * torch.randn(10, 1)).requires_grad_()
    out = ours(trees, scores, centre)
    loss, metrics = theirs(trees, scores, centre, margins)
    same(out.loss, loss, scores)
    for name, key in (("rewards/accuracies", "accuracy"), ("rewards/margins", "margin")):
        assert float(out.metrics[name].sum / out.metrics[name].count) == pytest.approx(metrics[key][0], abs=1e-6)
