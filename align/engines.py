"""What a rollout engine says of itself before one is started: asked by the recipe, the check, the plan of memory, the
simulator and the export, none of which imports an engine. Standard library only.

An engine of ours is a line of `ENGINES`, which names its facts. A user's own is `rollout: {name:
package.module:Class}`, the class with its facts in the attribute `facts`; one without takes any options and is taken
for the plainest.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from align.errors import RecipeError, Unsupported

ENGINES: Mapping[str, str] = {
    "vllm": "rollout.vllm_facts:FACTS",
    "transformers": "align.model.generate.facts:FACTS",
}
SHARE_OF_GPU = 0.9  # of its part of a GPU, what an engine takes unless it is told otherwise


@dataclass(frozen=True)
class EngineFacts:
    """engine: `package.module:Class`, a `rollout.base.Engine` (of a user's, the name itself). title: for messages.

    options: names of its own options (`rollout.engine`); None: any. refused: those that may not be set, and why.
    package, extra: the module that it imports, and what pip installs it by; None where align brings it.
    in_flight: whole weights may take over between two tokens of requests that run.
    slow_adapters_on_cpu: its adapter kernels are several times slower than the base there.
    largest_rank: of an adapter that it serves. tower_option: without it LoRA outside the language model is ignored.
    without_adapters, language_adapters: model types that it serves no adapters on, or on the language model alone.
    reserves: the option that says how many bytes keys and values take, whatever comes; on a CPU `reserved_on_cpu` where
    it is not given. share: the option that says which part of a GPU it takes.
    slots: sequences sampled at once, unless the option `slots_option` says otherwise. whole_batches: a batch is sampled
    to its end before the next begins.
    loads_exports: an export is proved by loading it there.
    """

    engine: str = ""
    title: str = ""
    options: tuple[str, ...] | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    package: str | None = None
    extra: str | None = None
    in_flight: bool = False
    slow_adapters_on_cpu: bool = False
    largest_rank: int | None = None
    tower_option: str | None = None
    without_adapters: tuple[str, ...] = ()
    language_adapters: tuple[str, ...] = ()
    reserves: str | None = None
    reserved_on_cpu: int | None = None
    share: str | None = None
    slots: int = 64
    slots_option: str | None = None
    whole_batches: bool = False
    loads_exports: bool = False

    def slots_with(self, options: Mapping[str, Any]) -> int:
        """Sequences that it samples at once under these options (`rollout.engine`)."""
        return int(options.get(self.slots_option, self.slots)) if self.slots_option else self.slots

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse options that the engine does not know or that would make its completions untrainable.

        Raises:
            RecipeError: an unknown option. Unsupported: a known one that may not be set here.
        """
        if self.options == () and options:
            raise RecipeError(
                f"the {self.title!r} engine takes no options, got {', '.join(sorted(options))}",
                where="rollout.engine",
                remedy="remove them",
            )
        for option in options:
            where = f"rollout.engine.{option}"
            if option in self.refused:
                what = f"the engine option {option!r} cannot be set here: {self.refused[option]}"
                raise Unsupported(what, where=where, remedy="remove it from rollout.engine")
            if self.options is not None and option not in self.options:
                near = difflib.get_close_matches(option, self.options, n=3)
                remedy = (
                    f"did you mean {' or '.join(near)}?" if near else f"see {self.title}'s EngineArgs for the names"
                )
                raise RecipeError(f"{self.title} has no engine argument {option!r}", where=where, remedy=remedy)


def facts_of_ours(name: str) -> EngineFacts:
    """Raises RecipeError where none of ours has this name."""
    if name not in ENGINES:
        raise RecipeError(
            f"no rollout engine is named {name!r}",
            where="rollout.name",
            remedy=f"choose one of {', '.join(sorted(ENGINES))}",
        )
    module, _, attribute = ENGINES[name].partition(":")
    facts: EngineFacts = getattr(import_module(module), attribute)
    return facts
