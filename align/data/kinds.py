"""Which stages could read a source: the layout of each kind of record that fits its columns."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from align.data.formats.choosing import SAMPLE
from align.data.laid_out import lay_out
from align.data.records import Kind
from align.data.rows import Row
from align.data.sources import open_source
from align.errors import DataError
from align.recipe.inputs import DataSource

STAGES: Mapping[Kind, str] = {"pair": "preference", "unpaired": "kto", "conversation": "sft", "prompt": "online"}
"""Kinds, those that read more of a row before those that read less, and what reads them."""


def kinds_of(source: DataSource) -> dict[Kind, str]:
    """The kinds that the first rows can be read as, each with its layout in words. Raises DataError where the source
    cannot be read."""
    opened = open_source(source, limit=SAMPLE)
    rows = [item.values for item in opened.rows(SAMPLE) if isinstance(item, Row)]
    found: dict[Kind, str] = {}
    for kind in STAGES:
        with suppress(DataError):
            found[kind] = lay_out(source, kind, opened, rows).words
    return found
