"""A combiner of a user's that answers what no advantages are: refused by name, in the check where it can be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.cli.main import main
from align.errors import PluginError
from align.objectives import combine
from align.objectives.check import Known
from align.objectives.combiners import described
from align.objectives.trial import try_combiner
from align.recipe.objectives import Objectives
from tests.unit.check.workshop import open_workshop

FUNCTION = """
import numpy as np

def mine(rewards, groups, weights, sigma, config):
    return ANSWER
"""
POLICY = """
import numpy as np

class Mine:
    def advance(self, state, view):
        return {**state, "steps": state.get("steps", 0) + 1}

    def weights(self, state, view):
        return view.weights / state["steps"]

    def metrics(self, state, view):
        return {"mine/steps": state["steps"]}

mine = Mine()
"""
SCORES = np.array([[1, 0], [0, 1], [1, 1], [0, 0]], np.float32)


def own(folder: Path, text: str) -> Objectives:
    (folder / "mine.py").write_text(text)
    return Objectives.model_validate({"combine": f"{folder}/mine.py:mine"})


def combined(config: Objectives, scores: np.ndarray = SCORES) -> tuple[np.ndarray, Mapping[str, Any]]:
    names, kinds = ("right", "short"), ("reward", "reward")
    advantages, state, _ = combine(scores, np.zeros(len(scores), np.int64), names, kinds, config, {}, 0)
    return advantages, state


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("None", "answered nothing (None) as advantages, where 4 numbers are needed"),
        ("1.0", "answered a float as advantages"),
        ("rewards[:1, 0]", "answered a ndarray of shape [1] as advantages"),
        ("rewards[:, :1]", "answered a ndarray of shape [4, 1]"),
        ("(r.sum() for r in rewards)", "answered a generator"),
        ("rewards[:, 0] * 1j", "answered a ndarray of shape [4]"),
        ("np.where(rewards[:, 0] > 0, np.nan, 0.0)", "gave nan as the advantage of a sample whose rewards are 1, 0"),
        ("np.where(rewards[:, 0] > 0, np.inf, 0.0)", "gave inf as the advantage of a sample"),
        ("rewards[:, 7]", "the combiner failed: IndexError"),
        ("exit(0)", "the combiner failed: SystemExit: 0"),
    ],
)
def test_what_are_no_advantages_is_refused(tmp_path: Path, answer: str, words: str) -> None:
    config = own(tmp_path, FUNCTION.replace("ANSWER", answer))
    with pytest.raises(PluginError) as caught:
        combined(config)
    assert words in caught.value.what and caught.value.where == config.combine and caught.value.remedy
    with pytest.raises(PluginError) as caught:
        try_combiner(config, {"right": Known("reward"), "short": Known("cost", (0.0, 4.0))}, 2, 2)
    if "whose" not in words:
        assert words.partition(" whose")[0] in caught.value.what


def test_scores_are_its_own_to_write_on_and_a_missing_one_may_leave_its_sample_out(tmp_path: Path) -> None:
    text = FUNCTION.replace(
        "    return ANSWER", "    found = rewards @ weights\n    rewards[:] = weights[:] = 0\n    return found"
    )
    scores = SCORES.copy()
    scores[3, 1] = np.nan
    advantages, _ = combined(own(tmp_path, text), scores)
    assert advantages[:3].tolist() == [1.0, 1.0, 2.0] and np.isnan(advantages[3])


def test_a_policy_that_is_sound_is_taken(tmp_path: Path) -> None:
    config = own(tmp_path, POLICY)
    assert combined(config)[1]["steps"] == 1
    try_combiner(config, {"right": Known("reward"), "short": Known("reward")}, 2, 2)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('{**state, "steps"', 'None and {**state, "steps"', "`advance` of the combiner answered nothing"),
        ("+ 1}", '+ 1, "seen": np.ones(2)}', "answered a state that a checkpoint cannot hold"),
        ("view.weights /", "0.5 /", "answered a float as weights, where 2 numbers are needed"),
        ('view.weights / state["steps"]', "view.weights * np.nan", "`weights` of the combiner answered [nan, nan]"),
        ('{"mine/steps": state["steps"]}', "None", "`metrics` of the combiner failed: AttributeError"),
    ],
)
def test_what_is_no_policy_is_refused(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert old in POLICY
    config = own(tmp_path, POLICY.replace(old, new))
    with pytest.raises(PluginError) as caught:
        combined(config)
    assert words in caught.value.what and caught.value.where == config.combine


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (FUNCTION + "mine.reads = 'mu'\n", "`reads` of a combiner is a tuple of names"),
        (FUNCTION + "mine.whiten = 'no'\n", "`whiten` True or False"),
        (POLICY.replace("mine = Mine()", "mine = Mine"), "this is a type"),
    ],
)
def test_what_it_says_of_itself_is_looked_at(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(PluginError) as caught:
        described(own(tmp_path, text).combine)
    assert words in caught.value.what


def test_the_check_tries_it_before_a_stage_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shop = open_workshop(tmp_path)
    shop.write("mine.py", FUNCTION.replace("ANSWER", "rewards[:, :1]"))
    shop.change("{weights: {numeric: 1.0, brevity: 0.5}}", '{combine: "mine.py:mine"}')
    assert main(["check", "recipe.yaml"]) == 2
    said = capsys.readouterr().err
    assert "mine.py:mine: the combiner answered a ndarray of shape [8, 1] as advantages, where 8 numbers" in said
    assert "named at recipe.yaml:39" in said
