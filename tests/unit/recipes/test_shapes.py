"""The vision demo's data: disjoint splits, the same rows every time, and pictures that show what is said of them."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

RECIPES = Path(__file__).resolve().parents[3] / "recipes"


@pytest.fixture(scope="module")
def shapes(generator: Callable[[str], ModuleType]) -> ModuleType:
    return generator("shapes")


def pixels(row: dict[str, Any]) -> np.ndarray:
    [uri] = row["images"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_no_training_split_ever_shows_a_held_out_picture(shapes: ModuleType) -> None:
    held = {row["images"][0] for row in shapes.prompts(rows=1000, held_out=True)}
    trained = {row["images"][0] for make in ("sft", "pairs", "prompts") for row in getattr(shapes, make)(rows=1000)}
    assert len(held) > 500 and not held & trained


@pytest.mark.parametrize("make", ["sft", "pairs", "prompts"])
def test_equal_options_give_equal_rows_and_another_seed_gives_others(shapes: ModuleType, make: str) -> None:
    rows = [list(getattr(shapes, make)(rows=20, seed=seed)) for seed in (0, 0, 1)]
    assert rows[0] == rows[1] and rows[0] != rows[2]


def test_the_pictures_show_the_colour_and_the_shape_that_the_answers_name(shapes: ModuleType) -> None:
    filled: dict[str, list[float]] = {name: [] for name in shapes.SHAPES}
    for row in shapes.prompts(rows=300):
        image = pixels(row)
        assert image.shape == (56, 56, 3)
        found = {name: (image == np.array(rgb)).all(-1) for name, rgb in shapes.COLOURS.items()}
        present = [name for name, mask in found.items() if mask.any()]
        assert len(present) == 1
        if row["answer"] in shapes.COLOURS:
            assert present == [row["answer"]]
        else:
            ys, xs = np.nonzero(found[present[0]])
            box = (np.ptp(ys) + 1) * (np.ptp(xs) + 1)
            filled[row["answer"]].append(len(ys) / box)
    middles = {name: float(np.median(shares)) for name, shares in filled.items()}
    assert middles["square"] == 1.0 and 0.72 < middles["circle"] < 0.85 and 0.45 < middles["triangle"] < 0.6


def test_the_demonstrator_makes_exactly_the_mistakes_that_are_meant(shapes: ModuleType) -> None:
    words = " ".join(str(row["messages"][1]["content"]) for row in shapes.sft(rows=400, careless=1.0))
    assert not any(f" {wrong}" in f" {words}" for wrong in shapes.MISTAKEN), (
        "at the utmost carelessness the right word is never said"
    )
    careful = " ".join(str(row["messages"][1]["content"]) for row in shapes.sft(rows=400, careless=0.0))
    assert all(word in careful for word in (*shapes.COLOURS, *shapes.SHAPES))


def test_a_pairs_sides_differ_in_the_answer_alone(shapes: ModuleType) -> None:
    for row in shapes.pairs(rows=200):
        chosen, rejected = (row[side][0]["content"] for side in ("chosen", "rejected"))
        differing = [(a, b) for a, b in zip(chosen.split(), rejected.split(), strict=True) if a != b]
        assert len(differing) == 1
