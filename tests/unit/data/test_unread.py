"""What a row says is used or named: keys, columns, thoughts, arguments of the template, system prompts, lost turns."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
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


# ------------------------------------------------------------------------------------------------- texts


def of_each(body: str) -> str:
    """A template that writes each message's header and end, and `body` between them."""
    return UNMARKED_CHATML.replace("{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}", (
        "{{ '<|im_start|>' + m['role'] + '\\n' }}" + body + "{{ '<|im_end|>\\n' }}"
    ))  # fmt: skip


def test_thoughts_in_the_text_that_a_template_cuts_off_are_counted(tmp_path: Path, folder: Path) -> None:
    body = "{{ m.content.split('</think>')[-1] }}"
    rows = [{"messages": turns("q", "<think>hm</think>a")}, {"messages": turns("q", "a")}]
    made = prepared(tmp_path, rows, "conversation", load_tokenizer(folder, chat_template=of_each(body)))
    assert notes(made) == [
        "the chat template does not render: thoughts in the text of an assistant turn (before `</think>`) (once, at "
        f"{tmp_path / 'data.jsonl'}:1)"
    ]
    kept = load_tokenizer(folder, chat_template="qwen3")
    for answer_text in ("<think>hm</think>a", "<think>\nhm\n</think>\n\na", "hm</think>a"):
        made = prepared(tmp_path, [{"messages": turns("q", answer_text)}], "conversation", kept)
        assert not notes(made) and "hm" in scored(kept, made.items[0].trunk)


@pytest.mark.parametrize(
    "body", ["{{ m.content.split('.')[0] }}", "{{ m.content | e }}", "{{ (m.content | trim)[:2] }}"]
)
def test_a_text_that_a_template_changes_or_shortens_is_counted_by_role(tmp_path: Path, folder: Path, body: str) -> None:
    tokenizer = load_tokenizer(folder, chat_template=of_each(body))
    rows = [{"messages": turns("ok", "a < b. so")}, {"messages": turns("  ok\n", "a & b. so")}]
    found = prepared(tmp_path, rows, "conversation", tokenizer).report.sources[0].unread
    assert found == {
        "not rendered: the text of 'assistant' messages as it stands": {
            "count": 2,
            "first": f"{tmp_path / 'data.jsonl'}:1",
        }
    }


def test_thoughts_beside_a_text_that_has_them_already_stand_once(tmp_path: Path, qwen: ChatTokenizer) -> None:
    rows = [{"messages": answer(content="<think>\nhm\n</think>\n\na", reasoning_content="hm")}]
    made = prepared(tmp_path, rows, "conversation", qwen)
    assert scored(qwen, made.items[0].trunk).count("hm") == 1 and not notes(made)
    rows = [{"messages": answer(content="<think>hm</think>a", thinking="so")}]
    with pytest.raises(DataError, match="thoughts in its content, before `</think>`, and others beside it"):
        prepared(tmp_path, rows, "conversation", qwen)


def test_a_second_system_turn_that_a_template_leaves_out_is_refused_though_its_words_stand_elsewhere(
    tmp_path: Path, folder: Path
) -> None:
    first_alone = "{% if m.role != 'system' or loop.first %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endif %}"
    tokenizer = load_tokenizer(folder, chat_template="{% for m in messages %}" + first_alone + "{% endfor %}")
    again = {"role": "system", "content": "be kind"}
    rows = [{"messages": [again, *turns("q", "a"), again, *turns("q", "a")]}]
    with pytest.raises(DataError, match="leaves out message 3, of role 'system'"):
        prepared(tmp_path, rows, "conversation", tokenizer)


