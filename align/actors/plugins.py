"""Rewards of a recipe as plugins of the `rewards` package, and that package's errors as ours. No Ray, no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import rewards
from align import errors
from align.plugins import REWARDS
from align.recipe.parts import Reward
from rewards.plugin import OVERRIDES, PluginSpec


def plugin_spec(reward: Reward) -> PluginSpec:
    """A recipe's reward as the pool takes it; options that the recipe leaves out are the decorator's."""
    options = {name: getattr(reward, name) for name in OVERRIDES if getattr(reward, name) is not None}
    return PluginSpec(REWARDS.get(reward.use, reward.use), reward.as_, dict(reward.args), options, reward.signature)


@contextlib.contextmanager
def align_errors() -> Iterator[None]:
    """Errors of the rewards package, which knows nothing of align, as ours."""
    try:
        yield
    except rewards.RewardError as error:
        raise errors.RewardError(error.what, where=error.where, remedy=error.remedy) from error
    except rewards.PluginError as error:
        raise errors.PluginError(error.what, where=error.where, remedy=error.remedy) from error
