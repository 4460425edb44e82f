"""Supervised fine-tuning: negative log-likelihood of the scored tokens, as a mean over all of them in the batch.

Variant `dft` (2508.05629) weighs each token's term with its own detached probability.
"""

from __future__ import annotations

from typing import Literal

from align.losses.base import LossConfig, LossInputs, LossOutput, Needs


class Config(LossConfig):
    variant: Literal["nll", "dft"] = "nll"


def needs(config: Config) -> Needs:
    return Needs(record="conversation")


def loss(inputs: LossInputs, config: Config) -> LossOutput:
    """Loss f32[]: -sum(logp) / tokens; dft: -sum(stop_gradient(p) * logp) / tokens."""
    from align.losses.reduce import aggregate, masked_mean, share_of_loss

    logps = inputs.outputs.logps
    terms = -logps if config.variant == "nll" else -logps.detach().exp() * logps
    total = aggregate(terms, inputs, "token")
    mask = inputs.batch.loss_mask
    return LossOutput(
        total,
        {
            "loss/total": share_of_loss(total),
            "loss/nll": masked_mean(-logps, mask),
            "policy/token_probability": masked_mean(logps.detach().exp(), mask),
        },
    )
