"""Other people's columns: what is read is what their names say; where they say two things it is refused with both."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from align.data.formats import LAYOUTS
from align.data.formats.choosing import choose
from align.data.formats.guess import ANSWERS, LAST_ANSWERS, QUESTIONS, SIDES
from align.data.formats.needed import NEEDED
from align.data.prepare import prepare
from align.data.records import Conversation, Kind, Labelled, Pair, Prompt, Record, Unpaired, messages_of
from align.data.sources import renamed
from align.data.tokenizer import ChatTokenizer
from align.errors import DataError
from tests.unit.data.build import source, text, write_jsonl

ASK, SAY = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
TURNS = [("user", "Q"), ("assistant", "A")]


def read(row: dict[str, Any], kind: Kind) -> Record:
    layout, guess = choose(LAYOUTS, kind, [row], where="rows.jsonl")
    [values] = renamed([row], guess.columns if guess else {}, "rows.jsonl")
    return layout.convert(values)


def said(record: Record) -> list[tuple[str, str]]:
    return [(m.role, str(m.content)) for m in messages_of(record)]


# ------------------------------------------------------------------------------------------- the table of the guide

CONVERSATIONS: dict[str, dict[str, Any]] = {
    "question, answer (GSM8K, SQuAD without context)": {"question": "Q", "answer": "A"},
    "prompt, response": {"prompt": "Q", "response": "A"},
    "problem, solution (MATH)": {"problem": "Q", "solution": "A"},
    "input, target (BIG-bench)": {"input": "Q", "target": "A"},
    "inputs, targets (FLAN)": {"inputs": "Q", "targets": "A"},
    "input, output": {"input": "Q", "output": "A"},
    "instruction, response": {"instruction": "Q", "response": "A"},
    "instruction, completion": {"instruction": "Q", "completion": "A"},
    "Question, Answer": {"Question": "Q", "Answer": "A"},
    "user, assistant": {"user": "Q", "assistant": "A"},
    "human, gpt": {"human": "Q", "gpt": "A"},
    "text, answer": {"text": "Q", "answer": "A"},
    "userPrompt, assistantResponse": {"userPrompt": "Q", "assistantResponse": "A"},
    "dialogue of roles": {"dialogue": [ASK, SAY]},
    "items of from and value (FastChat)": {"items": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    "trajectory": {"trajectory": [ASK, SAY], "reward": 1.0},
    "with an id and a source": {"id": 7, "source": "web", "question": "Q", "answer": "A", "category": "x"},
}


@pytest.mark.parametrize("name", list(CONVERSATIONS))
def test_questions_and_answers_are_turns_of_a_chat(name: str) -> None:
    assert said(read(CONVERSATIONS[name], "conversation")) == TURNS


def test_plain_text_gives_way_to_columns_that_say_who_speaks() -> None:
    alpaca = {"instruction": "I", "input": "", "output": "A", "text": "### Instruction: I ### Response: A"}
    assert said(read(alpaca, "conversation")) == [("user", "I"), ("assistant", "A")]
    assert read({"text": "Once."}, "conversation").completion == "Once."  # type: ignore[union-attr]
    with pytest.raises(DataError, match=r"response: answer.*response: solution"):
        read({"text": "Q", "answer": "A", "solution": "B"}, "conversation")


def test_a_question_beside_known_columns_is_not_left_out() -> None:
    record = read({"question": "Q", "chosen": "A", "rejected": "B"}, "pair")
    assert said(record)[0] == ("user", "Q"), "and not a pair without prompt"


@pytest.mark.parametrize("name", ["dialogue", "dialog", "conversation", "messages", "utterances"])
def test_strings_in_turn_are_a_chat_under_names_that_say_so(name: str) -> None:
    row = {"id": "1", name: ["Q", "A", "and?", "B"]}
    assert said(read(row, "conversation")) == [*TURNS, ("user", "and?"), ("assistant", "B")]
    assert said(read(row, "prompt")) == [*TURNS, ("user", "and?")]


@pytest.mark.parametrize(
    "row", [{"items": ["a", "b"]}, {"turns": ["a", "b"]}, {"data": ["a", "b"]}, {"dialog": ["a"]}, {"dialog": ["a", 2]}]
)
def test_strings_under_other_names_are_no_chat(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="no layout"):
        read(row, "conversation")


def test_what_goes_beside_them_is_read_too() -> None:
    row = {"system_prompt": "S", "question": "Q", "response": "A"}  # OpenOrca
    assert said(read(row, "conversation")) == [("system", "S"), *TURNS]
    dolly = {"instruction": "I", "context": "C", "response": "A", "category": "closed_qa"}
    assert said(read(dolly, "conversation")) == [("user", "I\nC"), ("assistant", "A")]
    assert said(read({**dolly, "context": ""}, "conversation")) == [("user", "I"), ("assistant", "A")]


PAIRS: dict[str, dict[str, Any]] = {
    "question and sides (TRL's names)": {"question": "Q", "chosen": "A", "rejected": "B"},
    "response_j, response_k (StackExchange)": {"question": "Q", "response_j": "A", "response_k": "B"},
    "answer_w, answer_l": {"prompt": "Q", "answer_w": "A", "answer_l": "B"},
    "win, lose": {"instruction": "Q", "win": "A", "lose": "B"},
    "output_1, output_2, preference (AlpacaFarm)": {
        "instruction": "Q", "output_1": "B", "output_2": "A", "preference": 2,
    },
    "response_a, response_b, winner": {"prompt": "Q", "response_a": "A", "response_b": "B", "winner": "model_a"},
    "answer_0, answer_1, choice": {"question": "Q", "answer_0": "B", "answer_1": "A", "choice": 1},
    "responses with scores beside": {"prompt": "Q", "responses": ["C", "A", "B"], "scores": [2, 3.5, 1]},
    "answers with ranks inside (Nectar)": {
        "prompt": "Q", "answers": [{"answer": "B", "rank": 7, "model": "m"}, {"answer": "A", "rank": 1, "model": "n"}],
    },
    "completions with scores inside (UltraFeedback)": {
        "instruction": "Q",
        "completions": [{"response": "A", "overall_score": 9}, {"response": "B", "overall_score": 2}],
    },
    "messages on both sides": {
        "chosen_messages": [ASK, SAY], "rejected_messages": [ASK, {"role": "assistant", "content": "B"}],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", list(PAIRS))
def test_the_better_side_is_the_chosen_one(name: str) -> None:
    record = read(PAIRS[name], "pair")
    assert isinstance(record, Pair)
    assert [(m.role, m.content) for m in record.prompt] == TURNS[:1]  # type: ignore[union-attr]
    assert [[m.content for m in side] for side in (record.chosen, record.rejected)] == [["A"], ["B"]]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "Q", "output_1": "A", "output_2": "B", "preference": 0}, "one of the two answers (1, a, 2, b)"),
        ({"prompt": "Q", "output_1": "A", "output_2": "B", "preference": "tie"}, "got 'tie'"),
        ({"prompt": "Q", "output_1": "A", "output_2": "B", "preference": True}, "got True"),
        ({"prompt": "Q", "output_1": "A", "output_2": "B", "preference": 1.5}, "got 1.5"),
        ({"prompt": "Q", "responses": ["A", "B"], "scores": [1, 1]}, "ranked alike"),
        ({"prompt": "Q", "responses": ["A", "B"], "scores": [1]}, "as long as `responses` (2)"),
        ({"prompt": "Q", "responses": [{"text": "A", "score": 1, "rank": 2}, {"text": "B"}]}, "rank and score"),
        ({"prompt": "Q", "responses": [{"text": "A", "score": "high"}, {"text": "B", "score": 2}]}, "must be a number"),
    ],
)  # fmt: skip
def test_a_verdict_that_prefers_none_is_refused(
    row: dict[str, Any], words: str, tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [row])
    with pytest.raises(DataError) as caught:
        prepare((source(path),), "pair", tokenizer, seed=0)
    assert words in caught.value.what and caught.value.where == f"{path}:1"


@pytest.mark.parametrize(
    ("word", "good"),
    [("good", True), ("Thumbs down", False), ("dislike", False), ("YES", True), ("undesirable", False)],
)
def test_a_label_may_be_a_word_that_can_mean_nothing_else(word: str, good: bool) -> None:
    record = read({"prompt": "Q", "completion": "A", "label": word}, "unpaired")
    assert isinstance(record, Unpaired) and record.desirable is good


def test_labels_of_single_answers_prompts_and_texts() -> None:
    record = read({"question": "Q", "answer": "A", "is_desirable": False}, "unpaired")
    assert isinstance(record, Unpaired) and said(record) == TURNS and record.desirable is False
    prompt = read({"problem": "Q", "answer": "42", "solution": "..."}, "prompt")
    assert isinstance(prompt, Prompt) and said(prompt) == TURNS[:1] and prompt.reference_answer is None
    verl = {"data_source": "x", "prompt": [ASK], "reward_model": {"ground_truth": "4"}, "extra_info": {}}
    assert said(read(verl, "prompt")) == TURNS[:1]
    review = read({"review": "Fine.", "sentiment": "good"}, "labelled")
    assert isinstance(review, Labelled) and (review.prompt, review.label) == ("Fine.", "good")
    assert read({"premise": "P", "hypothesis": "H", "label": 1}, "labelled").prompt == "P\nH"


@pytest.mark.parametrize("indent", [None, 1])
def test_rows_inside_one_object_are_rows_and_a_row_alone_stays_one(
    indent: int | None, tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    bbh = {"canary": "do not train", "examples": [{"input": "Q", "target": "A"}, {"input": "Q", "target": [5]}]}
    path = tmp_path / "task.json"
    path.write_text(json.dumps(bbh, indent=indent))
    with pytest.raises(DataError) as caught:
        prepare((source(path),), "conversation", tokenizer, seed=0)
    assert caught.value.where == f"{path} examples[1]" and "must be text, got [5]" in caught.value.what
    kept = prepare((source(path, on_bad_row="skip"),), "conversation", tokenizer, seed=0)
    assert kept.report.kept == 1 and kept.items[0].origin == f"{path} examples[0]"
    for alone in ({"messages": [ASK, SAY]}, {"question": "Q", "answer": "A", "data": [{"x": 1}], "test": [{"y": 2}]}):
        path.write_text(json.dumps(alone, indent=indent))
        assert prepare((source(path),), "conversation", tokenizer, seed=0).report.kept == 1


# ------------------------------------------------------------------------------------------------- two meanings


@pytest.mark.parametrize(
    ("row", "kind", "both"),
    [
        ({"question": "Q", "answer": "A", "solution": "B"}, "conversation", ("response: answer", "response: solution")),
        ({"question": "Q", "problem": "P", "answer": "A"}, "conversation", ("query: question", "query: problem")),
        ({"Answer": "A", "answer": "B", "question": "Q"}, "conversation", ("response: Answer", "response: answer")),
        ({"question": "Q", "problem": "P"}, "prompt", ("query: question", "query: problem")),
        (
            {"q": 1, "question": "Q", "win": "A", "lose": "B", "good": "C", "bad": "D"},
            "pair",
            ("response: win", "response: good"),
        ),
        ({"question": "Q", "answer": "A", "label": True, "liked": False}, "unpaired", ("label: label", "label: liked")),
    ],
)  # fmt: skip
def test_two_meanings_are_refused_with_both(row: dict[str, Any], kind: Kind, both: tuple[str, str]) -> None:
    with pytest.raises(DataError) as caught:
        read(row, kind)
    assert all(one in caught.value.what for one in both) and caught.value.remedy


@pytest.mark.parametrize("name", ["context", "choices", "passage", "options"])
def test_what_an_answer_depends_on_is_never_left_out_unsaid(name: str) -> None:
    for kind in ("conversation", "prompt"):
        with pytest.raises(DataError, match=f"would leave out `{name}`"):
            read({name: "C", "question": "Q", "answer": "A"}, kind)  # type: ignore[arg-type]


def test_what_is_mapped_by_hand_is_left_as_it_is(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [{"question": "Q", "answer": "A", "solution": "B", "context": "C"}])
    prepared = prepare(
        (source(path, columns={"query": "question", "response": "solution"}),), "conversation", tokenizer, seed=0
    )
    assert text(tokenizer, prepared.items[0].trunk).endswith("assistant\nB<|im_end|>\n")
    [one] = prepared.report.sources
    assert one.layout == "swift query" and set(one.unread) == {"column 'answer'", "column 'context'"}


def test_half_a_mapping_is_completed(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [{"frage": "Q", "answer": "A"}])
    prepared = prepare((source(path, columns={"prompt": "frage"}),), "conversation", tokenizer, seed=0)
    [one] = prepared.report.sources
    assert one.layout == "swift query; guessed: query = prompt, response = answer" and not one.unread
    assert (
        text(tokenizer, prepared.items[0].trunk)
        == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    )


def test_a_dotted_name_reaches_into_an_object_and_a_new_name_is_for_rewards(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    verl = {"prompt": [ASK], "reward_model": {"style": "rule", "ground_truth": "4"}, "a.b": "dotted"}
    path = write_jsonl(tmp_path / "data.jsonl", [verl, {**verl, "reward_model": {"style": "rule"}}])
    columns = {"answer": "reward_model.ground_truth", "note": "a.b"}
    first, second = prepare((source(path, columns=columns),), "prompt", tokenizer, seed=0).items
    assert (first.row["answer"], first.row["note"]) == ("4", "dotted") and second.row["answer"] is None
    assert first.row["reward_model"] == verl["reward_model"] and "prompt" in first.row
    nested = write_jsonl(tmp_path / "nested.jsonl", [{"data": {"q": "Q", "a": "A"}, "id": 1}])
    options = {"query": "data.q", "response": "data.a"}
    prepared = prepare((source(nested, columns=options),), "conversation", tokenizer, seed=0)
    assert "user\nQ<|im_end|>" in text(tokenizer, prepared.items[0].trunk)
    assert set(prepared.report.sources[0].unread) == {"column 'id'"}
    for wrong, kind in (
        ({"answer": "reward_model.truth"}, "prompt"),
        ({"answer": "reward_model.style"}, "conversation"),
    ):
        with pytest.raises(DataError, match=r"there is no column 'reward_model.truth'|unknown field 'answer'"):
            prepare((source(path, columns=wrong),), kind, tokenizer, seed=0)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="did you mean 'prompt'"):
        prepare((source(path, columns={"promt": "a.b"}),), "prompt", tokenizer, seed=0)


def test_a_guess_is_told(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [{"problem": "Q", "answer": "A", "level": 3}])
    report = prepare((source(path),), "conversation", tokenizer, seed=0).report
    assert report.sources[0].layout == "swift query; guessed: query = problem, response = answer"
    assert "guessed: query = problem, response = answer" in "\n".join(report.summary)
    assert "column that nothing reads: 'level'" in "\n".join(report.summary)


def test_columns_mixed_at_random_are_read_as_they_say_or_refused() -> None:
    """Every column holds its own name: what is read must be the one question, the one answer, the one pair."""
    rng = random.Random(0)
    others = ["id", "source", "category", "difficulty", "url", "score", "lang", "meta", "idx", "subject"]
    sides = [name for pair in SIDES for name in pair]
    read_rightly = 0
    for _ in range(2000):
        names = [
            *rng.sample(QUESTIONS, rng.choice((1, 1, 1, 2))),
            *rng.sample(ANSWERS, rng.choice((0, 1, 1, 2))),
            *rng.sample(LAST_ANSWERS, rng.choice((0, 0, 1))),
            *(rng.choice(SIDES) if rng.random() < 0.5 else rng.sample(sides, rng.choice((0, 1)))),
            *rng.sample(others, rng.randrange(4)),
            *rng.sample(sorted(NEEDED - set(QUESTIONS)), rng.choice((0, 0, 0, 1))),
        ]
        rng.shuffle(names)
        row = {name: f"<{name}>" for name in names}
        for kind in ("conversation", "pair"):
            try:
                layout, guess = choose(LAYOUTS, kind, [row], where="rows.jsonl")  # type: ignore[arg-type]
            except DataError:
                continue
            if guess is not None:
                [values] = renamed([row], guess.columns, "rows.jsonl")
                assert _means(layout.convert(values), row), (kind, row, guess)
                read_rightly += 1
    assert read_rightly > 600


def _means(record: Record, row: dict[str, Any]) -> bool:
    """Whether a record says what a person would read in these column names."""
    asked, *answers = [content for _, content in said(record)]
    if {*asked.split("\n")} != {f"<{name}>" for name in row if name in {*QUESTIONS, "context"}}:
        return False
    if isinstance(record, Conversation):
        best = [name for name in row if name in ANSWERS] or [name for name in row if name in LAST_ANSWERS]
        return answers == [f"<{name}>" for name in best]
    return tuple(answer.strip("<>") for answer in answers) in SIDES
