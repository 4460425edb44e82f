"""What is read from a model's text: calls as each family writes them, and nothing that looks like one is lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from align.data.template import ChatTemplate
from align.data.tokenizer import ChatTokenizer
from align.episodes.calls import FORMATS, Reply, ToolCall, find_format
from align.errors import Unsupported
from tests.unit.episodes.build import SCHEMAS

Family = Callable[..., ChatTokenizer]

FAMILIES = {
    "qwen2_5": "hermes", "qwen3": "hermes", "qwen3_coder": "qwen3_coder", "llama3_1": "llama", "mistral_v3": "mistral",
    "phi4_mini": "phi", "deepseek_v3": "deepseek", "glm4_5": "glm",
}  # fmt: skip
FIND = ToolCall("find", {"query": "keys", "limit": 3})
_ONE = '{"name": "find", "arguments": {"query": "keys", "limit": 3}}'
_DEEP = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
_FENCED = '```json\n{"query": "keys", "limit": 3}\n```'
WRITTEN = {  # each is the call above
    "hermes": [f"<tool_call>\n{_ONE}\n</tool_call>", f"<tool_call>{_ONE}</tool_call>"],
    "llama": [
        _ONE.replace("arguments", "parameters"),
        "<|python_tag|>" + _ONE.replace("arguments", "parameters"),
        '{"type": "function", "name": "find", "parameters": {"query": "keys", "limit": 3}}',
    ],
    "mistral": [
        f"[TOOL_CALLS] [{_ONE}]",
        '[TOOL_CALLS]find[ARGS]{"query": "keys", "limit": 3}',
        '[TOOL_CALLS]find{"query": "keys", "limit": 3}',
    ],
    "deepseek": [
        _DEEP.format(f"function<｜tool▁sep｜>find\n{_FENCED}"),
        _DEEP.format('find<｜tool▁sep｜>{"query": "keys", "limit": 3}'),
    ],
    "qwen3_coder": [
        "<tool_call>\n<function=find>\n<parameter=query>\nkeys\n</parameter>\n<parameter=limit>\n3\n</parameter>\n"
        "</function>\n</tool_call>",
        "<function=find><parameter=query>keys</parameter><parameter=limit>3</parameter></function>",
    ],
    "glm": [
        "<tool_call>find\n<arg_key>query</arg_key>\n<arg_value>keys</arg_value>\n<arg_key>limit</arg_key>\n"
        "<arg_value>3</arg_value>\n</tool_call>"
    ],
    "phi": [f"<|tool_call|>[{_ONE}]<|/tool_call|>", f"functools[{_ONE}]"],
    "granite": [f"<|tool_call|>[{_ONE}]", f"<tool_call>[{_ONE}]"],
    "gemma": ['<|tool_call>call:find{query:<|"|>keys<|"|>,limit:3}<tool_call|>'],
    "pythonic": [
        '[find(query="keys", limit=3)]',
        "<|python_start|>[find(query='keys', limit=3)]<|python_end|>",
        "<|tool_call_start|>[find(limit=3, query='ke' \"ys\")]<|tool_call_end|>",
    ],
}
CASES = [(name, text) for name, texts in WRITTEN.items() for text in texts]


def read(name: str, text: str, thinking: bool | None = None) -> Reply:
    return FORMATS[name].of(SCHEMAS).parse(text, thinking)


def bare(text: str) -> str:
    """A text without white space, and without what stands around all of a turn's calls."""
    return "".join(text.replace("<｜tool▁calls▁begin｜>", "").replace("<｜tool▁calls▁end｜>", "").split())


def same(reply: Reply, *calls: ToolCall) -> bool:
    return [(c.name, c.arguments) for c in reply.calls] == [(c.name, c.arguments) for c in calls]


