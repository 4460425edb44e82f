"""Rewards of ours that compare with an answer, and rows that have none: said before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.check.golds import golds_note, require_columns
from align.errors import PluginError
from align.protocols.fleet import PromptItem
from align.recipe.parts import Reward


def prompts(*rows: dict[str, Any]) -> list[PromptItem]:
    return [PromptItem(i, np.arange(2), i, row=row, origin=f"rows.jsonl:{i + 1}") for i, row in enumerate(rows)]


def note(use: str, *rows: dict[str, Any], folder: Path = Path(), **args: Any) -> str | None:
    return golds_note(Reward.model_validate({"use": use, "args": args}), folder, prompts(*rows))


@pytest.mark.parametrize("use", ["numeric", "math", "exact", "choice", "count", "overlap", "contains"])
def test_a_reward_that_finds_no_answer_in_any_row_is_refused_with_what_rows_have(use: str) -> None:
    with pytest.raises(PluginError, match=rf"{use} finds no answer in any of 2 rows.*it has: prompt") as error:
        note(use, {"prompt": "2+2?"}, {"prompt": "2+3?"})
    assert error.value.where == "rows.jsonl:1" and "column" in str(error.value.remedy)


def test_rows_without_an_answer_among_others_are_counted_with_the_first() -> None:
    said = note("numeric", {"answer": "4"}, {"question": "2+3?"}, {"answer": None})
    assert said is not None and "in 2 of 3 rows" in said and "first rows.jsonl:2" in said


def test_an_answer_under_any_name_or_the_one_that_args_give_is_found() -> None:
    assert note("numeric", {"reference_answer": "4"}, {"answer": 5}, {"solution": "6"}) is None
    assert note("numeric", {"total": 4}, column="total") is None
    with pytest.raises(PluginError, match="needs a column 'sum'"):
        note("numeric", {"total": 4}, column="sum")
    assert note("contains", {"prompt": "?"}, texts=["a"]) is None and note("length", {"prompt": "?"}, max=8) is None


def test_wrong_arguments_are_left_to_the_check_of_rewards() -> None:
    assert note("numeric", {"prompt": "?"}, tolerence=1) is None


def test_a_plugin_of_the_users_is_not_asked_what_its_gold_is(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from rewards import reward\n\n@reward(gold=lambda row: row['answer'])\ndef mine(samples):\n    return []\n"
    )
    assert note("mine.py:mine", {"prompt": "?"}, folder=tmp_path) is None


def test_a_column_that_no_row_has_is_refused_and_one_that_some_have_is_not() -> None:
    described = {"name": "acc", "columns": ["solution"]}
    require_columns(described, prompts({"level": 1}, {"solution": "4"}))
    require_columns(described, [])
    require_columns(None, prompts({"level": 1}))
    with pytest.raises(PluginError, match="acc takes 'solution', and none of 2 rows has a column") as error:
        require_columns(described, prompts({"level": 1}, {"reference_answer": "4"}))
    assert "rows have: level, reference_answer" in str(error.value.remedy)
