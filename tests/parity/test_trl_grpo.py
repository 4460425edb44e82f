"""Our GRPO equals TRL's on the same log-probabilities, values and gradients, wherever TRL follows the papers."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from trl.trainer.grpo_trainer import GRPOTrainer

from align.data.packing import collate, global_counts
from align.losses import configure
from align.losses.base import LossInputs
from align.types import HeadOutputs
from tests.parity.stand_in import padded, same, stand_in
from tests.unit.core.trees import group

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