@pytest.mark.parametrize(("name", "text"), CASES)
def test_a_call_is_read_with_what_is_said_and_thought_before_it(name: str, text: str) -> None:
    assert same(reply := read(name, text), FIND) and reply.invalid == () and reply.content == ""
    if text[0] not in "{[" or name == "mistral":
        reply = read(name, f"I look.\n\n{text}")
        assert same(reply, FIND) and reply.invalid == () and reply.content == "I look."
    reply = read(name, f"<think>\nwhere?\n</think>\n\n{text}")
    assert same(reply, FIND) and reply.thoughts == "where?" and reply.content == ""
    assert same(read(name, f"where?\n</think>\n\n{text}", thinking=True), FIND)


@pytest.mark.parametrize(("name", "text"), CASES)
def test_a_call_within_thoughts_is_none(name: str, text: str) -> None:
    for thought, thinking in ((f"<think>\n{text}\n", False), (f"{text}\n", True)):
        closed = read(name, f"{thought}</think>\n\nNo.", thinking)
        assert closed == Reply("No.", text), "closed"
        cut = read(name, thought, thinking)
        assert replace(cut, invalid=()) == Reply("", text), "cut in the middle"
        marked = any(marker in text for marker in FORMATS[name].markers)
        assert len(cut.invalid) == marked and "thoughts that do not end" in "".join(
            cut.invalid or ["thoughts that do not end"]
        )
    again = read(name, f"{text}\n<think>{text}</think>{text if text[0] not in '{[f' else ''}")
    assert len(again.calls) <= 2 and again.thoughts == text


@pytest.mark.parametrize(("name", "text"), CASES)
def test_what_is_cut_off_is_an_invalid_call_or_none_at_all(name: str, text: str) -> None:
    """Never another call than the one that was begun, and where its marker is whole never silence."""
    marker = next((m for m in FORMATS[name].markers if text.startswith(m)), "")
    marker = marker or text[: text.index("find") + 5]
    for end in range(len(text)):
        reply = read(name, text[:end])
        assert same(reply) or same(reply, FIND)
        if len(marker) <= end and not reply.calls:
            assert len(reply.invalid) == 1, text[:end]
            assert bare(reply.content) == bare(text[:end])
        elif not reply.calls:
            assert reply == Reply(text[:end]) or reply.invalid


