"""Fewer passes over memory in what is not a matrix product: LoRA's sum, RMS norms, feed-forwards and rotations.

transformers and peft compute these as chains of element-wise operations, each of which reads and writes every
activation and keeps an intermediate for backward. Here each is one autograd function that works in place, keeps its
inputs and a few numbers per token, and folds LoRA's scale and sum into the matrix products.

`fuse` exchanges the classes of modules whose code it knows (`align.model.fused.forms`): a model that computes something
else under the same names, for some inputs or in training mode alone, keeps its own.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from align.model.bitsandbytes_import import import_bitsandbytes
from align.model.fused.forms import FUSED, replaced
from align.model.fused.lora import FusedLoraLinear
from align.model.fused.mlp import looks_like_mlp, mlp_class
from align.model.fused.norm import looks_like_norm, norm_class
from align.model.fused.rotary import calls_rotation, rotary_class

import_bitsandbytes()
from peft.tuners.lora.layer import Linear as LoraLinear  # noqa: E402 (it imports bitsandbytes)
from peft.tuners.lora.layer import LoraLayer  # noqa: E402


class Exchange(Counter[str]):
    """How many modules of each class were exchanged. left: how many keep their own code, by class and reason."""

    def __init__(self, counts: Any = ()) -> None:
        super().__init__(counts)
        self.left: Counter[tuple[str, str]] = Counter()

    def lines(self) -> list[str]:
        """One of what was exchanged, and one for each class that was left."""
        done = ", ".join(f"{count} {name}" for name, count in sorted(self.items()))
        return [f"fused: {done or 'nothing'}"] + [
            f"not fused: {count} {name}, {reason}" for (name, reason), count in sorted(self.left.items())
        ]


def fuse(model: nn.Module) -> Exchange:
    """Exchange what can be; returns what was, and what was not and why."""
    kinds = ((_has_lora, _lora_class), (looks_like_norm, norm_class), (looks_like_mlp, mlp_class))
    done = Exchange()
    # from the inside out: a feed-forward is judged by what its projections have become
    for module in reversed(list(model.modules())):
        if getattr(type(module), FUSED, False):
            continue
        for looks_like, fused_class in (*kinds, (calls_rotation, rotary_class)):
            if looks_like(module):
                found, name = fused_class(module), type(module).__name__
                if isinstance(found, str):
                    done.left[name, found] += 1
                else:
                    module.__class__ = found
                    done[name] += 1
                break
    return done


def _has_lora(module: nn.Module) -> bool:
    return isinstance(module, LoraLayer)


def _lora_class(module: nn.Module) -> type[nn.Module] | str:
    if type(module) is not LoraLinear:
        return "it is another adapter than LoRA on a linear layer"
    return "its forward was replaced" if replaced(module) else FusedLoraLinear
