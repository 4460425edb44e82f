"""What engines are told of a stage's environments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.data.tokenizer import ChatTokenizer
from align.data.world import chosen
from align.protocols.fleet import PromptItem
from align.recipe.environment import Environment
from align.recipe.inputs import Media


@dataclass(frozen=True)
class Sight:
    """How images that environments show become tokens. most: of them in an episode of any. model: the folder with the
    model's processor; store: where they lie, processed, for engine and trainer; settings: the recipe's `media:`.

    kept: so many groups that were answered keep their images, whatever else the store must give up (None: all): they
    are trained on after they were sampled."""

    most: int
    model: Path
    store: Path
    settings: Media
    trust_remote_code: bool = False
    kept: int | None = None


@dataclass(frozen=True)
class WorldSpec:
    """One environment. rules: what the recipe says of it; description: what its process says (`describe`). longest:
    tokens of the longest prompt that chooses it, 0 where none does."""

    rules: Environment
    description: Mapping[str, Any]
    longest: int = 0

    @staticmethod
    def several(
        worlds: Sequence[Environment], descriptions: Sequence[Mapping[str, Any]], prompts: Sequence[PromptItem] = ()
    ) -> tuple[WorldSpec, ...]:
        """Each of a stage's, for these prompts."""
        longest, names = [0] * len(worlds), tuple(rules.as_ for rules in worlds)
        for prompt in prompts:
            number = chosen(prompt.row, names)
            longest[number] = max(longest[number], len(prompt.token_ids))
        return tuple(WorldSpec(*one) for one in zip(worlds, descriptions, longest, strict=True))


@dataclass(frozen=True)
class EpisodeSpec:
    """worlds: at least one, of which every prompt's row chooses (`align.data.world.chosen`). tokenizer: of the policy,
    with its chat template. folder: the recipe's, where user code is looked for; seed: the run's; logs: a folder for
    what environments print. sight: None where the model sees no images."""

    worlds: tuple[WorldSpec, ...]
    tokenizer: ChatTokenizer
    folder: Path
    seed: int
    logs: Path | None = None
    sight: Sight | None = None
