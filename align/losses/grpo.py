"""Group relative policy optimisation (2402.03300) on groups of completions with given advantages.

Per token, with ratio w to the policy at the start of the batch, weight c of that policy to the sampler, and advantage A
(computed by `align.objectives`, not here):

    -c surrogate(w, A) + kl * KL(policy || reference) - entropy_bonus * H

surrogate    `clip`: min(w A, clip(w, 1 - clip_low, 1 + clip_high) A), and `clip_delta` caps w itself (INTELLECT-2);
             `cispo` (2506.13585): sg(min(w, cispo_cap)) A logp. The cap is absolute, 5 as in ScaleRL (2510.13786);
             `sapo` (2511.20347): a soft gate in place of the clip;
             `vespo` (2602.10693): sg(phi(W)) A logp, W the ratio of the whole completion to the sampler, phi a smooth
             bump at 1; `dppo` (2602.04879): w A with w to the sampler, tokens that are too far from it masked, less
             dppo_log_square (log w)^2. Both are to the sampler itself: `correction` has no part in them.
ratio        of each token, or of the `sequence`: GSPO's geometric mean over the completion (2507.18071).
aggregation  `token` is DAPO's (2503.14476), `sequence` the original's, `constant` Dr. GRPO's (2503.20783),
             `sequence_sum` LUSPO's (2602.05261), which goes with `ratio: sequence`.

So TRL's loss_type is: grpo {aggregation: sequence}; dapo {aggregation: token}; dr_grpo {aggregation: constant}; gspo
{ratio: sequence, aggregation: sequence}; luspo {ratio: sequence, aggregation: sequence_sum}; cispo {surrogate: cispo};
sapo {surrogate: sapo, aggregation: sequence}; vespo {surrogate: vespo}. prime-rl's default is {surrogate: dppo}.

correction is c, without gradient: exp(logp at the start of the batch - logp of the sampler). It takes the sampler's
arithmetic and age out of the gradient, and leaves the clip range to the batch's own updates (decoupled PPO, 2110.00641;
for language models AReaL, 2505.24298). `level: token`, or `sequence`: the product over a completion's scored tokens,
which is unbiased, and the further from 1 the longer the completion. `mode: truncate` keeps c within [floor, cap] (TIS,
as V-trace's weights, 1802.01561); `mask` makes it 0 outside (MIS, IcePop). A masked token stays in every denominator,
as in TRL; verl's rejection sampling takes it out. KL and bonus are not weighted. TRL's vllm_importance_sampling_mode is
<level>_<mode>. It is on by default, as in TRL: where sampler and trainer agree, c is 1 (within 1e-4 in float32) and
nothing changes. TRL's own choice, sequence_mask at 3, drops whole completions, long ones first; ours is TIS per token
at 2 (verl's decoupled_token_is), which keeps them whatever their length. `correction: off` takes w to the sampler
itself: the clip range then also bounds mismatch and staleness, which is ordinary PPO (verl's bypass mode).

KL is an estimate from sampled tokens with u = logp_ref - logp: k3 = exp(u) - 1 - u (low variance; as a loss term its
gradient is the forward KL's), k2 = u^2 / 2 (its gradient is the reverse KL's where the sampler is the policy), w_k3 =
w k3 with w to the sampler (DeepSeek-V3.2, 2512.02556: unbiased for any sampler, in value and as the reverse KL's
gradient). w is the token's own here, whatever `ratio` is: a sequence's mean is no importance weight. k1 is refused as a
loss term: its gradient has zero mean.

top_entropy (2506.01939) trains the surrogate on that share of the tokens of the whole update, those of highest entropy,
and the entropy bonus acts on the same tokens; the KL on all. The policy runs twice: a pass without gradient and dropout
finds the threshold, the step's own forward is compared with it. off_policy_threshold (DeepSeek-V3.2, eq. 9) takes
sequences of negative advantage whose mean log-ratio to the sampler drifted beyond it out of the surrogate. Neither mask
changes a denominator. KL and bonus are aggregated as the surrogate is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from align.losses.base import LossConfig, LossInputs, LossOutput, Metric, Needs, Prepass

if TYPE_CHECKING:
    from torch import Tensor

_OWNER = {  # option -> the surrogate that reads it
    "clip_low": "clip",
    "clip_high": "clip",
    "clip_delta": "clip",
    "cispo_cap": "cispo",
    "sapo_temperature_pos": "sapo",
    "sapo_temperature_neg": "sapo",
    "vespo_k_pos": "vespo",
    "vespo_lambda_pos": "vespo",
    "vespo_k_neg": "vespo",
    "vespo_lambda_neg": "vespo",
    "dppo_divergence": "dppo",
    "dppo_low": "dppo",
    "dppo_high": "dppo",
    "dppo_log_square": "dppo",
}
_TO_SAMPLER = ("vespo", "dppo")
"""Surrogates whose ratio is to the sampler, whatever the policy was at the start of the batch."""


class Correction(LossConfig):
    """The weight of the policy at the start of a batch to the sampler, and what becomes of it outside [floor, cap]."""

    level: Literal["token", "sequence"] = "token"
    mode: Literal["truncate", "mask"] = "truncate"
    cap: Annotated[float, Field(ge=1)] | None = 2.0
    floor: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def _has_a_bound(self) -> Correction:
        if self.cap is None and self.floor is None:
            raise ValueError("`correction` needs `cap`, `floor` or both: without one a few weights decide an update")
        return self


def _switch(value: Any) -> Any:
    """`off` is none, `on` the default."""
    words: dict[Any, Any] = {False: None, "off": None, True: {}, "on": {}}
    return words.get(value, value) if isinstance(value, bool | str) else value


class Config(LossConfig):
    surrogate: Literal["clip", "cispo", "sapo", "vespo", "dppo"] = "clip"
    clip_low: Annotated[float, Field(ge=0)] = 0.2
    clip_high: Annotated[float, Field(ge=0)] = 0.2
    clip_delta: Annotated[float, Field(gt=1)] | None = None
    cispo_cap: Annotated[float, Field(gt=0)] = 5.0
    sapo_temperature_pos: Annotated[float, Field(gt=0)] = 1.0
    sapo_temperature_neg: Annotated[float, Field(gt=0)] = 1.05
    vespo_k_pos: Annotated[float, Field(ge=0)] = 2.0
    vespo_lambda_pos: Annotated[float, Field(gt=0)] = 3.0
    vespo_k_neg: Annotated[float, Field(ge=0)] = 3.0
    vespo_lambda_neg: Annotated[float, Field(gt=0)] = 2.0
    dppo_divergence: Literal["tv", "kl"] = "tv"
    dppo_low: Annotated[float, Field(gt=0)] = 0.1
    dppo_high: Annotated[float, Field(gt=0)] = 0.1
    dppo_log_square: Annotated[float, Field(ge=0)] = 1e-3
    aggregation: Literal["token", "sequence", "constant", "sequence_sum"] = "token"
    constant_length: Annotated[int, Field(gt=0)] | None = None
    ratio: Literal["token", "sequence"] = "token"
    kl: Annotated[float, Field(ge=0)] = 0.0
    kl_estimator: Literal["k2", "k3", "w_k3"] = "k3"
    entropy_bonus: float = 0.0
    top_entropy: Annotated[float, Field(gt=0, le=1)] = 1.0
    off_policy_threshold: Annotated[float, Field(ge=0)] | None = None
    correction: Annotated[Correction | None, BeforeValidator(_switch)] = Correction()
    log_entropy: bool = True

    @field_validator("kl_estimator", mode="before")
    @classmethod
    def _k1_is_no_loss_term(cls, value: Any) -> Any:
        if value == "k1":
            raise ValueError(
                "k1 is no loss term: its gradient has zero mean. `w_k3` and `k2` have the reverse KL's gradient; "
                "a KL inside the reward, where k1 belongs, is not offered by this version"
            )
        return value

    @model_validator(mode="after")
    def _constant_needs_length(self) -> Config:
        if (self.aggregation == "constant") != (self.constant_length is not None):
            raise ValueError("`aggregation: constant` and `constant_length` go together")
        return self

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> Config:
        given = self.model_fields_set
        for option, owner in _OWNER.items():
            if option in given and self.surrogate != owner:
                own = [f"`{name}`" for name, whose in _OWNER.items() if whose == self.surrogate]
                raise ValueError(
                    f"`{option}` belongs to `surrogate: {owner}`; the surrogate here is {self.surrogate}, "
                    f"which reads {', '.join(own)}"
                )
        if self.surrogate in _TO_SAMPLER and (self.ratio != "token" or (self.correction and "correction" in given)):
            option = "ratio" if self.ratio != "token" else "correction"
            raise ValueError(
                f"`surrogate: {self.surrogate}` has a ratio of its own, to the sampler itself, on which `{option}` has "
                "no effect; leave it out"
            )
        if self.clip_delta is not None and self.clip_delta <= 1 + self.clip_high:
            raise ValueError(
                f"`clip_delta` {self.clip_delta:g} bounds the ratio itself and must lie above 1 + `clip_high` = "
                f"{1 + self.clip_high:g}; INTELLECT-2 uses 4"
            )
        if "kl_estimator" in given and "kl" not in given:
            raise ValueError("`kl_estimator` without `kl`: there is no KL term to estimate; set `kl`, its coefficient")
        return self


def needs(config: Config) -> Needs:
    entropy = config.log_entropy or config.entropy_bonus or config.top_entropy < 1
    scope: Literal["batch", "sequence"] = "batch" if config.top_entropy < 1 else "sequence"
    head = ("entropy",) if entropy else ()
    ratio: Literal["sampler", "proximal"] = "proximal" if corrected(config) else "sampler"
    return Needs(record="group", reference=config.kl > 0, head=head, scope=scope, ratio=ratio)


def corrected(config: Config) -> Correction | None:
    """What is done about the sampler's own probabilities; None where the ratio is to the sampler itself."""
    return None if config.surrogate in _TO_SAMPLER else config.correction


