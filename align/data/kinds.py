"""Which stages could read a source: the layout of each kind of record that fits its columns."""

from __future__ import annotations

from collections.abc import Mapping

from align.data.formats import fields_of, layouts_of
from align.data.formats.base import SAMPLE
from align.data.formats.guess import choose
from align.data.formats.written import Values
from align.data.readers import Row
from align.data.records import Kind
from align.data.sources import open_source, renamed
from align.errors import DataError
from align.recipe.inputs import DataSource

STAGES: Mapping[Kind, str] = {"pair": "preference", "unpaired": "kto", "conversation": "sft", "prompt": "online"}
"""Kinds, those that read more of a row before those that read less, and what reads them."""


def kinds_of(source: DataSource) -> dict[Kind, str]:
    """The kinds that the first rows can be read as, each with its layout in words; of a kind for which two meanings are
    possible, what `align check` would say. Raises DataError where the source cannot be read."""
    opened = open_source(source, limit=SAMPLE)
    mapped = {**(opened.entry.columns if opened.entry else {}), **source.columns}
    rows = [item.values for item in opened.rows(SAMPLE) if isinstance(item, Row)]
    named = [Values.read(values) for values in renamed(rows, mapped, opened.path)]
    layouts, format = layouts_of(source.format or (opened.entry.format if opened.entry else None))
    names = frozenset(mapped) & fields_of(layouts)
    found: dict[Kind, str] = {}
    for kind in STAGES:
        try:
            layout, guess = choose(layouts, kind, named, where=opened.path, format=format, mapped=names)
        except DataError:
            continue
        found[kind] = guess.words if guess else layout.name
    return found
