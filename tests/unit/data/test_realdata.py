"""Real files, as people have them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from align.data.prepare import prepare
from align.data.tokenizer import ChatTokenizer, load_tokenizer
from align.errors import DataError
from tests.unit.data.build import scored, source, text

pytestmark = pytest.mark.realdata

PAIRED, UNPAIRED = "text/preference_paired", "text/preference_unpaired"


def test_gsm8k_is_read_as_text_and_as_chat_by_mapping_its_columns(shared_data: Path, tokenizer: ChatTokenizer) -> None:
    path = shared_data / "text/gsm8k/train.jsonl"
    first = json.loads(path.read_text().splitlines()[0])
    plain = source(path, columns={"prompt": "question", "completion": "answer"})
    chat = source(path, columns={"query": "question", "response": "answer"}, limit=100)
    begun = time.perf_counter()
    made = prepare((plain,), "conversation", tokenizer, seed=0)
    seconds = time.perf_counter() - begun
    assert len(made.items) == 7473 and not made.report.refused and seconds < 30
    tree = made.items[0]
    assert text(tokenizer, tree.trunk) == first["question"] + first["answer"] + "<|im_end|>"
    assert scored(tokenizer, tree.trunk) == first["answer"] + "<|im_end|>"
    tree = prepare((chat,), "conversation", tokenizer, seed=0).items[0]
    user = f"<|im_start|>user\n{first['question']}<|im_end|>\n<|im_start|>assistant\n"
    assert text(tokenizer, tree.trunk) == user + first["answer"] + "<|im_end|>\n"
    assert scored(tokenizer, tree.trunk) == first["answer"] + "<|im_end|>"


def test_gsm8k_questions_are_prompts_with_their_answers(shared_data: Path, tokenizer: ChatTokenizer) -> None:
    path = shared_data / "text/gsm8k/train.jsonl"
    columns = {"query": "question", "response": "answer"}
    made = prepare((source(path, columns=columns),), "prompt", tokenizer, seed=0)
    assert len(made.items) == 7473 and made.report.sources[0].reference_answers == 7473
    item = made.items[-1]
    assert item.row["reference_answer"] == item.row["answer"] and item.origin == f"{path}:7473"
    assert [m["role"] for m in item.messages] == ["user"]
    ends = tokenizer.decode(item.token_ids, False)
    assert ends == f"<|im_start|>user\n{item.row['question']}<|im_end|>\n<|im_start|>assistant\n"


def test_all_multi_turn_pairs_of_llama_factorys_demo_are_kept(shared_data: Path, tokenizer: ChatTokenizer) -> None:
    path = shared_data / PAIRED / "lf_dpo_en_demo.json"
    rows = json.loads(path.read_text())
    made = prepare((source(path),), "pair", tokenizer, seed=0)
    assert len(made.items) == 300 and not made.report.refused
    for tree, row in zip(made.items, rows, strict=True):
        chosen, rejected = (scored(tokenizer, b) for b in tree.branches)
        assert (chosen, rejected) == tuple(row[side]["value"] + "<|im_end|>" for side in ("chosen", "rejected"))
        assert not tree.trunk.loss_mask.any()
        prompt = text(tokenizer, tree.trunk)
        assert prompt.count("<|im_start|>") == len(row["conversations"]) + 1
        assert prompt.endswith(row["conversations"][-1]["value"] + "<|im_end|>\n<|im_start|>assistant\n")
    line = int(made.items[1].origin.rpartition(":")[2])
    assert path.read_text().splitlines()[line - 1].strip() == "{"


def test_the_six_pairs_without_a_difference_are_named(shared_data: Path, tokenizer: ChatTokenizer) -> None:
    path = shared_data / PAIRED / "llms_from_scratch_preference.json"
    same = [i for i, row in enumerate(json.loads(path.read_text())) if row["chosen"] == row["rejected"]]
    with pytest.raises(DataError, match="6 of 1100 rows cannot be used"):
        prepare((source(path),), "pair", tokenizer, seed=0)
    made = prepare((source(path, on_bad_row="skip"),), "pair", tokenizer, seed=0)
    assert (made.report.read, made.report.kept) == (1100, 1094)
    assert [r.row for r in made.report.refused] == same == [122, 226, 400, 566, 628, 676]
    assert {r.reason for r in made.report.refused} == {"chosen and rejected are the same"}
    lines = path.read_text().splitlines()
    for refusal in made.report.refused:
        at = int(refusal.origin.rpartition(":")[2])
        chosen, rejected = (json.loads("{" + lines[at + i].strip().rstrip(",") + "}") for i in (3, 4))
        assert next(iter(chosen.values())) == next(iter(rejected.values()))
        assert any(refusal.origin in line for line in made.report.summary)


def test_labelled_conversations_and_judged_answers_are_read(shared_data: Path, tokenizer: ChatTokenizer) -> None:
    made = prepare((source(shared_data / UNPAIRED / "lf_kto_en_demo.json"),), "unpaired", tokenizer, seed=0)
    assert sum(t.branches[0].columns["desirable"] for t in made.items) == 150 and len(made.items) == 300
    made = prepare((source(shared_data / UNPAIRED / "truthfulqa_judge_2000.jsonl"),), "conversation", tokenizer, seed=0)
    answers = [scored(tokenizer, t.trunk) for t in made.items]
    assert (answers.count(" no<|im_end|>"), answers.count(" yes<|im_end|>")) == (1127, 873)


def test_prompts_come_from_parquet_structs_and_from_benchmarks(shared_data: Path, tokenizer: ChatTokenizer) -> None:
    path = shared_data / "text/parquet/arithmetic_sequence_train.parquet"
    made = prepare((source(path),), "prompt", tokenizer, seed=0)
    assert len(made.items) == 800 and made.items[0].messages == ({"role": "user", "content": "8,3:9,4"},)
    assert made.items[7].origin == f"{path} row 7"
    folder = prepare((source(path.parent, split="arithmetic"),), "prompt", tokenizer, seed=0)
    assert len(folder.items) == 1000
    made = prepare((source(shared_data / "text/ifeval/input_data.jsonl"),), "prompt", tokenizer, seed=0)
    assert len(made.items) == 541 and made.items[0].row["key"] == 1000
    gz = source(shared_data / "text/code/HumanEval.jsonl.gz")
    assert prepare((gz,), "prompt", tokenizer, seed=0).items[0].row["entry_point"] == "has_close_elements"


def test_questions_and_answers_need_no_mapping(shared_data: Path, tokenizer: ChatTokenizer) -> None:
    """GSM8K's lines, and BIG-bench Hard's list inside one object."""
    for name, columns, count in (
        ("gsm8k/test.jsonl", ("question", "answer"), 1319),
        ("bbh/word_sorting.json", ("input", "target"), 250),
    ):
        path = shared_data / "text" / name
        made = prepare((source(path),), "conversation", tokenizer, seed=0)
        assert made.report.kept == count and made.report.sources[0].guessed
        first = json.loads(path.read_text().splitlines()[0]) if path.suffix == ".jsonl" else None
        row = first or json.loads(path.read_text())["examples"][0]
        asked, answered = (row[name] for name in columns)
        assert text(tokenizer, made.items[0].trunk) == (
            f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n{answered}<|im_end|>\n"
        )
        assert scored(tokenizer, made.items[0].trunk) == f"{answered}<|im_end|>"


def test_exams_are_prompts_and_no_conversations(shared_data: Path, tokenizer: ChatTokenizer, folder: Path) -> None:
    path = shared_data / "text/prompts/mt_bench_question.jsonl"
    made = prepare((source(path),), "prompt", tokenizer, seed=0)
    assert made.report.kept == 80 and any("a later turn of the user" in note for note in made.report.sources[0].notes)
    with pytest.raises(DataError, match="columns found: category, question_id, reference, turns"):
        prepare((source(path),), "conversation", tokenizer, seed=0)
    path = shared_data / "text/tools/bfcl_simple_python.json"
    made = prepare((source(path),), "prompt", load_tokenizer(folder, chat_template="qwen3"), seed=0)
    assert len(made.items) == made.report.read > 0


def test_rows_with_pictures_are_refused_for_a_model_of_text(shared_data: Path, tokenizer: ChatTokenizer) -> None:
    path = shared_data / "multimodal/mllm_demo/mllm_demo.json"
    with pytest.raises(DataError, match="the row has images, and the model takes text alone"):
        prepare((source(path),), "conversation", tokenizer, seed=0)


def test_alpaca_and_gsm8k_mix_by_weight(shared_data: Path, tokenizer: ChatTokenizer) -> None:
    alpaca = source(shared_data / "text/sft/llms_from_scratch_instruction.json", weight=3.0)
    gsm8k = source(
        shared_data / "text/gsm8k/train.jsonl",
        columns={"query": "question", "response": "answer"},
        weight=1.0,
        limit=500,
    )
    report = prepare((alpaca, gsm8k), "conversation", tokenizer, seed=0).report
    assert [s.used for s in report.sources] == [1200, 400]
    assert np.array_equal(report.lengths, np.concatenate([s.lengths for s in report.sources]))
