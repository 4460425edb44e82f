"""Layouts: which one fits, and what each row becomes."""

from __future__ import annotations

from typing import Any

import pytest

from align.data.formats import LAYOUTS
from align.data.formats.choosing import choose
from align.data.records import Conversation, Kind, Message, Pair, Prompt, RowError, Unpaired, check
from align.errors import DataError
from tests.unit.data.build import turns

USER, ANSWER, BAD = Message("user", "hi"), Message("assistant", "hello"), Message("assistant", "go away")


def record(kind: Kind, row: dict[str, Any], **options: Any) -> Any:
    layout, guess = choose(LAYOUTS, kind, [row], where="data.jsonl", **options)
    assert guess is None
    made = layout.convert(row)
    check(made)
    return made


SHAREGPT = [{"from": "system", "value": "be kind"}, {"from": "human", "value": "hi"}]


@pytest.mark.parametrize(
    ("kind", "row", "wanted"),
    [
        ("conversation", {"prompt": "hi", "completion": "hello"}, Conversation("hi", "hello")),
        ("conversation", {"text": "once upon"}, Conversation("", "once upon")),
        (
            "conversation",
            {"prompt": turns("hi"), "completion": [{"role": "assistant", "content": "hello"}]},
            Conversation((USER,), (ANSWER,)),
        ),
        (
            "conversation",
            {"prompt": "hi", "completion": "hello", "system": "be kind"},
            Conversation((Message("system", "be kind"), USER), (ANSWER,)),
        ),
        (
            "conversation",
            {"prompt": turns("hi"), "completion": turns("hi", "hello")},
            Conversation((USER,), (ANSWER,)),
        ),
        (
            "conversation",
            {"system": "be kind", "prompt": "hi", "completion": turns("hi", "hello")},
            Conversation((Message("system", "be kind"), USER), (ANSWER,)),
        ),
        (
            "unpaired",
            {"prompt": "hi", "completion": turns("hi", "hello"), "label": True},
            Unpaired((USER,), (ANSWER,), True),
        ),
        (
            "pair",
            {"system": "be kind", "prompt": "hi", "chosen": turns("hi", "hello"), "rejected": turns("hi", "go away")},
            Pair((Message("system", "be kind"), USER), (ANSWER,), (BAD,)),
        ),
        ("conversation", {"messages": turns("hi", "hello")}, Conversation((), (USER, ANSWER))),
        ("conversation", {"conversations": turns("hi", "hello")}, Conversation((), (USER, ANSWER))),
        ("conversation", {"messages": turns("hi", "hello"), "weight": 0.5}, Conversation((), (USER, ANSWER), (), 0.5)),
        (
            "conversation",
            {"conversations": [*SHAREGPT, {"from": "gpt", "value": "hello"}]},
            Conversation((), (Message("system", "be kind"), USER, ANSWER)),
        ),
        (
            "conversation",
            {"instruction": "hi", "input": "you", "output": "hello", "history": [["a", "b"]], "system": ""},
            Conversation((), (Message("user", "a"), Message("assistant", "b"), Message("user", "hi\nyou"), ANSWER)),
        ),
        ("conversation", {"query": "hi", "response": "hello"}, Conversation((), (USER, ANSWER))),
        ("pair", {"prompt": "hi", "chosen": " yes", "rejected": " no"}, Pair("hi", " yes", " no")),
        (
            "pair",
            {"chosen": "The sky is blue", "rejected": "The sky is green"},
            Pair("", "The sky is blue", "The sky is green", implicit=True),
        ),
        (
            "pair",
            {"chosen": turns("hi", "hello"), "rejected": turns("hi", "go away")},
            Pair((USER,), (ANSWER,), (BAD,)),
        ),
        (
            "pair",
            {"prompt": "hi", "chosen": turns("hi", "hello"), "rejected": turns("hi", "go away")},
            Pair((USER,), (ANSWER,), (BAD,)),
        ),
        (
            "pair",
            {"conversations": SHAREGPT[1:], "chosen": {"from": "gpt", "value": "hello"}, "rejected": "go away"},
            Pair((USER,), (ANSWER,), (BAD,)),
        ),
        ("pair", {"instruction": "hi", "chosen": "hello", "rejected": "go away"}, Pair((USER,), (ANSWER,), (BAD,))),
        ("pair", {"messages": turns("hi", "hello"), "rejected_response": "go away"}, Pair((USER,), (ANSWER,), (BAD,))),
        (
            "pair",
            {"messages": turns("hi", "hello"), "rejected_messages": turns("hi", "go away")},
            Pair((USER,), (ANSWER,), (BAD,)),
        ),
        (
            "pair",
            {"query": "hi", "response": "hello", "rejected_response": "go away"},
            Pair((USER,), (ANSWER,), (BAD,)),
        ),
        ("unpaired", {"prompt": "hi", "completion": "hello", "label": True}, Unpaired("hi", "hello", True)),
        ("unpaired", {"messages": turns("hi", "hello"), "label": False}, Unpaired((USER,), (ANSWER,), False)),
        ("unpaired", {"messages": turns("hi", "hello"), "kto_tag": True}, Unpaired((USER,), (ANSWER,), True)),
        ("unpaired", {"instruction": "hi", "output": "hello", "kto_tag": True}, Unpaired((USER,), (ANSWER,), True)),
        ("prompt", {"prompt": "hi", "level": 3}, Prompt("hi")),
        ("prompt", {"prompt": "hi", "completion": "hello"}, Prompt("hi", "hello")),
        ("prompt", {"prompt": turns("hi")}, Prompt((USER,))),
        ("prompt", {"messages": turns("hi", "hello")}, Prompt((USER,), "hello")),
        ("prompt", {"instruction": "hi", "output": "hello"}, Prompt((USER,), "hello")),
        ("prompt", {"query": "hi"}, Prompt((USER,))),
    ],
)
def test_every_layout_in_the_wild_becomes_its_record(kind: Kind, row: dict[str, Any], wanted: Any) -> None:
    assert record(kind, row) == wanted


