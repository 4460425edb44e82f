"""Direct preference optimisation (2305.18290) on pairs; P pairs, delta = (logp - logp_ref) chosen minus rejected.

Variants are pure functions of delta f32[P] in `PAIR_LOSSES`. `label_smoothing` is conservative DPO's epsilon (cDPO).
IPO (2310.12036) takes length-normalised log-ratios, as its authors' code does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from align.losses.base import LossConfig, LossInputs, LossOutput, Metric, Needs

if TYPE_CHECKING:
    from torch import Tensor


class Config(LossConfig):
    beta: Annotated[float, Field(gt=0)] = 0.1
    variant: Literal["sigmoid", "hinge", "ipo", "robust"] = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0


def needs(config: Config) -> Needs:
    return Needs(record="pair", reference=True, scope="pair")


def sigmoid(delta: Tensor, config: Config) -> Tensor:
    """-(1-e) log s(beta delta) - e log s(-beta delta); 2305.18290 eq. 7, cDPO for e > 0."""
    from torch.nn.functional import logsigmoid

    z, e = config.beta * delta, config.label_smoothing
    return -(1 - e) * logsigmoid(z) - e * logsigmoid(-z)


def hinge(delta: Tensor, config: Config) -> Tensor:
    """max(0, 1 - beta delta); SLiC, 2309.06657."""
    return (1 - config.beta * delta).clamp(min=0)


def ipo(delta: Tensor, config: Config) -> Tensor:
    """(delta - 1 / (2 beta))^2; 2310.12036 eq. 17."""
    return (delta - 1 / (2 * config.beta)) ** 2


def robust(delta: Tensor, config: Config) -> Tensor:
    """((1-e) L(delta) - e L(-delta)) / (1 - 2e): unbiased under label noise e; 2403.00409 eq. 12."""
    from torch.nn.functional import logsigmoid

    z, e = config.beta * delta, config.label_smoothing
    return (-(1 - e) * logsigmoid(z) + e * logsigmoid(-z)) / (1 - 2 * e)


PAIR_LOSSES: dict[str, Callable[[Tensor, Config], Tensor]] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "robust": robust,
}


def loss(inputs: LossInputs, config: Config) -> LossOutput:
    """Loss f32[]: mean over all pairs of the update of PAIR_LOSSES[variant]."""
    from align.losses.reduce import mean, sequence_sums, share_of_loss

    batch, logps, reference = inputs.batch, inputs.outputs.logps, inputs.reference_logps
    assert reference is not None, "dpo needs reference log-probabilities"
    ratios, lengths = sequence_sums(logps - reference, inputs, batch.loss_mask)
    sums, _ = sequence_sums(logps.detach(), inputs, batch.loss_mask)
    if config.variant == "ipo":
        ratios = ratios / lengths.clamp(min=1)
    chosen, rejected = batch.pairs[:, 0], batch.pairs[:, 1]
    delta = ratios[chosen] - ratios[rejected]
    total = PAIR_LOSSES[config.variant](delta, config).sum() / max(inputs.counts.pairs, 1)
    reward = config.beta * ratios.detach()
    metrics: dict[str, Metric] = {
        "loss/total": share_of_loss(total),
        "rewards/chosen": mean(reward[chosen]),
        "rewards/rejected": mean(reward[rejected]),
        "rewards/margins": mean(reward[chosen] - reward[rejected]),
        "rewards/accuracies": mean((reward[chosen] > reward[rejected]).float()),
        "logps/chosen": mean(sums[chosen]),
        "logps/rejected": mean(sums[rejected]),
    }
    return LossOutput(total, metrics)
