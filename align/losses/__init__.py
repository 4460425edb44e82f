"""Losses by name. Each is one file here exporting `Config`, `needs(config)` and `loss(inputs, config)`, or a user's
`pkg.mod:module` / `file.py` found through `align.plugins`. Loading one imports no torch.

`configure` gives one `Loss`, with its options; `Losses` are those of a stage, and what they need together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from align.errors import PluginError, RecipeError
from align.losses.answers import require_functions, require_needs, require_options, require_output
from align.losses.base import LossConfig, LossInputs, LossOutput, Needs, Nll, Prepass, Record
from align.plugins import builtin_names, resolve, users_code
from align.protocols.trees import Tree
from align.recipe.parts import LossTerm

if TYPE_CHECKING:
    from torch import Tensor

_HELPERS = ("answers", "base", "dpo_terms", "pairs", "policy_terms", "reduce")


@dataclass(frozen=True)
class Loss:
    """A loss with its options. module: what exports it (`align.losses.base` says what); weight: of its value in the
    sum. The methods are what a module may leave out, with the answer of one that does."""

    name: str
    module: ModuleType
    config: LossConfig
    needs: Needs
    weight: float = 1.0

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """Its value, without the weight, and its metrics. Raises PluginError where a user's fails or gives others."""
        with self._own("loss"):
            output = self.module.loss(inputs, self.config)
        return require_output(output, self.name)

    def seen_before(self, trees: Sequence[Tree]) -> Sequence[Tree]:
        """The trees that the pass without gradient goes over, before an update on `trees`."""
        if not hasattr(self.module, "auxiliary"):
            return trees
        with self._own("auxiliary"):
            seen: Sequence[Tree] = self.module.auxiliary(trees, self.config)
        return seen

    @property
    def sees_others(self) -> bool:
        """Whether that pass goes over other trees than those of the update."""
        return self.needs.scope == "batch" and hasattr(self.module, "auxiliary")

    def batch_stats(self, found: Prepass | None) -> dict[str, Tensor]:
        """What it takes from that pass."""
        with self._own("batch_stats"):
            stats: dict[str, Tensor] = self.module.batch_stats(found, self.config)
        return stats

    def derived(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Joined metrics with what it computes from them."""
        if not hasattr(self.module, "derived"):
            return dict(metrics)
        with self._own("derived"):
            found = dict(self.module.derived(metrics))
        if "loss/total" not in found and "loss/total" in metrics:
            remedy = "it answers all metrics that it was given, in place of those that it joins"
            raise PluginError("`derived` left out loss/total", where=self.name, remedy=remedy)
        return found

    def remarks(self) -> tuple[str, ...]:
        """What the plan says about its options."""
        if not hasattr(self.module, "remarks"):
            return ()
        with self._own("remarks"):
            said = self.module.remarks(self.config)
            return (said,) if isinstance(said, str) else tuple(said)

    @property
    def may_lack(self) -> bool:
        """Whether there are updates that do without something, which `lacking` tells."""
        return hasattr(self.module, "lacking")

    def lacking(self, trees: Sequence[Tree]) -> str | None:
        """What an update over these trees does without."""
        if not self.may_lack:
            return None
        with self._own("lacking"):
            said: str | None = self.module.lacking(trees, self.config)
        return said

    def _own(self, function: str) -> AbstractContextManager[None]:
        return _guarded(self.module, self.name, f"`{function}` of the loss failed")


def _guarded(
    module: ModuleType, name: str, doing: str, passing: tuple[type[Exception], ...] = ()
) -> AbstractContextManager[None]:
    """What a user's loss raises is told as the plugin's; of ours it is a bug of ours."""
    return nullcontext() if module.__name__.startswith(f"{__name__}.") else users_code(name, doing, passing)


class Losses:
    """The losses of a stage, in the recipe's order."""

    def __init__(self, losses: Iterable[Loss]):
        self._losses = tuple(losses)

    @classmethod
    def of(cls, terms: Iterable[LossTerm]) -> Losses:
        """Those that a recipe names. Raises PluginError or RecipeError."""
        return cls(configure(term.name, term.options, term.weight) for term in terms)

    def __iter__(self) -> Iterator[Loss]:
        return iter(self._losses)

    def __len__(self) -> int:
        return len(self._losses)

    @property
    def records(self) -> tuple[Record, ...]:
        """What each learns from. `align check` proves that the others can learn from what the first does."""
        return tuple(loss.needs.record for loss in self)

    @property
    def head(self) -> tuple[str, ...]:
        """Names of HeadOutputs beside logps that any of them reads."""
        return tuple(sorted({name for loss in self for name in loss.needs.head}))

    @property
    def nll(self) -> Nll:
        """Which tokens their likelihood term covers; two that disagree were refused by the check."""
        return next((loss.needs.nll for loss in self if loss.needs.nll != "none"), "none")

    @property
    def needs_reference(self) -> bool:
        return any(loss.needs.reference for loss in self)

    @property
    def needs_margin(self) -> bool:
        """Whether one reads a margin of every pair."""
        return any(loss.needs.margin for loss in self)

    @property
    def needs_proximal(self) -> bool:
        """Whether a ratio is to the policy at the start of the batch."""
        return any(loss.needs.ratio == "proximal" for loss in self)


def names() -> tuple[str, ...]:
    """Names of the losses that this package has."""
    return builtin_names(__name__, _HELPERS)


def load(name: str) -> ModuleType:
    """The module of a loss. Raises PluginError listing the choices, or naming what a user's module lacks."""
    module: ModuleType = resolve(name, group=__name__, package=__name__, hidden=_HELPERS)
    missing = [wanted for wanted in ("Config", "needs", "loss") if not hasattr(module, wanted)]
    if missing:
        file, colon, _ = name.rpartition(":")
        raise PluginError(
            f"a loss exports Config, needs and loss; this has no {' and no '.join(missing)}",
            where=name,
            remedy=f"a loss is a file, not a function in one: name {file}, with all three in it"
            if colon
            else "align/losses/sft.py is a short example",
        )
    require_options(module.Config, name)
    require_functions(module, name)
    return module


def described(name: str) -> dict[str, Any]:
    """A loss's options by name. It runs user code."""
    return {"options": list(load(name).Config.model_fields)}


def configure(name: str, options: Mapping[str, Any], weight: float = 1.0) -> Loss:
    """A loss with validated options. Raises PluginError or RecipeError."""
    module = load(name)
    try:
        with _guarded(module, name, "`Config` of the loss failed", (ValidationError,)):
            config = module.Config(**options)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or name}: {e['msg']}" for e in error.errors())
        known = ", ".join(field.alias or key for key, field in module.Config.model_fields.items())
        raise RecipeError(f"options of loss {name!r}: {problems}", remedy=f"its options are: {known}") from error
    with _guarded(module, name, "`needs` of the loss failed"):
        needs = module.needs(config)
    return Loss(name, module, config, require_needs(needs, module, name), weight)
