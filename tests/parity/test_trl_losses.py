"""Our losses equal TRL's on the same log-probabilities, values and gradients, wherever TRL follows the papers.

TRL's loss methods are called on a stand-in for their trainer and model: the arithmetic is theirs, the tensors ours.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer

from align.data.packing import collate, global_counts
from align.losses import configure
from align.losses.base import LossInputs
from align.protocols import Tree
from align.types import HeadOutputs
from tests.unit.core.trees import group, pair


def padded(values: torch.Tensor, owner: torch.Tensor, sequences: int, front: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[S, front + L] of per-token values, right-padded after `front` prompt places, and its completion mask."""
    lengths = [int((owner == s).sum()) for s in range(sequences)]
    rows, mask = [], torch.zeros(sequences, front + max(lengths), dtype=torch.long)
    for s, length in enumerate(lengths):
        empty = values.new_zeros(front), values.new_zeros(max(lengths) - length)
        rows.append(torch.cat([empty[0], values[owner == s], empty[1]]))
        mask[s, front : front + length] = 1
    return torch.stack(rows), mask


def stand_in(**attributes: Any) -> SimpleNamespace:
    accelerator = MagicMock()
    accelerator.device, accelerator.num_processes = torch.device("cpu"), 1
    accelerator.gather = accelerator.gather_for_metrics = lambda x: x
    accelerator.reduce = lambda x, reduction: x
    return SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=accelerator,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        **attributes,
    )


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


def same(mine: torch.Tensor, theirs: torch.Tensor, logps: torch.Tensor) -> None:
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(loss, logps, retain_graph=True)[0] for loss in (mine, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)
    assert gradients[0].abs().max() > 0


def test_trl_ignores_label_smoothing_in_its_sigmoid_loss_and_ours_does_not() -> None:
    trees = [pair(np.random.default_rng(i), i) for i in range(3)]
    batch = collate(trees)
    logps, reference = -3 * torch.rand(batch.labels.numel()), -3 * torch.rand(batch.labels.numel())
    module, config, _ = configure("dpo", {"label_smoothing": 0.2})
    mine = module.loss(LossInputs(HeadOutputs(logps), batch, global_counts(trees), reference), config).loss
    plain, smoothed = (trl_dpo(trees, logps, reference, "sigmoid", beta=0.1, label_smoothing=eps) for eps in (0.0, 0.2))
    assert plain == smoothed, "TRL has learnt label smoothing: this difference can go from the tests"
    assert abs(mine - smoothed) > 1e-4


GRPO = {
    "grpo": {"aggregation": "sequence"},
    "dapo": {"aggregation": "token", "clip_high": 0.28},
    "dr_grpo": {"aggregation": "constant", "constant_length": 16},
    "gspo": {"aggregation": "sequence", "ratio": "sequence", "clip_low": 0.05, "clip_high": 0.05},
}


@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize("name", GRPO)
def test_grpo_equals_trl(name: str, kl: float) -> None:
    options = GRPO[name]
    trees = [group(np.random.default_rng(i), i) for i in range(3)]
    batch = collate(trees)
    torch.manual_seed(1)
    logps = (batch.behavior_logps + 0.2 * torch.randn(batch.labels.numel())).requires_grad_()
    reference = logps.detach() + 0.3 * torch.randn(logps.shape)
    module, config, _ = configure("grpo", {**options, "kl": kl})
    mine = module.loss(
        LossInputs(HeadOutputs(logps), batch, global_counts(trees), reference if kl else None), config
    ).loss

    s = batch.sequences
    new, mask = padded(logps, batch.sequence_ids, s, 0)
    old, _ = padded(batch.behavior_logps, batch.sequence_ids, s, 0)
    ref, _ = padded(reference, batch.sequence_ids, s, 0)
    advantages = torch.stack([batch.advantages[batch.sequence_ids == k][0] for k in range(s)])
    trainer = stand_in(
        _get_per_token_logps_and_entropies=lambda *a, **k: (new, torch.zeros_like(new), None),
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=kl, _entropy_bonus_enabled=False,
        importance_sampling_level=options.get("ratio", "token"), loss_type="grpo" if name == "gspo" else name,
        epsilon_low=options.get("clip_low", 0.2), epsilon_high=options.get("clip_high", 0.2), use_vllm=False,
        max_completion_length=16, args=SimpleNamespace(delta=None, use_bias_correction_kl=False),
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.zeros(s, 2, dtype=torch.long), "prompt_mask": torch.ones(s, 2, dtype=torch.long),
        "completion_ids": torch.zeros_like(mask), "completion_mask": mask, "advantages": advantages,
        "old_per_token_logps": old, "ref_per_token_logps": ref, "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    same(mine, GRPOTrainer._compute_loss(trainer, None, inputs), logps)
