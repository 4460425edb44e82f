"""Our DPO equals TRL's on the same log-probabilities, values and gradients, wherever TRL follows the papers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from trl.trainer.dpo_trainer import DPOTrainer

from align.data.packing import collate, global_counts
from align.losses import configure
from align.losses.base import LossInputs
from align.protocols import Tree
from align.types import HeadOutputs
from tests.parity.stand_in import padded, same, stand_in
from tests.unit.core.trees import pair


def trl_dpo(trees: list[Tree], logps: torch.Tensor, reference: torch.Tensor, variant: str, **options: Any) -> Any:
    batch = collate(trees)
    order = torch.cat([batch.pairs[:, 0], batch.pairs[:, 1]])  # TRL wants all chosen, then all rejected
    mine, mask = padded(logps, batch.sequence_ids, batch.sequences, 1)
    theirs, _ = padded(reference, batch.sequence_ids, batch.sequences, 1)
    mine, theirs, mask = mine[order], theirs[order], mask[order]
    chosen, rejected = theirs.sum(1).chunk(2)

    def model(**kwargs: Any) -> SimpleNamespace:
        zeros = torch.zeros_like(mine[:, 1:])
        return SimpleNamespace(log_probs=mine[:, 1:], entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    trainer = stand_in(
        ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", use_weighting=False,
        loss_types=[variant], loss_weights=[1.0], _total_train_tokens=0, **options,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros_like(mask), "attention_mask": mask, "completion_mask": mask,
        "ref_chosen_logps": chosen, "ref_rejected_logps": rejected,
    }  # fmt: skip
    return DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)


@pytest.mark.parametrize(
    ("variant", "smoothing"), [("sigmoid", 0.0), ("hinge", 0.0), ("ipo", 0.0), ("robust", 0.0), ("robust", 0.15)]
)
def test_dpo_equals_trl(variant: str, smoothing: float) -> None:
    trees = [pair(np.random.default_rng(i), i) for i in range(5)]
    batch = collate(trees)
    n = batch.labels.numel()
    torch.manual_seed(0)
    logps, reference = (-3 * torch.rand(n)).requires_grad_(), -3 * torch.rand(n)
    module, config, _ = configure("dpo", {"beta": 0.2, "variant": variant, "label_smoothing": smoothing})
    mine = module.loss(LossInputs(HeadOutputs(logps), batch, global_counts(trees), reference), config).loss
    theirs = trl_dpo(trees, logps, reference, variant, beta=0.2, label_smoothing=smoothing)
    same(mine, theirs, logps)


def test_trl_ignores_label_smoothing_in_its_sigmoid_loss_and_ours_does_not() -> None:
    trees = [pair(np.random.default_rng(i), i) for i in range(3)]
    batch = collate(trees)
    logps, reference = -3 * torch.rand(batch.labels.numel()), -3 * torch.rand(batch.labels.numel())
    module, config, _ = configure("dpo", {"label_smoothing": 0.2})
    mine = module.loss(LossInputs(HeadOutputs(logps), batch, global_counts(trees), reference), config).loss
    plain, smoothed = (trl_dpo(trees, logps, reference, "sigmoid", beta=0.1, label_smoothing=eps) for eps in (0.0, 0.2))
    assert plain == smoothed, "TRL has learnt label smoothing: this difference can go from the tests"
    assert abs(mine - smoothed) > 1e-4
