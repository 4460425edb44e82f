"""From a recipe's `environment:` to what runs of it, and what it says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.errors import PluginError
from align.recipe.environment import Environment
from rewards.api import PluginError as RewardsPluginError
from rewards.environments.host import Host
from rewards.environments.spec import EnvironmentSpec
from rewards.process import default_memory_mb

_LEAST_MB, _SHARES = 512, 8
"""Data memory of an episode where the recipe says none: an eighth of half the machine's. All at once may ask for more
than there is; few do."""


def environment_spec(rules: Environment) -> EnvironmentSpec:
    """What is run of a recipe's environment."""
    return EnvironmentSpec(
        use=rules.use,
        tools=rules.tools,
        args=rules.args,
        signature=rules.signature,
        python=rules.python,
        name=rules.as_,
    )


def open_host(rules: Environment, folder: Path, seed: int, log: Path | None) -> Host:
    """The warm process that episodes are forked from, not started yet."""
    share = default_memory_mb() // min(rules.max_live, _SHARES)
    memory = rules.memory_mb or max(_LEAST_MB, share)
    return Host(environment_spec(rules), folder, seed, log_path=log, memory_mb=memory)


def scores_of_killed(rules: Environment, description: Mapping[str, Any]) -> dict[str, float]:
    """The scores, by objective, of an episode whose process was killed; none where it is lost.

    Raises PluginError for scores of what the environment does not score, or would not."""
    offered, given = description["objectives"], rules.on_kill
    if given is None:
        return {}
    if not isinstance(given, dict):
        if len(offered) > 1:
            raise _unfit("one score for several objectives", f"name each: on_kill: {{{next(iter(offered))}: ..., ...}}")
        given = dict.fromkeys(offered, given)
    if not given:
        raise _unfit(f"{description['name']} scores nothing itself", "leave `on_kill` out")
    for name, value in given.items():
        if name not in offered:
            raise _unfit(f"there is no objective {name!r}", f"there are: {', '.join(offered) or 'none'}")
        if (bounds := offered[name]["range"]) is not None and not bounds[0] <= value <= bounds[1]:
            raise _unfit(f"{value:g} is outside the range of {name!r}", f"give one of {bounds[0]:g} to {bounds[1]:g}")
    return dict(given)


def _unfit(what: str, remedy: str) -> PluginError:
    return PluginError(what, where="environment.on_kill", remedy=remedy)


async def started(host: Host) -> Mapping[str, Any]:
    """Start it; what the environment says of itself: name, tools, objectives, has, source, sha256, modules.

    Raises PluginError where it cannot be loaded, or has nothing that an episode could use."""
    try:
        described: Mapping[str, Any] = await host.start()
    except RewardsPluginError as error:
        raise PluginError(error.what, where=error.where, remedy=error.remedy) from error
    return described


async def describe(rules: Environment, folder: Path) -> Mapping[str, Any]:
    """`started`, of a process that is ended again."""
    host = open_host(rules, folder, 0, None)
    try:
        return await started(host)
    finally:
        host.close()
