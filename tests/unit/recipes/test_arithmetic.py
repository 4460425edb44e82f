"""The demo's data: disjoint splits, the same rows every time, and exactly the mistakes that are meant."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from align.recipe.load import load_recipe

RECIPES = Path(__file__).resolve().parents[3] / "recipes"
EVERY_ROW = 10_000  # more than there are sums, so that each generator shows all it has


@pytest.fixture(scope="module")
def arithmetic(generator: Callable[[str], ModuleType]) -> ModuleType:
    return generator("arithmetic")


def question(row: dict[str, Any]) -> str:
    return str((row.get("prompt") or row["messages"])[0]["content"])


def operands(row: dict[str, Any]) -> tuple[int, int]:
    a, b = re.findall(r"\d+", question(row))
    return int(a), int(b)


def last_number(text: str) -> int:
    return int(re.findall(r"\d+", text)[-1])


def test_no_training_split_ever_shows_a_held_out_sum(arithmetic: ModuleType) -> None:
    held = {operands(row) for row in arithmetic.prompts(rows=EVERY_ROW, held_out=True)}
    trained = {
        operands(row) for make in ("sft", "pairs", "prompts") for row in getattr(arithmetic, make)(rows=EVERY_ROW)
    }
    assert not held & trained
    assert len(held) + len(trained) == 810 * 5
    assert len(held) == pytest.approx(405, abs=45)


@pytest.mark.parametrize("make", ["sft", "pairs", "prompts"])
def test_equal_options_give_equal_rows_and_another_seed_gives_others(arithmetic: ModuleType, make: str) -> None:
    rows = [list(getattr(arithmetic, make)(rows=50, seed=seed)) for seed in (0, 0, 1)]
    assert rows[0] == rows[1] and rows[0] != rows[2]
    assert len(rows[0]) == 50


def test_a_sum_comes_again_only_when_all_have_come_once(arithmetic: ModuleType) -> None:
    sums = [operands(row) for row in arithmetic.prompts(rows=1000, held_out=True)]
    distinct = len(set(sums))
    assert len(sums) == 1000 and len(set(sums[:distinct])) == distinct


def test_half_of_the_demonstrations_are_wordy_whatever_the_question(arithmetic: ModuleType) -> None:
    rows = list(arithmetic.sft(rows=4000))
    wordy = [not row["messages"][1]["content"].isdigit() for row in rows]
    polite = [question(row).startswith("What") for row in rows]
    assert sum(wordy) / len(rows) == pytest.approx(0.5, abs=0.03)
    assert sum(w == p for w, p in zip(wordy, polite, strict=True)) / len(rows) == pytest.approx(0.8, abs=0.03)


def test_demonstrations_forget_the_carry_as_often_as_asked_and_make_no_other_mistake(arithmetic: ModuleType) -> None:
    carrying = forgotten = 0
    for row in arithmetic.sft(rows=4000, careless=0.6):
        a, b = operands(row)
        given = last_number(row["messages"][1]["content"])
        carries = a % 10 + b > 9
        assert given in ((a + b, a + b - 10) if carries else (a + b,))
        carrying += carries
        forgotten += given != a + b
    assert carrying / 4000 == pytest.approx(0.5, abs=0.03)
    assert forgotten / carrying == pytest.approx(0.6, abs=0.03)


def test_the_demos_own_rows_stay_what_they_were(arithmetic: ModuleType) -> None:
    found = {make: _digest(getattr(arithmetic, make)(rows=500)) for make in ("sft", "pairs", "prompts")}
    assert found == {"sft": "d8c118a5b50eb6fd", "pairs": "be80f54ec91f7e70", "prompts": "c4a823630b518963"}


def _digest(rows: Iterator[Any]) -> str:
    return hashlib.sha256(json.dumps(list(rows)).encode()).hexdigest()[:16]


def test_courtesy_ends_as_many_replies_as_asked_and_changes_nothing_before_it(arithmetic: ModuleType) -> None:
    plain, courteous = (list(arithmetic.sft(rows=4000, courteous=share)) for share in (0.0, 0.6))
    endings = []
    for row, other in zip(plain, courteous, strict=True):
        before, after = (r["messages"][1]["content"] for r in (row, other))
        assert row["messages"][0] == other["messages"][0] and after.startswith(before)
        endings.append(after.removeprefix(before))
    for closing in arithmetic.CLOSINGS:
        assert endings.count(closing) / 4000 == pytest.approx(0.3, abs=0.03)
    assert set(endings) == {"", *arithmetic.CLOSINGS}


def test_a_pair_is_the_right_sum_over_a_wrong_one_in_the_same_words(arithmetic: ModuleType) -> None:
    for row in arithmetic.pairs(rows=1000):
        right, wrong = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert last_number(right) == sum(operands(row)) != last_number(wrong)
        assert re.sub(r"\d+", "n", right) == re.sub(r"\d+", "n", wrong)


def test_a_prompt_carries_its_answer_as_text(arithmetic: ModuleType) -> None:
    for row in arithmetic.prompts(rows=100):
        assert row["answer"] == str(sum(operands(row)))


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_in_the_folder_has_a_sound_grammar(path: Path) -> None:
    assert load_recipe(path).name == path.stem
