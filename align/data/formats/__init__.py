"""Data layouts, one file per family. A new format is a new file with `LAYOUTS`, named here."""

from __future__ import annotations

from align.data.formats import alpaca, labelled, openai, sharegpt, swift, trl
from align.data.formats.base import Layout

LAYOUTS: tuple[Layout, ...] = (
    *trl.LAYOUTS,
    *openai.LAYOUTS,
    *sharegpt.LAYOUTS,
    *alpaca.LAYOUTS,
    *swift.LAYOUTS,
    *labelled.LAYOUTS,
)

FIELDS: frozenset[str] = frozenset().union(*(layout.columns for layout in LAYOUTS))
"""Every column name that some layout reads: what `columns:` may map to."""
