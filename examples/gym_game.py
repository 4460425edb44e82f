"""A game with gymnasium's interface as an environment: ten lines of `respond` around its `step`.

    align env try examples/gym_game.py:Lake --data rows.jsonl --replies replies.jsonl

The game here stands for any with `reset(seed=...) -> (observation, info)` and `step(action) -> (observation, reward,
terminated, truncated, info)`. One of gymnasium's own, whose observations are numbers, says what it looks like by
`render()`: `gymnasium.make("FrozenLake-v1", render_mode="ansi")` is stepped in the same lines, and `render()` returned.
"""

from __future__ import annotations

import random

from rewards import environment

MOVES = {"left": (0, -1), "down": (1, 0), "right": (0, 1), "up": (-1, 0)}


class FrozenLake:
    """Four by four fields: from the top left to the bottom right, and into no hole. As text."""

    actions = tuple(MOVES)

    def reset(self, *, seed: int | None = None) -> tuple[str, dict[str, object]]:
        free = [(row, column) for row in range(4) for column in range(4) if (row, column) not in ((0, 0), (3, 3))]
        self.holes = set(random.Random(seed).sample(free, 3))
        self.place = (0, 0)
        return self._text(), {}

    def step(self, action: int) -> tuple[str, float, bool, bool, dict[str, object]]:
        down, right = MOVES[self.actions[action]]
        self.place = min(3, max(0, self.place[0] + down)), min(3, max(0, self.place[1] + right))
        won, lost = self.place == (3, 3), self.place in self.holes
        return self._text(), float(won), won or lost, False, {}

    def _text(self) -> str:
        field = {(0, 0): "S", (3, 3): "G", **dict.fromkeys(self.holes, "H"), self.place: "X"}
        return "\n".join("".join(field.get((row, column), "F") for column in range(4)) for row in range(4))


@environment
class Lake:
    """The policy says a direction, and sees the lake."""

    def reset(self, seed: int) -> str:
        self.game, self.total, self.done = FrozenLake(), 0.0, False
        seen, _ = self.game.reset(seed=seed)
        return f"{seen}\n{', '.join(self.game.actions)}?"

    def respond(self, reply: str) -> str:
        word = reply.strip().lower()
        if word not in self.game.actions:
            return f"one of {', '.join(self.game.actions)}"
        seen, reward, over, cut, _ = self.game.step(self.game.actions.index(word))
        self.total += reward
        self.done = over or cut
        return str(seen)

    def reward(self) -> float:
        return self.total
