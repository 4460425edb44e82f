"""What objectives are called in a run: by their name, or `plugin.name` where two plugins share one; `as:` renames."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rewards.api import PluginError


@dataclass(frozen=True, slots=True)
class Named:
    """A plugin's name in the run, its own objective names, and whether `as:` gave the name."""

    plugin: str
    objectives: tuple[str, ...]
    renamed: bool


def objective_names(plugins: Sequence[Named]) -> list[tuple[str, ...]]:
    """The run's objective names, per plugin in its own order.

    `as: x` renames the plugin; its objective too where it has only one. Objectives that two plugins share become
    `plugin.objective`.

    Raises:
        PluginError: two plugins have the same name, or two objectives still do.
    """
    twice = [name for name, n in Counter(p.plugin for p in plugins).items() if n > 1]
    if twice:
        raise PluginError(f"two rewards are called {twice[0]!r}", remedy="rename one with `as: another_name`")
    own = [(p.plugin,) if p.renamed and len(p.objectives) == 1 else p.objectives for p in plugins]
    shared = {name for name, n in Counter(name for names in own for name in names).items() if n > 1}
    full = [
        tuple(f"{p.plugin}.{n}" if n in shared else n for n in names) for p, names in zip(plugins, own, strict=True)
    ]
    twice = [name for name, n in Counter(name for names in full for name in names).items() if n > 1]
    if twice:
        raise PluginError(f"two objectives are called {twice[0]!r}", remedy="rename one plugin with `as: another_name`")
    return full
