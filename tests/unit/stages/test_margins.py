"""Margins of pairs from rewards: weighted by name, missing ones left out and counted, scored once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.errors import DataError, RewardError
from align.recipe.schema import Recipe
from align.stages.backend import ScorerJob
from align.stages.margins import PairScores, margins_of
from tests.unit.stages.plain import PlainScorer
from tests.unit.stages.test_pipeline import PlainBackend, start

NAN = float("nan")


def test_margins_by_hand():
    scores = np.array([[[1, 10], [0, 30]], [[2, NAN], [5, 1]], [[1, 1], [NAN, 1]]], np.float32)
    found = PairScores(("good", "cost"), ("reward", "cost"), scores, np.array([False, False, False]))
    got = margins_of(found, {"good": 0.5, "cost": 0.1})
    assert got[0] == pytest.approx(0.5 * (1 - 0) - 0.1 * (10 - 30))
    assert np.isnan(got[1:]).all(), "a missing score is no 0"
    assert margins_of(found, {"good": 1.0, "cost": 0.0})[1] == -3, "weight 0 needs no score"
    dropped = PairScores(found.names, found.kinds, np.nan_to_num(scores), np.array([False, True, False]))
    assert np.isnan(margins_of(dropped, {})).tolist() == [False, True, False]


class Judge(PlainBackend):
    """Rewards give the length of an answer, and None for rows that say so; `asked` are the texts of each call."""

    asked: list[list[tuple[str, ...]]]

    async def scorer(self, job: ScorerJob) -> PlainScorer:
        self.jobs.append(job)
        self.asked = getattr(self, "asked", [])
        outer = self

        class Scorer(PlainScorer):
            async def score(self, groups: Any, budget: Any = None) -> Any:
                outer.asked.append([tuple(c.text for c in group.completions) for group in groups])
                assert budget is not None and budget.samples == 2 * 6
                return await super().score(groups, budget)

        return Scorer(length=lambda g, c: NAN if g.prompt.row.get("silent") else float(len(c.text)))


def recipe(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> Recipe:
    folder.mkdir(exist_ok=True)
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {
        "id": "modpo", "kind": "preference", "data": str(data), "loss": {"name": "modpo", "preference_weight": 0.5},
        "batch": {"pairs": 2}, "steps": 3, "adapter": {"rank": 4}, "rewards": [{"use": "short", "as": "length"}],
        "objectives": {"weights": {"length": 0.25}}, "eval": {"data": str(data)}, **changes,
    }  # fmt: skip
    model = {"config": {"model_type": "qwen3"}, "tokenizer": {"train_on": str(data), "vocab_size": 300}}
    content = {"name": "run", "output": str(folder / "runs"), "model": model, "stages": [stage]}
    return Recipe.model_validate(content)


def rows(silent: int = 0) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Question {n}", "chosen": "y" * (n + 1), "rejected": "no!", "silent": n < silent} for n in range(6)
    ]


def trained(backend: PlainBackend) -> dict[str, float]:
    """Margin of every pair that the trainer saw, by origin."""
    return {tree.origin: tree.columns["margin"] for trees in backend.trainers[0].trees for tree in trees}


def test_pairs_reach_the_trainer_with_weighted_differences_of_their_scores(tmp_path):
    backend = Judge()
    _, lines = start(recipe(tmp_path, rows()), backend)
    wanted = {f"{tmp_path}/pairs.jsonl:{n + 1}": 0.25 * (n + 1 - 3) for n in range(6)}
    assert trained(backend) == wanted
    assert backend.asked == [[("y" * (n + 1), "no!") for n in range(6)]], (
        "evaluation on the same rows asks nobody again"
    )
    report = json.loads((tmp_path / "runs" / "run" / "modpo" / "margins.json").read_text())
    assert report["left_out"] == 0 and report["mean"] == pytest.approx(np.mean(list(wanted.values())))
    assert any("margins of 6 pairs" in line for line in lines.messages)


def test_pairs_without_a_score_are_left_out_and_counted(tmp_path):
    backend = Judge()
    _, lines = start(recipe(tmp_path, rows(silent=2)), backend)
    assert not {f"{tmp_path}/pairs.jsonl:{n}" for n in (1, 2)} & trained(backend).keys()
    assert json.loads((tmp_path / "runs" / "run" / "modpo" / "margins.json").read_text())["missing"] == {"length": 2}
    assert any("2 left out for lack of a score" in line for line in lines.messages)


def test_scores_are_kept_for_runs_of_other_weights(tmp_path):
    start(recipe(tmp_path, rows()), Judge())
    other, again = recipe(tmp_path, rows(), objectives={"weights": {"length": 2.0}}), Judge()
    start(other.model_copy(update={"name": "other"}), again)
    assert not hasattr(again, "asked") and trained(again)[f"{tmp_path}/pairs.jsonl:1"] == 2.0 * (1 - 3)


def test_no_score_at_all_two_margins_and_none_are_refused(tmp_path):
    with pytest.raises(RewardError, match="none of 6 pairs has all its scores"):
        start(recipe(tmp_path / "a", rows(silent=6)), Judge())
    with pytest.raises(DataError, match="a `margin` of its own"):
        start(recipe(tmp_path / "b", [{**row, "margin": 1.0} for row in rows()]), Judge())
    with pytest.raises(DataError, match=r"pairs.jsonl:1[\s\S]*has no `margin`"):
        start(recipe(tmp_path / "c", rows(), rewards=[], objectives={}), Judge())


def test_several_turns_are_no_answer_to_judge(tmp_path):
    turns = [
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    row = {
        "prompt": [{"role": "user", "content": "q"}],
        "chosen": turns,
        "rejected": [{"role": "assistant", "content": "x"}],
    }
    with pytest.raises(DataError, match="chosen has 3 turns, and rewards judge one answer"):
        start(recipe(tmp_path, [row]), Judge())
