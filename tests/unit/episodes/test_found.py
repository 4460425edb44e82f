"""What attackers found in episodes: rows' template variables, templates that take turns, answers that add up, what is
said last, thoughts without tools."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from align.data.prepare import prepare
from align.data.tokenizer import ChatTokenizer
from align.episodes.engine import EpisodeEngine
from align.protocols.fleet import Completion, Episode, FailedPrompt, Group
from align.protocols.trainer import Publication
from align.recipe.inputs import DataSource
from rollout.base import Request
from tests.runs import write_jsonl
from tests.unit.episodes import stage
from tests.unit.episodes.stage import Script, Scripted, call

Family = Callable[..., ChatTokenizer]
GAME = """
from rewards import environment

@environment
class Game:
    def reset(self, row):
        self.heard, self.done = [], False
        return row.get("begin")

    def respond(self, reply):
        self.heard.append(reply)
        return ["again", "and again"][: len(self.heard)][-1] if len(self.heard) < 3 else None

    def reward(self):
        return float(len(self.heard))

    def state(self):
        return self.heard
"""
TOOLS = '''
from rewards import environment

@environment
class Tools:
    def reset(self, row):
        self.row, self.done, self.erased = row, False, False

    def submit(self, n: int) -> str:
        """Submit."""
        self.done = self.row.get("ends", True)
        return "RIGHT " * n

    def erase(self) -> str:
        """Erase."""
        self.erased = True
        return "erased"

    def reward(self):
        return float(not self.erased)
'''


@contextlib.contextmanager
def opened(
    folder: Path, tokenizer: ChatTokenizer, script: Script, source: str, context: int = 4096, **rules: Any
) -> Iterator[tuple[EpisodeEngine, Scripted]]:
    stage.write(folder, source)
    spec = asyncio.run(stage.spec_of(folder, tokenizer, **rules))
    inner = Scripted(tokenizer, script)
    engine = EpisodeEngine(replace(spec, max_model_len=context), inner)
    try:
        engine.publish(Publication(1, "adapter", "", "digest"))
        yield engine, inner
    finally:
        engine.close()


def played(
    engine: EpisodeEngine, tokenizer: ChatTokenizer, size: int = 1, **row: Any
) -> list[tuple[Completion, Episode]]:
    group: Group | FailedPrompt = stage.played(
        engine, stage.requests([stage.prompt(tokenizer, engine._spec, 0, **row)], size, max_tokens=600)
    )[0]
    assert isinstance(group, Group), group
    return [(c, c.episode) for c in group.completions if c.episode is not None]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return stage.tokenizer_in(tmp_path_factory.mktemp("tokenizer"))


def submits(text: str, request: Request) -> str:
    return call(n=3).replace('"add"', '"submit"')


def test_a_rows_template_variables_hold_for_every_turn(tmp_path: Path, family: Family) -> None:
    qwen = family("qwen3")
    row = {"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"enable_thinking": False}}
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [row, {**row, "chat_template_kwargs": {}}])
    off, on = prepare([DataSource(path=str(path))], "prompt", qwen, seed=0).items
    assert off.arguments == {"enable_thinking": False} and on.arguments == {}
    with opened(tmp_path, qwen, lambda text, request: "7", GAME, use="world.py:Game") as (engine, _):
        answers = stage.played(engine, stage.requests([replace(off, group_id=0), replace(on, group_id=1)], 1))
    texts = {}
    for number, group in answers.items():
        assert isinstance(group, Group)
        ids = [*group.prompt.token_ids.tolist(), *group.completions[0].token_ids.tolist()]
        texts[number] = qwen.decode(ids, skip_special_tokens=False)
    turns = [texts[number].count("<|im_start|>assistant\n<think>\n\n</think>\n\n") for number in (0, 1)]
    assert turns == [3, 0] and texts[0].count("<|im_start|>assistant") == 3


@pytest.mark.parametrize("name", ["gemma3", "mistral_v3", "llama3_1"])
def test_templates_that_take_turns_go_on_after_a_reset_that_speaks(tmp_path: Path, family: Family, name: str) -> None:
    theirs = family(name)
    with opened(tmp_path, theirs, lambda text, request: "7", GAME, use="world.py:Game") as (engine, inner):
        for _, episode in played(engine, theirs, 2, begin="Be brief."):
            assert episode.scores == {"game": 3.0} and episode.counts["turns"] == 3
    assert all("Be brief." in text for text in inner.seen[0])


def test_a_prompt_that_the_template_refuses_is_lost_and_ends_no_run(tmp_path: Path, family: Family) -> None:
    theirs = family("mistral_v3")
    wrong = [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]
    with opened(tmp_path, theirs, lambda text, request: "7", GAME, use="world.py:Game") as (engine, _):
        prompts = [stage.prompt(theirs, engine._spec, n, begin=begin) for n, begin in enumerate([wrong, None])]
        answers = stage.played(engine, stage.requests(prompts, 1))
    lost, fine = answers[0], answers[1]
    assert isinstance(lost, FailedPrompt) and "reset: the prompt cannot be written" in lost.message
    assert isinstance(fine, Group)


def test_answers_of_a_turn_share_what_may_be_added(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    def script(text: str, request: Request) -> str:
        return submits(text, request).replace("3", "400") * 4 if "<|im_start|>tool\n" not in text else "done"

    rules = {"use": "world.py:Tools", "max_observation_tokens": 80, "max_turns": 3}
    with opened(tmp_path, tokenizer, script, TOOLS, **rules) as (engine, _):
        [(completion, episode)] = played(engine, tokenizer, ends=False)
    told = [turn["content"] for turn in episode.turns if turn["role"] == "tool"]
    assert len(told) == 4 and episode.counts["cut_answers"] == 4
    assert completion.sampled is not None
    bound = engine._spec.environment.worlds[0].rules.answer_tokens
    assert int((~completion.sampled).sum()) <= bound + 4 * 40, "of bytes; what is said of cuts is text, too"


def test_nothing_is_put_behind_what_the_engine_can_hold(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    def script(text: str, request: Request) -> str:
        return submits(text, request).replace("3", "60")

    with opened(tmp_path, tokenizer, script, TOOLS, context=1000, use="world.py:Tools", max_turns=9) as (engine, _):
        [(completion, episode)] = played(engine, tokenizer, ends=False)
        size = len(stage.prompt(tokenizer, engine._spec, 0).token_ids) + len(completion.token_ids)
    assert episode.ended == "context" and size <= 1000 and completion.truncated
    assert completion.sampled is not None and completion.sampled[-1], "it ends with what the policy said"
    assert episode.turns[-1]["role"] == "tool", "and what it was told last is known to rewards"


@pytest.mark.parametrize("rules", [{}, {"max_turns": 1}])
def test_what_is_answered_last_is_among_the_turns(
    tmp_path: Path, tokenizer: ChatTokenizer, rules: dict[str, Any]
) -> None:
    with opened(tmp_path, tokenizer, submits, TOOLS, use="world.py:Tools", **rules) as (engine, _):
        [(completion, episode)] = played(engine, tokenizer, ends=not rules)
    assert [turn["role"] for turn in episode.turns] == ["assistant", "tool"]
    assert episode.turns[-1]["content"] == "RIGHT RIGHT RIGHT " and episode.ended == ("turns" if rules else "done")
    assert completion.sampled is not None and completion.sampled.all(), "no policy reads it"


def test_calls_behind_the_one_that_ends_the_episode_are_not_made(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    def script(text: str, request: Request) -> str:
        return submits(text, request) + '<tool_call>{"name": "erase", "arguments": {}}</tool_call>'

    with opened(tmp_path, tokenizer, script, TOOLS, use="world.py:Tools") as (engine, _):
        [(_, episode)] = played(engine, tokenizer)
    assert episode.scores == {"tools": 1.0} and episode.turns[-1]["content"] == "not called: the episode is over"


def test_thoughts_are_split_off_where_there_are_no_tools_too(tmp_path: Path, family: Family) -> None:
    qwen = family("qwen3")
    said = "<think>\nmaybe 5?\n</think>\n\n7"
    with opened(tmp_path, qwen, lambda text, request: said, GAME, use="world.py:Game") as (engine, _):
        [(_, episode)] = played(engine, qwen)
    assert episode.state == ["7", "7", "7"] and episode.turns[0]["reasoning_content"] == "maybe 5?"
