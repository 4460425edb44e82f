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
