"""Layouts of single projects: trees of messages, seed tasks, exams, turns in columns of their own, odd containers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.data.prepare import prepare
from align.data.streams import open_stream
from align.data.tokenizer import ChatTokenizer, load_tokenizer
from align.errors import DataError
from align.recipe.labels import Labels
from tests.unit.data.build import prepared, scored, source, text, write_jsonl

TURN = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
HAM = Labels(("ham", "spam"), "single_label")


def said(role: str, words: str, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"text": words, "role": role, "replies": list(replies), **more}


TREE = {
    "message_tree_id": "t",
    "prompt": said(
        "prompter",
        "Q",
        said("assistant", "bad", rank=2),
        said("assistant", "spam", rank=0, deleted=True),
        said("assistant", "good", said("prompter", "R", said("assistant", "B", rank=None)), rank=0),
        said("assistant", "fair", rank=1),
    ),
}


def test_a_tree_is_its_best_ranked_path_and_a_pair_its_best_and_worst_answer(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    made = prepared(tmp_path, [TREE], "conversation", tokenizer)
    assert text(tokenizer, made.items[0].trunk) == (
        f"{TURN}good<|im_end|>\n<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n"
    )
    assert "a reply beside the best ranked one" in made.report.sources[0].notes[0]
    assert "2 times" in made.report.sources[0].notes[0]
    [pair] = prepared(tmp_path, [TREE], "pair", tokenizer).items
    assert text(tokenizer, pair.trunk) == TURN
    assert [scored(tokenizer, side) for side in pair.branches] == ["good<|im_end|>", "bad<|im_end|>"]
    unanswered = {**TREE, "prompt": said("prompter", "Q", said("assistant", "A", said("prompter", "R")))}
    [one] = prepared(tmp_path, [unanswered], "conversation", tokenizer).items
    assert text(tokenizer, one.trunk) == f"{TURN}A<|im_end|>\n"
    with pytest.raises(DataError, match="no turn of the tree has two answers that are ranked apart"):
        prepared(tmp_path, [unanswered], "pair", tokenizer)


def test_a_row_that_is_one_message_of_a_tree_is_no_text_to_train_on(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    row = {"message_id": "m", "parent_id": "p", "text": "Q", "role": "prompter", "message_tree_id": "t"}
    with pytest.raises(DataError, match="each row is one message of a conversation"):
        prepared(tmp_path, [row], "conversation", tokenizer)


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Q", "instances": [{"input": "", "output": "A"}], "name": "n", "is_classification": False},
        {"src": ["Q"], "tgt": ["A"]},
        {"chat": {"turn_1": {"Human": "<|Human|>: Q<eoh>\n", "Commands": "<|Commands|>: None<eoc>\n", "MOSS": "A"}}},
        {"conversation_json": json.dumps({"messages": [{"role": "user", "content": "Q"},
                                                       {"role": "assistant", "content": "A"}]})},
    ],
)  # fmt: skip
def test_a_question_and_its_answer_as_single_projects_write_them(
    tmp_path: Path, tokenizer: ChatTokenizer, row: dict[str, Any]
) -> None:
    made = prepared(tmp_path, [row], "conversation", tokenizer)
    assert text(tokenizer, made.items[0].trunk) == f"{TURN}A<|im_end|>\n"
    [prompt] = prepared(tmp_path, [row], "prompt", tokenizer).items
    assert tokenizer.decode(prompt.token_ids, skip_special_tokens=False) == TURN
    assert prompt.row["reference_answer"] == "A"


def test_input_and_output_of_a_seed_task_are_of_one_instance(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    one = {"input": "I", "output": "A"}
    [tree] = prepared(tmp_path, [{"instruction": "Q", "instances": [one]}], "conversation", tokenizer).items
    assert text(tokenizer, tree.trunk).startswith("<|im_start|>user\nQ\nI<|im_end|>")
    with pytest.raises(DataError, match="`instances` has 2 of them, and a row is one"):
        prepared(tmp_path, [{"instruction": "Q", "instances": [one, one]}], "conversation", tokenizer)


@pytest.mark.parametrize("sort", [[1, 0], [0, 1]])
def test_the_higher_sort_of_paddle_is_the_chosen_side(
    tmp_path: Path, tokenizer: ChatTokenizer, sort: list[int]
) -> None:
    sides = ["A", ["B", "R", "C"]]
    row = {"src": ["P", "Q"], "tgt": ["O"], "response": sides if sort[0] else sides[::-1], "sort": sort}
    [pair] = prepared(tmp_path, [row], "pair", tokenizer).items
    assert text(tokenizer, pair.trunk).endswith(f"assistant\nO<|im_end|>\n{TURN}")
    assert [scored(tokenizer, side) for side in pair.branches] == ["A<|im_end|>", "B<|im_end|>C<|im_end|>"]
    for wrong, why in (({"sort": [1, 1]}, "none of the two is preferred"), ({"tgt": []}, "1 more must be in `src`")):
        with pytest.raises(DataError, match=why):
            prepared(tmp_path, [row | wrong], "pair", tokenizer)


def test_one_response_of_paddle_is_desirable_or_not(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    rows = [{"src": ["Q"], "tgt": [], "response": ["A"], "sort": [good]} for good in (1, 0)]
    made = prepared(tmp_path, rows, "unpaired", tokenizer)
    assert [tree.branches[0].columns["desirable"] for tree in made.items] == [1.0, 0.0]
    with pytest.raises(DataError, match="must be 1"):
        prepared(tmp_path, [rows[0] | {"sort": [3]}], "unpaired", tokenizer)


def test_mosss_thoughts_and_system_text_are_read_and_its_own_calls_refused(
    tmp_path: Path, tokenizer: ChatTokenizer, folder: Path
) -> None:
    turn = {"Human": "<|Human|>: Q<eoh>\n", "Inner Thoughts": "<|Inner Thoughts|>: T<eot>", "MOSS": "<|MOSS|>: A<eom>"}
    row = {"meta_instruction": "S", "chat": {"turn_1": turn}}
    qwen = load_tokenizer(folder, chat_template="qwen3")
    [tree] = prepared(tmp_path, [row], "conversation", qwen).items
    assert text(qwen, tree.trunk).startswith(f"<|im_start|>system\nS<|im_end|>\n{TURN}")
    assert "T\n</think>" in scored(qwen, tree.trunk) and scored(qwen, tree.trunk).endswith("A<|im_end|>")
    row = {"chat": {"turn_1": {**turn, "Commands": '<|Commands|>: Calculate("1+1")<eoc>'}}}
    with pytest.raises(DataError, match="calls tools in MOSS's own syntax"):
        prepared(tmp_path, [row], "conversation", tokenizer)


def test_turns_of_an_exam_are_the_users_and_the_first_is_the_prompt(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    rows = [{"question_id": 1, "turns": ["Q", "R"], "reference": ["A", "B"]}, {"question_id": 2, "turns": ["Q"]}]
    made = prepared(tmp_path, rows, "prompt", tokenizer)
    assert [tokenizer.decode(item.token_ids, skip_special_tokens=False) for item in made.items] == [TURN, TURN]
    assert made.items[0].row["reference_answer"] == "A"
    assert any("a later turn of the user" in note for note in made.report.sources[0].notes)
    arena = prepared(tmp_path, [{"question_id": "x", "turns": [{"content": "Q"}]}], "prompt", tokenizer)
    assert tokenizer.decode(arena.items[0].token_ids, skip_special_tokens=False) == TURN
    with pytest.raises(DataError, match="no layout"):  # whose turns these are, nothing says
        prepared(tmp_path, [{"turns": ["Q", "R"]}], "prompt", tokenizer)


def test_questions_of_bfcl_bring_their_tools(tmp_path: Path, folder: Path) -> None:
    qwen = load_tokenizer(folder, chat_template="qwen3")
    function = {"name": "add", "description": "adds", "parameters": {"type": "dict", "properties": {}}}
    asked = [{"role": "user", "content": "Q"}]
    [item] = prepared(tmp_path, [{"id": "1", "question": [asked], "function": [function]}], "prompt", qwen).items
    rendered = qwen.decode(item.token_ids, skip_special_tokens=False)
    assert '"name": "add"' in rendered and rendered.rstrip("\n").endswith("Q<|im_end|>\n<|im_start|>assistant")
    with pytest.raises(DataError, match="`question` has 2 turns"):
        prepared(tmp_path, [{"question": [asked, asked], "function": [function]}], "prompt", qwen)


# ------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(("number", "digits"), [(42, "42"), (2.5, "2.5"), (-1, "-1")])
@pytest.mark.parametrize("names", [("question", "answer"), ("query", "response"), ("instruction", "output")])
def test_a_number_as_the_answer_is_its_digits_and_told(
    tmp_path: Path, tokenizer: ChatTokenizer, names: tuple[str, str], number: float, digits: str
) -> None:
    row = {names[0]: "Q", names[1]: number}
    made = prepared(tmp_path, [row], "conversation", tokenizer)
    assert scored(tokenizer, made.items[0].trunk) == f"{digits}<|im_end|>"
    assert any("is a number, and its digits are the text of the answer" in n for n in made.report.sources[0].notes)
    [item] = prepared(tmp_path, [row], "prompt", tokenizer).items
    assert item.row["reference_answer"] == digits and item.row[names[1]] == number
    with pytest.raises(DataError):
        prepared(tmp_path, [{names[0]: "Q", names[1]: True}], "conversation", tokenizer)


def test_what_an_interpreter_printed_is_a_tools_answer(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "I"},
             {"role": "code_interpreter", "content": "2"}, {"role": "assistant", "content": "A"}]  # fmt: skip
    [tree] = prepared(tmp_path, [{"messages": turns}], "conversation", tokenizer).items
    assert "<|im_start|>tool\n2<|im_end|>" in text(tokenizer, tree.trunk)
    turns[1]["code_interpreter_call"] = "1+1"
    with pytest.raises(DataError, match="runs code in `code_interpreter_call`"):
        prepared(tmp_path, [{"messages": turns}], "conversation", tokenizer)


# ------------------------------------------------------------------------------------------------- containers


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_in_a_file_of_lines_is_its_rows(tmp_path: Path, tokenizer: ChatTokenizer, indent: int | None) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps([{"question": "Q", "answer": word} for word in "AB"], indent=indent))
    made = prepare((source(path),), "conversation", tokenizer, seed=0)
    assert [scored(tokenizer, tree.trunk) for tree in made.items] == ["A<|im_end|>", "B<|im_end|>"]
    opened = open_stream(source(path, stream=True), None)
    assert [item.origin for item in opened.rows()] == [item.origin for item in made.items]


def test_an_object_of_splits_is_one_split_or_refused(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    path, rows = tmp_path / "rows.json", [{"question": "Q", "answer": "A"}]
    path.write_text(json.dumps({"train": rows, "dev": rows}))
    with pytest.raises(DataError, match="the file holds the splits train, dev") as caught:
        prepare((source(path),), "conversation", tokenizer, seed=0)
    assert caught.value.remedy == "write the one that is meant to a file of its own"
    path.write_text(json.dumps({"dev": rows}))
    [tree] = prepare((source(path),), "conversation", tokenizer, seed=0).items
    assert tree.origin.endswith("rows.json dev[0]")
    path.write_text(json.dumps({"oos_test": [["what", "oos"], ["who", "in"]]}))
    with pytest.raises(DataError, match=r"the rows of `oos_test` are lists without columns' names"):
        prepare((source(path),), "labelled", tokenizer, seed=0, labels=HAM)


def test_a_first_line_of_values_is_no_header(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("ham\tso be it\nspam\tfree entry\nham\twhat now\n")
    with pytest.raises(DataError, match="'ham' is a value that further rows have in the same column"):
        prepare((source(path),), "labelled", tokenizer, seed=0, labels=HAM)
    path.write_text("label\ttext\nham\ttext\nlabel\ttext\nspam\tlabel\n")  # two tables, one behind the other
    made = prepare((source(path, on_bad_row="skip"),), "labelled", tokenizer, seed=0, labels=HAM)
    assert made.report.kept == 2 and "names the columns again" in made.report.sources[0].refused[0].reason


# ------------------------------------------------------------------------------------------------- two meanings


def test_a_context_beside_a_plain_prompt_has_two_meanings(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    row = {"prompt": "Q", "chosen": "A", "rejected": "B", "context": "C"}
    with pytest.raises(DataError, match="the prompt is `prompt` alone, or `context` and `prompt` together"):
        prepared(tmp_path, [row], "pair", tokenizer)
    assert len(prepared(tmp_path, [row], "pair", tokenizer, columns={"prompt": "prompt"}).items) == 1
    messages = {**row, "prompt": [{"role": "user", "content": "Q"}]}
    assert len(prepared(tmp_path, [messages], "pair", tokenizer).items) == 1


def test_a_question_that_a_template_framed_is_put_into_no_turn_unsaid(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    row = {"prompt": "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n", "response": "A"}
    with pytest.raises(DataError, match=r"plain text \(`columns: \{prompt: prompt, completion: response\}`\)"):
        prepared(tmp_path, [row], "conversation", tokenizer)
    columns = {"prompt": "prompt", "completion": "response"}
    [tree] = prepared(tmp_path, [row], "conversation", tokenizer, columns=columns).items
    assert text(tokenizer, tree.trunk).startswith(row["prompt"] + "A")


def test_two_answers_that_nobody_judged_are_no_pair(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    row = {"instruction": "Q", "output_1": "A", "output_2": "B"}
    with pytest.raises(DataError, match="`output_1` and `output_2` are two answers, and no column says which is"):
        prepared(tmp_path, [row], "pair", tokenizer)


def test_a_column_for_a_reward_may_be_one_of_our_fields(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"query": "Q", "completion": "A"}])
    [item] = prepare((source(path, columns={"gold": "completion"}),), "prompt", tokenizer, seed=0).items
    assert item.row["gold"] == "A"


# ------------------------------------------------------------------------- what must not be read wrongly


def refused(tmp_path: Path, rows: list[dict[str, Any]], kind: Any, tokenizer: ChatTokenizer) -> str:
    with pytest.raises(DataError) as error:
        prepared(tmp_path, rows, kind, tokenizer)
    return str(error.value)


def test_answers_of_paddle_that_are_not_to_be_learned_are_context(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    row = {"src": ["say one", "say two"], "tgt": ["it is uno", "it is dos"], "label": [0, 1]}
    made = prepared(tmp_path, [row], "conversation", tokenizer)
    trunk = made.items[0].trunk
    said = tokenizer.decode(trunk.token_ids[trunk.loss_mask].tolist(), False)
    assert "dos" in said and "uno" not in said
    assert "`label` must be a list of 2" in refused(tmp_path, [{**row, "label": [1]}], "conversation", tokenizer)
    for column, value in (("src_lang", "de"), ("langpair", "de-en")):
        languages = {"src": ["Hallo"], "tgt": ["Hello"], column: value}
        assert "a text and its translation" in refused(tmp_path, [languages], "conversation", tokenizer)


@pytest.mark.parametrize("verdict", ["not_a", "worse_a", "loser_model_a", "neither_b", "tie_b"])
def test_a_verdict_is_a_side_and_nothing_before_it_but_what_it_is_a_side_of(
    tmp_path: Path, tokenizer: ChatTokenizer, verdict: str
) -> None:
    row = {"query": "q", "answer_1": "a", "answer_2": "b", "preference": "model_a"}
    words = {"query": "q", "response_a": "a", "response_b": "b", "winner": "model_b"}
    assert prepared(tmp_path, [row], "pair", tokenizer).items and prepared(tmp_path, [words], "pair", tokenizer).items
    said = refused(tmp_path, [{**words, "winner": verdict}], "pair", tokenizer)
    assert verdict in said or "no column says which is better" in said


@pytest.mark.parametrize("beside", ["answer_choices", "endings", "candidates", "things"])
def test_a_number_beside_a_list_may_be_its_index_and_is_no_answer(
    tmp_path: Path, tokenizer: ChatTokenizer, beside: str
) -> None:
    row = {"question": "Which?", "answer": 1, beside: ["red", "green", "blue"]}
    refused(tmp_path, [row], "conversation", tokenizer)
    for named in ("1", "B", "(b)", "2."):
        refused(tmp_path, [row | {"answer": named}], "conversation", tokenizer)
    objects = row | {beside: [{"text": "red"}, {"text": "green"}]}
    for named in (1, "B"):
        refused(tmp_path, [objects | {"answer": named}], "conversation", tokenizer)
    made = prepared(tmp_path, [{"question": "How many?", "answer": 3}], "conversation", tokenizer)
    assert scored(tokenizer, made.items[0].trunk) == "3<|im_end|>"


@pytest.mark.parametrize("name", ["sol", "ans", "op"])
def test_numbered_solutions_are_choices(tmp_path: Path, tokenizer: ChatTokenizer, name: str) -> None:
    both = [f"{name}1", f"{name}2"]
    row = {"question": "How is it opened?", "answer": "the first", **dict.fromkeys(both, "turn it")}
    assert both[0] in refused(tmp_path, [row], "conversation", tokenizer)
    keyed = {"question": "Which?", "answer": "B", "things": {"A": "red", "B": "blue"}}
    assert "things" in refused(tmp_path, [keyed], "conversation", tokenizer)
    facts = {"question": "How many?", "answer": "5", "facts_of_it": {"source": "a book", "level": "hard"}}
    assert scored(tokenizer, prepared(tmp_path, [facts], "conversation", tokenizer).items[0].trunk) == "5<|im_end|>"


def test_trees_that_moderators_took_away_or_that_speak_twice_are_refused(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    def node(text: str, role: str, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"text": text, "role": role, "replies": list(replies), **more}

    def tree(root: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
        return [{"message_tree_id": "t", "prompt": root, **more}]

    fine = node("q", "prompter", node("a", "assistant", rank=0), node("gone", "assistant", rank=1, deleted="true"))
    made = prepared(tmp_path, tree(fine), "conversation", tokenizer)
    assert any("moderators took away" in note for note in made.report.sources[0].notes)
    for rows in (tree(fine, tree_state="aborted_low_grade"), tree({**fine, "deleted": True})):
        assert "moderators" in refused(tmp_path, rows, "conversation", tokenizer)
    twice = node("q", "prompter", node("a", "assistant", node("b", "assistant")))
    assert "same role" in refused(tmp_path, tree(twice), "conversation", tokenizer)
    users = node("q", "prompter", node("x", "prompter", rank=0), node("y", "prompter", rank=1))
    assert "same role" in refused(tmp_path, tree(users), "pair", tokenizer)


def test_a_text_that_is_broken_where_other_rows_hold_messages_is_refused(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    fine = {"prompt": '[{"role": "user", "content": "q"}]', "completion": '[{"role": "assistant", "content": "a"}]'}
    rows = [fine] * 5 + [{**fine, "completion": '[{"role": "assistant", "content": "a'}]
    assert "the text of `completion` is no messages in JSON" in refused(tmp_path, rows, "conversation", tokenizer)


def test_what_stands_beside_rows_in_an_object_and_belongs_to_each_is_refused(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    path = tmp_path / "rows.json"
    held = {"instruction": "Translate.", "instances": [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}]}
    path.write_text(json.dumps(held, indent=1))
    with pytest.raises(DataError, match="`instances` holds its rows, and `instruction` beside it may be of each"):
        prepare([source(path)], "conversation", tokenizer, seed=0)
    for name in ("tools", "preamble"):
        rows = [{"query": "q", "response": "a"}, {"query": "r", "response": "b"}]
        path.write_text(json.dumps({"data": rows, name: "what it may call"}, indent=1))
        with pytest.raises(DataError, match=f"`data` holds its rows, and `{name}` beside it may be of each"):
            prepare([source(path)], "conversation", tokenizer, seed=0)


def test_a_verdict_on_one_of_several_answers_ends_the_conversations_there(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    def chat(answer: str) -> list[dict[str, str]]:
        asked = [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]
        return [*asked, {"role": "user", "content": "r"}, {"role": "assistant", "content": f"{answer} again"}]

    row = {"conversation_a": chat("a"), "conversation_b": chat("b"), "winner": "model_a"}
    whole, first = (prepared(tmp_path, [row | {"turn": turn}], "pair", tokenizer) for turn in (2, 1))
    assert "again" in text(tokenizer, whole.items[0].branches[0])
    assert "again" not in text(tokenizer, first.items[0].branches[0])
    assert any("behind the one that was judged" in note for note in first.report.sources[0].notes)


def test_an_instance_holds_its_input_and_output_alone_and_a_chat_no_ends_of_others(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    row = {"instruction": "Do.", "instances": [{"input": "a", "output": "b", "constraints": "none"}]}
    assert "`constraints`" in refused(tmp_path, [row], "conversation", tokenizer)
    for chat in ("USER: hi ASSISTANT: hello USER: bye\n\nASSISTANT: ciao", "USER: hi\n\nASSISTANT: hello</s>"):
        assert "a turn of `chat` holds" in refused(tmp_path, [{"chat": chat}], "conversation", tokenizer)


@pytest.mark.parametrize(
    "row",
    [
        {"question": '[{"role": "user", "content": "q"}]', "answer": "a"},
        {"query": "q", "tools": "[]", "answer": '[{"name": "find", "arguments": {}}]'},
    ],
)
def test_under_a_guess_no_turn_is_messages_or_calls_in_json(
    tmp_path: Path, tokenizer: ChatTokenizer, row: dict[str, Any]
) -> None:
    assert "as JSON" in refused(tmp_path, [row], "conversation", tokenizer)
