"""Supervised fine-tuning: negative log-likelihood of the scored tokens, as a mean over all of them in the batch.

On pairs (as a term beside a preference loss) the scored tokens are the chosen side's.

Variant `dft` (2508.05629) weighs each token's term with its own detached probability.
"""

from __future__ import annotations

from typing import Literal

from align.losses.base import LossConfig, LossInputs, LossOutput, Needs


class Config(LossConfig):
    variant: Literal["nll", "dft"] = "nll"


def needs(config: Config) -> Needs:
    return Needs(record="conversation", nll="chosen", weights=True)


def loss(inputs: LossInputs, config: Config) -> LossOutput:
    """Loss f32[]: -sum(logp) / tokens; dft: -sum(stop_gradient(p) * logp) / tokens."""
    from align.losses.reduce import masked_mean, share_of_loss, weighted

    logps, mask = inputs.outputs.logps, inputs.batch.nll_mask
    terms = -logps if config.variant == "nll" else -logps.detach().exp() * logps
    total = (weighted(terms, inputs, "token") * mask).sum() / max(inputs.counts.nll_tokens, 1)
    return LossOutput(
        total,
        {
            "loss/total": share_of_loss(total),
            "loss/nll": masked_mean(-logps, mask),
            "policy/token_probability": masked_mean(logps.detach().exp(), mask),
        },
    )
