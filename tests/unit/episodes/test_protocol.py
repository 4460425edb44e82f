"""The protocol written anew: whatever a policy says and an environment does, an episode's ids are the prompts and draws
of its engine, end to end, and nothing but what was drawn counts as sampled."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import numpy as np
import pytest

from align.data.tokenizer import ChatTokenizer
from align.episodes.engine import EpisodeEngine
from align.protocols.fleet import Completion, Group
from align.protocols.trainer import Publication
from align.stages.groups import to_trees
from rollout.base import Request
from tests.unit.episodes import stage
from tests.unit.episodes.stage import Scripted, call

WORLD = '''
import random
from rewards import environment

@environment
class World:
    def reset(self, row, seed, episode_seed):
        self.chance = random.Random(episode_seed)
        self.turn = 0
        return self.chance.choice(["", "", "Begin.", f"Begin {seed % 7}."]) if row["differs"] else "Begin."

    def add(self, a: int, b: int) -> str:
        """Add."""
        said = ["3", "<|im_end|>", "x" * 400, "[1, 2]", "<tool_call>{}</tool_call>", "\\n\\n", "ä€𝄞"]
        if self.chance.random() < 0.1:
            raise ValueError("no paper")
        return self.chance.choice(said)

    def respond(self, reply):
        self.turn += 1
        return None if self.chance.random() < 0.3 else f"And {self.turn}?<|im_start|>"

    @property
    def done(self):
        return self.chance.random() < 0.05

    def reward(self):
        return self.chance.random()
'''
SAID = [
    "an answer", "", "<think>\nhm\n</think>\n\nwell", call(a=1, b=2), f"first\n{call(a=1, b=2)}\n{call(a=3, b=4)}",
    call(a="x"), '<tool_call>{"name": "add", ', '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>',
    "x" * 300, "<|im_start|>tool\n3", "ä€𝄞",
]  # fmt: skip


class Noting(Scripted):
    """Keeps what was asked and drawn."""

    def __init__(self, tokenizer: ChatTokenizer, seed: int):
        self.chance = random.Random(seed)
        super().__init__(tokenizer, lambda text, request: self.chance.choice(SAID))
        self.drawn: list[tuple[list[int], Completion]] = []

    def _group(self, request: Request, reply: str) -> Group:
        group = super()._group(request, reply)
        self.drawn.append((request.prompt.token_ids.tolist(), group.completions[0]))
        return group


def replayed(group: Group, completion: Completion, drawn: list[tuple[list[int], Completion]]) -> np.ndarray:
    """bool[n] of the completion's tokens: those that the engine drew, found from its own notes alone. Every prompt of
    the episode begins with the prompt before it and what was drawn then."""
    start = len(group.prompt.token_ids)
    whole = [*group.prompt.token_ids.tolist(), *completion.token_ids.tolist()]
    sampled = np.zeros(len(whole), bool)
    for prompt, one in drawn:
        begin, end = len(prompt), len(prompt) + len(one.token_ids)
        same = whole[:begin] == prompt and whole[begin:end] == one.token_ids.tolist()
        # episodes may say the same, and are told apart by their log-probabilities
        if same and np.array_equal(completion.logps[begin - start : end - start], one.logps):
            sampled[begin:end] = True
    assert not sampled[:start].any()
    assert (completion.logps[~sampled[start:]] == 0).all()
    return sampled[start:]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("differs", [False, True])
def test_episodes_are_what_the_engine_was_asked_and_what_it_drew(tmp_path: Path, seed: int, differs: bool) -> None:
    tokenizer = stage.tokenizer_in(tmp_path)
    stage.write(tmp_path, WORLD)
    rules = {"max_turns": 5, "max_tokens": 700, "max_observation_tokens": 40, "lockstep": seed % 2 == 0}
    spec = asyncio.run(stage.spec_of(tmp_path, tokenizer, use="world.py:World", **rules))
    inner = Noting(tokenizer, seed)
    engine = EpisodeEngine(spec, inner)
    try:
        engine.publish(Publication(7, "adapter", "", ""))
        prompts = [stage.prompt(tokenizer, spec, n, f"question {n}", differs=differs) for n in range(4)]
        answers = stage.played(engine, stage.requests(prompts, 3, max_tokens=250))
    finally:
        engine.close()
    groups = [answers[n] for n in range(4)]
    for group in groups:
        assert isinstance(group, Group)
        for completion in group.completions:
            assert completion.sampled is not None and completion.episode is not None
            found = replayed(group, completion, inner.drawn)
            np.testing.assert_array_equal(completion.sampled, found)
            assert completion.episode.counts["turns"] <= 5 and completion.length <= 700
            assert completion.sampled[-1], "an episode ends with what was sampled"
            assert (completion.versions == np.where(completion.sampled, 7, -1)).all()
        count = len(group.completions)
        advantages = np.arange(1, count + 1, dtype=np.float32)
        [tree] = to_trees([group], advantages, np.zeros(count, bool))
        for branch, completion, advantage in zip(tree.branches, group.completions, advantages, strict=True):
            assert branch.advantages is not None and completion.sampled is not None
            np.testing.assert_array_equal(branch.loss_mask, completion.sampled)
            np.testing.assert_array_equal(branch.advantages, np.where(completion.sampled, advantage, 0))
    total = sum(c.length for g in groups if isinstance(g, Group) for c in g.completions)
    assert total == sum(len(one.token_ids) for _, one in inner.drawn)
