"""Whatever stands in a list of messages or of tools is read, or the row's problem."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.formats.messages import read_messages
from align.data.formats.tools import schemas_of
from align.data.records import RowError

KEYS = [
    "role", "from", "type", "content", "value", "parts", "tool_calls", "function_call", "name", "arguments", "input",
    "function", "functionCall", "thinking", "text", "loss", "train_detail", "tool_call_id", "human", "assistant",
]  # fmt: skip
WORDS = ["user", "assistant", "tool", "gpt", "function_call", "tool_use", "tool_result", "[]", '{"name": "f"}', "{", ""]
LEAVES = st.none() | st.booleans() | st.integers(-2, 10**20) | st.floats() | st.sampled_from(WORDS)
INNER = st.dictionaries(st.sampled_from(KEYS), LEAVES, max_size=3)
VALUES = LEAVES | INNER | st.lists(LEAVES | INNER, max_size=2)
MESSAGES = st.lists(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4) | VALUES, max_size=3)


@settings(max_examples=150, deadline=None)
@given(MESSAGES, VALUES)
def test_any_json_in_any_place_is_messages_or_the_rows_problem(messages: Any, tools: Any) -> None:
    for value in (messages, tools):
        with suppress(RowError):
            assert all(isinstance(m.text, str) and m.role for m in read_messages(value))
    with suppress(RowError):
        assert all(isinstance(schema, dict) for schema in schemas_of(tools))
