"""The classify recipe's data: labels that follow from the text, disjoint splits, and words that alone do not tell."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from align.recipe.load import load_recipe

RECIPES = Path(__file__).resolve().parents[3] / "recipes"


@pytest.fixture(scope="module")
def reviews(generator: Callable[[str], ModuleType]) -> ModuleType:
    return generator("reviews")


def statements(text: str) -> tuple[str, str]:
    first, second = re.fullmatch(r"The (.+?)(?:, and|; also,|, but|, although) the (.+)\.", text).groups()  # type: ignore[union-attr]
    return first, second


def test_a_label_says_how_many_of_the_two_statements_are_good(reviews: ModuleType) -> None:
    for row in reviews.reviews(rows=500):
        good = sum(("not " in said) != (said.split()[-1] in reviews.GOOD) for said in statements(row["text"]))
        assert row["label"] == reviews.LABELS[good]


def test_held_out_pairs_of_statements_are_in_no_training_data(reviews: ModuleType) -> None:
    train, held = ({statements(row["text"]) for row in reviews.reviews(rows=3000, held_out=h)} for h in (False, True))
    assert not train & held and len(held) > 2000


def test_the_same_options_give_the_same_rows_and_every_label_is_frequent(reviews: ModuleType) -> None:
    rows = list(reviews.reviews(rows=1000, seed=3))
    assert rows == list(reviews.reviews(rows=1000, seed=3)) != list(reviews.reviews(rows=1000, seed=4))
    assert min(Counter(row["label"] for row in rows).values()) > 150


def test_the_recipe_names_its_labels(reviews: ModuleType) -> None:
    recipe = load_recipe(RECIPES / "classify.yaml")
    assert sorted(recipe.stage("reviews").labels) == sorted(reviews.LABELS)
