"""What engines are told of a stage's environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.data.tokenizer import ChatTokenizer
from align.recipe.environment import Environment
from align.recipe.inputs import Media


@dataclass(frozen=True)
class Sight:
    """How images that an environment shows become tokens. most: of them in an episode. model: the folder with the
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
class EpisodeSpec:
    """rules: what the recipe says. tokenizer: of the policy, with its chat template. description: of the environment,
    as its process gave it (`describe`). folder: the recipe's, where user code is looked for; seed: the run's; logs: a
    folder for what environments print. sight: None where the model sees no images."""

    rules: Environment
    tokenizer: ChatTokenizer
    description: Mapping[str, Any]
    folder: Path
    seed: int
    logs: Path | None = None
    sight: Sight | None = None
