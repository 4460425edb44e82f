"""Guess a number from 1 to 100: the data and the environment of guess-demo.yaml, a game without tools.

The policy says a number, `respond` says what is left, until the number is found or the turns are over. Those who play
in the traces halve what is left in every other turn, guess anywhere in it else, and sometimes outside of it: many of
their games take more than eight turns. Halving it each time takes seven at most; that is left to GRPO.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from rewards import Objective, environment

LOW, HIGH = 1, 100
TURNS = 8
STRAY, HALVES = 0.05, 0.5  # of the guesses of a trace: anywhere at all; the middle of what is left

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
            kind = rng.random()
            if kind < HALVES:
                guess = (game.low + game.high) // 2
            elif kind < HALVES + STRAY:
                guess = rng.randint(LOW, HIGH)
            else:
                guess = rng.randint(game.low, game.high)
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
