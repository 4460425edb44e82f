"""Guess a number from 1 to 100: the data and the environment of guess-demo.yaml, a game without tools.

The policy says a number, `respond` says what is left, until the number is found or the turns are over. Those who play
in the traces guess anywhere in what is left, and sometimes outside of it: many of their games take more than eight
turns. Halving it each time takes seven at most; that is left to GRPO.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from rewards import Objective, environment

LOW, HIGH = 1, 100
TURNS = 8
STRAY = 0.05  # of the guesses of a trace: anywhere at all

Row = dict[str, object]


@environment(objectives={"solved": Objective(range=(0, 1)), "turns": Objective(kind="cost")})
class Guess:
    """A secret number, and what is left of the numbers after each guess."""

    def reset(self, row: Row) -> None:
        self.secret = int(str(row["secret"]))
        self.low, self.high = LOW, HIGH
        self.turns = 0
        self.done = False

    def respond(self, reply: str) -> str:
        """What is left, as the next turn of the user."""
        self.turns += 1
        found = re.fullmatch(r"\d{1,3}", reply.strip())
        if found is None:
            return f"a number from {self.low} to {self.high}"
        guess = int(found[0])
        self.done = guess == self.secret
        if guess < self.secret:
            self.low = max(self.low, guess + 1)
        elif guess > self.secret:
            self.high = min(self.high, guess - 1)
        return f"{self.low} to {self.high}"

    def reward(self) -> dict[str, float]:
        return {"solved": float(self.done), "turns": float(self.turns)}


def sft(*, rows: int = 4000, seed: int = 0) -> Iterator[Row]:
    """Games {messages} of careless players, to their end or the eighth guess."""
    rng = random.Random(f"games/{seed}")
    for _ in range(rows):
        game = Guess()
        game.reset({"secret": rng.randint(LOW, HIGH)})
        messages = [_start()]
        while not game.done and game.turns < TURNS:
            stray = rng.random() < STRAY
            guess = rng.randint(LOW, HIGH) if stray else rng.randint(game.low, game.high)
            messages.append({"role": "assistant", "content": str(guess)})
            said = game.respond(str(guess))
            if not game.done and game.turns < TURNS:
                messages.append({"role": "user", "content": said})
        yield {"messages": messages}


def prompts(*, rows: int = 1000, seed: int = 0) -> Iterator[Row]:
    """Games to be played {prompt, secret}."""
    rng = random.Random(f"secrets/{seed}")
    for _ in range(rows):
        yield {"prompt": [_start()], "secret": rng.randint(LOW, HIGH)}


def _start() -> dict[str, str]:
    return {"role": "user", "content": f"{LOW} to {HIGH}"}
