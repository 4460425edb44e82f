"""Environments of a recipe, described by their own processes: what they offer, and what episodes will need."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.check.facts import DataFacts
from align.check.findings import Findings
from align.check.inputs import ModelFacts
from align.data.media.opening import takes_media
from align.data.tokenizer import ChatTokenizer
from align.data.world import Offered
from align.episodes.describe import describe, scores_of_killed
from align.episodes.setting import schema_tokens, setting_of
from align.episodes.spec import WorldSpec
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

    def of(self, stage: StageBase, found: Findings) -> list[Mapping[str, Any]] | None:
        """What each of the stage's environments says of itself; None where one could not be loaded (`found`)."""
        every = [self._asked(stage, world, found) for world in stage.worlds]
        known = [one for one in every if one is not None]
        return known if len(known) == len(every) else None

    def _asked(self, stage: StageBase, rules: Environment, found: Findings) -> Mapping[str, Any] | None:
        asked = rules.model_dump_json()
        if asked not in self._known:
            self._known[asked] = None
            with found.gather(stage.id, "environment"):
                self._known[asked] = self._described(rules)
        return self._known[asked]

    def _described(self, rules: Environment) -> Mapping[str, Any]:
        described = asyncio.run(describe(rules, self.folder))
        self.sources |= dict.fromkeys(rules.uses, described.get("sha256") or "")
        scores_of_killed(rules, described)
        return described

    def objectives(
        self, stage: StageBase, rewards: Mapping[str, Known] | None, found: Findings
    ) -> dict[str, Known] | None:
        """The environments' objectives before those of the rewards; None where one could not be described."""
        described = self.of(stage, found)
        if described is None or rewards is None:
            return None
        try:
            own = _together(described)
            _require_told_apart(own, rewards)
            if not own and not rewards:
                raise _nobody_scores(stage, described[0])
        except PluginError as error:
            found.add(error, stage.id)
            return None
        return {**own, **rewards}

    def offered(self, stage: StageBase, found: Findings) -> Offered | None:
        """What they offer to the stage's prompts; None where there are none, or one could not be loaded."""
        described = self.of(stage, found)
        return None if described is None else Offered.of(stage.worlds, described)

    def measure(self, stage: StageBase, tokenizer: ChatTokenizer, facts: DataFacts, found: Findings) -> None:
        """Fill `facts.openings`, and what `facts.longest` is with them. Raises Unsupported where the template refuses
        the tools."""
        described = self.of(stage, found)
        if not stage.worlds or described is None:
            facts.openings = [facts.longest] * len(stage.worlds)
            return
        worlds = WorldSpec.several(stage.worlds, described, facts.prompts)
        facts.openings = [world.longest and world.longest + schema_tokens(world, tokenizer) for world in worlds]
        facts.longest = max(facts.longest, *facts.openings)

    def lines(self, stage: StageBase, model: ModelFacts, facts: DataFacts, found: Findings) -> list[str]:
        """What its episodes are, in words. Raises Unsupported where the chat template cannot be continued, RecipeError
        for images of a model that sees none."""
        described = self.of(stage, found)
        if described is None or stage.engines is None:
            return []
        every, turn = zip(stage.worlds, described, facts.openings, strict=True), stage.engines.max_tokens
        return [line for rules, one, prompt in every for line in _lines(rules, one, turn, model, prompt)]


def _together(described: Sequence[Mapping[str, Any]]) -> dict[str, Known]:
    """The objectives of environments. One that two of them give is one. Raises PluginError where these mean others."""
    found: dict[str, Known] = {}
    for one in described:
        for name, said in one["objectives"].items():
            known = Known(said["kind"], said["range"] and tuple(said["range"]))
            if found.setdefault(name, known) != known:
                raise PluginError(
                    f"two environments give an objective {name!r}, of other kinds or ranges",
                    where="environment",
                    remedy="rename one in its `@environment(objectives=...)`",
                )
    return found


def _require_told_apart(own: Mapping[str, Known], rewards: Mapping[str, Known]) -> None:
    for name in own.keys() & rewards.keys():
        raise PluginError(
            f"the environment and a reward both give an objective {name!r}",
            where="environment",
            remedy="rename one: `as:` beside the environment's `use`, or beside the reward's",
        )


def _nobody_scores(stage: StageBase, described: Mapping[str, Any]) -> PluginError:
    functions = all(world.tools for world in stage.worlds)
    who = "plain functions score nothing" if functions else f"{described['name']} has no `reward`"
    sees = "add `rewards: [...]`, which see `sample.turns`"
    return PluginError(
        f"nothing scores the episodes: {who}, and the stage has no rewards",
        where="environment",
        remedy=sees if functions else f"write `def reward(self)`, or {sees} and `sample.state`",
    )


def _lines(rules: Environment, described: Mapping[str, Any], turn: int, model: ModelFacts, prompt: int) -> list[str]:
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
    wanted = prompt + rules.context_tokens(turn)
    return [
        f"environment {described['name']}: {', '.join(how)}",
        f"episodes: at most {rules.max_turns} turns of {turn} tokens, {rules.max_tokens} in all, answers of at "
        f"most {rules.max_observation_tokens}; the longest is {wanted:,} tokens with its prompt of "
        f"{prompt}; {rules.timeout_s:g} s a call, {rules.retries} retries, at most "
        f"{100 * rules.max_error_rate:g} % lost; {rules.max_live} at once an engine"
        + (", in lockstep" if rules.lockstep else ""),
        *_rewritten(rules, prompt + rules.trained_tokens(turn)),
    ]


def _rewritten(rules: Environment, tokens: int) -> list[str]:
    if rules.history == "append":
        return []
    return [
        "history: earlier turns as the chat template writes them; where it writes them anew an episode goes on in "
        f"another sequence (`episode/forks`), of which it may have {rules.max_turns}: at most {tokens:,} tokens to "
        "train on"
    ]