def test_null_columns_do_not_count_as_there(tmp_path: Any) -> None:
    row = {"messages": turns("hi", "hello"), "prompt": None, "tools": None, "images": []}
    assert record("conversation", row) == Conversation((), (USER, ANSWER))


def test_two_layouts_that_fit_are_refused_with_the_candidates() -> None:
    row = {"messages": turns("hi", "hello"), "prompt": "hi", "completion": "hello"}
    with pytest.raises(DataError, match="several layouts fit") as error:
        record("conversation", row)
    assert "trl: completion, prompt" in str(error.value) and "openai messages" in str(error.value)
    assert record("conversation", row, format="openai") == Conversation((), (USER, ANSWER))
    mapped = frozenset({"prompt", "completion"})
    assert record("conversation", row, mapped=mapped) == Conversation("hi", "hello")


def test_the_layout_that_uses_more_columns_wins_over_one_that_uses_fewer() -> None:
    row = {"instruction": "hi", "input": "", "output": "x", "chosen": "hello", "rejected": "go away"}
    assert record("pair", row) == Pair((USER,), (ANSWER,), (BAD,))


def test_an_unknown_layout_says_what_was_found_and_what_was_expected() -> None:
    with pytest.raises(DataError, match="columns found: question, turns") as error:
        record("prompt", {"question": 1, "turns": ["a"]})
    assert "openai messages: messages" in str(error.value) and "columns:" in str(error.value)
    with pytest.raises(DataError, match="unknown format 'sharegtp'") as error:
        record("prompt", {"prompt": "x"}, format="sharegtp")
    assert "did you mean 'sharegpt'?" in str(error.value)


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("conversation", {"prompt": "hi", "completion": " \n"}, "completion is empty"),
        ("conversation", {"messages": turns("hi")}, "no assistant turn"),
        ("conversation", {"messages": turns("hi", "")}, "completion is empty"),
        ("conversation", {"messages": [{"role": "alien", "content": "x"}]}, "unknown role 'alien'"),
        ("conversation", {"prompt": 3, "completion": "x"}, "`prompt` must be text, got 3"),
        ("conversation", {"prompt": "hi", "completion": "x", "weight": "much"}, "`weight` must be a number"),
        (
            "conversation",
            {"messages": [*turns("hi"), {"role": "assistant", "content": "x", "weight": 0}]},
            "is marked as not to be learnt",
        ),
        (
            "conversation",
            {"messages": [*turns("hi"), {"role": "assistant", "content": "x", "weight": 0.5}]},
            "weight must be 0 or 1",
        ),
        ("pair", {"prompt": "hi", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
        ("pair", {"chosen": "abc", "rejected": "abc"}, "chosen and rejected are the same"),
        ("pair", {"prompt": "hi", "chosen": "a", "rejected": ""}, "rejected is empty"),
        ("pair", {"prompt": turns("hi"), "chosen": turns("x", "y"), "rejected": "z"}, "starts with a user turn"),
        ("unpaired", {"prompt": "hi", "completion": "x", "label": 1}, "`label` must be true or false, or words"),
        ("unpaired", {"prompt": "hi", "completion": "x", "label": "so-so"}, "good or bad, got 'so-so'"),
        ("unpaired", {"messages": turns("hi"), "label": True}, "the last message is not the assistant's"),
        ("prompt", {"prompt": ""}, "the prompt is empty"),
        ("prompt", {"messages": [{"role": "assistant", "content": "x"}]}, "an assistant turn alone is no prompt"),
    ],
)
def test_rows_that_cannot_be_used_say_why(kind: Kind, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        record(kind, row)


def test_text_parts_are_joined_and_tool_calls_keep_their_arguments_as_objects() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "add "}, {"type": "text", "text": "1"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "1", "tool_call_id": "7"},
            {"role": "assistant", "content": "one", "weight": 0},
        ],
        "tools": '[{"name": "add", "parameters": null}]',
    }
    made = record("conversation", row)
    user, calls, tool, last = made.completion
    assert user.content == "add 1" and tool.extra == {"tool_call_id": "7"}
    assert calls.extra["tool_calls"][0]["function"]["arguments"] == {"a": 1} and not calls.is_empty
    assert not last.scored and calls.scored
    assert made.tools == ({"type": "function", "function": {"name": "add", "parameters": None}},)
