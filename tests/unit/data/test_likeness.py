"""Doubles and near-doubles: what is found is true, and what is there is found."""

from __future__ import annotations

import random

import pytest

from align.data.likeness import THRESHOLD, nearly_same, plain, same

WORDS = [f"w{n}" for n in range(500)]


def runs(text: str) -> set[tuple[str, ...]]:
    words = plain(text).split()
    return {tuple(words[at : at + 3]) for at in range(max(1, len(words) - 2))}


def jaccard(one: set[tuple[str, ...]], other: set[tuple[str, ...]]) -> float:
    """By the definition."""
    return len(one & other) / len(one | other)


def test_case_spaces_and_punctuation_make_no_difference() -> None:
    texts = ["What is 2 + 2?", "what  IS 2+2", "What is 2 + 3?", "", "  ", "Straße!", "STRASSE"]
    assert same(texts) == [[0, 1], [5, 6]]
    assert nearly_same(["...", "!!", ""]) == []


@pytest.mark.parametrize("length", [30, 200])
def test_near_doubles_are_those_of_the_definition(length: int) -> None:
    rng = random.Random(length)
    texts = []
    for _ in range(100):
        words = rng.choices(WORDS, k=length)
        texts.append(" ".join(words))
        for _ in range(rng.choice((0, 1, 1, 2, 6))):
            words[rng.randrange(length)] = rng.choice(WORDS)
        texts.append(" ".join(words))
    sets = [runs(text) for text in texts]
    near = [(at, e) for at in range(len(texts)) for e in range(at) if THRESHOLD <= jaccard(sets[at], sets[e]) < 1]
    wanted = {at for at, _ in near}
    found = nearly_same(texts)
    assert len(wanted) > 20
    assert {at for at, _, _ in found} <= wanted and len(found) >= 0.97 * len(wanted)
    for at, other, likeness in found:
        assert other < at and likeness == pytest.approx(jaccard(sets[at], sets[other]))


def test_an_exam_is_compared_with_the_data_and_not_with_itself() -> None:
    data = [" ".join(WORDS[:40]), " ".join(WORDS[100:140])]
    exam = [" ".join([*WORDS[:39], "other"]), " ".join(WORDS[200:240]), " ".join([*WORDS[200:239], "x"])]
    [(at, place, likeness)] = nearly_same(exam, data)
    assert (at, place) == (0, 0) and likeness == pytest.approx(37 / 39)


def test_thousands_of_one_kind_take_no_longer_than_their_number() -> None:
    texts = [f"{' '.join(WORDS[:60])} number {n}" for n in range(3000)]
    found = nearly_same(texts)
    assert [at for at, _, _ in found] == list(range(1, 3000))