def test_a_completion_that_repeats_its_prompt_is_what_follows_it(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    prompt, last = [{"role": "system", "content": "s"}, ASK], {"role": "assistant", "content": "a"}
    plain = prepared(tmp_path, [{"prompt": prompt, "completion": [last]}], "conversation", tokenizer).items[0].trunk
    again = prepared(tmp_path, [{"prompt": prompt, "completion": [*prompt, last]}], "conversation", tokenizer)
    assert again.items[0].trunk.token_ids.tolist() == plain.token_ids.tolist()
    assert again.items[0].trunk.loss_mask.tolist() == plain.loss_mask.tolist()
    row = {"prompt": prompt, "completion": [*prompt, last], "label": True}
    assert scored(tokenizer, prepared(tmp_path, [row], "unpaired", tokenizer).items[0].branches[0]) == "a<|im_end|>"
    made = prepared(tmp_path, [row], "prompt", tokenizer).items[0]
    assert len(made.messages) == 2 and made.row["reference_answer"] == "a"
    other = [{"prompt": [ASK], "completion": [prompt[0], ASK, last]}]
    with pytest.raises(DataError, match="starts with a system turn behind a prompt"):
        prepared(tmp_path, other, "conversation", tokenizer)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_messages_as_json_text_are_messages_whose_nulls_stay(tmp_path: Path, qwen: ChatTokenizer, suffix: str) -> None:
    call = {"name": "f", "arguments": {"x": None}}
    messages = json.dumps([ASK, {"role": "assistant", "content": None, "tool_calls": [call]}])
    path = tmp_path / f"data.{suffix}"
    if suffix == "csv":
        with path.open("w", newline="") as f:
            csv.writer(f).writerows([["messages"], [messages]])
    elif suffix == "parquet":
        pq.write_table(pa.table({"messages": [messages]}), path)
    else:
        write_jsonl(path, [{"messages": messages}])
    made = prepare((source(path),), "conversation", qwen, seed=0)
    assert '{"name": "f", "arguments": {"x": null}}' in scored(qwen, made.items[0].trunk)
    assert notes(made)[0].startswith("`messages` holds messages as JSON text, and is read as messages: once")


def test_text_that_only_looks_like_messages_stays_text_and_a_printed_list_is_named(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    for prompt in ('[{"city": "role"}]', '[{"role": "user"', "[1]", '{"from": 3}', "[]"):
        made = prepared(tmp_path, [{"prompt": prompt, "completion": "a"}], "conversation", tokenizer)
        assert text(tokenizer, made.items[0].trunk) == prompt + "a<|im_end|>" and len(notes(made)) == 1
    made = prepared(tmp_path, [{"prompt": str([ASK]), "completion": "a"}], "conversation", tokenizer)
    assert "the prompt is a list of messages as Python prints it" in notes(made)[0]


def test_what_generation_markers_make_of_a_conversation_is_said(tmp_path: Path, folder: Path) -> None:
    marked = "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    last = "{% if loop.last %}" + marked + "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
    for body, note in ((last, "around a conversation's last answer alone"), (marked, "around what users say too")):
        template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}" + body + "{% endfor %}"
        tokenizer = load_tokenizer(folder, chat_template=template)
        made = prepared(tmp_path, [{"messages": turns("q", "a", "q", "b")}], "conversation", tokenizer)
        assert [line for line in notes(made) if note in line], notes(made)


def test_an_answer_that_is_begun_by_its_own_word_is_gone_on_with(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    begun = {"role": "assistant", "content": "so "}
    for word in ("prefix", "partial"):
        item = prepared(tmp_path, [{"messages": [ASK, begun | {word: True}]}], "prompt", tokenizer).items[0]
        assert tokenizer.decode(item.token_ids, False).endswith("<|im_start|>assistant\nso ")
        assert "reference_answer" not in item.row
    for row in ({"messages": [ASK, begun | {"prefix": False}]}, {"messages": [ASK, begun]}):
        item = prepared(tmp_path, [row], "prompt", tokenizer).items[0]
        assert tokenizer.decode(item.token_ids, False).endswith("<|im_start|>assistant\n")
        assert item.row["reference_answer"] == "so "
    with pytest.raises(DataError, match="`continue_final_message` says that the last answer is only begun"):
        prepared(tmp_path, [{"messages": [ASK, begun], "continue_final_message": True}], "prompt", tokenizer)