def remarks(config: Config) -> tuple[str, ...]:
    """What the ratio is to and what is done about the sampler's own probabilities."""
    c = corrected(config)
    if config.surrogate in _TO_SAMPLER:
        return (f"`surrogate: {config.surrogate}`: the ratio is to the sampler itself; nothing is corrected besides",)
    if c is None:
        return ("`correction: off`: ratio and clip range are to the sampler, and bound its mismatch and staleness too",)
    bounds = [f"{word} {bound:g}" for word, bound in (("below", c.floor), ("above", c.cap)) if bound is not None]
    done = "truncated" if c.mode == "truncate" else "masked"
    return (f"the weight of each {c.level} to the sampler is {done} {' and '.join(bounds)} (`correction`)",)


def batch_stats(found: Prepass, config: Config) -> dict[str, Tensor]:
    """entropy_threshold f32[]: at or above it lies the share `top_entropy` of all scored tokens of the update."""
    from align.losses.policy_terms import entropy_threshold

    assert found.entropy is not None, "top_entropy needs the entropy of every scored token"
    return {"entropy_threshold": entropy_threshold(found.entropy, config.top_entropy)}


def loss(inputs: LossInputs, config: Config) -> LossOutput:
    """Loss f32[]: the surrogate, aggregated over the whole update, plus KL and minus the entropy bonus.

    Needs reference_logps f32[N] where kl > 0, and batch_stats["entropy_threshold"] where top_entropy < 1. Without
    proximal_logps f32[N] the ratio is to the sampler, and `correction` has nothing to act on.
    """
    import torch

    from align.losses import policy_terms
    from align.losses.reduce import aggregate, masked_mean

    def over_update(values: Tensor) -> Tensor:
        return aggregate(values, inputs, config.aggregation, config.constant_length)

    batch, logps, entropy = inputs.batch, inputs.outputs.logps, inputs.outputs.entropy
    mask = batch.loss_mask
    correction = corrected(config)
    sampled = inputs.proximal_logps is None or config.surrogate in _TO_SAMPLER
    old = batch.behavior_logps if sampled else inputs.proximal_logps
    assert old is not None
    ratio = policy_terms.ratios(logps, old, inputs, "product" if config.surrogate == "vespo" else config.ratio)
    surrogate, limited = policy_terms.SURROGATES[config.surrogate](ratio, logps, batch.advantages, config)
    entropic, drifted, metrics = masks(inputs, config)
    surrogate = torch.where(entropic & ~drifted, surrogate, torch.zeros_like(surrogate))
    if inputs.proximal_logps is not None and correction is not None:
        weight, outside = policy_terms.corrections(inputs, correction)
        surrogate = weight * surrogate
        metrics |= policy_terms.correction_metrics(weight, outside, inputs, correction)
    total = -over_update(surrogate)
    metrics |= {"loss/policy": Metric(total.detach(), reduce="sum"), "policy/ratio": masked_mean(ratio, mask)}
    metrics |= policy_terms.clip_metrics(limited, mask)
    if inputs.reference_logps is not None:
        kl = policy_terms.kl_terms(logps, inputs.reference_logps, batch.behavior_logps, config.kl_estimator)
        total = total + config.kl * over_update(kl)
        metrics["policy/kl"] = masked_mean(kl, mask)
    if entropy is not None:
        metrics["policy/entropy"] = masked_mean(entropy, mask)
        if config.entropy_bonus:
            total = total - config.entropy_bonus * over_update(
                torch.where(entropic, entropy, torch.zeros_like(entropy))
            )
    metrics["loss/total"] = Metric(total.detach(), reduce="sum")
    level = "token" if correction is None else correction.level
    return LossOutput(total, metrics | policy_terms.mismatch(inputs, level))


