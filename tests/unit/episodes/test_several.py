"""Several environments of one stage: each row is played by the one that it chooses, with its tools and its budgets."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from align.data.prepare import prepare
from align.data.records import RowError
from align.data.tokenizer import ChatTokenizer
from align.data.world import Offered, chosen
from align.episodes.describe import describe
from align.episodes.engine import EpisodeEngine
from align.episodes.spec import EpisodeSpec, WorldSpec
from align.errors import DataError
from align.objectives.combine import combine
from align.protocols.fleet import Completion, Episode, EpisodeFailure, Group, PromptItem
from align.protocols.scorer import ErrorBudget
from align.protocols.trainer import Publication
from align.recipe.environment import Environment, EnvironmentField
from align.recipe.inputs import DataSource
from align.recipe.objectives import Objectives
from align.stages.episode_scorer import EpisodeScorer, Known
from rollout.base import EngineSpec
from tests.runs import write_jsonl
from tests.unit.episodes import stage
from tests.unit.episodes.stage import CALCULATOR, Scripted, call

GUESS = '''
from rewards import environment

@environment
class Guess:
    def reset(self, row, seed):
        self.secret, self.right = row["secret"], False

    def guess(self, number: int) -> str:
        """Guess."""
        self.right = number == self.secret
        return "right" if self.right else "higher" if number < self.secret else "lower"

    def reward(self):
        return float(self.right)
'''
BOTH = [
    {"use": "world.py:Calculator", "as": "sums", "max_turns": 2, "timeout_s": 5},
    {"use": "guess.py:Guess", "as": "guess", "max_turns": 3, "timeout_s": 5, "tools_in": "prompt"},
]
ROWS = [
    {"prompt": [{"role": "user", "content": "1 + 2?"}], "environment": "sums", "answer": "3"},
    {"prompt": [{"role": "user", "content": "Guess!"}], "environment": "guess", "secret": 7},
]


def environments(value: Any) -> tuple[Environment, ...]:
    found: tuple[Environment, ...] = TypeAdapter(EnvironmentField).validate_python(value)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    stage.write(tmp_path, CALCULATOR)
    stage.write(tmp_path, GUESS, "guess.py")
    return tmp_path


@pytest.fixture
def tokenizer(folder: Path) -> ChatTokenizer:
    return stage.tokenizer_in(folder)


def described(worlds: Sequence[Environment], folder: Path) -> list[Mapping[str, Any]]:
    return [asyncio.run(describe(world, folder)) for world in worlds]


def prompts(folder: Path, tokenizer: ChatTokenizer, offered: Offered | None, rows: Any = ROWS) -> list[PromptItem]:
    write_jsonl(folder / "rows.jsonl", rows)
    items = prepare([DataSource(path=str(folder / "rows.jsonl"))], "prompt", tokenizer, seed=0, offered=offered).items
    return [replace(item, group_id=n, seed=n) for n, item in enumerate(items)]


# ------------------------------------------------------------------------------------------------- the recipe


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ([{"use": "a.py:A"}, {"use": "b.py:B", "as": "b"}], "a.py:A has none: write `as: NAME`"),
        ([{"use": "a.py:A", "as": "b"}, {"use": "b.py:B", "as": "b"}], "two environments are called 'b'"),
        ([{"use": "a.py:A", "as": "a", "lockstep": True}, {"use": "b.py:B", "as": "b"}], "the same `lockstep`"),
    ],
)
def test_several_environments_are_told_apart(value: Any, why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        environments(value)


def test_one_environment_is_written_as_before() -> None:
    [one] = environments("a.py:A")
    assert one.use == "a.py:A" and environments(None) == () and environments({"use": "a.py:A"}) == (one,)
    assert environments([{"use": "a.py:A"}]) == (one,)
    assert [world.as_ for world in environments(BOTH)] == ["sums", "guess"]


def test_a_row_chooses_by_name() -> None:
    assert chosen({"environment": "guess"}, ("sums", "guess")) == 1
    assert chosen({}, ("sums",)) == chosen({"environment": "sums"}, ("sums",)) == 0
    assert chosen({"environment": "Linux"}, (None,)) == 0, "the row's own, of an environment without a name"
    for row, names, why in (
        ({}, ("sums", "guess"), "a column `environment`, one of 'sums', 'guess'"),
        ({"environment": "game"}, ("sums", "guess"), "is 'game', and the stage has 'sums', 'guess'"),
        ({"environment": "game"}, ("sums",), "is 'game', and the stage has 'sums'"),
        ({"environment": ["sums"]}, ("sums", "guess"), r"is \['sums'\]"),
    ):
        with pytest.raises(RowError, match=why):
            chosen(row, names)


# ------------------------------------------------------------------------------------------------- rows and episodes


def test_a_prompt_has_the_tools_of_its_own_environment(folder: Path, tokenizer: ChatTokenizer) -> None:
    worlds = environments([BOTH[0], {**BOTH[1], "tools_in": "template"}])
    items = prompts(folder, tokenizer, Offered.of(worlds, described(worlds, folder)))
    sums, guess = (tokenizer.decode(item.token_ids.tolist(), skip_special_tokens=False) for item in items)
    assert '"add"' in sums and '"guess"' not in sums and '"guess"' in guess and '"add"' not in guess


@pytest.mark.parametrize("row", [{"environment": "game"}, {}])
def test_a_row_that_chooses_none_is_refused_with_its_place(
    folder: Path, tokenizer: ChatTokenizer, row: Mapping[str, Any]
) -> None:
    worlds = environments(BOTH)
    rows = [ROWS[0], {"prompt": ROWS[1]["prompt"], "secret": 7, **row}]
    with pytest.raises(DataError, match=r"rows.jsonl:2(.|\n)*'sums', 'guess'"):
        prompts(folder, tokenizer, Offered.of(worlds, described(worlds, folder)), rows)


@pytest.mark.parametrize("lockstep", [False, True])
def test_each_row_is_played_by_its_own_environment(folder: Path, tokenizer: ChatTokenizer, lockstep: bool) -> None:
    worlds = environments([{**one, "lockstep": lockstep} for one in BOTH])
    descriptions = described(worlds, folder)
    episodes = EpisodeSpec(WorldSpec.several(worlds, descriptions), tokenizer, folder, 0, logs=folder)
    spec = EngineSpec("scripted", str(folder), max_model_len=4096, environment=episodes)

    def script(text: str, request: Any) -> str:
        if "Guess!" in text:
            return '<tool_call>{"name": "guess", "arguments": {"number": 7}}</tool_call>'
        return "3" if "\n3<|im_end|>" in text else call(a=1, b=2)

    inner = Scripted(tokenizer, script)
    engine = EpisodeEngine(spec, inner)
    try:
        engine.publish(Publication(0, "base", "", ""))
        items = prompts(folder, tokenizer, Offered.of(worlds, descriptions))
        answers = stage.played(engine, stage.requests([*items, *(replace(i, group_id=9) for i in items)], 3))
    finally:
        engine.close()
    for number, name, turns in ((0, "sums", 2), (1, "guess", 3), (2, "sums", 2), (3, "guess", 3)):
        group = answers[number]
        assert isinstance(group, Group)
        for completion in group.completions:
            assert completion.episode is not None
            assert completion.episode.environment == name and completion.episode.scores == {name: 1.0}
            assert completion.episode.counts["turns"] == turns, "budgets are each one's own"
    if lockstep:
        assert [len(step) for step in inner.seen] == [12, 12, 6], "one engine samples the turns of all together"
    assert (folder / "sums.log").exists() and (folder / "guess.log").exists()


def test_an_environment_that_is_killed_leaves_the_others_alone(folder: Path, tokenizer: ChatTokenizer) -> None:
    stage.write(folder, GUESS.replace("self.right = number", "__import__('os')._exit(3)  # "), "guess.py")
    worlds = environments([BOTH[0], {**BOTH[1], "retries": 0}])
    descriptions = described(worlds, folder)
    episodes = EpisodeSpec(WorldSpec.several(worlds, descriptions), tokenizer, folder, 0)
    spec = EngineSpec("scripted", str(folder), max_model_len=4096, environment=episodes)
    guess = '<tool_call>{"name": "guess", "arguments": {"number": 7}}</tool_call>'
    engine = EpisodeEngine(spec, Scripted(tokenizer, lambda text, _: guess if "Guess!" in text else "3"))
    try:
        engine.publish(Publication(0, "base", "", ""))
        items = prompts(folder, tokenizer, Offered.of(worlds, descriptions))
        answers = stage.played(engine, stage.requests(items, 2))
    finally:
        engine.close()
    assert isinstance(answers[0], Group) and not isinstance(answers[1], Group)
    assert [c.episode and c.episode.scores for c in answers[0].completions] == [{"sums": 1.0}] * 2


# ------------------------------------------------------------------------------------------------- scores


def episode(name: str, scores: Mapping[str, float | None], *, lost: bool = False, **counts: float) -> Completion:
    failure = EpisodeFailure("died", f"{name} is gone") if lost else None
    made = Episode(scores=scores, failure=failure, counts=counts, environment=name)
    ids = np.arange(0 if lost else 2)
    return Completion(ids, np.zeros(len(ids), np.float32), ids.astype(np.int32), "", "eos", episode=made)


SUMS, GAME = Known("sums", ("sums",), ("reward",), 0.0), Known("guess", ("guess", "calls"), ("reward", "cost"), 0.5)


def item(number: int) -> PromptItem:
    return PromptItem(number, np.arange(3), 0)


def test_what_another_environment_scores_does_not_apply_and_is_no_zero() -> None:
    groups = [
        Group(item(0), (episode("sums", {"sums": 1.0}, turns=2), episode("sums", {"sums": 0.0}, turns=4))),
        Group(item(1), (episode("guess", {"guess": 1.0, "calls": 3.0}, turns=3),
                        episode("guess", {"guess": 0.0, "calls": 5.0}, turns=5))),
    ]  # fmt: skip
    table = asyncio.run(EpisodeScorer([SUMS, GAME], None, "grpo").score(groups))
    nan = np.nan
    assert table.objectives == ("sums", "guess", "calls") and table.kinds == ("reward", "reward", "cost")
    np.testing.assert_array_equal(table.scores, [[1, nan, nan], [0, nan, nan], [nan, 1, 3], [nan, 0, 5]])
    assert not table.failures and table.metrics["episode/turns"] == 3.5 and table.counts["episode/turns"] == 4
    assert table.metrics["episode/sums/turns"] == 3 and table.metrics["episode/guess/turns"] == 4
    assert table.metrics["episode/sums/episodes"] == table.metrics["episode/guess/episodes"] == 2
    weights = Objectives.model_validate({"weights": {"sums": 1.0, "guess": 1.0, "calls": 0.5}, "scale": "none"})
    groups_of = np.array([0, 0, 1, 1])
    advantages, _, _ = combine(table.scores, groups_of, table.objectives, table.kinds, weights, {}, 0)
    # by hand: 1 and 0 about their mean; of the game 1 - 0.5 * 3 = -0.5 and 0 - 0.5 * 5 = -2.5 about -1.5
    np.testing.assert_allclose(advantages, [0.5, -0.5, 1.0, -1.0], atol=1e-6)


def test_each_environment_may_lose_its_own_share() -> None:
    scorer = EpisodeScorer([SUMS, GAME], None, "grpo")
    lost = Group(item(0), (episode("guess", {}, lost=True), episode("guess", {}, lost=True)))
    fine = Group(item(1), (episode("sums", {"sums": 1.0}), episode("sums", {"sums": 1.0})))
    table = asyncio.run(scorer.score([lost, fine], ErrorBudget(1, 4)))
    assert [failure.plugin for failure in table.failures] == ["guess", "guess"]
    assert table.metrics["episode/guess/lost"] == 2 and table.metrics["episode/sums/lost"] == 0
    assert "environment guess: group 0" in table.notes["guess/lost"]
    gone = Group(item(2), (episode("sums", {}, lost=True),))
    with pytest.raises(Exception, match=r"1 of 4 episodes of the environment sums(.|\n)*sums is gone"):
        asyncio.run(scorer.score([gone], ErrorBudget(2, 4)))
