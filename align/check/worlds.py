"""Environments of a recipe, described by their own processes: what they offer, and what episodes will need."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.check.findings import Findings
from align.check.inputs import DataFacts, ModelFacts
from align.data.media.opening import takes_media
from align.data.tokenizer import ChatTokenizer
from align.data.world import Offered
from align.episodes.describe import describe, scores_of_killed
from align.episodes.setting import schema_tokens, setting_of
from align.errors import PluginError, RecipeError
from align.objectives.check import Known
from align.recipe.capabilities import StageBase
from align.recipe.environment import Environment


class Worlds:
    """Descriptions of a recipe's environments, each asked for once. sources: SHA-256 by the name that a recipe uses."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.sources: dict[str, str] = {}
        self._known: dict[str, Mapping[str, Any] | None] = {}

    def of(self, stage: StageBase, found: Findings) -> Mapping[str, Any] | None:
        """What the stage's environment says of itself; None where it has none, or it could not be loaded (`found`)."""
        if stage.world is None:
            return None
        asked = stage.world.model_dump_json()
        if asked not in self._known:
            self._known[asked] = None
            with found.gather(stage.id, "environment"):
                self._known[asked] = self._described(stage.world)
        return self._known[asked]

    def _described(self, rules: Environment) -> Mapping[str, Any]:
        described = asyncio.run(describe(rules, self.folder))
        self.sources |= dict.fromkeys(rules.uses, described.get("sha256") or "")
        scores_of_killed(rules, described)
        return described

    def objectives(
        self, stage: StageBase, rewards: Mapping[str, Known] | None, found: Findings
    ) -> dict[str, Known] | None:
        """The environment's objectives before those of the rewards; None where either could not be described."""
        described = self.of(stage, found)
        if described is None or rewards is None:
            return None
        own = {name: Known(o["kind"], o["range"] and tuple(o["range"])) for name, o in described["objectives"].items()}
        for name in own.keys() & rewards.keys():
            error = PluginError(
                f"the environment and a reward both give an objective {name!r}",
                where="environment",
                remedy="rename one: `as:` beside the environment's `use`, or beside the reward's",
            )
            found.add(error, stage.id)
            return None
        if not own and not rewards:
            functions = stage.world is not None and bool(stage.world.tools)
            who = "plain functions score nothing" if functions else f"{described['name']} has no `reward`"
            sees = "add `rewards: [...]`, which see `sample.turns`"
            error = PluginError(
                f"nothing scores the episodes: {who}, and the stage has no rewards",
                where="environment",
                remedy=sees if functions else f"write `def reward(self)`, or {sees} and `sample.state`",
            )
            found.add(error, stage.id)
            return None
        return {**own, **rewards}

    def offered(self, stage: StageBase, found: Findings) -> Offered | None:
        """What it offers to the stage's prompts; None where there is none, or it could not be loaded."""
        return Offered.of(stage.world, self.of(stage, found))

    def schema_tokens(self, stage: StageBase, tokenizer: ChatTokenizer, found: Findings) -> int:
        """Tokens that tools add to each of its prompts as text. Raises Unsupported where the template refuses it."""
        described = self.of(stage, found)
        return 0 if described is None or stage.world is None else schema_tokens(stage.world, tokenizer, described)

    def lines(self, stage: StageBase, model: ModelFacts, facts: DataFacts, found: Findings) -> list[str]:
        """What its episodes are, in words. Raises Unsupported where the chat template cannot be continued, RecipeError
        for images of a model that sees none."""
        described, rules = self.of(stage, found), stage.world
        if described is None or rules is None or stage.engines is None:
            return []
        sees = takes_media(model.config)
        if rules.max_media and not sees:
            kind = model.config.get("model_type") or "text"
            raise RecipeError(
                f"`max_media: {rules.max_media}` beside a {kind} model, which takes text alone",
                where="environment.max_media",
                remedy="leave it out, or use a vision-language model",
            )
        setting = setting_of(rules, model.tokenizer, described, 0)
        names = [tool["function"]["name"] for tool in described["tools"]]
        how = [f"tools {', '.join(names)}" if names else "no tools"]
        how += [f"calls read as {setting.format.name}"] if setting.format else []
        how += ["turns of its own (respond)"] if described["has"].get("respond") else []
        how += ["a reward of its own"] if described["has"].get("reward") else []
        how += [f"at most {rules.images(sees)} images an episode"] if sees else []
        turn = stage.engines.max_tokens
        wanted = facts.longest + stage.sampled_tokens
        return [
            f"environment {described['name']}: {', '.join(how)}",
            f"episodes: at most {rules.max_turns} turns of {turn} tokens, {rules.max_tokens} in all, answers of at "
            f"most {rules.max_observation_tokens}; the longest is {wanted:,} tokens with its prompt of "
            f"{facts.longest}; {rules.timeout_s:g} s a call, {rules.retries} retries, at most "
            f"{100 * rules.max_error_rate:g} % lost; {rules.max_live} at once an engine"
            + (", in lockstep" if rules.lockstep else ""),
            *_rewritten(rules, facts.longest + stage.trained_tokens),
        ]


def _rewritten(rules: Environment, tokens: int) -> list[str]:
    if rules.history == "append":
        return []
    return [
        "history: earlier turns as the chat template writes them; where it writes them anew an episode goes on in "
        f"another sequence (`episode/forks`), of which it may have {rules.max_turns}: at most {tokens:,} tokens to "
        "train on"
    ]