def test_plain_answers_stay_as_they_are() -> None:
    for name in FORMATS:
        for text in ("", " a \n", "2 < 3, [1], {x}", '{"name": "Bob", "age": 3}', '[1, "a"]', "[f] (x)", "a\n\nb\n"):
            assert read(name, text) == Reply(text)


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("hermes", "<tool_call>\n{'name': 'find'}\n</tool_call>", "not valid JSON"),
        ("hermes", '<tool_call>{"name": "find", "arguments": "{}"}</tool_call>', "are an object, not '{}'"),
        ("hermes", '<tool_call>{"name": "find", "arguments": [1]}</tool_call>', "are an object, not"),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>', 'has a "name"'),
        ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>', 'has a "name"'),
        ("hermes", "<tool_call>[]</tool_call>", "calls nothing"),
        ("hermes", "<tool_call></tool_call>", "nothing stands where"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1, "a": 2}}</tool_call>', "'a' stands twice"),
        ("hermes", '<tool_call>{"name": "f", "name": "g"}</tool_call>', "'name' stands twice"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', "NaN is no JSON value"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1e999}}</tool_call>', "not finite"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "\\ud83d"}}</tool_call>', "half a character"),
        ("hermes", f'<tool_call>{{"name": "f", "arguments": {{"a": {"9" * 5000}}}}}</tool_call>', "5000 digits"),
        ("hermes", f'<tool_call>{{"name": "f", "arguments": {{"a": {"[" * 5000}', "nested too deeply"),
        ("hermes", f"<tool_call>{'[' * 200}{']' * 200}</tool_call>", "nested more than 100"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}} and more</tool_call>', "no </tool_call> stands behind"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}, "extra": 1}</tool_call>', "'extra' beside"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}, "parameters": {}}</tool_call>', "and \"parameters\""),
        ("llama", "<|python_tag|>print(3)", "not valid JSON"),
        ("llama", '{"name": "find", "parameters": 3}', "are an object"),
        ("mistral", "[TOOL_CALLS] none", "no [ARGS]"),
        ("mistral", "[TOOL_CALLS][]", "calls nothing"),
        ("deepseek", "<｜tool▁calls▁begin｜>x", "no <｜tool▁call▁begin｜> behind"),
        ("deepseek", "a<｜tool▁calls▁end｜>", "nothing began"),
        ("deepseek", _DEEP.format("function<｜tool▁sep｜>find\n```json\n{}\n"), "fence"),
        ("qwen3_coder", "<tool_call>find</tool_call>", "no <function=name>"),
        ("qwen3_coder", "<function=f><parameter=a>1</parameter><parameter=a>2</parameter></function>", "twice"),
        ("glm", "<tool_call>find<arg_key>a</arg_key></tool_call>", "no <arg_value>"),
        ("glm", "<tool_call></tool_call>", "no name"),
        ("gemma", "<|tool_call>find<tool_call|>", "call:name{ is missing"),
        ("gemma", '<|tool_call>call:f{a:<|"|>x}<tool_call|>', "no <|\"|> stands behind the text"),
        ("gemma", "<|tool_call>call:f{a:1,a:2}<tool_call|>", "'a' stands twice"),
        ("pythonic", "[find(3)]", "an argument's name"),
        ("pythonic", "[find(a=__import__('os'))]", "is missing"),
        ("pythonic", "[find(a=1, a=2)]", "'a' stands twice"),
        ("pythonic", "[find(a={'b': 1, 'b': 2})]", "'b' stands twice"),
        ("pythonic", "[find(a=1e999)]", "not finite"),
        ("pythonic", f"[find(a={'[' * 5000}{']' * 5000})]", "nested more than"),
    ],
)  # fmt: skip
def test_what_looks_like_a_call_and_is_none_says_why(name: str, text: str, why: str) -> None:
    reply = read(name, text)
    assert reply.calls == () and len(reply.invalid) == 1 and why in reply.invalid[0]
    assert bare(reply.content) == bare(text)


def test_valid_calls_beside_invalid_ones_are_read() -> None:
    text = f"a <tool_call>{_ONE}</tool_call> b <tool_call>{{</tool_call> c <tool_call>{_ONE}</tool_call> d"
    reply = read("hermes", text)
    assert same(reply, FIND, FIND) and len(reply.invalid) == 1
    assert reply.content == "a\nb\n<tool_call>{</tool_call>\nc\nd"


def test_markers_within_a_calls_own_texts_end_nothing() -> None:
    said = "</tool_call> <tool_call> <think> </think> [TOOL_CALLS] <|tool_call|>"
    call = f'{{"name": "find", "arguments": {{"query": "{said}"}}}}'
    for name, text in (
        ("hermes", f"<tool_call>{call}</tool_call>"),
        ("mistral", f"[TOOL_CALLS][{call}]"),
        ("phi", f"<|tool_call|>[{call}]<|/tool_call|>"),
        ("llama", call.replace("arguments", "parameters")),
        ("pythonic", f"[find(query='{said}')]"),
    ):
        assert same(read(name, text, False), ToolCall("find", {"query": said})), name


def test_texts_in_tags_become_values_of_the_schemas_types() -> None:
    parameters = {"names": '["a", "b"]', "sure": "true", "share": "0.5", "extra": '{"a": null}'}
    want = {"names": ["a", "b"], "sure": True, "share": 0.5, "extra": {"a": None}}
    glm = "".join(f"<arg_key>{k}</arg_key><arg_value>{v}</arg_value>" for k, v in parameters.items())
    assert same(read("glm", f"<tool_call>forget{glm}</tool_call>"), ToolCall("forget", want))
    coder = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in (parameters | {"sure": "True"}).items())
    assert same(read("qwen3_coder", f"<function=forget>{coder}</function>"), ToolCall("forget", want))
    for tool, key, text in (
        ("find", "query", "3"),
        ("find", "limit", "many"),
        ("find", "other", "3"),
        ("no", "a", "3"),
    ):
        reply = read("glm", f"<tool_call>{tool}<arg_key>{key}</arg_key><arg_value>{text}</arg_value></tool_call>")
        assert same(reply, ToolCall(tool, {key: text}))  # as it stands: what is wrong with it the tool's own check says


