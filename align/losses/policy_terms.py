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
    from align.losses.grpo import Config, Correction

Level = Literal["token", "sequence"]
RatioOf = Literal["token", "sequence", "product"]

LOG_RATIO_LIMIT = 20.0  # exp stays finite in float32; a ratio of 5e8 is far outside any clip range

Limited = dict[str, Tensor]  # "low", "high", "delta" -> bool[N]: the tokens whose ratio a surrogate bounds there
Surrogate = Callable[[Tensor, Tensor, Tensor, "Config"], tuple[Tensor, Limited]]


def ratios(logps: Tensor, old: Tensor, inputs: LossInputs, of: RatioOf) -> Tensor:
    """w per token f32[N], to the policy that gave `old` f32[N].

    Of a "sequence": each token carries its sequence's geometric mean, with the gradient of its own log-probability
    (GSPO-token, 2507.18071 eq. 14); summed over a sequence with one advantage that is GSPO's gradient. Of the
    "product": likewise the ratio of the whole sequence's probabilities.
    """
    log_w = logps - old
    if of != "token":
        sums, lengths = sequence_sums(log_w.detach(), inputs, inputs.batch.loss_mask)
        whole = sums / lengths.clamp(min=1) if of == "sequence" else sums
        log_w = whole[inputs.batch.sequence_ids] + logps - logps.detach()
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


def vespo(ratio: Tensor, logps: Tensor, advantages: Tensor, config: Config) -> tuple[Tensor, Limited]:
    """sg(phi(W)) A logp, phi(W) = e^lambda W^k e^(-lambda W) of the whole sequence's ratio W (2602.10693): 1 at W = 1,
    0 far from it on both sides, k and lambda by the sign of A. As with cispo the value is no objective."""
    log_w = ratio.detach().log()
    positive = advantages >= 0
    k = torch.where(positive, config.vespo_k_pos, config.vespo_k_neg)
    steep = torch.where(positive, config.vespo_lambda_pos, config.vespo_lambda_neg)
    phi = (steep + k * log_w - steep * log_w.exp()).exp()
    return phi * advantages * logps, {}


def dppo(ratio: Tensor, logps: Tensor, advantages: Tensor, config: Config) -> tuple[Tensor, Limited]:
    """M w A - dppo_log_square (log w)^2, with w to the sampler and M = 0 where a token is further from it than a bound,
    on the side that A pushes it to (DPPO, 2602.04879 eq. 11, 12).

    How far: between Bernoulli(pi) and Bernoulli(mu) of the sampled token, |pi - mu| (`tv`, eq. 13) or KL(mu || pi)
    (`kl`, eq. 14). The square is prime-rl's, after Kimi K2.5 (2602.02276); it acts on masked tokens too.
    """
    log_w = ratio.log()
    pi, mu = logps.detach().exp(), (logps - log_w).detach().exp()
    if config.dppo_divergence == "tv":
        far = (pi - mu).abs()
    else:
        rest, rest_mu = torch.log1p(-pi.clamp(max=1 - 1e-7)), torch.log1p(-mu.clamp(max=1 - 1e-7))
        far = (mu * -log_w.detach() + (1 - mu) * (rest_mu - rest)).clamp(min=0)
    limited = {
        "low": (advantages < 0) & (pi < mu) & (far > config.dppo_low),
        "high": (advantages > 0) & (pi > mu) & (far > config.dppo_high),
    }
    kept = ~(limited["low"] | limited["high"])
    return torch.where(kept, ratio, 0.0) * advantages - config.dppo_log_square * log_w**2, limited


SURROGATES: dict[str, Surrogate] = {"clip": clip, "cispo": cispo, "sapo": sapo, "vespo": vespo, "dppo": dppo}


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


# ------------------------------------------------------------------------------------------ sampler and trainer


def gap(inputs: LossInputs) -> Tensor:
    """log p_trainer - log p_sampler f32[N], without gradient: of the policy at the start of the batch where the step
    knows it, else of the policy as it is."""
    policy = inputs.outputs.logps.detach() if inputs.proximal_logps is None else inputs.proximal_logps
    return policy - inputs.batch.behavior_logps


def importance_weights(inputs: LossInputs, level: Level) -> Tensor:
    """p_trainer / p_sampler: f32[N] at level "token"; f32[S] at level "sequence", the product over the completion's
    scored tokens. Bounded to exp(+-LOG_RATIO_LIMIT)."""
    log_weight = gap(inputs)
    if level == "sequence":
        log_weight, _ = sequence_sums(log_weight, inputs, inputs.batch.loss_mask)
    return log_weight.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def corrections(inputs: LossInputs, correction: Correction) -> tuple[Tensor, Tensor]:
    """The weight of each token's surrogate, f32[N] without gradient, and where the bounds changed it, bool[N]."""
    weight = importance_weights(inputs, correction.level)
    if correction.level == "sequence":
        weight = weight[inputs.batch.sequence_ids]
    low = 0.0 if correction.floor is None else correction.floor
    high = math.inf if correction.cap is None else correction.cap
    outside = (weight < low) | (weight > high)
    if correction.mode == "mask":
        return torch.where(outside, torch.zeros_like(weight), weight), outside
    return weight.clamp(low, high), outside


def correction_metrics(
    weight: Tensor, outside: Tensor, inputs: LossInputs, correction: Correction
) -> dict[str, Metric]:
    """mismatch/correction: the mean weight over tokens. mismatch/{truncated, masked}_{tokens, sequences}: how many the
    bounds changed, in units of the level."""
    mask = inputs.batch.loss_mask
    if correction.level == "sequence":
        changed = sequences_with(outside, inputs)
    else:
        changed = Metric((outside & mask).sum(), reduce="sum")
    done = "masked" if correction.mode == "mask" else "truncated"
    return {"mismatch/correction": masked_mean(weight, mask), f"mismatch/{done}_{correction.level}s": changed}


def mismatch(inputs: LossInputs, level: Level) -> dict[str, Metric]:
    """How far the trainer at the start of the batch (else: as it is) is from the sampler, on the sampler's own tokens.

    mismatch/kl: KL(sampler || trainer) in nats per token, estimated by k3 with r = p_trainer / p_sampler: the mean of
    r - 1 - log r (Schulman 2020), unbiased and never negative. mismatch/max_abs: the largest |log r|. The sums of
    weights and of their squares become mismatch/ess (`align.losses.grpo.derived`): the effective sample size
    (sum w)^2 / (n sum w^2) in (0, 1], over the n tokens or, at level "sequence", the n sequences with a scored token;
    w without cap and floor, so that it tells how much the bounds had to do.
    """
    mask, difference = inputs.batch.loss_mask, gap(inputs)
    weight, counted = importance_weights(inputs, level), mask
    if level == "sequence":
        _, lengths = sequence_sums(difference, inputs, mask)
        counted = lengths > 0
    bounded = difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return {
        "mismatch/kl": masked_mean(torch.expm1(bounded) - difference, mask),
        "mismatch/max_abs": largest(difference.abs(), mask),
        "mismatch/weight": masked_mean(weight, counted),
        "mismatch/weight_sq": masked_mean(weight**2, counted),
    }
