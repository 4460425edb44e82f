"""Whether rows hold the answers that our rewards compare with, and the columns that others take. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.actors.plugins import plugin_spec
from align.errors import PluginError
from align.protocols.fleet import PromptItem
from align.recipe.parts import Reward
from rewards.api import PluginError as RewardsPluginError
from rewards.find import builtin_names, load


def require_columns(described: Mapping[str, Any] | None, prompts: Sequence[PromptItem]) -> None:
    """Raise PluginError where a reward is to be called with a column that no row has: every call would fail.

    described: what `rewards.describe` answers; None where it could not be described, which has been told.
    """
    known = {name for prompt in prompts for name in prompt.row}
    missing = [name for name in (described or {}).get("columns", ()) if name not in known]
    if missing and prompts and described is not None:
        raise PluginError(
            f"{described['name']} takes {missing[0]!r}, and none of {len(prompts)} rows has a column of that name",
            where=prompts[0].origin,
            remedy=f"rows have: {', '.join(sorted(known)) or 'none'}; rename that column or the parameter, or give "
            "it in `args:`",
        )


def golds_note(reward: Reward, folder: Path, prompts: Sequence[PromptItem]) -> str | None:
    """How many of the prompts' rows have no answer for a reward of ours, which would fail on each of their completions;
    None where all have one, or the reward needs none. What a user's plugin calls its gold is for trials alone.

    Raises PluginError where no row has one.
    """
    if reward.signature != "align" or reward.use not in builtin_names() or not prompts:
        return None
    try:
        plugin = load(plugin_spec(reward), folder)
    except RewardsPluginError:
        return None  # of its arguments, which are told where rewards are described
    missing: list[tuple[str, str]] = []
    for prompt in prompts:
        try:
            plugin.gold(prompt.row)
        except (LookupError, ValueError, TypeError, AttributeError) as error:  # as the reward itself would
            said = error.args[0] if isinstance(error, KeyError) and error.args else error
            missing.append((prompt.origin, str(said)))
    if not missing:
        return None
    origin, why = missing[0]
    if len(missing) == len(prompts):
        raise PluginError(
            f"{plugin.name} finds no answer in any of {len(prompts)} rows: {why}",
            where=origin,
            remedy="name the column with `args: {column: ...}`, add one, or give rows whose last turn is the answer",
        )
    some = f"{len(missing)} of {len(prompts)} rows"
    return f"{plugin.name} finds no answer in {some} and fails on their completions, first {origin}: {why}"
