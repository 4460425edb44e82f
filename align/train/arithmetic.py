"""In which dtypes a policy computes, so that whoever is compared with it computes in the same.

What is trained whole has float32 masters, and computes under autocast in the recipe's dtype: the products in half
precision, the residual stream, norms and embeddings in float32. A model that is all in half precision gives other
values for the same weights, by 0.01 a token and more: a loss on ratios would begin anywhere but at a ratio of 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from align.model.parts import parts_of
from align.recipe.adapter import Adapter, Part


def arithmetic(adapter: Adapter, dtype: torch.dtype) -> tuple[Literal["all"] | Sequence[Part], torch.dtype | None]:
    """Parts of the model that are kept in float32, and the dtype of autocast, for a model that is trained so."""
    if dtype == torch.float32:
        return (), None
    if adapter.kind == "full":
        return "all", dtype
    whole = adapter.parts("full")
    return whole, dtype if whole else None


def widen(model: Any, wanted: Sequence[Part]) -> None:
    """Keep the parameters of these parts in float32, as those that are trained whole are."""
    parts = parts_of(model)
    for name, parameter in model.named_parameters():
        if wanted and parts.of(name) in wanted:
            parameter.data = parameter.data.float()


def narrowed(model: Any, autocast: torch.dtype | None) -> Any:
    """A frozen float32 model, with the weights that autocast rounds at every product rounded once: half the memory, and
    the same values. Of linear layers alone, and of those that share no weight with anything else."""
    if autocast is None:
        return model
    shared = [parameter for module in model.modules() for parameter in module._parameters.values()]
    for module in model.modules():
        if type(module) is nn.Linear and sum(one is module.weight for one in shared) == 1:
            for parameter in module.parameters():
                parameter.data = parameter.data.to(autocast)
    return model
