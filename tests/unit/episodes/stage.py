"""Episodes without a model: a byte-level tokenizer, an engine that follows a script, environments in files; and what
real engines need beside those."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align.data.scratch import train_tokenizer
from align.data.templates import CHATML
from align.data.tokenizer import ChatTokenizer, load_tokenizer
from align.episodes.describe import describe
from align.episodes.spec import EpisodeSpec, WorldSpec
from align.protocols.fleet import Completion, FailedPrompt, Group, PromptItem, Sampling
from align.protocols.trainer import Publication
from align.recipe.environment import Environment
from align.recipe.inputs import TokenizerFromScratch
from rollout.base import EngineSpec, Request
from tests.runs import write_jsonl
from tests.tiny_models import write_tiny_qwen3

CALCULATOR = '''
from rewards import environment

@environment
class Calculator:
    def reset(self, row, seed):
        self.answer, self.seed, self.calls = str(row["answer"]), seed, 0

    def add(self, a: int, b: int) -> str:
        """Add two numbers.

        Args:
            a: one
            b: the other
        """
        self.calls += 1
        return str(a + b)

    def respond(self, reply):
        self.said = reply

    def reward(self):
        return float(self.said == self.answer)

    def state(self):
        return {"calls": self.calls, "seed": self.seed}
'''

Script = Callable[[str, Request], str]
"""What is sampled after a prompt, as text; its end of turn is added."""


def call(**arguments: Any) -> str:
    import json

    return f'<tool_call>{{"name": "add", "arguments": {json.dumps(arguments)}}}</tool_call>'


def tokenizer_in(folder: Path) -> ChatTokenizer:
    words = folder / "words.jsonl"
    write_jsonl(words, [{"text": "some words for a tokenizer of bytes"}])
    spec = TokenizerFromScratch.model_validate({"train_on": {"path": str(words)}, "vocab_size": 300})
    train_tokenizer(spec, folder / "tokenizer")
    return load_tokenizer(folder / "tokenizer")


class Scripted:
    """An engine inside: answers every request in one step by a script. seen: prompts of each step, decoded."""

    def __init__(self, tokenizer: ChatTokenizer, script: Script):
        self.tokenizer, self.script = tokenizer, script
        self.version: int | None = None
        self.continuing = False
        self.waiting: list[Request] = []
        self.seen: list[list[str]] = []
        self.closed = False

    @property
    def running(self) -> int:
        return len(self.waiting)

    def add(self, requests: Sequence[Request]) -> None:
        self.waiting += requests

    def step(self) -> list[tuple[int, Group | FailedPrompt]]:
        taken, self.waiting = self.waiting, []
        texts = [self.tokenizer.decode(r.prompt.token_ids.tolist(), skip_special_tokens=False) for r in taken]
        self.seen.append(texts)
        return [(r.ticket, self._group(r, self.script(text, r))) for r, text in zip(taken, texts, strict=True)]

    def _group(self, request: Request, reply: str) -> Group:
        end = self.tokenizer.ends.text.token
        ids = self.tokenizer.encode(reply + end, add_special_tokens=False)
        cut = len(ids) > request.sampling.max_tokens
        ids = ids[: request.sampling.max_tokens]
        logps = -np.random.default_rng(request.prompt.seed).random(len(ids)).astype(np.float32)
        text, raw = self.tokenizer.decode(ids), self.tokenizer.decode(ids, skip_special_tokens=False).removesuffix(end)
        versions = np.full(len(ids), self.version or 0, np.int32)
        finish = "length" if cut else "eos"
        return Group(request.prompt, (Completion(np.array(ids), logps, versions, text, finish, raw),))  # type: ignore[arg-type]

    def abandon(self, tickets: Sequence[int]) -> None:
        self.waiting = [r for r in self.waiting if r.ticket not in set(tickets)]

    def accepts(self, publication: Publication) -> bool:
        return True

    def publish(self, publication: Publication) -> str:
        self.version = publication.version
        return publication.digest

    def logps(self, token_ids: Any, media: Any = ()) -> list[np.ndarray]:
        return []

    def close(self) -> None:
        self.closed = True


def write(folder: Path, source: str, name: str = "world.py") -> Path:
    path = folder / name
    path.write_text(textwrap.dedent(source))
    return path


def write_model(folder: Path, source: str) -> ChatTokenizer:
    """A tiny chat model in `model`, which real engines load, and an environment beside it; the model's tokenizer."""
    write_tiny_qwen3(folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(CHATML)
    write(folder, source)
    return load_tokenizer(folder / "model")


async def spec_of(folder: Path, tokenizer: ChatTokenizer, **rules: Any) -> EngineSpec:
    """An engine's spec for the environment that `rules` name."""
    settled = Environment.model_validate({"timeout_s": 5.0, **rules})
    described = await describe(settled, folder)
    episodes = EpisodeSpec((WorldSpec(settled, described),), tokenizer, folder, 0)
    return EngineSpec("scripted", str(folder), max_model_len=4096, environment=episodes)


def prompt(tokenizer: ChatTokenizer, spec: EngineSpec, number: int, text: str = "1 + 2?", **row: Any) -> PromptItem:
    messages = ({"role": "user", "content": text},)
    tools = spec.environment.worlds[0].description["tools"]
    ids = tokenizer.chat_ids(messages, True, tools)
    values = {"answer": "3", **row}
    return PromptItem(number, np.array(ids), 1000 + number, messages, values, f"rows.jsonl:{number + 1}")


def requests(prompts: Sequence[PromptItem], size: int, **sampling: Any) -> list[Request]:
    drawn = Sampling(**{"temperature": 1.0, "max_tokens": 200, **sampling})
    return [Request(n, one, size, drawn) for n, one in enumerate(prompts)]


def played(engine: Any, asked: Sequence[Request]) -> dict[int, Group | FailedPrompt]:
    """Every answer, by ticket."""
    engine.add(asked)
    answers: dict[int, Group | FailedPrompt] = {}
    while engine.running:
        answers |= dict(engine.step())
    return answers
