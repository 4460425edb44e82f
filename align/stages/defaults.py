"""Values that a recipe may leave out and that depend on the stage: learning rates and schedule."""

from __future__ import annotations

from typing import Any

from align.recipe.adapter import Adapter, Part, Rate
from align.recipe.parts import Optim

# Learning rates by (stage kind, trains an adapter): what TRL, ms-swift and the LoRA papers use as starting points.
LEARNING_RATES = {
    ("sft", True): 1e-4,
    ("sft", False): 2e-5,
    ("preference", True): 5e-6,
    ("preference", False): 5e-7,
    ("reward_model", True): 1e-4,
    ("reward_model", False): 1e-5,
    ("classify", True): 1e-4,
    ("classify", False): 1e-5,
    ("online", True): 1e-5,
    ("online", False): 1e-6,
}
SCHEDULES = {
    "sft": ("cosine", 0.05),
    "preference": ("cosine", 0.05),
    "reward_model": ("cosine", 0.05),
    "classify": ("cosine", 0.05),
    "online": ("constant", 0.05),
}


def resolved_optim(stage: Any, adapter: Adapter) -> Optim:
    """The stage's optimizer settings with every value filled in."""
    schedule, warmup = SCHEDULES[stage.kind]
    optim: Optim = stage.optim
    return optim.model_copy(
        update={
            "lr": optim.lr if optim.lr is not None else LEARNING_RATES[stage.kind, adapter.kind != "full"],
            "schedule": optim.schedule or schedule,
            "warmup": warmup if optim.warmup is None else optim.warmup,
        }
    )


def resolved_rates(stage: Any, adapter: Adapter) -> dict[Part, Rate]:
    """Learning rate and weight decay of each part that is trained. A part without its own has the stage's; where the
    stage leaves its learning rate open too, a part that is trained whole has what whole models have by default."""
    optim = resolved_optim(stage, adapter)
    assert optim.lr is not None
    rates: dict[Part, Rate] = {}
    for part, mode in adapter.modes.items():
        if mode == "frozen":
            continue
        own, lr = getattr(adapter.tune, part), optim.lr
        if stage.optim.lr is None and mode == "full":
            lr = LEARNING_RATES[stage.kind, False]
        own_lr, own_decay = (own.lr, own.weight_decay) if own is not None else (None, None)
        rates[part] = Rate(lr if own_lr is None else own_lr, optim.weight_decay if own_decay is None else own_decay)
    return rates
