"""Alpaca: `instruction`, `input`, `output`, `history`, `system`; `chosen`/`rejected` or `kto_tag` for preferences.

As in LLaMA-Factory: the user's turn is the instruction and, where there is one, the input on the next line; `history`
is a list of [question, answer] that comes before it, whose answers are scored like every assistant turn. Seed tasks of
Self-Instruct (Stanford's, BELLE's) have input and output in `instances: [{input, output}]`, one of them a row.
"""

from __future__ import annotations

from collections.abc import Callable

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
        if len(instances) != 1:
            raise RowError(
                f"`instances` has {len(instances)} of them, and a row is one: a generator (file.py:function) can make "
                "a row of each"
            )
        inside = instances[0]
        strange = sorted(inside.keys() - _INSIDE)
        if strange:
            raise RowError(f"the instance has {strange[0]!r} beside its input and output, which nothing reads")
        read_of = ("instruction", "system", "weight", "tools", "functions")
        return read({**{name: value for name in read_of if (value := row.get(name)) is not None}, **inside})

    return convert


_INSIDE = frozenset({"input", "output"})


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
