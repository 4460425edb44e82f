"""Sums of four digits and a calculator: the data and the environment of tools-demo.yaml.

An environment is a class: its public methods are the tools, one object is one episode. The traces that the demo begins
with are as bad as what people find in their logs: more than half of them guess the sum without asking the calculator,
and a third of the others ask it again and again. So a model that imitates them answers less than half of all questions,
and uses more calls than it needs; what is right, and that calls cost something, is left to GRPO.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator

from rewards import Objective, environment
from rewards.environments import tool_schemas

HELD_OUT_SHARE = 10  # one sum in ten is held out
GUESS = "About {sum}."
GUESSES, REPEATS = 0.55, 0.35  # of the traces: no call; of the others: more than one

Row = dict[str, object]


@environment(objectives={"right": Objective(range=(0, 1)), "calls": Objective(kind="cost")})
class Calculator:
    """A question, and a calculator to ask."""

    def reset(self, row: Row) -> None:
        self.answer = str(row["answer"])
        self.calls = 0
        self.said = ""

    def add(self, a: int, b: int) -> str:
        """Add two numbers.

        Args:
            a: one
            b: the other
        """
        self.calls += 1
        return str(a + b)

    def respond(self, reply: str) -> None:
        """A reply without a call is the answer; nothing follows."""
        self.said = reply

    def reward(self) -> dict[str, float]:
        numbers = re.findall(r"\d+", self.said)
        return {"right": float(numbers[-1:] == [self.answer]), "calls": float(self.calls)}

    def state(self) -> dict[str, int]:
        return {"calls": self.calls}


def sft(*, rows: int = 4000, seed: int = 0) -> Iterator[Row]:
    """Traces {messages, tools}: guesses, single calls and repeated ones."""
    rng = random.Random(f"traces/{seed}")
    tools = tool_schemas(Calculator)
    for a, b in _sums(rng, rows, held_out=False):
        calls = 0 if rng.random() < GUESSES else rng.choice((2, 3)) if rng.random() < REPEATS else 1
        total = a + b if calls else a + b + rng.choice((-1000, -100, -10, -1, 1, 10, 100, 1000))
        asked = [_call(a, b), {"role": "tool", "content": str(a + b)}] * calls
        said = str(total) if calls else GUESS.format(sum=total)
        yield {"messages": [_question(a, b), *asked, {"role": "assistant", "content": said}], "tools": tools}


def prompts(*, rows: int = 1000, seed: int = 0, held_out: bool = False) -> Iterator[Row]:
    """Questions {prompt, answer}; with `held_out` those that no trace shows."""
    rng = random.Random(f"questions/{held_out}/{seed}")
    for a, b in _sums(rng, rows, held_out=held_out):
        yield {"prompt": [_question(a, b)], "answer": str(a + b)}


def words(*, rows: int = 200) -> Iterator[Row]:
    """What the tokenizer is made of: questions, and calls and schemas as the chat template writes them."""
    rng = random.Random("words")
    schema = json.dumps(tool_schemas(Calculator)[0])
    for a, b in _sums(rng, rows, held_out=False):
        call = f'<tool_call>{{"name": "add", "arguments": {{"a": {a}, "b": {b}}}}}</tool_call>'
        yield {
            "text": f"system\nTools, called as {call}:\n{schema}\nuser\n{a} + {b}?\nassistant\n{call}\ntool\n{a + b}\n"
            + GUESS.format(sum=a + b)
        }


def _sums(rng: random.Random, rows: int, *, held_out: bool) -> Iterator[tuple[int, int]]:
    while rows > 0:
        a, b = rng.randint(1000, 9999), rng.randint(1000, 9999)
        share = hashlib.sha256(f"{a}+{b}".encode()).digest()[0] % HELD_OUT_SHARE
        if (share == 0) == held_out:
            rows -= 1
            yield a, b


def _question(a: int, b: int) -> dict[str, str]:
    return {"role": "user", "content": f"{a} + {b}?"}


def _call(a: int, b: int) -> dict[str, object]:
    function = {"name": "add", "arguments": {"a": a, "b": b}}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
