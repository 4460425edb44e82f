"""Odds ratio preference optimisation (2403.07691): NLL of the chosen side minus a weighted log odds ratio.

    NLL - lambda * log s[(m_c - m_r) - (log(1 - e^m_c) - log(1 - e^m_r))],   m = mean log-probability

The NLL covers prompt and response as the authors' code does; `nll: response` leaves the prompt out. log1mexp clamps
its argument to at most -1e-7, so that value and gradient stay finite for a completion of probability one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from align.losses.base import LossConfig, LossInputs, LossOutput, Needs

if TYPE_CHECKING:
    from torch import Tensor

MAX_MEAN_LOGP = -1e-7


class Config(LossConfig):
    lambda_: Annotated[float, Field(ge=0, alias="lambda")] = 0.1
    nll: Literal["prompt_and_response", "response"] = "prompt_and_response"


def needs(config: Config) -> Needs:
    nll: Literal["chosen", "prompt_and_chosen"] = "chosen" if config.nll == "response" else "prompt_and_chosen"
    return Needs(record="pair", scope="pair", nll=nll, weights=True)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0, stable at both ends; a `where` over two branches would give NaN gradients."""
    import torch

    return torch.log(-torch.expm1(x.clamp(max=MAX_MEAN_LOGP)))


def loss(inputs: LossInputs, config: Config) -> LossOutput:
    """Loss f32[]: NLL over the update's NLL tokens minus lambda times the mean log-sigmoid of the log odds ratio."""
    from torch.nn.functional import logsigmoid

    from align.losses.pairs import chosen_nll, mean_over_pairs, pair_sums, side_metrics
    from align.losses.reduce import mean, share_of_loss

    sums = pair_sums(inputs.outputs.logps, inputs)
    chosen, rejected = sums.means
    log_odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    nll = chosen_nll(inputs)
    total = nll - config.lambda_ * mean_over_pairs(logsigmoid(log_odds), inputs)
    sides = side_metrics(config.lambda_ * chosen.detach(), config.lambda_ * rejected.detach(), sums)
    extra = {"loss/total": share_of_loss(total), "loss/nll": share_of_loss(nll), "rewards/log_odds": mean(log_odds)}
    return LossOutput(total, sides | extra)
