"""An online stage of several updates per batch on real actors, with completions by transformers: what it reports.
That a kill in the middle of a turn changes nothing is proved by tests/prove/prove_resume.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.runs import grpo, metrics, rollouts, run, write_data, write_recipe

pytestmark = pytest.mark.slow

JUDGE = """
def even(samples):
    return [sum(t % 2 == 0 for t in s.token_ids) / len(s.token_ids) for s in samples]
"""
TURNS, GROUPS, SIZE = 5, 4, 4
STAGE: dict[str, Any] = grpo(
    **{"from": None},
    adapter={"kind": "lora", "rank": 4, "alpha": 8},
    # a model that was not taught ends no turn, and its answers are all of one length
    rollout={"name": "transformers", "max_tokens": 8, "truncated": "keep"},
    rewards=[{"use": "judge.py:even"}],
    batch={"groups": GROUPS, "group_size": SIZE},
    optim={"lr": 1e-3, "schedule": "linear", "warmup": 0.0},
    updates_per_batch=2,
    minibatches=2,
    steps=TURNS,
    packing={"max_tokens": 64},  # several microbatches to a minibatch
    save={"every": 2},
    eval=None,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("updates")
    write_data(found)
    (found / "judge.py").write_text(JUDGE)
    return found


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    run(write_recipe(folder, "whole", [STAGE]))
    return folder / "runs" / "whole"


def test_a_turn_makes_four_updates_and_one_version(whole: Path) -> None:
    lines = metrics(whole, "grpo")
    assert [line["step"] for line in lines] == list(range(1, TURNS + 1))
    assert [line["train/updates"] for line in lines] == [4.0] * TURNS
    assert [line["staleness/max"] for line in lines] == [0.0] * TURNS
    rows = rollouts(whole, "grpo")
    assert len(rows) == TURNS * GROUPS * SIZE and all(row["version"] == row["step"] - 1 for row in rows)


def test_the_learning_rate_falls_with_every_update(whole: Path) -> None:
    """Linear to 0 over 20 updates: a turn's mean is that of its four."""
    rates = [line["optim/lr"] for line in metrics(whole, "grpo")]
    assert rates == pytest.approx([1e-3 * (1 - (4 * turn + 2) / (4 * TURNS)) for turn in range(TURNS)])


def test_later_updates_move_away_from_the_start_and_the_samplers_mismatch_stays_rounding(whole: Path) -> None:
    for line in metrics(whole, "grpo"):
        assert line["mismatch/max_abs"] < 1e-4 and line["mismatch/ess"] > 1 - 1e-6
        assert line["mismatch/correction"] == pytest.approx(1.0, abs=1e-4)
        assert line["mismatch/truncated_tokens"] == 0.0
    assert any(line["policy/ratio"] != 1.0 for line in metrics(whole, "grpo"))


def test_every_scored_token_is_trained_on_twice(whole: Path) -> None:
    rows = rollouts(whole, "grpo")
    for line in metrics(whole, "grpo"):
        kept = sum(len(row["token_ids"]) for row in rows if row["step"] == line["step"] and row["trained"])
        assert line["tokens/scored"] == 2 * kept
