"""Cross-entropy of what environments answer (ECHO, 2605.24517): the policy learns to foresee what its own calls bring.

    -sum(logp) / tokens,   over all tokens that an environment added behind the first sampled one

Those that the chat template writes around an answer are among them, those of images are not. It stands beside grpo,
`loss: [{name: grpo}, {name: echo, weight: 0.05}]` (the paper's weight), in the same forward pass, and learns from every
episode that was played, those of missing or equal scores too. It divides by its own tokens, so that long answers do not
thin out what episodes teach; a row's `weight` multiplies those alone. Its size says how much of an environment the
policy knows already.
"""

from __future__ import annotations

from align.losses.base import LossConfig, LossInputs, LossOutput, Needs


class Config(LossConfig):
    pass


def needs(config: Config) -> Needs:
    return Needs(record="group", nll="observed", ratio="sampler")  # of none, and right however many updates there are


def loss(inputs: LossInputs, config: Config) -> LossOutput:
    """Loss f32[]: the mean of -logp over all observed tokens of the update."""
    from align.losses.reduce import masked_mean, share_of_loss

    logps, mask = inputs.outputs.logps, inputs.batch.nll_mask
    total = -(logps * mask).sum() / max(inputs.counts.nll_tokens, 1)
    return LossOutput(total, {"loss/total": share_of_loss(total), "loss/observed": masked_mean(-logps, mask)})
