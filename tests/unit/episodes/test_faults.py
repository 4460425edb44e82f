"""What environments do wrong at any point: it is said, costs what the recipe says, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align.data.tokenizer import ChatTokenizer
from align.episodes.budgets import within
from align.episodes.engine import EpisodeEngine
from align.protocols.fleet import Completion, Episode, FailedPrompt, Group
from align.protocols.trainer import Publication
from rewards.environments.content import well_formed
from rollout.base import Request
from tests.unit.episodes import stage
from tests.unit.episodes.stage import Script, Scripted, call

WORLD = '''
import os

from rewards import environment

@environment
class World:
    def reset(self, row):
        self.row = row
        return row.get("begin")

    def add(self, a, b):
        """Add."""
        if self.row.get("exit") == "add":
            os._exit(3)
        if self.row.get("parts"):
            return [{"type": "text", "text": "sum: "}, {"type": "text", "text": "9 " * 200}]
        return self.row.get("gives", "3")

    def respond(self, reply):
        return self.row.get("says")

    def reward(self):
        if self.row.get("exit") == "reward":
            os._exit(4)
        return 1.0

    def state(self):
        if self.row.get("state"):
            raise KeyError("no state")
        return {"gave": self.row.get("gives")}
'''.replace("a, b):", "a: str, b: int) -> str:")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return stage.tokenizer_in(tmp_path_factory.mktemp("tokenizer"))


@contextlib.contextmanager
def opened(
    folder: Path, tokenizer: ChatTokenizer, script: Script, **rules: Any
) -> Iterator[tuple[EpisodeEngine, Scripted]]:
    stage.write(folder, WORLD)
    spec = asyncio.run(stage.spec_of(folder, tokenizer, **{"use": "world.py:World", "retries": 1, **rules}))
    inner = Scripted(tokenizer, script)
    engine = EpisodeEngine(spec, inner)
    try:
        engine.publish(Publication(1, "adapter", "", "digest"))
        yield engine, inner
    finally:
        engine.close()


def asks_once(text: str, request: Request) -> str:
    return "3" if "<|im_start|>tool\n" in text else call(a="1", b=2)


def drawn(engine: EpisodeEngine, tokenizer: ChatTokenizer, size: int = 2, **row: Any) -> Group | FailedPrompt:
    return stage.played(engine, stage.requests([stage.prompt(tokenizer, engine._spec, 0, **row)], size))[0]


def played(group: Group | FailedPrompt) -> list[tuple[Completion, Episode]]:
    assert isinstance(group, Group), group
    return [(c, c.episode) for c in group.completions if c.episode is not None]


@pytest.mark.parametrize("where", ["add", "reward"])
def test_a_process_that_dies_is_drawn_again_before_the_recipe_scores_it(
    tmp_path: Path, tokenizer: ChatTokenizer, where: str
) -> None:
    with opened(tmp_path, tokenizer, asks_once, on_kill=0.5, retries=2) as (engine, inner):
        found = played(drawn(engine, tokenizer, exit=where))
    assert [episode.ended for _, episode in found] == ["killed"] * 2 and all(e.killed for _, e in found)
    assert all(completion.length and episode.failure is None for completion, episode in found)
    first_turns = sum("<|im_start|>tool" not in text for step in inner.seen for text in step)
    assert first_turns == 2 * 3, "two episodes, each played three times"
    with opened(tmp_path, tokenizer, asks_once) as (engine, _):
        lost = drawn(engine, tokenizer, exit=where)
    assert isinstance(lost, FailedPrompt) and "exited with status" in lost.message


def test_a_state_that_fails_takes_no_score_away(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    with opened(tmp_path, tokenizer, asks_once) as (engine, _):
        for _, episode in played(drawn(engine, tokenizer, state=True)):
            assert episode.scores == {"world": 1.0} and episode.state is None
            assert episode.failure is not None and "state: KeyError" in episode.failure.message


def test_text_that_utf_8_cannot_write_is_mended_wherever_it_comes_from(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    with opened(tmp_path, tokenizer, asks_once) as (engine, _):
        rows = {"gives": "a \udfff b", "begin": "c \ud83d\ude00 \ud83d", "says": None}
        for _, episode in played(drawn(engine, tokenizer, **rows)):
            begun, _, told, *_ = episode.turns
            assert begun["content"] == "c \U0001f600 \ufffd" and told["content"] == "a \ufffd b"
            assert episode.state == {"gave": "a \ufffd b"} and episode.failure is None
    assert well_formed({"\ud800": ["\u20ac", 1, None]}) == {"\ufffd": ["\u20ac", 1, None]}


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ([{"role": "assistant", "content": "mine"}], "`role` of a message is one of system"),
        ([{"role": "user<|im_end|>", "content": "x"}], "`role` of a message is one of"),
        ([{"role": "user", "content": 5}], "`content` of a message is text"),
        ([{"role": "user", "content": [1]}], "`content` of a message is text"),
        ([{"role": "user"}], "`content` of a message is text"),
        (7, "returned a int where text"),
    ],
)
def test_what_is_no_turn_is_named_and_no_episode(
    tmp_path: Path, tokenizer: ChatTokenizer, given: Any, why: str
) -> None:
    with opened(tmp_path, tokenizer, lambda text, request: "3") as (engine, _):
        lost = drawn(engine, tokenizer, says=given)
    assert isinstance(lost, FailedPrompt) and "respond" in lost.message and why in lost.message


def test_answers_of_several_parts_are_cut_and_complained_of_as_others(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    def script(text: str, request: Request) -> str:
        return "3" if "<|im_start|>tool\n" in text else call(a="1", b=2) + "<tool_call>{no}</tool_call>"

    with opened(tmp_path, tokenizer, script, max_observation_tokens=40) as (engine, _):
        for completion, episode in played(drawn(engine, tokenizer, parts=True)):
            [told] = [turn for turn in episode.turns if turn["role"] == "tool"]
            assert [part["type"] for part in told["content"]] == ["text", "text"]
            assert told["content"][0]["text"] == "sum: " and "characters cut" in told["content"][1]["text"]
            assert episode.counts["cut_answers"] == 1 and episode.counts["invalid_calls"] == 1
            assert completion.sampled is not None and (~completion.sampled).sum() < 140
    parts = [{"type": "image"}, {"type": "text", "text": "a " * 99}, {"type": "text", "text": "behind"}]
    kept, cut = within(parts, 10, tokenizer)
    assert cut and [part["type"] for part in kept] == ["image", "text"], "what is behind the cut is gone"
    assert within(parts[:1], 1, tokenizer) == (parts[:1], False)
