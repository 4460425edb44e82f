"""Are the weights of a merged folder, as plain transformers loads them, those of base + adapter?

How far two models' distributions are apart cannot tell: on a pretrained 135M model (float32), one module of an adapter
of realistic size that is left out moves KL by 6e-7 nats, and rounding the right merge to bfloat16 by 2e-4. So weights
are compared one by one, W + s B A in float64, to the rounding of the written dtype; of each module those where the
adapter is largest beside the weight's own rounding, and as many at random. Nothing of the merge is asked: neither
peft's sum, nor the names that it wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from align.errors import ExportError
from align.model.adapters import lora_layers
from align.model.quantised import dense, linear_weight
from align.model.weights import merged_parameters

ROWS, LARGEST, RANDOM = 16, 64, 64
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}
SMALLEST = {torch.float16: 2.0**-25}  # half of what float16 counts in below its normal range
COMPUTED = 2.0**-19  # of float32 sums, relative to what is summed: a rank of 512 stays within


@dataclass(frozen=True)
class Expected:
    """Of one module's weight: places i64[n], values f64[n] and what the float32 computation of each may cost f64[n]."""

    rows: Tensor
    columns: Tensor
    values: Tensor
    slack: Tensor


@torch.no_grad()
def expected_weights(peft: Any, seed: int) -> dict[str, Expected]:
    """By path of the adapted module. Weights are [out, in]; of a layer that stores them the other way, as it does."""
    return {path: _expected(layer, seed + number) for number, (path, layer) in enumerate(lora_layers(peft))}


def _expected(layer: Any, seed: int) -> Expected:
    generator = torch.Generator().manual_seed(seed)
    flipped = bool(getattr(layer, "fan_in_fan_out", False))
    weight = dense(linear_weight(layer.get_base_layer())).detach().cpu()
    weight = weight.T if flipped else weight
    a, b = (part["default"].weight.detach().cpu().double() for part in (layer.lora_A, layer.lora_B))
    scale = float(layer.scaling["default"])
    some = torch.randperm(weight.shape[0], generator=generator)[:ROWS]
    change = scale * (b[some] @ a)
    ratio = change.abs() / weight[some].double().abs().clamp(min=1e-12)
    top = ratio.flatten().topk(min(LARGEST, ratio.numel())).indices
    rows = [some[top // weight.shape[1]], torch.randint(weight.shape[0], (RANDOM,), generator=generator)]
    columns = [top % weight.shape[1], torch.randint(weight.shape[1], (RANDOM,), generator=generator)]
    row, column = torch.cat(rows), torch.cat(columns)
    parts = scale * b[row] * a[:, column].T  # f64[n, rank]
    own = weight[row, column].double()
    if "default" in layer.lora_magnitude_vector:  # DoRA: a norm goes over each row; peft's forward proved the sum
        whole = merged_parameters(layer, "default")[0].detach().cpu()
        values = (whole.T if flipped else whole)[row, column].double()
    else:
        values = own + parts.sum(-1)
    slack = COMPUTED * (own.abs() + parts.abs().sum(-1))
    return Expected(*((column, row) if flipped else (row, column)), values, slack)


@torch.no_grad()
def require_weights(model: Any, expected: Mapping[str, Expected], dtype: torch.dtype) -> float:
    """Compare a model loaded in float32 from a folder in `dtype`; the largest error in units of what is allowed.

    Raises ExportError naming the module that has other weights.
    """
    worst = 0.0
    for path, wanted in expected.items():
        found = model.get_submodule(path).weight.detach().cpu()[wanted.rows, wanted.columns].double()
        allowed = HALF_ULP[dtype] * wanted.values.abs() * (1 + 2.0**-8) + wanted.slack + SMALLEST.get(dtype, 1e-38)
        error = (found - wanted.values).abs() / allowed
        most = float(error.max())
        if not most <= 1.0:
            raise ExportError(
                f"the merged {path} differs from base + adapter beyond {str(dtype).removeprefix('torch.')}'s bounds: "
                f"{int((~(error <= 1)).sum())} of {len(error)} weights that were looked at by more than rounding, the "
                f"worst by {most:.1e} times as much",
                remedy="nothing was written; report this model and adapter",
            )
        worst = max(worst, most)
    return worst
