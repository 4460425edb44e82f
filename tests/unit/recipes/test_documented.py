"""The data of real.yaml: disjoint splits, the same rows every time, demonstrations that obey as often as they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rewards import Sample
from rewards.builtins.ifeval import ifeval

EVERY_ROW = 4000


@pytest.fixture(scope="module")
def documented(generator: Callable[[str], ModuleType]) -> ModuleType:
    return generator("documented")


def names_in(rows: list[dict[str, Any]], documented: ModuleType) -> set[str]:
    texts = [(row.get("prompt") or row["messages"])[0]["content"] for row in rows]
    return {
        word.rstrip(".?") for text in texts for word in text.split() if word.rstrip(".?") in documented.documented()
    }


def test_there_is_enough_to_ask_and_no_text_twice(documented: ModuleType) -> None:
    found = documented.documented()
    assert len(found) > 900, "this Python documents far less than those that the recipe was made on"
    assert len(set(found.values())) == len(found)
    assert all(text.endswith(".") and "\n" not in text for text in found.values())


def test_no_training_row_asks_about_what_is_held_out(documented: ModuleType) -> None:
    training = [*documented.sft(rows=EVERY_ROW), *documented.pairs(rows=EVERY_ROW), *documented.prompts(rows=EVERY_ROW)]
    held = [*documented.pairs(rows=EVERY_ROW, held_out=True), *documented.prompts(rows=EVERY_ROW, held_out=True)]
    assert names_in(training, documented).isdisjoint(names_in(held, documented))
    assert len(names_in(held, documented)) >= 100, "the exam asks about each once"


def test_the_same_options_give_the_same_rows_and_another_seed_others(documented: ModuleType) -> None:
    once, again = list(documented.sft(rows=50)), list(documented.sft(rows=50))
    assert once == again
    assert once != list(documented.sft(rows=50, seed=1))


def followed(rows: list[dict[str, Any]], replies: list[str]) -> list[float]:
    samples = [Sample(reply, row=row) for row, reply in zip(rows, replies, strict=True)]
    return [float(score.values) for score in ifeval(samples)]


def test_instructions_that_are_asked_for_together_can_be_obeyed_together(documented: ModuleType) -> None:
    rows, replies = [], []
    for subject, rng in documented._drawn("test", EVERY_ROW, 0, general=0.25):
        asked = documented._asked(subject.name, rng, rng.choice((2, 3)))
        rows.append(documented._verifiable(asked))
        replies.append(documented._followed(asked, subject.text))
    kinds = {kind for row in rows for kind in row["instruction_id_list"]}
    assert len(kinds) == 6
    scores = followed(rows, replies)
    assert sum(scores) / len(scores) > 0.995, "a few short texts are taken for another language than English"


def test_a_preference_obeys_and_its_other_side_does_not(documented: ModuleType) -> None:
    good, bad = 0, 0
    wording = {one.words: one for one in documented._instructions(documented.random.Random(0), "x")}
    rows = [
        row for row in documented.pairs(rows=2000) if any(words in row["prompt"][0]["content"] for words in wording)
    ]
    for row in rows:
        [asked] = [one for words, one in wording.items() if words in row["prompt"][0]["content"]]
        verifiable = documented._verifiable([asked])
        chosen, rejected = (followed([verifiable], [row[side][0]["content"]])[0] for side in ("chosen", "rejected"))
        good, bad = good + (chosen == 1), bad + (rejected == 1)
    assert good > 0.995 * len(rows) and bad < 0.005 * len(rows)


def test_careless_demonstrations_are_the_bare_sentence(documented: ModuleType) -> None:
    sentences = set(documented.documented().values())

    def bare(careless: float) -> float:
        replies = [row["messages"][-1]["content"] for row in documented.sft(rows=1000, careless=careless)]
        return sum(reply in sentences for reply in replies) / len(replies)

    assert bare(1.0) == 1.0 and bare(0.5) == pytest.approx(0.5, abs=0.05) and bare(0.0) == 0.0


def test_a_share_of_what_trains_asks_about_other_things_than_the_exam_does(documented: ModuleType) -> None:
    asked = {row["prompt"][0]["content"] for row in documented.questions()}
    known = {wording for subject in documented._general() for wording in subject.wordings}
    assert len(known) >= 100 and known.isdisjoint(asked)
    for rows in (
        [row["messages"][:1] for row in documented.sft(rows=400, general=0.25)],
        [row["prompt"] for row in documented.pairs(rows=400, general=0.25)],
        [row["prompt"] for row in documented.prompts(rows=400, general=0.25)],
    ):
        texts = [turns[0]["content"] for turns in rows]
        assert sum(any(text.startswith(wording) for wording in known) for text in texts) == 100
    for seed in range(10):
        assert all(row["chosen"] != row["rejected"] for row in documented.pairs(rows=400, seed=seed, general=0.5))


def test_ifevals_own_prompts_take_the_place_of_ours(documented: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "input_data.jsonl"
    rows = [
        {"key": n, "prompt": f"Write {n}.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
        for n in range(10)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    taken = list(documented.elsewhere(rows=5, file=str(file)))
    assert [row["prompt"][0]["content"] for row in taken] == [f"Write {n}." for n in (0, 2, 4, 6, 8)]
    assert taken[0]["instruction_id_list"] == ["punctuation:no_comma"]
    assert len(list(documented.elsewhere(rows=7))) == 7


def test_the_exam_judges_each_part_by_its_own(documented: ModuleType, generator: Callable[[str], ModuleType]) -> None:
    exam = generator("real_exam").exam
    docs = next(iter(documented.prompts(rows=1, held_out=True)))
    question = next(iter(documented.questions()))
    about, general = exam([Sample(docs["answer"], row=docs), Sample("It is PARIS, I think.", row=question)])
    assert about.values["overlap"] == 1.0 and about.values["knows"] is None and 0 <= about.values["follows"] <= 1
    words = len(docs["answer"].split())
    assert about.values["length"] == pytest.approx(min(words, 14) / max(words, 14))
    assert general.values == dict.fromkeys(("follows", "overlap", "length", "elsewhere")) | {"knows": 1.0}
    [wrong] = exam([Sample("Lyon.", row=question)])
    assert wrong.values["knows"] == 0.0
