"""Episodes on real engines and a real trainer: equal log-probabilities of every sampled token of every turn, tokens of
the environment never scored, packed = alone, and lists that repeat bit for bit."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.data.templates import CHATML
from align.data.tokenizer import ChatTokenizer, load_tokenizer
from align.protocols.fleet import Group, Sampling
from align.protocols.trainer import Publication
from align.stages.groups import to_trees
from align.train.trainer import PolicyTrainer
from rollout.base import EngineSpec, Request, make_engine
from tests.tiny_models import VOCABULARY
from tests.unit.episodes import stage
from tests.unit.train.test_trainer import make_spec

TURNS = 4
WORLD = f"""
from rewards import environment

@environment
class World:
    def reset(self, row, seed):
        self.turn, self.seed = 0, seed

    def respond(self, reply):
        self.turn += 1
        return f"go on {{self.turn}}" if self.turn < {TURNS} else None

    def reward(self):
        return float(self.turn)
"""
REWRITTEN = """{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ 'said: ' if message.role == 'assistant' }}{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""
"""A template that writes no turn as it was sampled: an episode goes on anew behind each."""
# every other token ends a turn: turns of a model that was never trained are short, and the template ends them
SAMPLING = Sampling(temperature=0.8, max_tokens=24, stop_token_ids=tuple(range(3, VOCABULARY, 2)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("episodes")
    stage.write_model(folder, WORLD)
    return folder


@pytest.fixture(scope="module", params=["append", "template"])
def history(request: pytest.FixtureRequest, folder: Path) -> str:
    (folder / "model" / "chat_template.jinja").write_text(REWRITTEN if request.param == "template" else CHATML)
    return str(request.param)


@pytest.fixture(scope="module")
def tokenizer(folder: Path, history: str) -> ChatTokenizer:
    return load_tokenizer(folder / "model")


@pytest.fixture(scope="module", params=["transformers", "vllm"])
def engine(request: pytest.FixtureRequest, folder: Path, tokenizer: ChatTokenizer, history: str) -> Iterator[Any]:
    rules = {"use": "world.py:World", "lockstep": True, "history": history}
    spec: EngineSpec = asyncio.run(stage.spec_of(folder, tokenizer, **rules))
    spec = replace(
        spec,
        name=request.param,
        folder=str(folder / "model"),
        max_model_len=512,
        max_tokens=24,
        end_ids=tokenizer.eos_ids,
    )
    made = make_engine(spec)
    made.publish(Publication(1, "base", spec.folder, ""))
    yield made
    made.close()


def drawn(engine: Any, tokenizer: ChatTokenizer) -> list[Group]:
    prompts = [stage.prompt(tokenizer, engine._spec, n, f"question {n}") for n in range(3)]
    answers = stage.played(engine, [Request(n, one, 4, SAMPLING) for n, one in enumerate(prompts)])
    groups = [answers[n] for n in range(3)]
    assert all(isinstance(group, Group) for group in groups), groups
    return [group for group in groups if isinstance(group, Group)]


def test_trainer_and_engine_agree_on_every_sampled_token_of_every_turn(
    engine: Any, folder: Path, tokenizer: ChatTokenizer, history: str
) -> None:
    groups = drawn(engine, tokenizer)
    forks = [completion.forks for group in groups for completion in group.completions]
    assert sum(map(bool, forks)) == (0 if history == "append" else len(forks))
    trainer = PolicyTrainer(
        replace(make_spec(folder / "model", "grpo"), temperature=SAMPLING.temperature, max_tokens=4096)
    )
    count = sum(len(group.completions) for group in groups)
    trees = to_trees(groups, np.ones(count, np.float32), np.zeros(count, bool))
    for group, logps in zip(groups, trainer.logps(trees), strict=True):
        left = iter(logps)  # of each sequence of an episode
        for completion in group.completions:
            own = np.concatenate([next(left) for _ in completion.sequences])
            assert completion.episode is not None
            assert len(own) == completion.length > 0
            assert completion.episode.counts["turns"] > 1
            np.testing.assert_allclose(own, completion.sampled_logps, atol=1e-4)
        assert next(left, None) is None
    alone = PolicyTrainer(replace(trainer.spec, max_tokens=8))
    for one, other in zip(trainer.logps(trees), alone.logps(trees), strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-6)


def test_in_lockstep_a_list_gives_the_same_episodes_bit_for_bit(engine: Any, tokenizer: ChatTokenizer) -> None:
    first, again = drawn(engine, tokenizer), drawn(engine, tokenizer)
    for one, other in zip(first, again, strict=True):
        for a, b in zip(one.completions, other.completions, strict=True):
            for part, same in zip(a.sequences, b.sequences, strict=True):
                assert np.array_equal(part.token_ids, same.token_ids) and np.array_equal(part.logps, same.logps)
                assert np.array_equal(part.sampled, same.sampled)
