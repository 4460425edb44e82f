"""The layout that a source's rows have, and their values under our names: as the recipe maps them, as the folder says
that they are from, or as a guess."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from align.data.formats import fields_of, layouts_of
from align.data.formats.base import Layout
from align.data.formats.choosing import candidates, choose
from align.data.formats.written import Values
from align.data.records import Kind
from align.data.sources import Opened, renamed, under_our_names
from align.data.unread import is_filled
from align.recipe.inputs import DataSource


@dataclass(frozen=True)
class LaidOut:
    """layout: of most rows; others: those that it was chosen among. values: of each row, under our names. columns: our
    field -> theirs; for_rewards: those of them that no layout reads. words: for the report. mappings: what made the
    values of the rows, one after the other. seen: their columns that hold something in these rows. free: the recipe
    names neither a format nor columns. written: columns that hold messages as JSON text in them."""

    layout: Layout
    others: Sequence[Layout]
    values: Sequence[Values]
    columns: Mapping[str, str]
    for_rewards: Mapping[str, str]
    words: str
    guessed: bool
    mappings: Sequence[Mapping[str, str]]
    seen: frozenset[str] = frozenset()
    free: bool = False
    written: frozenset[str] = frozenset()

    def of(self, rows: Sequence[dict[str, Any]]) -> LaidOut:
        """More rows of the same source, laid out as the first were."""
        values = [Values.read(row) for row in under_our_names(rows, self.mappings[0])]
        for mapping in self.mappings[1:]:
            values = [Values.read(row) for row in under_our_names(values, mapping)]
        return replace(self, values=values)


def lay_out(source: DataSource, kind: Kind, opened: Opened, rows: Sequence[dict[str, Any]]) -> LaidOut:
    """Raises DataError where no layout of this kind fits, or several, or where a column that is mapped is not there."""
    entry = opened.entry
    columns = {**entry.columns, **source.columns} if entry else dict(source.columns)
    mappings: list[Mapping[str, str]] = [dict(columns)]
    values = [Values.read(row) for row in renamed(rows, columns, opened.path)]
    layouts, format = layouts_of(source.format or (entry.format if entry else None))
    names = frozenset(columns) & fields_of(layouts)
    for_rewards = {ours: theirs for ours, theirs in columns.items() if ours not in names}
    layout, guess = choose(layouts, kind, values, where=opened.path, format=format, mapped=names)
    if guess is not None:
        mappings.append(guess.columns)
        values = [Values.read(row) for row in renamed(values, guess.columns, opened.path)]
        names |= guess.columns.keys()
        columns |= {ours: columns.get(theirs, theirs) for ours, theirs in guess.columns.items()}
    others = candidates(layouts, kind, format, names & layout.columns)
    words = guess.words if guess else layout.name
    free = not columns and format is None
    seen = frozenset(name for row in rows for name, value in row.items() if is_filled(value))
    written = frozenset[str]().union(*(row.written for row in values))
    guessed = guess is not None
    return LaidOut(layout, others, values, columns, for_rewards, words, guessed, mappings, seen, free, written)
