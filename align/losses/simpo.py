"""Simple preference optimisation (2405.14734): length-normalised, reference-free, with a target margin.

    -log s(beta (r_c - r_r) - gamma) + nll_weight * NLL(chosen),   r = mean log-probability of the completion

`gamma` is the margin itself, not the paper's ratio gamma/beta. `nll_weight` > 0 is CPO-SimPO; 0 has exactly no NLL
gradient. `alpha` > 0 is AlphaPO (2501.03884): r = (1 - p^-alpha) / alpha with p = exp(mean log-probability), written
with expm1; the exponent is clamped at 80, and clamped sides are counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from align.losses.base import LossConfig, LossInputs, LossOutput, Metric, Needs

if TYPE_CHECKING:
    from torch import Tensor

EXPONENT_LIMIT = 80.0


class Config(LossConfig):
    beta: Annotated[float, Field(gt=0)] = 2.0
    gamma: Annotated[float, Field(ge=0)] = 0.5
    alpha: float = 0.0
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    nll_weight: Annotated[float, Field(ge=0)] = 0.0


def needs(config: Config) -> Needs:
    return Needs(record="pair", scope="pair", nll="chosen" if config.nll_weight else "none", weights=True)


def remarks(config: Config) -> tuple[str, ...]:
    return (f"simpo: gamma {config.gamma:g} is the margin itself; gamma/beta is {config.gamma / config.beta:g}",)


def implicit_reward(mean_logps: Tensor, alpha: float) -> Tensor:
    """r f32[P] of mean log-probabilities f32[P]; alpha = 0 is SimPO's own, the limit of AlphaPO's."""
    import torch

    if alpha == 0.0:
        return mean_logps
    return -torch.expm1((-alpha * mean_logps).clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT)) / alpha


def loss(inputs: LossInputs, config: Config) -> LossOutput:
    """Loss f32[]: mean over the update's pairs, plus the weighted NLL over the update's chosen tokens."""
    from align.losses.pairs import chosen_nll, mean_over_pairs, pair_sums, side_metrics, sigmoid
    from align.losses.reduce import mean, share_of_loss

    sums = pair_sums(inputs.outputs.logps, inputs)
    mean_chosen, mean_rejected = sums.means
    chosen, rejected = (config.beta * implicit_reward(x, config.alpha) for x in (mean_chosen, mean_rejected))
    total = mean_over_pairs(sigmoid(chosen - rejected - config.gamma, config.label_smoothing), inputs)
    metrics: dict[str, Metric] = side_metrics(chosen.detach(), rejected.detach(), sums)
    if config.alpha:
        clamped = [(config.alpha * x).abs() > EXPONENT_LIMIT for x in (mean_chosen, mean_rejected)]
        metrics["rewards/clamped"] = mean((clamped[0] | clamped[1]).float())
    if config.nll_weight:
        nll = chosen_nll(inputs)
        total = total + config.nll_weight * nll
        metrics["loss/nll"] = share_of_loss(nll)
    return LossOutput(total, metrics | {"loss/total": share_of_loss(total)})
