"""Reward functions written for TRL and ms-swift run unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rewards import PluginError, Sample
from rewards.find import load
from rewards.plugin import PluginSpec
from rewards.pool import PoolResult, RewardPool

SOURCE = """
import asyncio

def trl_reward(prompts, completions, completion_ids, answer, log_metric=None, **kwargs):
    assert kwargs["trainer_state"] is None and kwargs["level"] == ["easy", None]
    log_metric("seen", len(prompts))
    texts = [c[0]["content"] if isinstance(c, list) else c for c in completions]
    return [float(a in t) if a != "?" else None for t, a in zip(texts, answer)]

def trl_small(completions, answer):
    return [float(a == c) for a, c in zip(answer, completions)]

async def trl_async(completions, completion_ids, bonus=0.0, **kwargs):
    await asyncio.sleep(0)
    return [len(ids) + bonus for ids in completion_ids]

def trl_conversational(prompts, completions, **kwargs):
    assert prompts[0] == [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    return [float(c == [{"role": "assistant", "content": "yes"}]) for c in completions]

def swift_function(completions, answer, **kwargs):
    assert kwargs["messages"][0][-1] == {"role": "assistant", "content": completions[0]}
    return [float(a in c) for c, a in zip(completions, answer)]

class ORM:
    def __init__(self, weight=1.0):
        self.weight = weight
    def __call__(self, completions, answer, **kwargs):
        return [self.weight * (a in c) for c, a in zip(completions, answer)]

class AsyncORM(ORM):
    async def __call__(self, completions, answer, **kwargs):
        await asyncio.sleep(0)
        return super().__call__(completions, answer)
"""

PLAIN = [
    Sample("it is 4", [{"role": "text", "content": "2+2"}], {"answer": "4", "level": "easy"}, [1, 2, 3]),
    Sample("dunno", [{"role": "text", "content": "?"}], {"answer": "?"}, [1]),
]
CHAT = [
    Sample(text, [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], {"answer": "yes"})
    for text in ("yes", "no")
]


def score(tmp_path: Path, name: str, samples: list[Sample], signature: str, **args: object) -> PoolResult:
    (tmp_path / "theirs.py").write_text(SOURCE)
    spec = PluginSpec(f"theirs.py:{name}", args=args, signature=signature)  # type: ignore[arg-type]
    with RewardPool([spec], tmp_path, 0) as pool:
        return pool.score_sync(samples)


def test_a_trl_reward_gets_prompts_completions_and_columns_and_keeps_none(tmp_path: Path) -> None:
    result = score(tmp_path, "trl_reward", PLAIN, "trl")
    assert result.scores == [[1.0], [None]] and not result.failures, result.failures
    assert result.metrics["reward/trl_reward/seen"] == 2


def test_a_trl_reward_without_kwargs_gets_what_it_names(tmp_path: Path) -> None:
    assert score(tmp_path, "trl_small", [Sample("a", row={"answer": "a", "x": 1})], "trl").failures == ()


def test_an_async_trl_reward_takes_args_of_the_recipe(tmp_path: Path) -> None:
    assert score(tmp_path, "trl_async", PLAIN, "trl", bonus=0.5).scores == [[3.5], [1.5]]


def test_a_trl_reward_gets_conversational_completions(tmp_path: Path) -> None:
    assert score(tmp_path, "trl_conversational", CHAT, "trl").scores == [[1.0], [0.0]]


def test_swift_functions_and_classes_run(tmp_path: Path) -> None:
    assert score(tmp_path, "swift_function", CHAT, "swift").scores == [[1.0], [0.0]]
    result = score(tmp_path, "ORM", CHAT, "swift", weight=2.0)
    assert result.objectives == ("ORM",) and result.scores == [[2.0], [0.0]]
    assert score(tmp_path, "AsyncORM", CHAT, "swift").scores == [[1.0], [0.0]]


def test_arguments_that_nobody_takes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="bogus"):
        score(tmp_path, "ORM", CHAT, "swift", bogus=1)
    with pytest.raises(PluginError, match="bogus"):
        score(tmp_path, "trl_small", CHAT, "trl", bogus=1)


@pytest.mark.parametrize("name", ["trl_reward", "trl_small", "swift_function"])
def test_a_function_of_theirs_without_its_signature_is_refused_before_it_scores(tmp_path: Path, name: str) -> None:
    with pytest.raises(PluginError, match="completions") as error:
        score(tmp_path, name, CHAT, "align")
    assert "signature: trl" in str(error.value.remedy)


def test_a_decorated_function_may_call_its_samples_completions(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from rewards import reward\n\n@reward\n"
        "def said(completions):\n    return [len(c.completion) for c in completions]\n"
    )
    with RewardPool([PluginSpec("mine.py:said")], tmp_path, 0) as pool:
        assert pool.score_sync(CHAT).scores == [[3.0], [2.0]]


@pytest.mark.parametrize(
    "peer, parameters",
    [("verl", "data_source, solution_str, ground_truth, extra_info=None"), ("OpenRLHF", "queries, prompts, labels")],
)
def test_a_function_of_verl_or_openrlhf_is_refused_with_what_to_write(
    tmp_path: Path, peer: str, parameters: str
) -> None:
    (tmp_path / "mine.py").write_text(f"def theirs({parameters}):\n    return 1.0\n")
    with pytest.raises(PluginError, match=f"those of {peer}'s reward functions") as error:
        load(PluginSpec("mine.py:theirs"), tmp_path)
    assert "[theirs(..., s.completion," in str(error.value.remedy)


@pytest.mark.parametrize(
    "signature, name, wants",
    [
        ("trl", "plain", ["solution"]),
        ("trl", "part", []),
        ("trl", "given", ["level"]),
        ("trl", "Made", ["key"]),
        ("swift", "Made", ["key"]),
        ("swift", "renamed", ["solution"]),
    ],
)
def test_the_columns_that_a_function_of_theirs_cannot_do_without_are_known(
    tmp_path: Path, signature: Any, name: str, wants: list[str]
) -> None:
    (tmp_path / "mine.py").write_text(
        "from functools import partial\n"
        "def plain(prompts, completions, solution, level=1, **kwargs): ...\n"
        "part = partial(plain, solution=['a'])\n"
        "def given(completions, level, weight): ...\n"
        "def renamed(texts, solution): ...\n"
        "class Made:\n    def __init__(self, k=1): ...\n    def __call__(self, completions, key): ...\n"
    )
    args = {"weight": 2} if name == "given" else {}
    assert load(PluginSpec(f"mine.py:{name}", args=args, signature=signature), tmp_path).describe()["columns"] == wants
