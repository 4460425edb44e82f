"""A model's own dropout, which its config brings along. The recipe's is `adapter.dropout`, and is another one."""

from __future__ import annotations

from torch import nn


def switch_off_own_dropout(model: nn.Module) -> None:
    """Set every dropout of the model to 0, in place, but not that of its adapters. What is saved of the model keeps the
    config as it came.

    Attention layers hold their probability as a number, not as a module.
    """
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            continue
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for attribute, value in list(vars(module).items()):
            if "dropout" in attribute and isinstance(value, float):
                setattr(module, attribute, 0.0)
