"""Direct preference optimisation (2305.18290) on pairs, and the losses that share its form.

P pairs; rho = logp - logp_ref of a completion, c chosen and r rejected; delta = rho_c - rho_r; e label_smoothing.

variant       loss of a pair
sigmoid       -(1-e) log s(beta delta) - e log s(-beta delta); e > 0 is conservative DPO
sigmoid_norm  the same without e, on means over tokens in place of sums (Tulu 3, 2411.15124)
hinge         max(0, 1 - beta delta) (SLiC, 2309.06657)
ipo           (delta - 1 / (2 beta))^2 on means over tokens, as its authors' code does (2310.12036 eq. 17)
robust        sigmoid's loss made unbiased under a share e of flipped labels (2403.00409 eq. 12)
exo_pair      KL(s(+-beta delta) || (1-e, e)) (2402.00856 eq. 16); e is 1e-3 where it is not given
discopop      logistic and exponential loss, mixed by s(beta delta / discopop_tau) (2406.08414 eq. 5)
nca_pair      -log s(beta rho_c) - 1/2 log s(-beta rho_c) - 1/2 log s(-beta rho_r) (2402.05369)
bco_pair      -log s(beta rho_c) - log s(-beta rho_r) (2404.04656), without the paper's reward shift: that is a running
              mean over past steps, which no loss of one update has; TRL's is left out too
sppo_hard     (rho_c - 1 / (2 beta))^2 + (rho_r + 1 / (2 beta))^2 (2405.00675 eq. 4.7 with P = 1 and 0)
apo_zero      s(-beta rho_c) + s(beta rho_r) (2408.06266 eq. 7)
apo_down      s(beta rho_c) + s(-beta delta) (2408.06266 eq. 8)
aot           sigmoid's loss of the k-th smallest logp_c - logp_r minus the k-th smallest of the reference (2406.05882)
aot_unpaired  sigmoid's loss of the k-th smallest rho_c minus the k-th smallest rho_r (2406.05882)

aot and aot_unpaired sort over all pairs of the whole update, whatever its microbatches and ranks: a pass without
gradient and dropout finds for each pair what it meets after sorting. Ties stand in order of tree id. Rows with a weight
are refused: a term belongs to the sides of different pairs.

divergence (f-DPO, 2309.16240) puts f'(e^rho) in place of rho; `reverse_kl` is DPO. Only a difference of two rewards is
free of the prompt's own constant, so variants that read one side alone have no other divergence. f' is free up to a
constant, taken so that f'(1) = 0, as TRL's; it matters for ipo and sigmoid_norm alone, which divide each side by its
length. `divergence_alpha` is the paper's, in (0, 1): towards 0 lies the reverse KL, towards 1 the forward KL (TRL's
f_alpha_divergence_coef is 1 - alpha).
weighting: `wpo` (2406.11827 eq. 2) weighs a pair by how likely its tokens are under the policy.
ld_alpha (LD-DPO, 2409.06411) weighs tokens beyond the shorter side's length, of policy and reference alike; a mean over
tokens still divides by the full length.

rewards/... are beta f'(e^rho), over tokens where the variant's are means; logps/... are sums, unweighted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from align.losses.base import LossConfig, LossInputs, LossOutput, Metric, Needs, Prepass

if TYPE_CHECKING:
    from torch import Tensor

_SMOOTHING = {"sigmoid": 0.0, "robust": 0.0, "exo_pair": 1e-3, "aot": 0.0, "aot_unpaired": 0.0}  # variant -> default
_OF_DIFFERENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "discopop")
_BY_RANK = ("aot", "aot_unpaired")
_OVER_TOKENS = ("ipo", "sigmoid_norm")


class Config(LossConfig):
    beta: Annotated[float, Field(gt=0)] = 0.1
    variant: Literal[
        "sigmoid",
        "sigmoid_norm",
        "hinge",
        "ipo",
        "robust",
        "exo_pair",
        "discopop",
        "nca_pair",
        "bco_pair",
        "sppo_hard",
        "apo_zero",
        "apo_down",
        "aot",
        "aot_unpaired",
    ] = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    discopop_tau: Annotated[float, Field(gt=0)] = 0.05
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    divergence_alpha: Annotated[float, Field(gt=0, lt=1)] = 0.5
    weighting: Literal["none", "wpo"] = "none"
    ld_alpha: Annotated[float, Field(ge=0, le=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _own_default(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "label_smoothing" in given:
            return given
        own = [e for variant, e in _SMOOTHING.items() if variant == given.get("variant")]  # which may be a list
        return given | {"label_smoothing": own[0]} if own else given

    @model_validator(mode="after")
    def _smoothing_is_used(self) -> Config:
        if self.label_smoothing and self.variant not in _SMOOTHING:
            raise ValueError(
                f"variant {self.variant!r} has no label smoothing; use {_list(_SMOOTHING)}, or drop `label_smoothing`"
            )
        if self.variant == "exo_pair" and not self.label_smoothing:
            raise ValueError(
                "exo_pair with `label_smoothing: 0` is infinite: it is the share that the rejected side has in the "
                "target; leave it out for 1e-3, the paper's"
            )
        return self

    @model_validator(mode="after")
    def _divergence_is_of_a_difference(self) -> Config:
        if self.divergence != "reverse_kl" and self.variant not in _OF_DIFFERENCE:
            raise ValueError(
                f"variant {self.variant!r} has no `divergence: {self.divergence}`: it is defined on log-ratios "
                f"themselves; use {_list(_OF_DIFFERENCE)}, or drop `divergence`"
            )
        return self

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> Config:
        given = self.model_fields_set
        if "divergence_alpha" in given and self.divergence != "alpha":
            raise ValueError(f"`divergence_alpha` goes with `divergence: alpha`; it is {self.divergence} here")
        if "discopop_tau" in given and self.variant != "discopop":
            raise ValueError(f"`discopop_tau` goes with `variant: discopop`; it is {self.variant} here")
        return self

    @model_validator(mode="after")
    def _ranks_are_of_whole_pairs(self) -> Config:
        for option, on in (("weighting", self.weighting != "none"), ("ld_alpha", self.ld_alpha is not None)):
            if on and self.variant in _BY_RANK:
                why = {
                    "weighting": "a term of it joins the sides of different pairs, so no pair's weight belongs to it",
                    "ld_alpha": "it sorts sums over whole completions",
                }[option]
                raise ValueError(f"variant {self.variant!r} has no `{option}`: {why}; drop one of the two")
        return self


def _list(names: Any) -> str:
    *some, last = names
    return f"{', '.join(some)} or {last}"


def needs(config: Config) -> Needs:
    return Needs(
        record="pair",
        reference=True,
        head=("log_sum_sq",) if config.weighting == "wpo" else (),
        scope="batch" if config.variant in _BY_RANK else "pair",
        weights=config.variant not in _BY_RANK,  # a term of theirs joins sides of different pairs
    )


def batch_stats(found: Prepass, config: Config) -> dict[str, Tensor]:
    """ids i64[P], the trees of all pairs of the update in order, and per pair f32[P] what it meets after sorting."""
    from align.losses.dpo_terms import MATCHES

    ids, again = found.ids.reshape(-1, 2).unbind(1)
    assert bool((ids == again).all() and (ids[1:] > ids[:-1]).all()), "one pair per tree, each tree once in an update"
    return {"ids": ids.contiguous()} | MATCHES[config.variant](found)


def loss(inputs: LossInputs, config: Config) -> LossOutput:
    """Loss f32[]: mean over all pairs of the update of PAIR_LOSSES[variant].

    Needs reference_logps f32[N]; log_sum_sq f32[N] where weighting is wpo; `batch_stats` of aot and aot_unpaired.
    """
    from align.losses import dpo_terms as terms
    from align.losses.pairs import mean_over_pairs, pair_sums, side_metrics
    from align.losses.reduce import mean, share_of_loss

    logps, reference = inputs.outputs.logps, inputs.reference_logps
    assert reference is not None, "dpo needs reference log-probabilities"
    weights = terms.length_weights(inputs, config.ld_alpha) if config.ld_alpha is not None else None
    ratios = pair_sums(logps - reference if weights is None else weights * (logps - reference), inputs)
    sides = terms.sides(ratios, config, over_tokens=config.variant in _OVER_TOKENS)
    partners = terms.partners(inputs) if config.variant in _BY_RANK else {}
    values = terms.PAIR_LOSSES[config.variant](sides, partners, config)
    metrics: dict[str, Metric] = {}
    if config.weighting == "wpo":
        weight = terms.wpo_weights(inputs)
        values = weight * values
        metrics["policy/wpo_weight"] = mean(weight)
    total = mean_over_pairs(values, inputs)
    rewards = [config.beta * side.detach() for side in (sides.chosen, sides.rejected)]
    metrics |= side_metrics(rewards[0], rewards[1], pair_sums(logps.detach(), inputs))
    metrics |= terms.clamped(ratios, config)
    return LossOutput(total, metrics | {"loss/total": share_of_loss(total)})
