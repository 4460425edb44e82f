"""IFEval's 25 kinds on responses made by hand, the strict and the loose reading, and all 541 real rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rewards import Sample
from rewards.builtins._ifeval import KINDS, parse
from rewards.builtins._ifeval.words import count_sentences
from rewards.builtins.ifeval import ifeval
from tests.unit.rewards.sentences import SENTENCES

GERMAN = "Das ist ein Satz, und er ist nicht auf Englisch geschrieben."
# kind: (kwargs, texts that follow, texts that do not)
CASES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "keywords:existence": ({"keywords": ["Mom", "c++"]}, ["my MOM writes C++"], ["my mom writes c", "c++"]),
    "keywords:frequency": (
        {"keyword": "war", "frequency": 2, "relation": "at least"},
        ["War, war and peace", "warm wars"],
        ["war and peace", "peace"],
    ),
    "keywords:forbidden_words": ({"forbidden_words": ["rock", "no"]}, ["rocks know"], ["It is a Rock.", "oh no!"]),
    "keywords:letter_frequency": (
        {"letter": "T", "let_frequency": 3, "let_relation": "less than"},
        ["to at", "none of it"],
        ["to that", "Tt t"],
    ),
    "language:response_language": ({"language": "de"}, [GERMAN], ["This is a sentence in English.", "12 34"]),
    "length_constraints:number_sentences": (
        {"num_sentences": 3, "relation": "less than"},
        [
            "Dr. No paid $1.50 at 5 a.m. in U.S. money. Then he left.",
            "one\ntwo\nthree",
            "1. First\n2. Second\n3. Third",
        ],
        ["One. Two! Three?", 'He said "no." She said "yes." They left'],
    ),
    "length_constraints:number_paragraphs": (
        {"num_paragraphs": 2},
        ["one\n***\ntwo", "***\none\n***\ntwo\n***"],
        ["one\n\ntwo", "one\n***\n\n***\ntwo", "one *** two *** three"],
    ),
    "length_constraints:number_words": (
        {"num_words": 4, "relation": "at least"},
        ["four words are here", "well-known: it counts"],
        ["only three words", "- - - - one"],
    ),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Summary"},
        ["one\n\nsummary, then", 'one\n\n"Summary" it is', "one\n\nSUMMARY"],
        ["summary\n\none", "one\n\nsummary\n\nthree", "one\nsummary", "one\n\nsummaries"],
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, ["[name] of [place]"], ["[name]", "(a) (b)"]),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, ["Hi.\nP.S. Bye", "p. s. bye"], ["Hi.", "PS bye"]),
    "detectable_format:number_bullet_lists": (
        {"num_bullets": 2},
        ["* one\n* two", "- one\n  - two", "Items:\n* one\n- two"],
        ["* one", "* one\n* two\n* three", "1. one\n2. two", "**one**\n**two**"],
    ),
    "detectable_format:constrained_response": (
        {},
        ["My answer is maybe.", "Well. My answer is no."],
        ["Yes.", "My answer is yes"],
    ),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2},
        ["*one* and *two*", "**one** and *two*", "*one* *two* *three*"],
        ["*one*", "* one\n* two", "** ** and *one*"],
    ),
    "detectable_format:multiple_sections": (
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb"],
        ["SECTION 1\na", "Section 1\na\nSection 2\nb", "SECTION one SECTION two"],
    ),
    "detectable_format:json_format": (
        {},
        ['{"a": [1]}', '```json\n{"a": 1}\n```'],
        ["{'a': 1}", 'Here: {"a": 1}', "[1"],
    ),
    "detectable_format:title": ({}, ["<<Ode>>\ntext"], ["<Ode>", "<<>>", "<<\n>>", "# Ode"]),
    "combination:two_responses": ({}, ["one\n******\ntwo"], ["one", "one ****** one", "a ****** b ****** c"]),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say hi."}, [" say HI. Hi!"], ["Hi! Say hi.", "Say hi"]),
    "startend:end_checker": ({"end_phrase": "Peace!"}, ["love and peace!", '"Peace!"'], ["Peace", "Peace! And love."]),
    "startend:quotation": ({}, [' "all of it"\n'], ['"', 'he said "no"', "'all of it'"]),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["STOP and THINK", "The UN in the US"],
        ["STOP and think", "Stop And Think"],
    ),
    "change_case:english_capital": (
        {},
        ["THIS IS NOT A TEST OF THE CASE.", "HELLO"],
        ["This is not", "DAS IST NICHT VON DER STADT"],
    ),
    "change_case:english_lowercase": (
        {},
        ["this is not a test of the case."],
        ["This is", "das ist nicht von der stadt"],
    ),
    "punctuation:no_comma": ({}, ["one; two"], ["one, two"]),
}


def score(kind: str, kwargs: dict[str, Any] | None, text: str, **args: Any) -> float:
    row = {"instruction_id_list": [kind], "kwargs": [kwargs]}
    value = ifeval([Sample(text, row=row)], **args)[0].values
    assert isinstance(value, float)
    return value


def test_the_cases_are_the_25_kinds() -> None:
    assert set(CASES) == set(KINDS)
    assert len(KINDS) == 25


@pytest.mark.parametrize("kind", KINDS)
def test_what_follows_an_instruction_and_what_does_not(kind: str) -> None:
    kwargs, right, wrong = CASES[kind]
    assert [t for t in right if score(kind, kwargs, t) != 1.0] == []
    assert [t for t in [*wrong, "", " \n"] if score(kind, kwargs, t) != 0.0] == []


def test_less_than_is_strict_and_at_least_is_not() -> None:
    words = {"num_words": 3}
    kind = "length_constraints:number_words"
    assert score(kind, {**words, "relation": "less than"}, "one two three") == 0.0
    assert score(kind, {**words, "relation": "at least"}, "one two three") == 1.0


def test_sentences_are_counted_in_other_scripts_too() -> None:
    assert count_sentences("यह एक वाक्य है। यह दूसरा है।") == 2
    assert count_sentences("今日は雨です。明日は晴れます。") == 2
    assert count_sentences("J. K. Rowling and St. John wrote, e.g. books, etc. They sold... well!") == 3


def test_loose_forgives_a_first_line_a_last_line_and_asterisks() -> None:
    kind = "startend:quotation"
    for text in ('Sure:\n"it"', '"it"\nThat is all.', 'Sure:\n"it"\nBye.', '**"it"**', 'Sure:\n*"it"*'):
        assert score(kind, {}, text) == 0.0
        assert score(kind, {}, text, mode="loose") == 1.0
    assert score(kind, {}, "it", mode="loose") == 0.0
    assert score("punctuation:no_comma", {}, "a, b\n", mode="loose") == 0.0  # a cut that is empty follows nothing


def test_the_share_or_all_and_which_were_not_followed() -> None:
    row = {
        "instruction_id_list": ["punctuation:no_comma", "detectable_format:title", "startend:end_checker"],
        "kwargs": [{}, None, {"end_phrase": "Bye.", "num_words": None}],
    }
    sample = [Sample("no title, Bye.", row=row)]
    assert ifeval(sample)[0].values == pytest.approx(1 / 3)
    assert ifeval(sample)[0].info == {"not_followed": ["punctuation:no_comma", "detectable_format:title"]}
    assert ifeval(sample, score="all")[0].values == 0.0
    assert ifeval([Sample("<<A title>> Bye.", row=row)], score="all")[0].values == 1.0


@pytest.mark.parametrize(
    ("kinds", "kwargs", "message"),
    [
        (["keywords:existance"], [{}], "no instruction 'keywords:existance'; it has: keywords:existence"),
        (["punctuation:no_comma"], [{"keyword": "a"}], "takes no 'keyword'; its kwargs: none"),
        (["keywords:frequency"], [{"keyword": "a", "frequency": 1}], "needs 'relation'"),
        (["length_constraints:number_words"], [{"num_words": 5, "relation": "at most"}], "'less than' or 'at least'"),
        (["length_constraints:number_words"], [{"num_words": "5", "relation": "at least"}], "num_words is '5'; int"),
        (["keywords:existence"], [{"keywords": []}], "keywords is \\[\\]"),
        (["language:response_language"], [{"language": "tlh"}], "language 'tlh' cannot be told; known: ar"),
        (["punctuation:no_comma"], [], "kwargs for each"),
        ([], [], "a list of kinds"),
    ],
)
def test_an_instruction_that_is_not_understood_is_an_error(kinds: Any, kwargs: Any, message: str) -> None:
    row = {"instruction_id_list": kinds, "kwargs": kwargs}
    with pytest.raises(ValueError, match=message):
        ifeval([Sample("text", row=row)])
    with pytest.raises(KeyError, match="instruction_id_list"):
        ifeval([Sample("text", row={"prompt": "?"})])


# ------------------------------------------------------------------------------------------------------- real rows


def rows(folder: Path) -> list[dict[str, Any]]:
    with (folder / "text/ifeval/input_data.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.realdata
def test_every_real_row_is_understood_and_scored(shared_data: Path) -> None:
    found = rows(shared_data)
    assert len(found) == 541
    assert {i.kind for row in found for i in parse(row["instruction_id_list"], row["kwargs"])} == set(KINDS)
    strict = ifeval([Sample(row["prompt"], row=row) for row in found])
    loose = ifeval([Sample(row["prompt"], row=row) for row in found], mode="loose")
    assert all(0 <= s.values <= u.values <= 1 for s, u in zip(strict, loose, strict=True))  # type: ignore[operator]
    assert 0.2 < sum(s.values for s in strict) / 541 < 0.6  # type: ignore[misc]


def repeated(text: str, key: str, relation: str) -> Any:
    """The text as often as `key` says, or once where fewer than that are wanted."""
    return lambda k: text.format(**k) * (k[key] if k[relation] == "at least" else 1)


# kind: kwargs -> a response that follows; "so" is no word, letter or mark that any row asks for.
GOLD: dict[str, Any] = {
    "keywords:existence": lambda k: "; ".join(k["keywords"]),
    "keywords:frequency": lambda k: f"{k['keyword']}. " * (k["frequency"] - (k["relation"] == "less than")) + "so",
    "keywords:forbidden_words": lambda k: "so",
    "keywords:letter_frequency": lambda k: (
        k["letter"] * (k["let_frequency"] - (k["let_relation"] == "less than")) + "z"
    ),
    "language:response_language": lambda k: SENTENCES[k["language"]],
    "length_constraints:number_sentences": repeated("It is so. ", "num_sentences", "relation"),
    "length_constraints:number_paragraphs": lambda k: "\n***\n".join(["so"] * k["num_paragraphs"]),
    "length_constraints:number_words": repeated("so ", "num_words", "relation"),
    "length_constraints:nth_paragraph_first_word": lambda k: "\n\n".join([k["first_word"]] * k["num_paragraphs"]),
    "detectable_content:number_placeholders": lambda k: "[so]" * k["num_placeholders"],
    "detectable_content:postscript": lambda k: f"so\n{k['postscript_marker']} so",
    "detectable_format:number_bullet_lists": lambda k: "* so\n" * k["num_bullets"],
    "detectable_format:constrained_response": lambda k: "My answer is yes.",
    "detectable_format:number_highlighted_sections": lambda k: "*so* " * k["num_highlights"],
    "detectable_format:multiple_sections": lambda k: "\n".join(
        f"{k['section_spliter']} {i}\nso" for i in range(1, k["num_sections"] + 1)
    ),
    "detectable_format:json_format": lambda k: '{"so": 1}',
    "detectable_format:title": lambda k: "<<so>>",
    "combination:two_responses": lambda k: "so\n******\nand so",
    "combination:repeat_prompt": lambda k: f"{k['prompt_to_repeat']}\nso",
    "startend:end_checker": lambda k: f"so. {k['end_phrase']}",
    "startend:quotation": lambda k: '"so"',
    "change_case:capital_word_frequency": repeated("SO ", "capital_frequency", "capital_relation"),
    "change_case:english_capital": lambda k: SENTENCES["en"].upper(),
    "change_case:english_lowercase": lambda k: SENTENCES["en"].lower(),
    "punctuation:no_comma": lambda k: "so",
}


@pytest.mark.realdata
def test_an_answer_written_for_a_real_row_of_one_instruction_scores_best_and_a_spoilt_one_less(
    shared_data: Path,
) -> None:
    made = 0
    for row in rows(shared_data):
        if len(row["kwargs"]) > 1:
            continue
        gold = GOLD[row["instruction_id_list"][0]](row["kwargs"][0])
        made += 1
        best, empty = ifeval([Sample(gold, row=row), Sample(" ", row=row)])
        assert best.values == 1.0, (row["instruction_id_list"], best.info, gold[:300])
        assert empty.values == 0.0
    assert made >= 300