def test_python_escapes_are_read_as_python_reads_them() -> None:
    reply = read("pythonic", r"""[f(a='it\'s\n\u00fc\x41\d', b=[1, -2.5, None, true], c={'k': (1,)},), g.h()]""")
    want = {"a": "it's\nüA\\d", "b": [1, -2.5, None, True], "c": {"k": [1]}}
    assert same(reply, ToolCall("f", want), ToolCall("g.h", {}))


def test_gemmas_values_nest() -> None:
    text = (
        '<|tool_call>call:f{a:[1,{<|"|>b c<|"|>:null}],d:<|"|>"x", }<tool_call|> <|"|>,e:{f:-2.5,g:true}}<tool_call|>'
    )
    want = {"a": [1, {"b c": None}], "d": '"x", }<tool_call|> ', "e": {"f": -2.5, "g": True}}
    assert same(read("gemma", text), ToolCall("f", want))


def test_several_calls_stand_side_by_side() -> None:
    one = _ONE.replace("arguments", "parameters")
    assert same(read("llama", f"{one}; {one}\n{one}"), FIND, FIND, FIND)
    assert same(read("mistral", f"[TOOL_CALLS][{_ONE}, {_ONE}]"), FIND, FIND)
    assert same(read("mistral", '[TOOL_CALLS]f[ARGS]{}[TOOL_CALLS]g[CALL_ID]123456789[ARGS]{}'),
                ToolCall("f", {}), ToolCall("g", {}))  # fmt: skip


def test_ids_are_the_models_where_a_template_takes_them() -> None:
    calls = ", ".join(f'{{"name": "f", "arguments": {{}}, "id": "{i}"}}' for i in ("abc123DEF", "no", "a-b-c-d-e"))
    reply = read("mistral", f"[TOOL_CALLS][{calls}]")
    assert [c.id for c in reply.calls] == ["abc123DEF", None, None]
    assert [c["id"] for c in reply.message(calls_before=7)["tool_calls"]] == ["abc123DEF", "call00008", "call00009"]


def test_a_reply_is_a_message_as_openai_writes_it() -> None:
    assert Reply("Hi.").message() == {"role": "assistant", "content": "Hi."}
    message = read("hermes", f"<think>hm</think>Look.<tool_call>{_ONE}</tool_call>").message()
    assert message == {
        "role": "assistant", "content": "Look.", "reasoning_content": "hm",
        "tool_calls": [{"type": "function", "id": "call00000",
                        "function": {"name": "find", "arguments": {"query": "keys", "limit": 3}}}],
    }  # fmt: skip


