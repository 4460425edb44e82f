"""ms-swift: `messages` with `rejected_response` | `rejected_messages` | `label`; `query`/`response` of its older data.

`rejected_response` replaces the content of the last assistant turn; `rejected_messages` is a whole second conversation.
`query`/`response` are chat turns (the template is applied), with `history` and `system` like Alpaca's.
"""

from __future__ import annotations

from collections.abc import Callable

from align.data.formats.base import (
    Layout,
    Row,
    answer_of,
    is_list_of,
    is_number,
    label_of,
    text_of,
    tools_of,
    weight_of,
)
from align.data.formats.messages import read_history, read_messages, with_system
from align.data.formats.trl import split_common
from align.data.records import (
    Conversation,
    Kind,
    Message,
    Pair,
    Prompt,
    Record,
    RowError,
    Unpaired,
    assistant,
    prompt_from,
)


def _split(row: Row) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """(prompt, completion): the completion is the last assistant turn."""
    messages = with_system(row, read_messages(row["messages"]))
    if not messages or messages[-1].role != "assistant":
        raise RowError("the last message is not the assistant's")
    return messages[:-1], messages[-1:]


def _rejected_response(row: Row) -> Pair:
    prompt, chosen = _split(row)
    return Pair(prompt, chosen, assistant(text_of(row, "rejected_response")), tools_of(row), weight_of(row))


def _rejected_messages(row: Row) -> Pair:
    chosen = with_system(row, read_messages(row["messages"]))
    rejected = with_system(row, read_messages(row["rejected_messages"], "rejected_messages"))
    prompt, chosen_rest, rejected_rest = split_common(chosen, rejected)
    return Pair(prompt, chosen_rest, rejected_rest, tools_of(row), weight_of(row))


def _labelled(column: str) -> Callable[[Row], Unpaired]:
    def convert(row: Row) -> Unpaired:
        prompt, completion = _split(row)
        return Unpaired(prompt, completion, label_of(row, column), tools_of(row), weight_of(row))

    return convert


def read_query(row: Row) -> tuple[Message, ...]:
    earlier = read_history(row.get("history"), "[query, response]")
    return with_system(row, (*earlier, Message("user", text_of(row, "query"))))


def _query_conversation(row: Row) -> Conversation:
    return Conversation((), read_query(row) + assistant(answer_of(row, "response")), tools_of(row), weight_of(row))


def _query_pair(row: Row) -> Pair:
    chosen, rejected = assistant(text_of(row, "response")), assistant(text_of(row, "rejected_response"))
    return Pair(read_query(row), chosen, rejected, tools_of(row), weight_of(row))


def _query_unpaired(row: Row) -> Unpaired:
    return Unpaired(read_query(row), assistant(text_of(row, "response")), label_of(row), tools_of(row), weight_of(row))


def _query_prompt(row: Row) -> Prompt:
    answer = row.get("response")  # rewards see its column, whatever it holds
    known = answer_of(row, "response") if isinstance(answer, str) or is_number(answer) else ""
    return prompt_from(read_query(row), known, tools_of(row))


def _has_roles(row: Row) -> bool:
    return is_list_of(row["messages"], "role")


def _messages_layout(kind: Kind, more: str, convert: Callable[[Row], Record]) -> Layout:
    return Layout(
        f"swift messages, {more}",
        ("swift",),
        kind,
        frozenset({"messages", more}),
        convert,
        frozenset({"system"}),
        fits=_has_roles,
    )


def _query_layout(kind: Kind, convert: Callable[[Row], Record], *more: str, optional: tuple[str, ...] = ()) -> Layout:
    required = frozenset({"query", *more})
    return Layout("swift query", ("swift",), kind, required, convert, frozenset({"history", "system", *optional}))


LAYOUTS = (
    _messages_layout("pair", "rejected_response", _rejected_response),
    _messages_layout("pair", "rejected_messages", _rejected_messages),
    _messages_layout("unpaired", "label", _labelled("label")),
    _messages_layout("unpaired", "kto_tag", _labelled("kto_tag")),
    _query_layout("conversation", _query_conversation, "response"),
    _query_layout("pair", _query_pair, "response", "rejected_response"),
    _query_layout("unpaired", _query_unpaired, "response", "label"),
    _query_layout("prompt", _query_prompt, optional=("response",)),
)
