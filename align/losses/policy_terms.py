"""What grpo is composed of: ratios, surrogates, KL estimates, masks. Pure functions of tensors over N scored tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from align.losses.base import LossInputs, Metric
from align.losses.reduce import largest, masked_mean, sequence_sums

if TYPE_CHECKING:
    from align.losses.grpo import Config

LOG_RATIO_LIMIT = 20.0  # exp stays finite in float32; a ratio of 5e8 is far outside any clip range

Limited = dict[str, Tensor]  # "low", "high", "delta" -> bool[N]: the tokens whose ratio a surrogate bounds there
Surrogate = Callable[[Tensor, Tensor, Tensor, "Config"], tuple[Tensor, Limited]]


def ratios(logps: Tensor, old: Tensor, inputs: LossInputs, level: Literal["token", "sequence"]) -> Tensor:
    """w per token f32[N], to the policy that gave `old` f32[N].

    Level "sequence": each token carries its sequence's geometric mean, with the gradient of its own log-probability
    (GSPO-token, 2507.18071 eq. 14); summed over a sequence with one advantage that is GSPO's gradient.
    """
    log_w = logps - old
    if level == "sequence":
        sums, lengths = sequence_sums(log_w.detach(), inputs, inputs.batch.loss_mask)
        mean = (sums / lengths.clamp(min=1))[inputs.batch.sequence_ids]
        log_w = mean + logps - logps.detach()
    return log_w.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def clip(ratio: Tensor, logps: Tensor, advantages: Tensor, config: Config) -> tuple[Tensor, Limited]:
    """min(w A, clip(w, 1 - clip_low, 1 + clip_high) A): PPO's (1707.06347 eq. 7), with DAPO's two bounds.

    clip_delta: w itself is capped there first. That matters for A < 0 alone, where the minimum has no bound from above
    (INTELLECT-2, 2505.07291; TRL's delta).
    """
    low, high, delta = 1 - config.clip_low, 1 + config.clip_high, config.clip_delta
    limited = {"low": (ratio < low) & (advantages < 0), "high": (ratio > high) & (advantages > 0)}
    clipped = ratio.clamp(low, high)
    if delta is not None:
        limited["delta"] = (ratio > delta) & (advantages < 0)
        ratio = ratio.clamp(max=delta)
    return torch.minimum(ratio * advantages, clipped * advantages), limited


def cispo(ratio: Tensor, logps: Tensor, advantages: Tensor, config: Config) -> tuple[Tensor, Limited]:
    """sg(min(w, cispo_cap)) A logp (2506.13585, without a lower bound, as in its experiments): every token
    keeps a gradient, its weight is bounded. The value is no objective: its gradient is that with the weight frozen."""
    weight = ratio.detach().clamp(max=config.cispo_cap)
    return weight * advantages * logps, {"high": ratio > config.cispo_cap}


def sapo(ratio: Tensor, logps: Tensor, advantages: Tensor, config: Config) -> tuple[Tensor, Limited]:
    """4 / tau sigmoid(tau (w - 1)) A (2511.20347), tau by the sign of A: a soft gate, whose slope is 1 at
    w = 1 and falls off on both sides."""
    positive = torch.full_like(ratio, config.sapo_temperature_pos)
    tau = torch.where(advantages > 0, positive, torch.full_like(ratio, config.sapo_temperature_neg))
    return torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages, {}


SURROGATES: dict[str, Surrogate] = {"clip": clip, "cispo": cispo, "sapo": sapo}


def kl_terms(logps: Tensor, reference: Tensor, behavior: Tensor, estimator: str) -> Tensor:
    """Per-token KL estimate f32[N], from tokens that `behavior` sampled; see `align.losses.grpo`.

    u is bounded from above alone: there e^u would overflow. Far below, k3 is linear in u and needs no bound.
    """
    u = reference - logps
    if estimator == "k2":
        return 0.5 * u * u
    u = u.clamp(max=LOG_RATIO_LIMIT)
    k3 = torch.expm1(u) - u
    if estimator == "k3":
        return k3
    weight = (logps - behavior).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    return weight * k3


def off_policy(inputs: LossInputs, threshold: float) -> Tensor:
    """bool[N]: tokens of sequences that drifted beyond `threshold` and have a negative advantage (DeepSeek-V3.2,
    2512.02556 eq. 9). Drift: the mean of log sampler - log policy over the sequence's tokens, in nats."""
    batch = inputs.batch
    drift, lengths = sequence_sums(batch.behavior_logps - inputs.outputs.logps.detach(), inputs, batch.loss_mask)
    beyond = drift / lengths.clamp(min=1) > threshold
    return beyond[batch.sequence_ids] & (batch.advantages < 0)


def sequences_with(tokens: Tensor, inputs: LossInputs) -> Metric:
    """The number of sequences that have any of `tokens` bool[N] under the loss mask."""
    found, _ = sequence_sums(tokens.to(torch.float32), inputs, inputs.batch.loss_mask)
    return Metric((found > 0).sum(), reduce="sum")


def entropy_threshold(entropy: Tensor, share: float) -> Tensor:
    """f32[]: at or above it lie the highest `share` of entropy f32[N] (2506.01939), and all that tie with the lowest
    of these.

    The tokens are those at or above the (1 - share) quantile with linear interpolation, as TRL's. The threshold itself
    lies half-way to the next token below: the step's own forward computes entropies again, and the last bit must not
    move a token over it.
    """
    n = entropy.numel()
    ordered = entropy.sort().values
    first = math.ceil((1 - share) * (n - 1) - 1e-9)  # 0.7 * 10 is 7.000000000000001
    if first <= 0:
        return entropy.new_full((), -1.0)  # below every entropy: all tokens
    return (ordered[first - 1] + ordered[first]) / 2


def clip_metrics(limited: Limited, mask: Tensor) -> dict[str, Metric]:
    """policy/clip_fraction: share of tokens that a surrogate bounds; also by bound, where there are several."""
    if not limited:
        return {}
    anywhere = torch.stack(list(limited.values())).any(dim=0)
    metrics = {"policy/clip_fraction": masked_mean(anywhere.float(), mask)}
    return metrics | {f"policy/clip_fraction_{k}": masked_mean(v.float(), mask) for k, v in limited.items()}


def mismatch(inputs: LossInputs) -> dict[str, Metric]:
    """How far the trainer's log-probabilities are from the sampler's on the sampler's own tokens."""
    mask = inputs.batch.loss_mask
    difference = inputs.outputs.logps.detach() - inputs.batch.behavior_logps
    bounded = difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    weight = bounded.exp()
    return {
        "mismatch/kl": masked_mean(torch.expm1(bounded) - difference, mask),
        "mismatch/max_abs": largest(difference.abs(), mask),
        "mismatch/weight": masked_mean(weight, mask),
        "mismatch/weight_sq": masked_mean(weight**2, mask),
    }
