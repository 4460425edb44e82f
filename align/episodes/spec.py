"""What engines are told of a stage's environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.data.tokenizer import ChatTokenizer
from align.recipe.environment import Environment


@dataclass(frozen=True)
class EpisodeSpec:
    """rules: what the recipe says. tokenizer: of the policy, with its chat template. description: of the environment,
    as its process gave it (`describe`). folder: the recipe's, where user code is looked for; seed: the run's; logs: a
    folder for what environments print."""

    rules: Environment
    tokenizer: ChatTokenizer
    description: Mapping[str, Any]
    folder: Path
    seed: int
    logs: Path | None = None
