"""A stage of episodes as a run: killed and resumed to the bit in lockstep, nothing left behind; ahead of training; and
what its evaluation, its rewards and its log say."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_episodes import REWRITTEN
from tests.runs import (
    Stopped,
    grpo,
    metrics,
    rollouts,
    run,
    sft,
    stop_at,
    timeless,
    weights,
    write_data,
    write_jsonl,
    write_recipe,
)
from tests.unit.episodes.stage import write

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

WORLD = '''
from rewards import environment

@environment
class Count:
    """Wants an answer again and again, and says how often."""

    def reset(self, row, seed):
        self.right, self.turn = str(row["reference_answer"]), 0
        self.said = []
        return "Then count on from it."

    def respond(self, reply):
        self.turn += 1
        self.said.append(reply)
        return f"{self.turn} + 1 =" if self.turn < 3 else None

    def reward(self):
        return sum(self.right in said for said in self.said) / 3

    def state(self):
        return {"turns": self.turn}
'''
REWARDS = """
from rewards import reward

@reward
def turned(samples):
    assert all(s.turns and s.state["turns"] <= 3 for s in samples if s.turns)
    return [float(len([t for t in s.turns if t["role"] == "assistant"])) for s in samples]
"""


SHORT = {"max_observation_tokens": 32, "max_turns": 4, "max_calls": 1}  # within 512 positions


def stage(**changes: Any) -> dict[str, Any]:
    return grpo(
        **{
            "from": "sft",
            "adapter": {"kind": "lora", "rank": 4, "alpha": 8},
            "environment": {"use": "world.py:Count", "lockstep": True, **SHORT},
            "rewards": [{"use": "turned.py:turned"}],
            "rollout": {"max_tokens": 8, "truncated": "keep"},
            "objectives": {"weights": {"count": 1.0, "turned": 0.1}},
            "steps": 6,
            "eval": {"data": {"path": "sums.jsonl", "limit": 8}, "every": 3},
            **changes,
        }
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_data(tmp_path)
    write(tmp_path, WORLD)
    write(tmp_path, REWARDS, "turned.py")
    return tmp_path


def test_episodes_in_lockstep_resume_bit_equal_after_a_kill_and_leave_nothing(folder: Path) -> None:
    learn = sft(adapter={"kind": "full"}, steps=20, eval=None)
    run(write_recipe(folder, "whole", [learn, stage()]))
    recipe = write_recipe(folder, "broken", [learn, stage()])
    whole, broken = folder / "runs" / "whole", folder / "runs" / "broken"
    killed = stop_at(recipe, lambda: len(metrics(broken, "grpo")) >= 3, signal.SIGKILL)
    assert killed == Stopped(-signal.SIGKILL, [], []), (
        "environments, their warm process and engines die with the driver"
    )
    assert "continues from step" in run(recipe, "--resume")
    assert timeless(whole, "grpo") == timeless(broken, "grpo")
    assert weights(whole, "grpo") == weights(broken, "grpo")
    assert rollouts(whole, "grpo") == rollouts(broken, "grpo")
    rows = rollouts(whole, "grpo")
    several = [row for row in rows if json.loads(row["state"])["turns"] > 1]
    assert several and all(
        row["objective/turned"] == json.loads(row["state"])["turns"] or row["finish"] == "length" for row in rows
    )
    for row in several:
        roles = [turn["role"] for turn in json.loads(row["turns"])]
        assert roles[:4] == ["user", "assistant", "user", "assistant"] and not all(row["sampled"])
    last = metrics(whole, "grpo")[-1]
    assert last["episode/turns"] >= 1 and last["episode/lost"] == 0 and "eval/count" in last


def test_episodes_run_ahead_of_training(folder: Path) -> None:
    loose = {"use": "world.py:Count", **SHORT}
    loss = [{"name": "grpo"}, {"name": "echo", "weight": 0.05}]
    run(write_recipe(folder, "ahead", [stage(**{"from": None}, environment=loose, staleness=1, steps=5, loss=loss)]))
    found = metrics(folder / "runs" / "ahead", "grpo")
    assert len(found) == 5 and max(step["staleness/max"] for step in found) == 1
    foreseen = [step["loss/observed"] for step in found if "loss/observed" in step]  # none where no turn was answered
    assert foreseen and min(foreseen) > 0, "what the environment says is foreseen, badly"
    assert all(step["mismatch/kl"] < 1e-4 for step in found), "the trainer sees what the policy saw"
    assert all("Then count on from it." in row["prompt"] for row in rollouts(folder / "runs" / "ahead", "grpo"))


GAME = """
from rewards import environment

@environment
class Game:
    def reset(self, row, seed):
        return "Guess!"

    def respond(self, reply):
        return None

    def reward(self):
        return 0.5

    def state(self):
        return {"game": True}
"""


def test_rows_choose_one_of_several_environments(folder: Path) -> None:
    """Each is played by its own, and what the other scores does not apply to it."""
    write(folder, GAME, "game.py")
    rows = [json.loads(line) for line in (folder / "sums.jsonl").read_text().splitlines()[:16]]
    names = [("count", "game")[n % 2] for n in range(len(rows))]
    write_jsonl(folder / "chosen.jsonl", [row | {"environment": name} for row, name in zip(rows, names, strict=True)])
    several = [
        {"use": "world.py:Count", "as": "count", "lockstep": True, **SHORT},
        {"use": "game.py:Game", "as": "game", "lockstep": True, **SHORT},
    ]
    wanted = {"from": None, "environment": several, "data": {"path": "chosen.jsonl"}, "rewards": [], "steps": 2}
    both = stage(**wanted, objectives={"weights": {"count": 1.0, "game": 1.0}}, eval=None)
    run(write_recipe(folder, "several", [both]))
    drawn = rollouts(folder / "runs" / "several", "grpo")
    assert {row["environment"] for row in drawn} == {"count", "game"}
    for row in drawn:
        other = {"count": "game", "game": "count"}[row["environment"]]
        assert row[f"objective/{other}"] is None and row[f"objective/{row['environment']}"] is not None
        assert ("Guess!" in row["prompt"]) == (row["environment"] == "game")
        assert ("game" in json.loads(row["state"])) == (row["environment"] == "game")
    for line in metrics(folder / "runs" / "several", "grpo"):
        assert line["episode/count/episodes"] + line["episode/game/episodes"] == line["groups/total"] * 4
        assert line["episode/lost"] == 0


def test_a_run_trains_on_what_the_template_writes_then(folder: Path) -> None:
    """The template writes no turn as it was sampled: each turn is a sequence of its own, and all of an episode are one
    for the loss. Trainer and engine agree on what stands in front of each token."""
    (folder / "said.jinja").write_text(REWRITTEN)
    anew = {"use": "world.py:Count", "history": "template", **SHORT}
    recipe = write_recipe(folder, "anew", [stage(**{"from": None}, environment=anew, steps=3, eval=None)])
    run(recipe, "model.chat_template=said.jinja")
    drawn, found = rollouts(folder / "runs" / "anew", "grpo"), metrics(folder / "runs" / "anew", "grpo")
    turns = [sum(turn["role"] == "assistant" for turn in json.loads(row["turns"])) for row in drawn]
    assert [len(json.loads(row["forks"] or "[]")) for row in drawn] == [n - 1 for n in turns] and max(turns) > 1
    assert all(step["episode/forks"] > 0 and step["mismatch/kl"] < 1e-4 for step in found)
