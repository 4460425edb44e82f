"""Classes written for TRL's environment_factory run unchanged: what its trainer does with them, ours does."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from rewards import PluginError
from tests.unit.environments.stage import hosted, within, write

WORDLE = '''
class WordleEnv:
    """As in TRL's guide."""

    def __init__(self, words=("crane", "slate")):
        self.words = words

    def reset(self, **kwargs) -> str | None:
        self.reward = 0.0
        self.done = False
        self._hidden = kwargs["answer"]
        self.columns = sorted(kwargs)
        return "Guess a word of five letters."

    def guess(self, word: str) -> str:
        """
        Make a guess.

        Args:
            word: The guessed word, in square brackets.

        Returns:
            The feedback message.
        """
        if self.done:
            raise ValueError("Game over.")
        self.done = word == self._hidden
        self.reward = float(self.done)
        return "right" if self.done else "wrong"

    async def count(self, word: str) -> int:
        """Count letters.

        Args:
            word: any
        """
        return len(word)

    def _helper(self):
        return 1
'''
OWNS = WORDLE + "\n    def get_reward(self) -> float:\n        return self.reward\n"


def test_a_class_of_trl_runs_unchanged(tmp_path: Path) -> None:
    space: dict[str, type] = {}
    exec(WORDLE, space)
    members = inspect.getmembers(space["WordleEnv"], predicate=inspect.isfunction)
    theirs = [name for name, _ in members if name not in ("reset", "get_reward") and name[0] != "_"]

    async def play() -> None:
        async with hosted(write(tmp_path, WORDLE), "env.py:WordleEnv", signature="trl") as host:
            assert [t["function"]["name"] for t in host.description["tools"]] == theirs == ["count", "guess"]
            assert host.description["has"] == dict.fromkeys(("respond", "done", "close", "reward"), False) | {
                "reset": True, "state": True,
            }  # fmt: skip
            live = await host.open()
            reset = await live.reset({"answer": "crane", "prompt": "Play."}, 0, 0, 5)
            assert reset.value == "Guess a word of five letters."
            wrong, right, count, over = await live.calls(
                [("guess", {"word": "slate"}), ("guess", {"word": "crane"}), ("count", {"word": "abc"}),
                 ("guess", {"word": "again"})], 5
            )  # fmt: skip
            assert (wrong.value, right.value, count.value) == ("wrong", "right", "3")
            assert not right.done, "TRL has no such member: the attribute is the user's own"
            assert over.kind == "raised" and over.message == "ValueError: Game over."
            state = (await live.state(5)).value
            assert state == {"words": ["crane", "slate"], "reward": 1.0, "done": True, "columns": ["answer", "prompt"]}

    within(play)


def test_one_that_owns_its_reward_is_asked_for_it(tmp_path: Path) -> None:
    async def play() -> None:
        async with hosted(write(tmp_path, OWNS), "env.py:WordleEnv", signature="trl") as host:
            assert host.description["objectives"] == {"wordle_env": {"kind": "reward", "range": None}}
            live = await host.open()
            await live.reset({"answer": "crane"}, 0, 0, 5)
            await live.calls([("guess", {"word": "crane"})], 5)
            assert (await live.reward(5)).value["values"] == {"wordle_env": 1.0}

    within(play)


def test_one_without_reset_is_refused_as_by_trl(tmp_path: Path) -> None:
    async def play() -> None:
        text = "class Env:\n    def act(self, x: int): ...\n"
        async with hosted(write(tmp_path, text), signature="trl"):
            pass

    with pytest.raises(PluginError, match="has `reset`, and this has none"):
        within(play)


IMAGES = '''
import sys, types
class Image:
    mode = "RGB"
    def save(self, file, format):
        file.write(b"png")
class Env:
    def reset(self):
        return [{"type": "image", "image": Image()}, {"type": "text", "text": "Look."}]
    def look(self) -> list:
        """Look again."""
        return [{"type": "image", "image": Image()}]
'''


@pytest.mark.parametrize("signature", ["trl", "align"])
def test_images_are_sent_as_data(tmp_path: Path, signature: str) -> None:
    picture = {"type": "image", "image": "data:;base64,cG5n"}

    async def play() -> None:
        async with hosted(write(tmp_path, IMAGES), signature=signature) as host:
            live = await host.open()
            assert (await live.reset({}, 0, 0, 5)).value == [
                {"role": "user", "content": [picture, {"type": "text", "text": "Look."}]}
            ]
            assert (await live.calls([("look", {})], 5))[0].value == [picture]

    within(play)
