"""Which language a text is in: sentences of every language that is known, and English prompts of real data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rewards import Sample
from rewards.api import PluginError
from rewards.builtins._language import LANGUAGES, detect
from rewards.builtins.language import language
from rewards.find import load
from rewards.plugin import PluginSpec
from tests.unit.rewards.sentences import SENTENCES

IFEVAL = [
    "ar",
    "bg",
    "bn",
    "de",
    "fa",
    "fi",
    "gu",
    "hi",
    "it",
    "kn",
    "ko",
    "mr",
    "ne",
    "pa",
    "pt",
    "ru",
    "sw",
    "ta",
    "te",
    "th",
    "ur",
    "vi",
]


def test_every_known_language_is_told_from_all_others() -> None:
    assert set(SENTENCES) == LANGUAGES
    assert set(IFEVAL) <= LANGUAGES
    told = {code: detect(text) for code, text in SENTENCES.items()}
    assert told == {code: code for code in SENTENCES}
    halves = {code: [detect(s) for s in text.replace("।", ".").split(". ")] for code, text in SENTENCES.items()}
    wrong = {code: found for code, found in halves.items() if set(found) - {code, None}}
    assert wrong == {}


def test_what_is_no_evidence_decides_nothing() -> None:
    for text in ("", "1 + 2 = 3", "🙂", "Zyx qwv blorp", "```\nthe of and to in is that\n```", "https://the.of/and/to"):
        assert detect(text) is None
    assert detect("THE CAT IS ON THE MAT") == "en"
    assert detect("The word 'собака' means dog in Russian, and it is one of the first words that you learn.") == "en"
    assert detect("中文里的一个字：あ。这是一个中文句子，没有假名，只有汉字。") == "zh"


def test_a_completion_in_the_wanted_language_scores_1_and_one_without_letters_nothing() -> None:
    samples = [Sample(SENTENCES[code], row={"lang": "pt-BR"}) for code in ("pt", "es", "en")]
    assert language(samples, column="lang") == [1.0, 0.0, 0.0]
    assert language([*samples, Sample("42")], language="en") == [0.0, 0.0, 1.0, None]
    with pytest.raises(KeyError, match="'locale'; it has: lang"):
        language(samples, column="locale")
    with pytest.raises(ValueError, match="'tlh' cannot be told; known: ar, bg"):
        language([Sample("nuqneH", row={"lang": "tlh"})], column="lang")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"language": "da"}, "'da' cannot be told"),
        ({}, "give `language`"),
        ({"language": "de", "column": "x"}, "give `language`"),
    ],
)
def test_the_recipe_names_one_known_language(args: dict[str, str], message: str) -> None:
    with pytest.raises(PluginError, match=message):
        load(PluginSpec("language", args=args), ".")


@pytest.mark.realdata
def test_real_english_is_english(shared_data: Path) -> None:
    lines = (shared_data / "text/gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()
    found = [detect(json.loads(line)["question"]) for line in lines]
    assert len(found) == 1319
    assert found.count("en") >= 1310
    assert set(found) <= {"en", None}
    rows = json.loads((shared_data / "text/sft/llms_from_scratch_instruction.json").read_text(encoding="utf-8"))
    short = [detect(row["instruction"]) for row in rows]  # a dozen words each
    assert short.count("en") > 0.9 * len(short)
    assert len(short) - short.count("en") - short.count(None) < 0.02 * len(short)
