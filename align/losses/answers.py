"""What a loss answered, before anything is made of it: a user's own may answer anything. No torch until it is asked."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from align.errors import PluginError
from align.losses.base import LossConfig, LossOutput, Metric, Needs
from align.plugins import require_call

if TYPE_CHECKING:
    from torch import Tensor

_REDUCE = ("mean", "max", "sum")
_TAKES = {
    "needs": ("config",),
    "loss": ("inputs", "config"),
    "batch_stats": ("found", "config"),
    "auxiliary": ("trees", "config"),
    "lacking": ("trees", "config"),
    "remarks": ("config",),
    "derived": ("metrics",),
}


def require_options(config: Any, name: str) -> None:
    """`Config` is a LossConfig: another class takes a misspelt option without a word. Raises PluginError."""
    if not (isinstance(config, type) and issubclass(config, LossConfig)):
        raise PluginError(
            "`Config` of a loss is a class of its options, made of align.losses.base.LossConfig",
            where=name,
            remedy="write `class Config(LossConfig):`, with a field for each option",
        )


def require_functions(module: Any, name: str) -> None:
    """What a loss exports can be called as it will be. Raises PluginError."""
    for function, takes in _TAKES.items():
        found = getattr(module, function, None)
        if found is None:
            continue
        if not callable(found) or inspect.iscoroutinefunction(found) or inspect.isgeneratorfunction(found):
            raise PluginError(
                f"`{function}` of a loss is a plain function, and this is {_short(found)}",
                where=name,
                remedy=f"write `def {function}({', '.join(takes)})`, which returns its answer",
            )
        require_call(
            found,
            takes,
            said=f"`{function}` of a loss cannot be called with {' and '.join(takes)}",
            where=name,
            remedy=f"write `def {function}({', '.join(takes)})`",
        )


def require_needs(found: Any, module: Any, name: str) -> Needs:
    """What `needs` answered. Raises PluginError where it is no Needs, or promises what the module lacks."""
    if not isinstance(found, Needs):
        raise PluginError(
            f"`needs(config)` answered {_short(found)}", where=name, remedy="return align.losses.base.Needs(record=...)"
        )
    if found.scope == "batch" and not callable(getattr(module, "batch_stats", None)):
        raise PluginError(
            '`needs` says scope "batch", and the loss has no `batch_stats(found, config)`',
            where=name,
            remedy="add it (align/losses/base.py says what it is given), or leave `scope` out",
        )
    return found


def require_output(found: Any, name: str) -> LossOutput:
    """A loss's value and metrics, each one number. Raises PluginError."""
    from torch import Tensor

    remedy = "return LossOutput(loss, {name: Metric(sum, count)}): align/losses/sft.py is a short example"
    if not isinstance(found, LossOutput):
        raise PluginError(f"the loss answered {_short(found)}", where=name, remedy=remedy)
    if not isinstance(found.loss, Tensor) or found.loss.numel() != 1 or not found.loss.is_floating_point():
        raise PluginError(
            f"`LossOutput.loss` is {_short(found.loss)}, where one number with its gradient is needed",
            where=name,
            remedy="sum over tokens or sequences, and divide by `inputs.counts`",
        )
    if not isinstance(found.metrics, Mapping):
        raise PluginError(f"`LossOutput.metrics` is {_short(found.metrics)}", where=name, remedy=remedy)
    for key, metric in found.metrics.items():
        if not isinstance(metric, Metric) or not isinstance(metric.sum, Tensor) or metric.sum.numel() != 1:
            said = _short(metric.sum if isinstance(metric, Metric) else metric)
            raise PluginError(
                f"the metric {key!r} is {said}, where a sum and a count are needed", where=name, remedy=remedy
            )
        if metric.reduce not in _REDUCE:
            what = f"the metric {key!r} is joined by {metric.reduce!r}"
            raise PluginError(what, where=name, remedy=f"use {' or '.join(_REDUCE)}")
    return found


def require_gradient(total: Tensor, names: str) -> None:
    """A loss that is made of no output of the model teaches nothing. Raises PluginError."""
    from torch import is_grad_enabled

    if is_grad_enabled() and not total.requires_grad:
        raise PluginError(
            "the loss has no gradient: it is not computed from `inputs.outputs`, or was detached from it",
            where=names,
            remedy="compute it from `inputs.outputs.logps` (or what `Needs.head` asks for) without `.detach()`, "
            "`.item()` or numpy",
        )


def _short(value: Any) -> str:
    shape = getattr(value, "shape", None)
    text = f"a {type(value).__name__}" + (f" of shape {list(shape)}" if shape is not None else "")
    return "nothing (None)" if value is None else text
