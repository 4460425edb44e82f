"""Alpaca: `instruction`, `input`, `output`, `history`, `system`; `chosen`/`rejected` or `kto_tag` for preferences.

As in LLaMA-Factory: the user's turn is the instruction and, where there is one, the input on the next line; `history`
is a list of [question, answer] that comes before it, whose answers are scored like every assistant turn. Seed tasks of
Self-Instruct (Stanford's, BELLE's) have input and output in `instances: [{input, output}]`, one of them a row. What
else an instance says is named in the report, or refused where the answer may depend on it (Unnatural Instructions').
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from align.data.formats.base import (
    Layout,
    Row,
    answer_of,
    is_list_of,
    label_of,
    optional_text,
    text_of,
    tools_of,
    weight_of,
)
from align.data.formats.messages import read_history, with_system
from align.data.formats.needed import needed
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
from align.data.unread import is_filled
from align.data.values import kind_of

_OPTIONAL = frozenset({"input", "history", "system"})


def read_prompt(row: Row) -> tuple[Message, ...]:
    question = "\n".join(part for part in (text_of(row, "instruction"), optional_text(row, "input")) if part)
    return with_system(row, (*read_history(row.get("history"), "[question, answer]"), Message("user", question)))


def _conversation(row: Row) -> Conversation:
    return Conversation((), read_prompt(row) + assistant(answer_of(row, "output")), tools_of(row), weight_of(row))


def _pair(row: Row) -> Pair:
    chosen, rejected = assistant(text_of(row, "chosen")), assistant(text_of(row, "rejected"))
    return Pair(read_prompt(row), chosen, rejected, tools_of(row), weight_of(row))


def _unpaired(label: str) -> Callable[[Row], Unpaired]:
    def convert(row: Row) -> Unpaired:
        answer = assistant(answer_of(row, "output"))
        return Unpaired(read_prompt(row), answer, label_of(row, label), tools_of(row), weight_of(row))

    return convert


def _prompt(row: Row) -> Prompt:
    return prompt_from(read_prompt(row), answer_of(row, "output", needed=False), tools_of(row))


def _layout(kind: Kind, convert: Callable[[Row], Record], *more: str) -> Layout:
    required = frozenset({"instruction", *more})
    return Layout("alpaca", ("alpaca",), kind, required, convert, (_OPTIONAL | {"output"}) - required)


def _instance(read: Callable[[Row], Record]) -> Callable[[Row], Record]:
    """Of a row that has its input and output inside its one instance."""

    def convert(row: Row) -> Record:
        instances = row["instances"]
        if not isinstance(instances, list) or not all(isinstance(one, Mapping) for one in instances):
            raise RowError(f"`instances` must be a list of objects with input and output, got {kind_of(instances)}")
        if len(instances) != 1:
            raise RowError(
                f"`instances` has {len(instances)} of them, and a row is one: a generator (file.py:function) can make "
                "a row of each"
            )
        inside = instances[0]
        left = _beside(row, inside)
        read_of = ("instruction", "system", "weight", "tools", "functions")
        given = {name: value for name in read_of if (value := row.get(name)) is not None}
        record = read({**given, "input": inside.get("input"), "output": inside.get("output")})
        if left and isinstance(record, Conversation) and not isinstance(record.completion, str):
            first, *rest = record.completion
            record = replace(record, completion=(replace(first, unread=(*first.unread, *left)), *rest))
        return record

    return convert


_TOLD = frozenset({"label", "explanation", "id", "name", "lang", "language", "source", "score"})
"""What an instance may say beside its input and output that changes neither: all else may be of its question."""


def _beside(row: Row, inside: Row) -> list[str]:
    """What an instance says and nothing reads, for the report. Raises RowError where it may be of the question or says
    another thing than the row."""
    said = {name: value for name, value in inside.items() if name not in ("input", "output") and is_filled(value)}
    said = {name: value for name, value in said.items() if name != "constraints" or value not in ("None", "None.")}
    for name, value in said.items():
        if name not in _TOLD and not (name in ("instruction", "system") and value == row.get(name)):
            raise RowError(
                f"the instance has `{name}` beside its input and output, on which the answer may depend; a function of "
                "the row (`format: mine.py:rows`) can say what is asked, with `instruction` and `input`"
            )
    for name in (name for name in row if needed(name) and name != "instances"):
        if is_filled(value := row.get(name)) and value != inside.get(name):
            raise RowError(f"the row has `{name}`, and its instance an input of its own: one of them is meant")
    return [f"key {name!r} of `instances`" for name in said if name in _TOLD]


def _has_instances(row: Row) -> bool:
    return is_list_of(row["instances"], "input", "output")


def _instances(kind: Kind, read: Callable[[Row], Record]) -> Layout:
    required, optional = frozenset({"instruction", "instances"}), frozenset({"system"})
    fits, convert = _has_instances, _instance(read)
    return Layout("self-instruct", ("alpaca",), kind, required, convert, optional, fits=fits, verbatim=True)


LAYOUTS = (
    _layout("conversation", _conversation, "output"),
    _layout("pair", _pair, "chosen", "rejected"),
    _layout("unpaired", _unpaired("label"), "output", "label"),
    _layout("unpaired", _unpaired("kto_tag"), "output", "kto_tag"),
    _layout("prompt", _prompt),
    _instances("conversation", _conversation),
    _instances("prompt", _prompt),
)
