"""The one entry: sources of rows in, tokenised trees or prompts and a report out.

Sources are laid end to end, or mixed by their weights (`align.data.mixing`).

Tokenised data are cached by content: bytes of the data, tokenizer and template, options and the code of this package.
Prompts are not cached, because their rows must be read for the rewards anyway.

A row's own `weight` multiplies its terms of the loss (a prompt's: its advantages); rows of weight 0 are left out here,
before batches are made, and counted in the report.

Images and other media go through a `Library` (align.data.media), which the caller opens where the model takes them.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.data import cache as store
from align.data.audit import DataReport, SourceReport, refusal_error
from align.data.formats import fields_of, layouts_of
from align.data.labels import Labelling
from align.data.media.library import Library
from align.data.mixing import mix
from align.data.records import Kind
from align.data.sources import open_source
from align.data.table import Kept, Table
from align.data.tables import Tokeniser
from align.data.tokenizer import ChatTokenizer
from align.data.whole import read_table
from align.data.world import Offered
from align.errors import DataError
from align.protocols.fleet import Group
from align.recipe.inputs import DataSource, Exhausted
from align.recipe.labels import Labels


@dataclass(frozen=True)
class Prepared:
    """items: Trees (ids 0..n-1), or PromptItems for kind "prompt" (group_id = number, seed 0: the stage draws both).
    groups: where `answers` were asked for, each pair as a group of two completions, chosen first.
    records: where they were asked for, every kept row as it was read. files: SHA-256 of every file that a medium was
    read from, by path."""

    items: list[Any]
    report: DataReport
    groups: list[Group] = field(default_factory=list)
    records: list[Kept] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)


def prepare(
    sources: Sequence[DataSource],
    kind: Kind,
    tokenizer: ChatTokenizer,
    *,
    seed: int,
    max_length: int | None = None,
    cache: Path | None = None,
    first: int | None = None,
    folder: Path | None = None,
    answers: bool = False,
    media: Library | None = None,
    labels: Labels | None = None,
    unlabelled: bool = False,
    records: bool = False,
    exhausted: Exhausted | None = None,
    offered: Offered | None = None,
) -> Prepared:
    """Read, convert, check, tokenise and mix the rows of a stage.

    Args:
        sources: in the recipe's order. seed: decides which rows a weighted source gives.
        max_length: for sources that set none of their own. cache: folder of tokenised data; None caches nothing.
        first: read at most that many rows of each source (for a quick check). folder: what relative paths refer to.
        answers: of pairs, also what rewards judge: their texts and rows, which no cache keeps.
        media: of a model that takes images; its media stay in the store until it is closed. None: rows with media are
            refused.
        labels: of labelled rows, what their labels may be; unlabelled: a row may have none.
        records: hand on the rows as they were read, too; no cache keeps them.
        exhausted: of sources with weights, how long an epoch is. offered: by environments to the prompts.
    Raises DataError where a source cannot be read or, unless it says `on_bad_row: skip`, has rows that cannot be used.
    """
    assert kind == "pair" or not answers, "only pairs have answers to judge"
    assert (kind == "labelled") == (labels is not None), "labelled rows have labels, and others none"
    labelling = Labelling(labels, unlabelled) if labels else None
    tokenisers = [
        Tokeniser(_with_max_length(s, max_length), kind, tokenizer, media, answers, labelling, records, offered)
        for s in sources
    ]
    tables = [_prepare_source(t, cache, first, folder) for t in tokenisers]
    for table, source in zip(tables, sources, strict=True):
        if not table.report.kept:
            raise _nothing_left(table.report, source.path)
    drawn = mix([t.report.kept for t in tables], [s.weight for s in sources], seed, exhausted)
    weighted = any((t.weights != 1.0).any() for t in tables)
    items: list[Any] = []
    groups: list[Group] = []
    for table, rows in zip(tables, drawn, strict=True):
        table.report.used = len(rows)
        if not len(rows):
            raise DataError(
                f"its share of an epoch is none of its {table.report.kept} rows",
                where=table.report.path,
                remedy="give it a larger `weight`, or leave the source out",
            )
        groups += [table.group(int(row), len(items) + i) for i, row in enumerate(rows if answers else ())]
        items += [table.item(int(row), len(items) + i, weighted) for i, row in enumerate(rows)]
    files = {path: sha for table in tables for path, sha in table.files.items()}
    read = [record for table in tables for record in table.records]
    return Prepared(items, DataReport(kind, [t.report for t in tables]), groups, read, files)


def _nothing_left(report: SourceReport, path: str) -> DataError:
    reasons = list(dict.fromkeys(r.reason for r in report.refused[:50]))
    reasons += [f"{report.weightless} rows have weight 0 and are left out"] if report.weightless else []
    reasons += [f"{report.filtered} rows are longer than `max_length`"] if report.filtered else []
    remedy = "the reasons were: " + "; ".join(reasons) if reasons else "the source has no rows"
    return DataError(f"none of {report.read} rows can be used", where=path, remedy=remedy)


# ------------------------------------------------------------------------------------------------- one source


def _prepare_source(tokeniser: Tokeniser, cache: Path | None, first: int | None, folder: Path | None) -> Table:
    source, kind, library = tokeniser.source, tokeniser.kind, tokeniser.library
    check_options(source, kind)
    limits = [n for n in (source.limit, first) if n is not None]
    limit = min(limits) if limits else None
    opened = open_source(source, folder=folder, cache=cache, limit=limit)
    path = None
    if cache is not None and kind != "prompt" and not (tokeniser.answers or tokeniser.records):
        read_as = f"{kind} {tokeniser.labelling or ''}"
        key = store.key(opened.digest(), tokeniser.tokenizer.fingerprint, read_as, source, limit, library)
        path = cache / f"{key}.npz"
        if (table := store.load(path, kind, library)) is not None:
            table.label_columns = tokeniser.label_columns
            return table
    table = read_table(tokeniser, opened, limit)
    if table.report.refused and source.on_bad_row == "error":
        raise refusal_error(table.report)
    if path is not None:
        store.save(path, table)
    return table


def _with_max_length(source: DataSource, max_length: int | None) -> DataSource:
    return source if source.max_length is not None else source.model_copy(update={"max_length": max_length})


def check_options(source: DataSource, kind: Kind) -> None:
    """Raise DataError for options of a source that mean nothing for this kind of row."""
    how = source.too_long
    if kind == "prompt" and how in ("left", "right", "split"):
        raise DataError(
            f"`too_long: {how}` on prompts",
            where=source.path,
            remedy="prompts that are sampled from are never cut: a cut prompt is another question. "
            "Use `too_long: drop` to leave long ones out",
        )
    if how == "split" and kind != "conversation":
        raise DataError(
            f"`too_long: split` on rows of kind {kind}",
            where=source.path,
            remedy="a part of an answer cannot be judged as the whole was: use right, left or drop",
        )
    if how != "error" and source.max_length is None:
        raise DataError(
            f"`too_long: {how}` without `max_length`: no row is too long",
            where=source.path,
            remedy="give the source a `max_length`, in tokens, or leave it out",
        )
    fields = fields_of(layouts_of(source.format)[0])
    for name, theirs in source.columns.items():
        if name not in fields and theirs in fields and kind != "prompt":  # which may give a reward a name of its own
            raise DataError(
                f"`columns: {{{name}: {theirs}}}` is the wrong way round: it maps our field to your column",
                where=source.path,
                remedy=f"write `columns: {{{theirs}: {name}}}`",
            )
        # of a prompt's row, a column may be for rewards alone: what is hardly another word is refused there
        near = difflib.get_close_matches(name, fields, n=1, cutoff=0.9 if kind == "prompt" else 0.6)
        if name not in fields and (near or kind != "prompt"):
            raise DataError(
                f"`columns:` names an unknown field {name!r} (known: {', '.join(sorted(fields))})",
                where=source.path,
                remedy=f"did you mean {near[0]!r}? " if near else "it maps our field to your column",
            )
