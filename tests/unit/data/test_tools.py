"""Tool calls, results and schemas in every spelling: what the chat template renders, and what of it is scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.data.tokenizer import ChatTokenizer, load_tokenizer
from align.errors import DataError
from tests.unit.data.build import UNMARKED_CHATML, prepared, scored, text, write_jsonl

ARGUMENTS = {"q": "cats", "page": None, "tags": ["ü", {"deep": None}]}
AS_TEXT = json.dumps(ARGUMENTS)
WRITTEN = '{"q": "cats", "page": null, "tags": ["ü", {"deep": null}]}'
CALL = f'<tool_call>\n{{"name": "find", "arguments": {WRITTEN}}}\n</tool_call>'
THOUGHT = "<think>\n\n</think>\n\n"
TARGET = f"{THOUGHT}{CALL}<|im_end|>{THOUGHT}three<|im_end|>"
PARAMETERS = {"type": "object", "properties": {"q": {"type": "string"}, "page": {"default": None, "enum": [1, None]}}}
SCHEMA = {"type": "function", "function": {"name": "find", "description": "x", "parameters": PARAMETERS}}
ASK: dict[str, Any] = {"role": "user", "content": "find cats"}
RESULT: dict[str, Any] = {"role": "tool", "content": "3 cats"}
THREE: dict[str, Any] = {"role": "assistant", "content": "three"}


@pytest.fixture(scope="module")
def qwen(folder: Path) -> ChatTokenizer:
    return load_tokenizer(folder, chat_template="qwen3")


def calling(*calls: Any, **more: Any) -> list[dict[str, Any]]:
    return [ASK, {"role": "assistant", "content": None, "tool_calls": list(calls)} | more, RESULT, THREE]


def shared(value: Any, call: str = "function_call", result: str = "observation") -> list[dict[str, Any]]:
    return [{"from": "human", "value": "find cats"}, {"from": call, "value": value},
            {"from": result, "value": "3 cats"}, {"from": "gpt", "value": "three"}]  # fmt: skip


def swift(value: Any) -> list[dict[str, Any]]:
    return [ASK, {"role": "tool_call", "content": value}, {"role": "tool_response", "content": "3 cats"}, THREE]


def parts(call: dict[str, Any], result: dict[str, Any]) -> list[dict[str, Any]]:
    return [ASK, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}, THREE]


FLAT = {"name": "find", "arguments": ARGUMENTS}
FLAT_TEXT = json.dumps(FLAT)

CALLS: dict[str, list[dict[str, Any]]] = {
    "OpenAI, text": calling({"id": "c1", "type": "function", "function": {"name": "find", "arguments": AS_TEXT}}),
    "OpenAI, object": calling({"id": "c1", "type": "function", "function": FLAT}),
    "OpenAI, streamed": calling({"index": 0, "id": "c1", "type": "function", "function": FLAT}),
    "OpenAI, twice encoded": calling({"function": {"name": "find", "arguments": json.dumps(AS_TEXT)}}),
    "function without type": calling({"function": {"name": "find", "parameters": ARGUMENTS}}),
    "flat, arguments": calling(FLAT),
    "flat, text": calling({"name": "find", "arguments": AS_TEXT}),
    "flat, parameters": calling({"name": "find", "parameters": ARGUMENTS}),
    "flat, args (LangChain)": calling({"name": "find", "args": ARGUMENTS, "id": "c1", "type": "tool_call"}),
    "the function as text": calling({"type": "function", "function": FLAT_TEXT}),
    "the call as text": calling({"id": "c1", "tool_call": FLAT_TEXT}),
    "name beside": calling({"function": "find", "args": ARGUMENTS}),
    "Cohere": calling({"tool_name": "find", "parameters": ARGUMENTS}),
    "empty content": calling(FLAT, content=""),
    "no content": [ASK, {"role": "assistant", "tool_calls": [FLAT]}, RESULT, THREE],
    "calls as text": [ASK, {"role": "assistant", "content": "", "tool_calls": json.dumps([FLAT])}, RESULT, THREE],
    "call in a list as text": calling(FLAT_TEXT),
    "one call, no list": [ASK, {"role": "assistant", "content": "", "tool_calls": FLAT}, RESULT, THREE],
    "legacy function_call": [
        ASK, {"role": "assistant", "content": None, "function_call": {"name": "find", "arguments": AS_TEXT}},
        {"role": "function", "name": "find", "content": "3 cats"}, THREE,
    ],
    "ShareGPT": shared(FLAT_TEXT),
    "ShareGPT, list": shared(json.dumps([FLAT])),
    "ShareGPT, object": shared(FLAT),
    "ShareGPT, Glaive": shared(FLAT_TEXT, "function-call", "function-response"),
    "ShareGPT, tool_call": shared(FLAT_TEXT, "tool_call", "tool_response"),
    "ms-swift": swift(FLAT_TEXT),
    "ms-swift, object": swift(FLAT),
    "Anthropic": parts(
        {"type": "tool_use", "id": "c1", "name": "find", "input": ARGUMENTS},
        {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "3 cats"}]},
    ),
    "Vercel": parts(
        {"type": "tool-call", "toolCallId": "c1", "toolName": "find", "input": ARGUMENTS},
        {"type": "tool-result", "toolCallId": "c1", "toolName": "find", "output": "3 cats"},
    ),
    "Gemini": [
        {"role": "user", "parts": [{"text": "find cats"}]},
        {"role": "model", "parts": [{"functionCall": {"name": "find", "args": ARGUMENTS}}]},
        {"role": "user", "parts": [{"functionResponse": {"name": "find", "response": "3 cats"}}]},
        {"role": "model", "parts": [{"text": "three"}]},
    ],
    "Bedrock": parts(
        {"toolUse": {"toolUseId": "c1", "name": "find", "input": ARGUMENTS}},
        {"toolResult": {"toolUseId": "c1", "content": "3 cats"}},
    ),
    "OpenAI Responses": [
        ASK, {"type": "function_call", "call_id": "c1", "name": "find", "arguments": AS_TEXT},
        {"type": "function_call_output", "call_id": "c1", "output": "3 cats"}, {"type": "message", **THREE},
    ],
    "Llama": [*calling(FLAT)[:2], {"role": "ipython", "content": "3 cats"}, THREE],
    "the same twice": [
        ASK, {"role": "assistant", "content": [{"type": "tool_use", "id": "c1", "name": "find", "input": ARGUMENTS}],
              "tool_calls": [{"name": "find", "args": ARGUMENTS, "id": "c1", "type": "tool_call"}]}, RESULT, THREE,
    ],
}  # fmt: skip


def test_calls_in_every_spelling_are_the_same_target(tmp_path: Path, qwen: ChatTokenizer) -> None:
    whole = set()
    for name, messages in CALLS.items():
        column = "conversations" if "from" in messages[0] else "messages"
        for call in (messages, json.loads(json.dumps(messages))):
            made = prepared(tmp_path, [{column: call, "tools": [SCHEMA]}], "conversation", qwen)
        tree = made.items[0]
        assert scored(qwen, tree.trunk) == TARGET, name
        whole.add(text(qwen, tree.trunk))
        unread = set(made.report.sources[0].unread)
        assert unread <= {"not rendered: message key 'tool_call_id'", "not rendered: message key 'name'"}, (
            name,
            unread,
        )
    assert len(whole) == 1, "prompts and results are the same too"
    assert "<tool_response>\n3 cats\n</tool_response>" in whole.pop()


def test_schemas_in_every_spelling_are_the_same_prompt(tmp_path: Path, qwen: ChatTokenizer) -> None:
    flat = {"name": "find", "description": "x", "parameters": PARAMETERS}
    other = {"name": "find", "description": "x"}
    spellings: list[dict[str, Any]] = [
        {"tools": [SCHEMA]}, {"tools": json.dumps([SCHEMA])}, {"tools": [json.dumps(SCHEMA)]}, {"tools": SCHEMA},
        {"tools": [flat]}, {"tools": json.dumps([flat])}, {"tools": json.dumps(flat)}, {"tools": [{"function": flat}]},
        {"tools": [{"type": "function", **flat}]}, {"tools": [{**other, "input_schema": PARAMETERS}]},
        {"tools": [{**other, "inputSchema": PARAMETERS}]}, {"tools": [{"functionDeclarations": [flat]}]},
        {"functions": [flat]}, {"functions": json.dumps([flat])}, {"tools": [], "functions": [flat]},
        {"tools": [{"type": "function", "function": json.dumps(flat)}]},
        {"tools": [flat | {"parameters": json.dumps(PARAMETERS)}]},
        {"tools": [{"toolSpec": other | {"inputSchema": {"json": PARAMETERS}}}]},
        {"tools": {"tools": [{"toolSpec": other | {"inputSchema": {"json": PARAMETERS}}}]}},
        {"tools": {"find": {"description": "x", "parameters": PARAMETERS}}}, {"tools": {"find": other | flat}},
    ]  # fmt: skip
    want = f"<tools>\n{json.dumps(SCHEMA)}\n</tools>"
    for columns in spellings:
        for row, kind in (
            ({"messages": calling(FLAT)}, "conversation"),
            ({"conversations": shared(FLAT_TEXT)}, "conversation"),
            ({"messages": [ASK]}, "prompt"),
            ({"prompt": [ASK], "chosen": [THREE], "rejected": "no"}, "pair"),
            ({"instruction": "find cats", "output": "three"}, "conversation"),
        ):
            item = prepared(tmp_path, [row | columns], kind, qwen).items[0]
            ids = item.token_ids if kind == "prompt" else item.trunk.token_ids
            assert want in qwen.decode(ids, skip_special_tokens=False), (columns, row)


def test_several_calls_are_one_turn_with_what_was_said_before(tmp_path: Path, qwen: ChatTokenizer) -> None:
    one, two = json.dumps({"name": "f", "arguments": {"a": 1}}), json.dumps({"name": "g", "arguments": {}})
    tagged = "".join(f"\n<tool_call>\n{call}\n</tool_call>" for call in (one, two))
    want = f"both{tagged}<|im_end|>"
    results = [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]
    call = [{"role": "tool_call", "content": one}, {"role": "tool_call", "content": two}]
    parts = [{"type": "text", "text": "both"}, {"type": "tool_use", "name": "f", "input": {"a": 1}},
             {"type": "tool_use", "name": "g", "input": {}}]  # fmt: skip
    answers = [{"type": "tool_result", "content": "1"}, {"type": "tool_result", "content": 2}]
    rows = [
        [ASK, {"role": "assistant", "content": "both"}, *call, *results, THREE],
        [ASK, {"role": "assistant", "content": "both", "tool_calls": [one, two]}, *results, THREE],
        [
            ASK,
            {"role": "assistant", "content": "both"},
            {"role": "tool_call", "content": f"[{one}, {two}]"},
            *results,
            THREE,
        ],
        [ASK, {"role": "assistant", "content": parts}, {"role": "user", "content": answers}, THREE],
    ]
    made = prepared(tmp_path, [{"messages": row} for row in rows], "conversation", qwen)
    assert {scored(qwen, t.trunk) for t in made.items} == {f"{THOUGHT}{want}{THOUGHT}three<|im_end|>"}
    assert len({text(qwen, t.trunk) for t in made.items}) == 1
    assert "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>" in text(
        qwen, made.items[0].trunk
    )


def test_results_that_are_no_text_are_json_and_null_is_nothing(tmp_path: Path, qwen: ChatTokenizer) -> None:
    for value, want in (
        ({"temp": 3, "wind": None}, '{"temp": 3, "wind": null}'), ([{"a": "ü"}], '[{"a": "ü"}]'), (7, "7"), (None, ""),
        ("", ""), ([], "[]"), (True, "true"),
        ([{"type": "text", "text": "3 "}, {"type": "text", "text": "cats"}], "3 cats"),
    ):  # fmt: skip
        row = {"messages": [ASK, *calling(FLAT)[1:2], {"role": "tool", "content": value}, THREE]}
        tree = prepared(tmp_path, [row], "conversation", qwen).items[0]
        assert f"<tool_response>\n{want}\n</tool_response>" in text(qwen, tree.trunk)


def test_calls_that_cannot_be_read_are_refused_with_the_reason(tmp_path: Path, qwen: ChatTokenizer) -> None:
    odd = {"messages": [ASK | {"tool_calls": [FLAT]}, THREE]}
    assert (
        "message key 'tool_calls' (once" in prepared(tmp_path, [odd], "conversation", qwen).report.sources[0].notes[0]
    )
    used = {"type": "tool_use", "name": "find", "input": {}}
    for messages, reason in (
        (calling({"name": "find", "arguments": '{"q": "ca'}), "the arguments of find is not valid JSON"),
        (calling({"name": "find", "arguments": '{"q": [1e999]}'}), "the arguments of find hold a number that is not"),
        (calling({"name": "find", "arguments": {"q": {"of": float("nan")}}}), "hold a number that is not finite"),
        (calling({"name": "find", "arguments": "[1]"}), "must be an object"),
        (calling({"name": "find", "arguments": 3}), "must be an object"),
        (calling({"name": "find", "arguments": '{"q": NaN}'}), "hold a number that is not finite"),
        (calling({"name": "find", "arguments": {"q": [float("inf")]}}), "hold a number that is not finite"),
        (calling({"name": "find", "arguments": '{"q": 1, "q": 2}'}), "the arguments of find: the key 'q' stands twice"),
        (calling({"name": "find", "arguments": '{"q": "\\ud83d"}'}), "of find: text that cannot be encoded"),
        (calling({"function": "find(q='cats')"}), "names no function"),
        (calling({"arguments": {}}), "names no function"),
        (calling({"name": "find", "arguments": {}, "parameters": {}}), "one of them holds its arguments"),
        (calling(3), "must be an object"),
        (shared("find(cats)"), "a tool call is not valid JSON"),
        (shared(""), "is empty"),
        (shared("[]"), "holds none"),
        (calling(FLAT, function_call={"name": "other", "arguments": "{}"}), "calls other tools"),
        (parts(used | {"input": "x"}, {"type": "tool_result", "content": ""}), "not valid JSON"),
        ([{"role": "user", "content": [used]}, THREE], "holds a tool call"),
        ([ASK, {"role": "assistant", "content": [used, "then"]}], "behind its tool calls"),
    ):  # fmt: skip
        row = {"conversations" if "from" in messages[0] else "messages": messages}
        with pytest.raises(DataError, match=reason) as error:
            prepared(tmp_path, [row], "conversation", qwen)
        assert error.value.where.endswith(":1")
    for tools in (
        [{"description": "x"}],
        [{"find": 3}],
        [{"type": "function", "function": "find"}],
        [{"toolSpec": {}}],
    ):
        with pytest.raises(DataError, match="names no function"):
            prepared(tmp_path, [{"messages": [ASK, THREE], "tools": tools}], "conversation", qwen)
    for tools in ('[{"name": ', [3], 3, "tools"):
        with pytest.raises(DataError, match="`tools`"):
            prepared(tmp_path, [{"messages": [ASK, THREE], "tools": tools}], "conversation", qwen)
    with pytest.raises(DataError, match="`tools` and `functions`"):
        prepared(tmp_path, [{"messages": [ASK, THREE], "tools": [SCHEMA], "functions": [SCHEMA]}], "conversation", qwen)


PRINTS = (  # like DeepSeek's: the arguments are put behind a text, so they must be one; a call is read without content
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% generation %}"
    "{% if m['role'] == 'assistant' and m['content'] is none %}{% for t in m['tool_calls'] %}"
    "{{ t['function']['name'] + '(' + t['function']['arguments'] + ')' }}{% endfor %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SHOWS = PRINTS.replace(" + t['function']['arguments'] + ')'", "}}{{ t['function']['arguments'] }}{{ ')'").replace(
    " and m['content'] is none", " and m['tool_calls']"
)


def test_a_template_that_prints_arguments_is_given_text(tmp_path: Path, folder: Path) -> None:
    for template in (PRINTS, SHOWS):
        tokenizer = load_tokenizer(
            folder, chat_template=template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        )
        rows = [{"messages": calling({"name": "find", "arguments": a})} for a in ({"q": "cats"}, '{"q":"cats"}')]
        made = prepared(tmp_path, rows, "conversation", tokenizer)
        assert [scored(tokenizer, t.trunk) for t in made.items] == ['find({"q": "cats"})<|im_end|>three<|im_end|>'] * 2


FORGETFUL = (  # renders the first call only, and no text beside it
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['tool_calls'] %}"
    "{{ m['tool_calls'][0]['function'] | tojson }}{% else %}{{ m['content'] }}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_a_call_that_the_template_leaves_out_is_refused(tmp_path: Path, folder: Path) -> None:
    tokenizer = load_tokenizer(folder, chat_template=UNMARKED_CHATML)
    with pytest.raises(DataError, match=r"leaves out the tool call of message 1 \(find\).*model.chat_template"):
        prepared(tmp_path, [{"messages": calling(FLAT)}], "conversation", tokenizer)
    forgetful = load_tokenizer(folder, chat_template=FORGETFUL)
    assert prepared(tmp_path, [{"messages": calling(FLAT)}], "conversation", forgetful).items
    with pytest.raises(DataError, match="leaves out one of 2 tool calls of message 1"):
        prepared(tmp_path, [{"messages": calling(FLAT, {"name": "g", "arguments": {}})}], "conversation", forgetful)
    report = prepared(tmp_path, [{"messages": calling(FLAT, content="I look")}], "conversation", forgetful).report
    assert "text beside a tool call (once" in report.sources[0].notes[0]


def test_nulls_stay_where_rows_are_json_and_go_where_columns_invent_them(tmp_path: Path, qwen: ChatTokenizer) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from align.data.prepare import prepare
    from align.data.sources import open_source
    from tests.unit.data.build import source

    rows = [{"tools": [SCHEMA], "messages": calling({"function": {"name": "find", "arguments": a}})}
            for a in (ARGUMENTS, AS_TEXT)]  # fmt: skip
    (tmp_path / "array.json").write_text(json.dumps(rows))
    for path in (write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "array.json"):
        items = prepare((source(path),), "conversation", qwen, seed=0).items
        assert [scored(qwen, t.trunk) for t in items] == [TARGET, TARGET]
        assert json.dumps(SCHEMA) in text(qwen, items[0].trunk)
    calls = [{"function": {"name": "f", "arguments": {"a": 1}}}, {"function": {"name": "g", "arguments": {"b": "x"}}}]
    table = pa.Table.from_pylist(
        [{"messages": calling(call), "extra": {"level": n or None}} for n, call in enumerate(calls)]
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as f, pa.ipc.new_stream(f, table.schema) as writer:
        writer.write_table(table)
    for name in ("rows.parquet", "rows.arrow"):
        made = prepare((source(tmp_path / name),), "conversation", qwen, seed=0)
        assert '{"name": "f", "arguments": {"a": 1}}' in scored(qwen, made.items[0].trunk)
        assert '{"name": "g", "arguments": {"b": "x"}}' in scored(qwen, made.items[1].trunk)
        assert set(made.report.sources[0].unread) == {"column 'extra'"}, "no null of Arrow's counts as said"
    first = next(open_source(source(tmp_path / "rows.parquet")).rows())
    assert first.values["extra"] == {"level": None}, "rewards see a row as it is"  # type: ignore[union-attr]


def test_openais_preference_files_are_pairs_with_their_tools(tmp_path: Path, qwen: ChatTokenizer) -> None:
    row = {
        "input": {"messages": [ASK], "tools": [SCHEMA], "parallel_tool_calls": True},
        "preferred_output": [calling(FLAT)[1]],
        "non_preferred_output": [{"role": "assistant", "content": "no"}],
    }
    made = prepared(tmp_path, [row], "pair", qwen)
    tree = made.items[0]
    assert [scored(qwen, b) for b in tree.branches] == [f"{THOUGHT}{CALL}<|im_end|>", f"{THOUGHT}no<|im_end|>"]
    assert json.dumps(SCHEMA) in text(qwen, tree.trunk)
    assert set(made.report.sources[0].unread) == {"key 'parallel_tool_calls' of `input`"}


def test_a_reference_answer_that_calls_a_tool_is_the_call(tmp_path: Path, qwen: ChatTokenizer) -> None:
    rows = [{"messages": calling(FLAT)[:2]}, {"messages": calling(FLAT, FLAT, content="I look")[:2]}]
    answers = [i.row["reference_answer"] for i in prepared(tmp_path, rows, "prompt", qwen).items]
    assert json.loads(answers[0]) == FLAT
    assert answers[1].startswith("I look\n") and json.loads(answers[1].split("\n")[1]) == [FLAT, FLAT]


def test_calls_written_as_text_stay_text_and_are_named_where_the_template_writes_others(
    tmp_path: Path, qwen: ChatTokenizer, tokenizer: ChatTokenizer
) -> None:
    row = {"messages": [ASK, {"role": "assistant", "content": CALL}]}
    made = prepared(tmp_path, [row], "conversation", qwen)
    assert scored(qwen, made.items[0].trunk) == f"{THOUGHT}{CALL}<|im_end|>" and not made.report.sources[0].notes
    made = prepared(tmp_path, [row], "conversation", tokenizer)  # ours writes them so, too
    assert scored(tokenizer, made.items[0].trunk) == f"{CALL}<|im_end|>" and not made.report.sources[0].notes


def test_calls_as_other_models_write_them_and_ends_of_turns_in_texts_are_named(
    tmp_path: Path, qwen: ChatTokenizer
) -> None:
    call = '<functioncall> {"name": "find", "arguments": {}} <|im_end|>'
    for mark in ("<functioncall>", "[TOOL_CALLS]", "<|python_tag|>", "<function="):
        row = {"messages": [ASK, {"role": "assistant", "content": call.replace("<functioncall>", mark)}]}
        notes = " ".join(prepared(tmp_path, [row], "conversation", qwen).report.sources[0].notes)
        assert f"tool calls written as {mark} text, which stay text (once" in notes
        assert "texts of messages hold '<|im_end|>', which the tokenizer reads as the token that frames turns" in notes
    plain = {"messages": [ASK, {"role": "assistant", "content": "a function call < 3"}]}
    assert not prepared(tmp_path, [plain], "conversation", qwen).report.sources[0].notes


def test_an_answer_and_its_call_of_which_one_alone_is_learnt_are_refused(tmp_path: Path, qwen: ChatTokenizer) -> None:
    said = {"role": "assistant", "content": "I look", "loss": False}
    call = {"role": "tool_call", "content": FLAT_TEXT}
    with pytest.raises(DataError, match="message 1 of `messages` and the call behind it are one turn"):
        prepared(tmp_path, [{"messages": [ASK, said, call, RESULT, THREE]}], "conversation", qwen)
    both = prepared(tmp_path, [{"messages": [ASK, said, call | {"loss": False}, RESULT, THREE]}], "conversation", qwen)
    assert scored(qwen, both.items[0].trunk) == f"{THOUGHT}three<|im_end|>"