FLOODS = {
    "markers": lambda name: "".join(FORMATS[name].markers),
    "markers and a brace": lambda name: FORMATS[name].markers[0] + '{"',
    "open texts": lambda name: FORMATS[name].markers[0] + '{"name": "f", "arguments": {"a": "',
    "bad calls": lambda name: FORMATS[name].markers[0] + '{"name": "f", "arguments": 3}',
    "whole": lambda name: WRITTEN[name][0] + "\n",
    "last": lambda name: WRITTEN[name][-1] + ";",
    "half": lambda name: WRITTEN[name][0][: len(WRITTEN[name][0]) * 2 // 3],
    "thoughts": lambda name: "<think></think>",
    "open thoughts": lambda name: "</think><think>",
    "brackets": lambda name: "[f(a={'b':[",
    "spaces": lambda name: " " * 50,
    "backslashes": lambda name: FORMATS[name].markers[0] + "[f(a='" + "\\" * 30,
    "tags": lambda name: "<tool_call><function=f><parameter=a><arg_key>a</arg_key><arg_value>",
}


@pytest.mark.parametrize("name", FORMATS)
def test_half_a_million_characters_of_anything_are_read_in_a_moment(name: str) -> None:
    for what, make in FLOODS.items():
        unit = make(name)
        for text in (unit * (500_000 // len(unit)), unit * (250_000 // len(unit)) + "</parameter>" * 99 + "]}\"'"):
            begun = time.process_time()
            reply = read(name, text, False)
            assert time.process_time() - begun < 3, what
            assert len(reply.invalid) < 40


@pytest.mark.parametrize(("name", "wanted"), FAMILIES.items())
def test_the_format_is_the_one_that_the_template_writes(family: Family, name: str, wanted: str) -> None:
    found = find_format(family(name), SCHEMAS)
    assert found.name == wanted
    assert same(found.parse(WRITTEN[wanted][0], False), FIND)


def test_thoughts_that_the_generation_prompt_begins_are_split_off(family: Family) -> None:
    said = "hm\n</think>\n\nYes."
    assert find_format(family("deepseek_v3"), SCHEMAS).parse(said) == Reply("Yes.", "hm")
    assert find_format(family("deepseek_v3"), SCHEMAS).parse("hm, <think>") == Reply("", "hm, <think>")
    assert find_format(family("qwen3"), SCHEMAS).parse("<think>\nhm\n</think>\n\nYes.") == Reply("Yes.", "hm")


def test_a_format_is_chosen_by_name_and_others_are_refused_with_the_way_out(family: Family) -> None:
    assert find_format(family("smollm2"), SCHEMAS, "hermes").name == "hermes"
    with pytest.raises(Unsupported, match=r"writes no tool calls(.|\n)*tools_in: prompt") as caught:
        find_format(family("smollm2"), SCHEMAS)
    assert "chat_template.jinja" in str(caught.value.where)
    with pytest.raises(Unsupported, match=r"hermse(.|\n)*hermes, "):
        find_format(family("qwen3"), SCHEMAS, "hermse")


def test_a_named_format_must_find_the_calls_of_a_template_that_no_format_reads_whole(family: Family) -> None:
    def odd(call: str) -> ChatTokenizer:
        plain = family("smollm2")
        written = (
            "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
            "{% for c in m['tool_calls'] or [] %}" + call + "{% endfor %}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        template = ChatTemplate(written, plain.require_template().variables)
        return ChatTokenizer(plain.backend, plain.named_tokens, template, eos_ids=plain.declared_ids)

    lossy = odd('<tool_call>{"name": "{{ c.function.name }}", "arguments": {}}</tool_call>')
    with pytest.raises(Unsupported, match="none of the formats that are known"):
        find_format(lossy, SCHEMAS)
    assert find_format(lossy, SCHEMAS, "hermes").name == "hermes", "it finds the calls"
    strange = odd("!!{{ c.function.name }} {{ c.function.arguments }}!!")
    with pytest.raises(Unsupported, match=r"in which hermes finds none(.|\n)*tools_in: prompt"):
        find_format(strange, SCHEMAS, "hermes")


def test_odd_schemas_are_no_reason_to_fail() -> None:
    either = {"anyOf": [{"type": "null"}, {"type": ["integer", "string"]}]}
    properties = {"a": either, "b": {"enum": [1, 2]}, "c": True}
    odd: list[dict[str, Any]] = [{"function": {"name": "f", "parameters": {"properties": properties}}}, {}]
    texts = {"a": "null", "b": "2", "c": "3"}
    tags = "".join(f"<arg_key>{k}</arg_key><arg_value>{v}</arg_value>" for k, v in texts.items())
    reply = FORMATS["glm"].of(odd).parse(f"<tool_call>f{tags}</tool_call>")
    assert same(reply, ToolCall("f", {"a": None, "b": 2, "c": "3"}))
