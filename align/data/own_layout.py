"""Records as rows of our own layout: what any layout said, written so that nothing has to be guessed again.

conversation   messages | prompt, completion | text (plain)
pair           prompt, chosen, rejected     margin
unpaired       prompt, completion, label
prompt         prompt [reference_answer], and the row's other columns
all            tools, weight (where it is not 1), the template's variables
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align.data.records import Conversation, Message, Pair, Prompt, Record, Text, Unpaired


def row_of(record: Record) -> dict[str, Any]:
    """A row from which the layouts read the same record."""
    if isinstance(record, Conversation):
        row = _conversation(record)
    elif isinstance(record, Pair):
        row = {} if record.implicit else {"prompt": _text(record.prompt)}
        row |= {"chosen": _text(record.chosen), "rejected": _text(record.rejected)}
    elif isinstance(record, Unpaired):
        row = {"prompt": _text(record.prompt), "completion": _text(record.completion), "label": record.desirable}
    elif isinstance(record, Prompt):
        row = {"prompt": _text(record.prompt)}
        if record.reference_answer is not None:
            row["reference_answer"] = record.reference_answer
    else:
        raise TypeError(f"no layout is written for a {type(record).__name__}")
    if record.tools:
        row["tools"] = [dict(tool) for tool in record.tools]
    if record.weight != 1.0:
        row["weight"] = record.weight
    return row | dict(record.arguments)


def _conversation(record: Conversation) -> dict[str, Any]:
    if isinstance(record.completion, str):
        if not record.prompt:
            return {"text": record.completion}
        return {"prompt": _text(record.prompt), "completion": record.completion}
    if not isinstance(record.prompt, str):
        return {"messages": [_message(m) for m in (*record.prompt, *record.completion)]}
    return {"prompt": record.prompt, "completion": _text(record.completion)}


def _text(text: Text) -> Any:
    return text if isinstance(text, str) else [_message(message) for message in text]


def _message(message: Message) -> dict[str, Any]:
    content: Any = message.content
    if not isinstance(content, str):
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": part.kind, part.kind: part.source}
            for part in content
        ]
    said: Mapping[str, Any] = {**message.extra, **message.more}
    flag = {} if message.scored else {"loss": False}
    return {"role": message.role, "content": content, **said, **flag}