def derived(metrics: Mapping[str, float]) -> dict[str, float]:
    """`metrics`, joined over all microbatches and ranks, with mismatch/ess in place of the sums behind it (see
    `align.losses.policy_terms.mismatch`): Kong's effective sample size as a share, at most 1 but for rounding."""
    out = dict(metrics)
    weight, weight_sq = out.pop("mismatch/weight", None), out.pop("mismatch/weight_sq", None)
    if weight is not None and weight_sq:
        out["mismatch/ess"] = min(1.0, weight**2 / weight_sq)
    return out


def masks(inputs: LossInputs, config: Config) -> tuple[Tensor, Tensor, dict[str, Metric]]:
    """Which tokens `top_entropy` trains, bool[N]; which `off_policy_threshold` does not, bool[N]; and their counts."""
    import torch

    from align.losses.policy_terms import off_policy, sequences_with

    entropic = torch.ones_like(inputs.batch.loss_mask)
    drifted, metrics = ~entropic, {}
    if config.top_entropy < 1:
        assert inputs.outputs.entropy is not None, "top_entropy needs the entropy of every scored token"
        threshold = inputs.batch_stats["entropy_threshold"]
        entropic = inputs.outputs.entropy.detach() >= threshold
        metrics["policy/top_entropy_tokens"] = Metric((entropic & inputs.batch.loss_mask).sum(), reduce="sum")
        metrics["policy/entropy_threshold"] = Metric(threshold, reduce="max")
    if config.off_policy_threshold is not None:
        drifted = off_policy(inputs, config.off_policy_threshold)
        metrics["policy/off_policy_sequences"] = sequences_with(drifted, inputs)
    return entropic, drifted, metrics
