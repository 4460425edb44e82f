"""What a row says is used or named: keys, columns, thoughts, arguments of the template, system prompts, lost turns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.data.prepare import prepare
from align.data.tokenizer import ChatTokenizer, load_tokenizer
from align.errors import DataError
from tests.unit.data.build import UNMARKED_CHATML, prepared, scored, source, text, turns, write_jsonl

ASK: dict[str, Any] = {"role": "user", "content": "q"}


def answer(**more: Any) -> list[dict[str, Any]]:
    return [ASK, {"role": "assistant", "content": "a"} | more]


@pytest.fixture(scope="module")
def qwen(folder: Path) -> ChatTokenizer:
    return load_tokenizer(folder, chat_template="qwen3")


def notes(made: Any) -> list[str]:
    return list(made.report.sources[0].notes)


# ------------------------------------------------------------------------------------------------- keys and columns


def test_keys_of_messages_that_nothing_reads_are_counted_with_the_first_line(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    rows = [
        {"messages": turns("q", "a")},
        {"messages": answer(foo=1, mood=None, notes="")},
        {"messages": answer(foo=0)},
    ]
    rows[0]["messages"][0]["cached"] = False
    made = prepared(tmp_path, rows, "conversation", tokenizer)
    path = tmp_path / "data.jsonl"
    assert notes(made) == [
        f"the chat template does not render: message key 'cached' (once, at {path}:1), "
        f"message key 'foo' (2 times, first {path}:2)"
    ]
    found = made.report.to_json()["sources"][0]["unread"]
    assert found["not rendered: message key 'foo'"] == {"count": 2, "first": f"{path}:2"}
    assert "foo" in "\n".join(made.report.summary)
    shared = [{"from": "human", "value": "q", "emotion": "calm"}, {"from": "gpt", "value": "a"}]
    pair = {"conversations": shared[:1], "chosen": shared[1] | {"model": "m"}, "rejected": "b"}
    assert set(prepared(tmp_path, [pair], "pair", tokenizer).report.sources[0].unread) == {
        "not rendered: message key 'emotion'", "not rendered: message key 'model'",
    }  # fmt: skip


def test_a_key_that_the_template_reads_is_rendered_and_never_makes_two_messages_differ(
    tmp_path: Path, folder: Path
) -> None:
    template = UNMARKED_CHATML.replace("m['content']", "((m.tool_plan or '') + m['content'])")
    tokenizer = load_tokenizer(folder, chat_template=template)
    made = prepared(tmp_path, [{"messages": answer(tool_plan="first ")}], "conversation", tokenizer)
    assert scored(tokenizer, made.items[0].trunk) == "first a<|im_end|>" and not notes(made)
    sides = [[ASK | {"id": n}, {"role": "assistant", "content": side, "id": n}] for n, side in enumerate("ab")]
    made = prepared(tmp_path, [{"chosen": sides[0], "rejected": sides[1]}], "pair", tokenizer)
    assert text(tokenizer, made.items[0].trunk).count("<|im_start|>") == 2, "the prompt is what they share"
    same = [answer(model="m1"), answer(model="m2")]
    with pytest.raises(DataError, match="chosen and rejected are the same"):
        prepared(tmp_path, [{"prompt": [ASK], "chosen": same[0][1:], "rejected": same[1][1:]}], "pair", tokenizer)


def test_keys_of_calls_parts_and_results_are_counted_too(tmp_path: Path, qwen: ChatTokenizer) -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": {}, "latency": 3}, "cost": 1}
    part = {"type": "text", "text": "q", "cache_control": {"type": "ephemeral"}}
    result = {"type": "tool_result", "tool_use_id": "1", "content": "r", "is_error": True}
    messages = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "user", "content": [result]}, {"role": "assistant", "content": "a"}]  # fmt: skip
    unread = prepared(tmp_path, [{"messages": messages}], "conversation", qwen).report.sources[0].unread
    assert set(unread) == {
        "tool call key 'cost'", "tool call key 'latency'", "content part key 'cache_control'",
        "tool result key 'is_error'", "not rendered: message key 'tool_call_id'",
    }  # fmt: skip


def test_columns_that_nothing_reads_are_one_line_and_those_of_prompts_go_to_the_rewards(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    rows = [{"messages": answer(), "id": n, "source": "web" if n else None, "tool_choice": "auto"} for n in range(3)]
    made = prepared(tmp_path, rows, "conversation", tokenizer)
    path = tmp_path / "data.jsonl"
    assert notes(made) == [
        f"columns that nothing reads: 'id' (3 rows), 'tool_choice' (3 rows), 'source' (2 rows), first {path}:1"
    ]
    made = prepared(tmp_path, rows, "prompt", tokenizer)
    assert not notes(made) and made.items[1].row["source"] == "web"
    for row, kind, unread in (
        ({"text": "a b", "tools": "[]", "system": "s"}, "conversation", {"tools", "system"}),
        ({"prompt": "q", "completion": "a", "margin": 1}, "conversation", {"margin"}),
        ({"messages": answer(), "rejected_images": ["x.png"]}, "conversation", {"rejected_images"}),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": 1}, "pair", set()),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "score": 1}, "pair", {"score"}),
        ({"instruction": "q", "chosen": "a", "rejected": "b", "output": "c"}, "pair", {"output"}),
        ({"prompt": "q", "completion": "a", "label": True, "rating": 2}, "unpaired", {"rating"}),
    ):
        found = prepared(tmp_path, [row], kind, tokenizer).report.sources[0].unread
        assert {what for what in found if what.startswith("column")} == {f"column {name!r}" for name in unread}


def test_a_column_that_a_mapping_hides_is_named(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    row = {"prompt": "old", "question": "q", "answer": "a"}
    made = prepared(tmp_path, [row], "conversation", tokenizer, columns={"prompt": "question", "completion": "answer"})
    assert text(tokenizer, made.items[0].trunk) == "qa<|im_end|>"
    assert set(made.report.sources[0].unread) == {"column 'prompt'"}


def test_what_was_unread_is_said_again_from_the_cache(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [{"messages": answer(foo=1), "id": 1}])
    first, second = (
        prepare((source(path),), "conversation", tokenizer, seed=0, cache=tmp_path / "cache") for _ in range(2)
    )
    assert len(notes(first)) == 2 and first.report.to_json() == second.report.to_json()


def test_a_message_without_content_names_its_keys(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    with pytest.raises(DataError, match="has no content; its keys: role, text"):
        prepared(tmp_path, [{"messages": [{"role": "user", "text": "q"}, *answer()[1:]]}], "conversation", tokenizer)


# ------------------------------------------------------------------------------------------------- system


def test_a_system_column_is_the_first_turn_in_every_layout_and_stands_once(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    head, user = "<|im_start|>system\nPIRATE<|im_end|>\n", "<|im_start|>user\nq<|im_end|>\n"
    shared = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    whole, other = answer(), [ASK, {"role": "assistant", "content": "b"}]
    rows: list[tuple[str, dict[str, Any]]] = [
        ("conversation", {"messages": whole}), ("prompt", {"messages": whole}), ("prompt", {"conversations": shared}),
        ("conversation", {"conversations": shared}), ("conversation", {"prompt": [ASK], "completion": whole[1:]}),
        ("conversation", {"query": "q", "response": "a"}), ("conversation", {"instruction": "q", "output": "a"}),
        ("pair", {"messages": whole, "rejected_response": "b"}), ("pair", {"chosen": whole, "rejected": other}),
        ("pair", {"messages": whole, "rejected_messages": other}), ("prompt", {"prompt": "q"}),
        ("pair", {"prompt": [ASK], "chosen": whole[1:], "rejected": other[1:]}),
        ("unpaired", {"messages": whole, "label": True}),
    ]  # fmt: skip
    for kind, row in rows:
        own = "messages" in row or ("chosen" in row and "prompt" not in row)
        for said, unread in ((None, False), ("PIRATE", False), ("INNER", True)):
            turn = [{"role": "system", "content": said}] if said and own else []
            if said and not own:
                continue
            more = {name: [*turn, *row[name]] for name in ("messages", "rejected_messages", "chosen", "rejected")
                    if isinstance(row.get(name), list) and own}  # fmt: skip
            made = prepared(tmp_path, [row | more | {"system": "PIRATE"}], kind, tokenizer)
            ids = made.items[0].token_ids if kind == "prompt" else made.items[0].trunk.token_ids
            begins = (head if said != "INNER" else head.replace("PIRATE", "INNER")) + user
            seen = tokenizer.decode(ids, skip_special_tokens=False)
            assert seen.startswith(begins) and seen.count("<|im_start|>system") == 1, (kind, row, said)
            assert any("beside a system turn" in note for note in notes(made)) is unread, (kind, row)


# ------------------------------------------------------------------------------------------------- thoughts


def test_thoughts_under_every_name_are_rendered_where_the_template_reads_one(tmp_path: Path, folder: Path) -> None:
    spellings: list[dict[str, Any]] = [
        {"reasoning_content": "why"}, {"reasoning": "why"}, {"thinking": "why"}, {"thought": "why"},
        {"content": [{"type": "thinking", "thinking": "why", "signature": ""}, {"type": "text", "text": "a"}]},
        {"content": None, "parts": [{"text": "why", "thought": True}, {"text": "a"}]},
        {"reasoning": "why", "reasoning_content": "why"},
    ]  # fmt: skip
    for name in ("reasoning_content", "reasoning", "thinking", "thought"):
        template = UNMARKED_CHATML.replace("m['content']", f"((m.get('{name}') or '') + '/' + m['content'])")
        tokenizer = load_tokenizer(folder, chat_template=template)
        made = prepared(tmp_path, [{"messages": answer(**more)} for more in spellings], "conversation", tokenizer)
        assert {scored(tokenizer, t.trunk) for t in made.items} == {"why/a<|im_end|>"}
        assert not notes(made)
    qwen = load_tokenizer(folder, chat_template="qwen3")
    tree = prepared(tmp_path, [{"messages": answer(thinking="why")}], "conversation", qwen).items[0]
    assert scored(qwen, tree.trunk) == "<think>\nwhy\n</think>\n\na<|im_end|>"
    with pytest.raises(DataError, match="different thoughts"):
        prepared(tmp_path, [{"messages": answer(thinking="x", reasoning="y")}], "conversation", qwen)


def test_thoughts_and_names_that_the_template_never_renders_are_counted(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    rows = [{"messages": turns("q", "a")}] + [{"messages": answer(reasoning="why", name="bob")}] * 2
    made = prepared(tmp_path, rows, "conversation", tokenizer)
    path = tmp_path / "data.jsonl"
    at, thoughts = f"(2 times, first {path}:2)", "thoughts of an assistant turn (`reasoning_content`)"
    assert notes(made) == [f"the chat template does not render: {thoughts} {at}, message key 'name' {at}"]
    pair = {"prompt": [ASK], "chosen": answer(reasoning="why")[1:], "rejected": [{"role": "assistant", "content": "b"}]}
    assert (
        "thoughts of an assistant turn (`reasoning_content`) (once"
        in notes(prepared(tmp_path, [pair], "pair", tokenizer))[0]
    )


def test_a_name_is_rendered_where_the_template_reads_that_of_messages(tmp_path: Path, folder: Path) -> None:
    row = {"messages": [ASK | {"name": "ann"}, *answer(name="bob")[1:]], "tools": [{"name": "f"}]}
    reads = load_tokenizer(
        folder, chat_template=UNMARKED_CHATML.replace("m['role'] +", "m['role'] + (m.name or '') +", 1)
    )
    made = prepared(tmp_path, [row | {"tools": None}], "prompt", reads)
    assert "userann" in reads.decode(made.items[0].token_ids, False) and not notes(made)
    others = (
        "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" + UNMARKED_CHATML
    )  # a name, but of a function
    made = prepared(tmp_path, [row], "conversation", load_tokenizer(folder, chat_template=others))
    assert notes(made) == [
        f"the chat template does not render: message key 'name' (2 times, first {tmp_path}/data.jsonl:1)"
    ]


def test_thoughts_that_a_template_drops_from_earlier_turns_are_counted(tmp_path: Path, folder: Path) -> None:
    template = UNMARKED_CHATML.replace(
        "m['content']", "((m.reasoning_content or '') if not loop.first and loop.index > 3 else '') + m['content']"
    )
    tokenizer = load_tokenizer(folder, chat_template=template)
    row = {"messages": [*answer(reasoning="first"), *answer(reasoning="second")]}
    made = prepared(tmp_path, [row], "conversation", tokenizer)
    assert "seconda" in text(tokenizer, made.items[0].trunk)
    assert "thoughts of an assistant turn (`reasoning_content`) (once" in notes(made)[0]


# ------------------------------------------------------------------------------------------------- turns, arguments


def test_a_turn_that_the_template_leaves_out_is_refused(tmp_path: Path, folder: Path) -> None:
    template = UNMARKED_CHATML.replace(
        "{% for m in messages %}", "{% for m in messages if m['role'] in ('system', 'user', 'assistant') %}"
    )
    tokenizer = load_tokenizer(folder, chat_template=template)
    row = {"messages": [*answer(), {"role": "tool", "content": "result"}, *answer()[1:]]}
    with pytest.raises(DataError, match="leaves out message 2, of role 'tool': 'result'"):
        prepared(tmp_path, [row], "conversation", tokenizer)
    row["messages"][2]["content"] = "q"  # stands in the text all the same
    with pytest.raises(DataError, match="leaves out message 2, of role 'tool': 'q'"):
        prepared(tmp_path, [row], "conversation", tokenizer)
    row = {"messages": [{"role": "developer", "content": "be kind"}, *answer()]}
    tree = prepared(tmp_path, [row], "conversation", tokenizer).items[0]
    assert text(tokenizer, tree.trunk).startswith("<|im_start|>system\nbe kind<|im_end|>"), "the role that it knows"


def test_arguments_of_the_template_are_honoured_row_by_row(tmp_path: Path, qwen: ChatTokenizer) -> None:
    off: list[dict[str, Any]] = [
        {"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}, {"enable_thinking": 0},
        {"chat_template_kwargs": '{"enable_thinking": false}'},
        {"apply_chat_template_kwargs": {"enable_thinking": False}},
        {"chat_template_kwargs": {"enable_thinking": False}, "enable_thinking": False},
    ]  # fmt: skip
    on: list[dict[str, Any]] = [
        {},
        {"enable_thinking": True},
        {"chat_template_kwargs": None},
        {"enable_thinking": None},
    ]
    empty = "<think>\n\n</think>\n\n"
    for rows, without in ((off, True), (on, False)):
        made = prepared(tmp_path, [{"messages": answer()} | row for row in rows], "conversation", qwen)
        assert {scored(qwen, t.trunk) for t in made.items} == {("" if without else empty) + "a<|im_end|>"}
        assert not notes(made)
        for item in prepared(tmp_path, [{"messages": [ASK]} | row for row in rows], "prompt", qwen).items:
            assert qwen.decode(item.token_ids, False).endswith(f"assistant\n{empty}" if without else "assistant\n")
        pair = {"prompt": [ASK], "chosen": "a", "rejected": "b"}
        for tree in prepared(tmp_path, [pair | row for row in rows], "pair", qwen).items:
            assert text(qwen, tree.trunk).endswith(f"assistant\n{empty}" if without else "assistant\n")


def test_arguments_that_the_template_does_not_read_are_counted_and_bad_ones_refused(
    tmp_path: Path, tokenizer: ChatTokenizer, qwen: ChatTokenizer
) -> None:
    rows = [{"messages": answer(), "enable_thinking": False, "documents": [{"text": "d"}]}] * 2
    made = prepared(tmp_path, rows, "conversation", tokenizer)
    at = f"(2 times, first {tmp_path / 'data.jsonl'}:1)"
    assert notes(made) == [
        f"the chat template does not render: template argument 'enable_thinking' {at}, "
        f"template argument 'documents' {at}"
    ]
    plain = {"prompt": "q", "completion": "a", "enable_thinking": False, "tools": [{"name": "f"}]}
    assert {"not rendered: tool schemas (`tools`)", "not rendered: template argument 'enable_thinking'"} <= set(
        prepared(tmp_path, [plain], "conversation", tokenizer).report.sources[0].unread
    )
    for bad, reason in (
        ({"chat_template_kwargs": [1]}, "must be an object"),
        ({"chat_template_kwargs": "{"}, "not valid JSON"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "sets 'chat_template'"),
        ({"chat_template_kwargs": {"enable_thinking": True}, "enable_thinking": False}, "different values"),
        ({"enable_thinking": "no"}, "must be true or false"),
    ):
        with pytest.raises(DataError, match=reason):
            prepared(tmp_path, [{"messages": answer()} | bad], "conversation", qwen)
    json.dumps(made.report.to_json())


def test_documents_of_a_row_are_given_to_a_template_that_reads_them(tmp_path: Path, folder: Path) -> None:
    template = "{% for d in documents or [] %}{{ d.text }}|{% endfor %}" + UNMARKED_CHATML
    tokenizer = load_tokenizer(folder, chat_template=template)
    row = {"messages": answer(), "documents": [{"text": "one"}, {"text": "two"}]}
    made = prepared(tmp_path, [row], "conversation", tokenizer)
    assert text(tokenizer, made.items[0].trunk).startswith("one|two|<|im_start|>user") and not notes(made)
    with pytest.raises(DataError, match="`documents` must be a list"):
        prepared(tmp_path, [row | {"documents": "one two"}], "conversation", tokenizer)
