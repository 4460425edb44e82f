"""Direct preference optimisation (2305.18290) on pairs; P pairs, delta = (logp - logp_ref) chosen minus rejected.

Variants are pure functions of delta f32[P] in `PAIR_LOSSES`. `label_smoothing` is conservative DPO's epsilon (cDPO).
IPO (2310.12036) takes length-normalised log-ratios, as its authors' code does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from align.losses.base import LossConfig, LossInputs, LossOutput, Needs

if TYPE_CHECKING:
    from torch import Tensor


class Config(LossConfig):
    beta: Annotated[float, Field(gt=0)] = 0.1
    variant: Literal["sigmoid", "hinge", "ipo", "robust"] = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0

    @model_validator(mode="after")
    def _smoothing_is_used(self) -> Config:
        if self.label_smoothing and self.variant in ("hinge", "ipo"):
            raise ValueError(f"variant {self.variant!r} has no label smoothing; use sigmoid or robust, or drop it")
        return self


def needs(config: Config) -> Needs:
    return Needs(record="pair", reference=True, scope="pair")


def sigmoid(delta: Tensor, config: Config) -> Tensor:
    from align.losses.pairs import sigmoid

    return sigmoid(config.beta * delta, config.label_smoothing)


def hinge(delta: Tensor, config: Config) -> Tensor:
    from align.losses.pairs import hinge

    return hinge(config.beta * delta)


def ipo(delta: Tensor, config: Config) -> Tensor:
    from align.losses.pairs import squared

    return squared(delta, config.beta)


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
    """Loss f32[]: mean over all pairs of the update of PAIR_LOSSES[variant]. Needs reference_logps f32[N]."""
    from align.losses.pairs import pair_sums, side_metrics
    from align.losses.reduce import share_of_loss

    logps, reference = inputs.outputs.logps, inputs.reference_logps
    assert reference is not None, "dpo needs reference log-probabilities"
    ratios = pair_sums(logps - reference, inputs)
    chosen, rejected = ratios.means if config.variant == "ipo" else (ratios.chosen, ratios.rejected)
    total = PAIR_LOSSES[config.variant](chosen - rejected, config).sum() / max(inputs.counts.pairs, 1)
    sides = side_metrics(
        config.beta * chosen.detach(), config.beta * rejected.detach(), pair_sums(logps.detach(), inputs)
    )
    return LossOutput(total, {"loss/total": share_of_loss(total)} | sides)
