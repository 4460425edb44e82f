"""Labelled texts, for classification and regression: any prompt layout with a column `label` or `labels`.

    text [text_pair]                     plain text, as a classifier of transformers is given it; a second text on the
                                         next line
    messages, conversations              rendered by the chat template, whole, without generation prompt
    instruction [input, history, system] the same (Alpaca)
    query [history, system]              the same (ms-swift)

What a label may be is for the stage to say: names, indices, truth values or numbers. A row without one is read too:
a model is also asked about texts whose label nobody knows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from align.data.formats import alpaca
from align.data.formats.base import Layout, Row, is_list_of, optional_text, text_of, tools_of, weight_of
from align.data.formats.messages import read_messages, with_system
from align.data.formats.swift import read_query
from align.data.records import Labelled, RowError, Text

_LABELS = frozenset({"label", "labels"})
_TURNS = frozenset({"history", "system"})


def label_of(row: Row) -> Any:
    """The label as it stands; None where there is none."""
    given = [name for name in sorted(_LABELS) if row.get(name) is not None]
    if len(given) > 1:
        raise RowError("the row has `label` and `labels`; one of them is the label")
    return row[given[0]] if given else None


def _text(row: Row) -> Text:
    first, second = text_of(row, "text"), optional_text(row, "text_pair")
    return f"{first}\n{second}" if second else first


def _layout(
    name: str,
    formats: tuple[str, ...],
    column: str,
    read: Callable[[Row], Text],
    optional: frozenset[str] = frozenset(),
    fits: Callable[[Row], bool] = lambda row: True,
) -> Layout:
    def convert(row: Row) -> Labelled:
        return Labelled(read(row), label_of(row), tools_of(row), weight_of(row))

    return Layout(name, formats, "labelled", frozenset({column}), convert, optional | _LABELS, fits=fits)


def _of_messages(column: str) -> tuple[Layout, ...]:
    return (
        _layout(
            f"openai {column}",
            ("openai", "trl", "swift", "messages"),
            column,
            lambda row: with_system(row, read_messages(row[column], column)),
            frozenset({"system"}),
            lambda row: is_list_of(row[column], "role"),
        ),
        _layout(
            f"sharegpt {column}",
            ("sharegpt",),
            column,
            lambda row: with_system(row, read_messages(row[column], column)),
            frozenset({"system"}),
            lambda row: is_list_of(row[column], "from"),
        ),
    )


LAYOUTS = (
    _layout("labelled text", ("text",), "text", _text, frozenset({"text_pair"})),
    *_of_messages("messages"),
    *_of_messages("conversations"),
    _layout("alpaca", ("alpaca",), "instruction", alpaca.read_prompt, _TURNS | {"input"}),
    _layout("swift query", ("swift",), "query", read_query, _TURNS),
)
