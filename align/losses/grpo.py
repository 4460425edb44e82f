"""Group relative policy optimisation (2402.03300) on groups of completions with given advantages.

Per token, with ratio w to the policy that sampled it and advantage A (computed by `align.objectives`, not here):

    -min(w A, clip(w, 1 - clip_low, 1 + clip_high) A) + kl * KL(policy || reference)

Aggregation `token` is DAPO's (2503.14476), `sequence` the original's, `constant` Dr. GRPO's (2503.20783); ratio
`sequence` is GSPO's geometric mean over the completion (2507.18071). The old policy is the sampler's own
log-probabilities unless the step computed proximal ones.

KL is an estimate from sampled tokens with u = logp_ref - logp: k3 = exp(u) - 1 - u (low variance; as a loss term its
gradient is the forward KL's), k2 = u^2 / 2 (its gradient is the reverse KL's). k1 is refused as a loss term: its
gradient has zero mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from align.losses.base import LossConfig, LossInputs, LossOutput, Metric, Needs

if TYPE_CHECKING:
    from torch import Tensor

LOG_RATIO_LIMIT = 20.0  # exp stays finite in float32; a ratio of 5e8 is far outside any clip range


class Config(LossConfig):
    clip_low: Annotated[float, Field(ge=0)] = 0.2
    clip_high: Annotated[float, Field(ge=0)] = 0.2
    aggregation: Literal["token", "sequence", "constant"] = "token"
    constant_length: Annotated[int, Field(gt=0)] | None = None
    ratio: Literal["token", "sequence"] = "token"
    kl: Annotated[float, Field(ge=0)] = 0.0
    kl_estimator: Literal["k2", "k3"] = "k3"
    entropy_bonus: float = 0.0
    log_entropy: bool = True

    @model_validator(mode="after")
    def _constant_needs_length(self) -> Config:
        if (self.aggregation == "constant") != (self.constant_length is not None):
            raise ValueError("`aggregation: constant` and `constant_length` go together")
        return self


def needs(config: Config) -> Needs:
    head = ("entropy",) if config.log_entropy or config.entropy_bonus else ()
    return Needs(record="group", reference=config.kl > 0, head=head)


def kl_terms(logps: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """Per-token KL estimate f32[N]; see the module's docstring."""
    u = (reference - logps).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return u.exp() - 1 - u if estimator == "k3" else 0.5 * u * u


def log_ratios(logps: Tensor, old: Tensor, inputs: LossInputs, config: Config) -> Tensor:
    """log w per token f32[N]; for `ratio: sequence` each token carries its sequence's mean, with the gradient of
    its own log-probability (GSPO-token, 2507.18071 eq. 14)."""
    from align.losses.reduce import sequence_sums

    difference = logps - old
    if config.ratio == "token":
        return difference
    sums, lengths = sequence_sums(difference.detach(), inputs, inputs.batch.loss_mask)
    sequence_mean = (sums / lengths.clamp(min=1))[inputs.batch.sequence_ids]
    return sequence_mean + logps - logps.detach()


def loss(inputs: LossInputs, config: Config) -> LossOutput:
    """Loss f32[]: the clipped surrogate, aggregated over the whole update, plus KL and minus the entropy bonus."""
    import torch

    from align.losses.reduce import aggregate, masked_mean

    batch, logps = inputs.batch, inputs.outputs.logps
    mask, advantages = batch.loss_mask, batch.advantages
    old = batch.behavior_logps if inputs.proximal_logps is None else inputs.proximal_logps
    ratio = log_ratios(logps, old, inputs, config).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    total = -aggregate(surrogate, inputs, config.aggregation, config.constant_length)
    metrics: dict[str, Metric] = {
        "loss/policy": Metric(total.detach(), reduce="sum"),
        "policy/ratio": masked_mean(ratio, mask),
        "policy/clip_fraction": masked_mean((surrogate < ratio * advantages).float(), mask),
    }
    if inputs.reference_logps is not None:
        kl = kl_terms(logps, inputs.reference_logps, config.kl_estimator)
        total = total + config.kl * aggregate(kl, inputs, config.aggregation, config.constant_length)
        metrics["policy/kl"] = masked_mean(kl, mask)
    if inputs.outputs.entropy is not None:
        metrics["policy/entropy"] = masked_mean(inputs.outputs.entropy, mask)
        if config.entropy_bonus:
            bonus = aggregate(inputs.outputs.entropy, inputs, config.aggregation, config.constant_length)
            total = total - config.entropy_bonus * bonus
    return LossOutput(total, metrics | {"loss/total": Metric(total.detach(), reduce="sum")} | mismatch(inputs))


def mismatch(inputs: LossInputs) -> dict[str, Metric]:
    """How far the trainer's log-probabilities are from the sampler's on the sampler's own tokens."""
    from align.losses.reduce import largest, masked_mean

    mask = inputs.batch.loss_mask
    difference = inputs.outputs.logps.detach() - inputs.batch.behavior_logps
    weight = difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    return {
        "mismatch/kl": masked_mean(weight - 1 - difference, mask),
        "mismatch/max_abs": largest(difference.abs(), mask),
        "mismatch/weight": masked_mean(weight, mask),
        "mismatch/weight_sq": masked_mean(weight**2, mask),
    }
