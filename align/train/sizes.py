"""How large a model is and what is trained of it, for the run folder and the screen."""

from __future__ import annotations

from typing import Any

from torch import nn

from align.model.parts import numel, sizes, trained_parts
from align.recipe.adapter import Rate
from align.train.spec import TrainerSpec


def described_sizes(spec: TrainerSpec, module: nn.Module, model: nn.Module) -> dict[str, Any]:
    """Of the whole parameters, before a strategy leaves a rank its part. module: `model` and what wraps it."""
    return {
        "parameters": sum(numel(p) for p in module.parameters()),
        "trained_parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "parts": _parts(spec, model),
    }


def _parts(spec: TrainerSpec, model: nn.Module) -> dict[str, dict[str, Any]]:
    """What is trained of each part of the model, and at which peak rates."""
    modes, rates = spec.adapter_config.modes, spec.rates
    usual = Rate(float(spec.optim.lr or 0.0), spec.optim.weight_decay)
    trained = trained_parts(model)
    found: dict[str, dict[str, Any]] = {}
    for part, size in sizes(model).items():
        own = trained.get(part, ())
        found[part] = {"mode": modes[part] if own else "frozen", "parameters": size}
        if own:
            rate = rates.get(part, usual)
            found[part] |= {"trained": sum(p.numel() for p in own), **rate._asdict()}
    return found
