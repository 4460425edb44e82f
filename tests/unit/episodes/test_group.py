"""Groups of episodes: a common beginning, budgets of answers, and episodes drawn again."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from align.data.tokenizer import ChatTokenizer
from align.episodes.budgets import cut_middle
from align.episodes.group import Played, Retries, draw_group
from align.episodes.outcomes import Lost
from align.protocols.fleet import Completion, Episode, FailedPrompt, Fork, Group, PromptItem
from align.protocols.trees import REPEATED
from tests.unit.episodes import stage
from tests.unit.stages.plain import prompt


def played(prompt: list[int], own: list[int]) -> Played:
    n = len(own)
    done = Completion(
        np.array(own), np.full(n, -1.0, np.float32), np.full(n, 4, np.int32), "", "eos",
        sampled=np.ones(n, bool), episode=Episode(),
    )  # fmt: skip
    return Played(np.array(prompt), done)


def drawn(several: list[Played | Lost], retries: int = 0) -> tuple[Group | FailedPrompt, list[tuple[int, int]]]:
    asked: list[tuple[int, int]] = []

    async def draw(item: PromptItem, number: int, attempt: int) -> Played:
        asked.append((number, attempt))
        one = several[number]
        if isinstance(one, Lost):
            raise one
        return one

    return asyncio.run(draw_group(prompt(0), len(several), draw, Retries(retries))), asked


def test_prompts_that_differ_share_their_beginning_and_the_rest_is_never_sampled() -> None:
    group, _ = drawn([played([5, 6, 7], [1, 2]), played([5, 6, 8, 9], [3])])
    assert isinstance(group, Group) and group.prompt.token_ids.tolist() == [5, 6]
    one, other = group.completions
    assert one.token_ids.tolist() == [7, 1, 2] and other.token_ids.tolist() == [8, 9, 3]
    assert one.sampled is not None and other.sampled is not None
    assert one.sampled.tolist() == [False, True, True] and other.sampled.tolist() == [False, False, True]
    assert one.versions.tolist() == [-1, 4, 4] and other.logps.tolist() == [0, 0, -1] and other.length == 1


def test_every_sequence_of_an_episode_gets_what_its_prompt_has_of_its_own() -> None:
    one = played([5, 6, 7], [3])
    before = Fork(np.array([1, 2]), np.full(2, -1.0, np.float32), np.array([4, -1], np.int32), np.array([True, False]))
    one = one._replace(completion=replace(one.completion, forks=(before,)))
    group, _ = drawn([one, played([5, 6, 8], [9])])
    assert isinstance(group, Group)
    first, last = group.completions[0].sequences
    assert first.token_ids.tolist() == [7, 1, 2] and last.token_ids.tolist() == [7, 3]
    assert first.sampled.tolist() == [False, True, False] and last.versions.tolist() == [REPEATED, 4]
    assert group.completions[0].sampled_ids.tolist() == [1, 3]


def test_an_episode_is_drawn_again_as_often_as_it_may_be_and_its_group_once() -> None:
    gone = Lost("died", "exit 3", killed=True)
    group, asked = drawn([played([5], [1]), gone, played([5], [2])], retries=2)
    assert isinstance(group, Group) and [c.length for c in group.completions] == [1, 0, 1]
    assert asked.count((1, 0)) == 3 and max(attempt for _, attempt in asked) == 0
    failed, asked = drawn([played([5], [1]), gone], retries=1)
    assert isinstance(failed, FailedPrompt) and "exit 3" in failed.message
    assert asked.count((1, 0)) == asked.count((1, 1)) == 2 and asked.count((0, 1)) == 1


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return stage.tokenizer_in(tmp_path_factory.mktemp("tokenizer"))


def test_a_long_answer_is_cut_in_its_middle_and_says_so(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    text = "".join(f"{n:04d}," for n in range(1000))
    cut, gone = cut_middle(text, 50, tokenizer)
    assert cut.startswith("0000,") and cut.endswith("0999,") and gone > 4900
    assert f"[... {gone} characters cut ...]" in cut and len(tokenizer.encode(cut)) < 100
    assert cut_middle("short", 50, tokenizer) == ("short", 0)
    flood, _ = cut_middle("x" * 50_000_000, 50, tokenizer)
    assert len(flood) < 1000
