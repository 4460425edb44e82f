"""Contrastive preference optimisation (2401.08417): a reference-free margin plus the chosen side's NLL.

    L(beta (logp_c - logp_r)) + nll_weight * NLL(chosen)

Variants: sigmoid (with label smoothing), hinge, ipo (squared, on length-normalised log-probabilities).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from align.losses.base import LossConfig, LossInputs, LossOutput, Metric, Needs


class Config(LossConfig):
    beta: Annotated[float, Field(gt=0)] = 0.1
    variant: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    nll_weight: Annotated[float, Field(ge=0)] = 1.0

    @model_validator(mode="after")
    def _smoothing_is_used(self) -> Config:
        if self.label_smoothing and self.variant != "sigmoid":
            raise ValueError(f"variant {self.variant!r} has no label smoothing; use sigmoid, or drop it")
        return self


def needs(config: Config) -> Needs:
    return Needs(record="pair", scope="pair", nll="chosen" if config.nll_weight else "none", weights=True)


def loss(inputs: LossInputs, config: Config) -> LossOutput:
    """Loss f32[]: mean over the update's pairs, plus the weighted NLL over the update's chosen tokens."""
    from align.losses.pairs import chosen_nll, hinge, mean_over_pairs, pair_sums, side_metrics, sigmoid, squared
    from align.losses.reduce import share_of_loss

    sums = pair_sums(inputs.outputs.logps, inputs)
    if config.variant == "ipo":
        chosen, rejected = sums.means
        terms = squared(chosen - rejected, config.beta)
    else:
        chosen, rejected = sums.chosen, sums.rejected
        z = config.beta * (chosen - rejected)
        terms = sigmoid(z, config.label_smoothing) if config.variant == "sigmoid" else hinge(z)
    total = mean_over_pairs(terms, inputs)
    metrics: dict[str, Metric] = side_metrics(config.beta * chosen.detach(), config.beta * rejected.detach(), sums)
    if config.nll_weight:
        nll = chosen_nll(inputs)
        total = total + config.nll_weight * nll
        metrics["loss/nll"] = share_of_loss(nll)
    return LossOutput(total, metrics | {"loss/total": share_of_loss(total)})
