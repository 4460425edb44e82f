"""The one entry: sources of rows in, tokenised trees or prompts and a report out.

Sources without `weight` are laid end to end. With weights (all sources must have one) they are shares of an epoch: an
epoch has as many items as all sources have usable rows together, N, and source i gets the part w_i / sum(w) of N (in
whole rows, by largest remainder). A source that has more rows than its share gives the first of a permutation drawn
from (seed, its place in the list), the same in every epoch; one that has fewer gives all of them as often as it takes,
and the first of the permutation once more.

Tokenised data are cached by content: bytes of the data, tokenizer and template, options and the code of this package.
Prompts are not cached, because their rows must be read for the rewards anyway.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from align.data import cache as store
from align.data.audit import DataReport, Refusal, SourceReport, refusal_error
from align.data.formats import FIELDS, LAYOUTS
from align.data.formats.base import Layout, choose, margin_of, refuse_media
from align.data.labels import Labelling, distribution
from align.data.order import epoch_order
from align.data.readers import Row
from align.data.records import Kind, Labelled, Pair, Prompt, Record, RowError, Text, check
from align.data.render import Encoded, Tokens, draft, encode, fit
from align.data.sources import Opened, apply_columns, open_source
from align.data.tokenizer import ChatTokenizer
from align.errors import DataError
from align.protocols import Completion, Group, PromptItem, Segment, Tree
from align.recipe.labels import Labels
from align.recipe.schema import DataSource

_CHUNK = 4096  # rows tokenised in one call


@dataclass(frozen=True)
class Prepared:
    """items: Trees (ids 0..n-1), or PromptItems for kind "prompt" (group_id = number, seed 0: the stage draws both).
    groups: where `answers` were asked for, each pair as a group of two completions, chosen first."""

    items: list[Any]
    report: DataReport
    groups: list[Group] = field(default_factory=list)


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
    labels: Labels | None = None,
    unlabelled: bool = False,
) -> Prepared:
    """Read, convert, check, tokenise and mix the rows of a stage.

    Args:
        sources: in the recipe's order. seed: decides which rows a weighted source gives.
        max_length: for sources that set none of their own. cache: folder of tokenised data; None caches nothing.
        first: read at most that many rows of each source (for a quick check). folder: what relative paths refer to.
        answers: of pairs, also what rewards judge: their texts and rows, which no cache keeps.
        labels: of labelled rows, what their labels may be; unlabelled: a row may have none.
    Raises DataError where a source cannot be read or, unless it says `on_bad_row: skip`, has rows that cannot be used.
    """
    assert kind == "pair" or not answers, "only pairs have answers to judge"
    assert (kind == "labelled") == (labels is not None), "labelled rows have labels, and others none"
    labelling = Labelling(labels, unlabelled) if labels else None
    tables = [
        _prepare_source(s, kind, tokenizer, max_length, cache, first, folder, answers, labelling) for s in sources
    ]
    for table, source in zip(tables, sources, strict=True):
        if not table.report.kept:
            raise DataError(
                f"none of {table.report.read} rows can be used",
                where=source.path,
                remedy="the reasons were: " + "; ".join(dict.fromkeys(r.reason for r in table.report.refused[:50]))
                if table.report.refused
                else "the source has no rows",
            )
    drawn = mix([t.report.kept for t in tables], [s.weight for s in sources], seed)
    weighted = any((t.weights != 1.0).any() for t in tables)
    items: list[Any] = []
    groups: list[Group] = []
    for table, rows in zip(tables, drawn, strict=True):
        table.report.used = len(rows)
        groups += [table.group(int(row), len(items) + i) for i, row in enumerate(rows if answers else ())]
        items += [table.item(int(row), len(items) + i, weighted) for i, row in enumerate(rows)]
    return Prepared(items, DataReport(kind, [t.report for t in tables]), groups)


def mix(kept: Sequence[int], weights: Sequence[float | None], seed: int) -> list[np.ndarray]:
    """Rows i64[n_i] that each source gives to an epoch (see the module's docstring). Raises DataError."""
    given = [w for w in weights if w is not None]
    if not given:
        return [np.arange(n) for n in kept]
    if len(given) != len(kept):
        raise DataError(
            f"{len(given)} of {len(kept)} sources have a `weight`",
            where="data",
            remedy="weights are shares of an epoch: give all sources one, or none",
        )
    exact = np.array(given) / sum(given) * sum(kept)
    counts = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(counts - exact, kind="stable")
    counts[by_remainder[: sum(kept) - int(counts.sum())]] += 1
    drawn = []
    for i, (n, count) in enumerate(zip(kept, counts, strict=True)):
        times, rest = divmod(int(count), n)
        once_more = np.sort(epoch_order(n, seed, i)[:rest])
        drawn.append(np.concatenate([np.tile(np.arange(n), times), once_more]))
    return drawn


# ------------------------------------------------------------------------------------------------- one source


@dataclass
class Table:
    """Usable rows of one source, tokenised. rows: for prompts, (messages, values) of each; answers: of pairs that
    rewards are to judge, the same and both completions' texts; weights f32[kept]; margins f32[kept], NaN where a row
    gives none; labels f32[kept, C]: of labelled rows, the values of `label_columns`, NaN where a row gives none."""

    kind: Kind
    report: SourceReport
    encoded: list[Encoded]
    origins: list[str]
    weights: np.ndarray
    desirable: np.ndarray
    margins: np.ndarray
    rows: list[tuple[tuple[dict[str, Any], ...], dict[str, Any]]] | None = None
    answers: list[tuple[tuple[dict[str, Any], ...], dict[str, Any], tuple[str, str]]] | None = None
    labels: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    label_columns: tuple[str, ...] = ()

    def group(self, row: int, number: int) -> Group:
        """A pair as what a reward sees: its prompt, and two completions that nobody sampled."""
        assert self.answers is not None
        e, (messages, values, texts) = self.encoded[row], self.answers[row]
        none = np.zeros(0, np.float32)
        sides = zip(e.branches, texts, strict=True)
        completions = [Completion(side.ids, none, none.astype(np.int32), text, "eos") for side, text in sides]
        prompt = PromptItem(number, e.trunk.ids, 0, messages, values, self.origins[row])
        return Group(prompt, tuple(completions))

    def item(self, row: int, number: int, weighted: bool) -> Tree | PromptItem:
        e, origin = self.encoded[row], self.origins[row]
        if self.rows is not None:
            messages, values = self.rows[row]
            return PromptItem(number, e.trunk.ids, 0, messages, values, origin)
        columns: dict[str, float] = {"weight": float(self.weights[row])} if weighted else {}
        if self.kind == "unpaired":
            columns["desirable"] = float(self.desirable[row])
        if self.kind == "labelled" and not np.isnan(self.labels[row]).any():
            columns |= dict(zip(self.label_columns, self.labels[row].tolist(), strict=True))
        trunk = _segment(e.trunk, {} if e.branches else columns)
        pair = columns if self.kind == "pair" else {}
        if self.kind == "pair" and not np.isnan(self.margins[row]):
            pair = columns | {"margin": float(self.margins[row])}
        return Tree(number, trunk, tuple(_segment(b, columns) for b in e.branches), pair, origin)


def _segment(tokens: Tokens, columns: dict[str, float]) -> Segment:
    return Segment(tokens.ids, tokens.mask, columns=columns)


def _prepare_source(
    source: DataSource,
    kind: Kind,
    tokenizer: ChatTokenizer,
    max_length: int | None,
    cache: Path | None,
    first: int | None,
    folder: Path | None,
    answers: bool = False,
    labelling: Labelling | None = None,
) -> Table:
    _check_options(source, kind)
    source = _with_max_length(source, max_length)
    limits = [n for n in (source.limit, first) if n is not None]
    limit = min(limits) if limits else None
    opened = open_source(source, folder=folder, cache=cache, limit=limit)
    path = None
    if cache is not None and kind != "prompt" and not answers:
        key = store.key(opened.digest(), tokenizer.fingerprint, f"{kind} {labelling or ''}", source, limit)
        path = cache / f"{key}.npz"
        if (table := store.load(path, kind)) is not None:
            table.label_columns = labelling.labels.columns if labelling else ()
            return table
    table = _tokenise(opened, source, kind, tokenizer, limit, answers, labelling)
    if table.report.refused and source.on_bad_row == "error":
        raise refusal_error(table.report)
    if path is not None:
        store.save(path, table)
    return table


def _with_max_length(source: DataSource, max_length: int | None) -> DataSource:
    return source if source.max_length is not None else source.model_copy(update={"max_length": max_length})


def _check_options(source: DataSource, kind: Kind) -> None:
    if kind == "prompt" and source.truncate != "error":
        raise DataError(
            f"`truncate: {source.truncate}` on prompts",
            where=source.path,
            remedy="prompts of an online stage are never cut: a cut prompt is another question. "
            "Use `overlong_prompts: filter` to leave long ones out",
        )
    for name in source.columns:
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, n=1)
            raise DataError(
                f"`columns:` names an unknown field {name!r} (known: {', '.join(sorted(FIELDS))})",
                where=source.path,
                remedy=f"did you mean {near[0]!r}? " if near else "it maps our field to your column",
            )


def _tokenise(
    opened: Opened,
    source: DataSource,
    kind: Kind,
    tokenizer: ChatTokenizer,
    limit: int | None,
    answers: bool = False,
    labelling: Labelling | None = None,
) -> Table:
    items = list(opened.rows(limit))
    report = SourceReport(opened.path, read=len(items))
    report.refused += [i for i in items if isinstance(i, Refusal)]
    rows = [i for i in items if isinstance(i, Row)]
    none = np.zeros(0, np.float32)
    table = Table(kind, report, [], [], none, np.zeros(0, bool), none, [] if kind == "prompt" else None)
    table.answers = [] if answers else None
    if not rows:
        return table
    named = apply_columns(rows, source)
    layout = choose(LAYOUTS, kind, named, where=opened.path, format=source.format, mapped=frozenset(source.columns))
    report.layout = layout.name
    weights: list[float] = []
    desirable: list[bool] = []
    margins: list[float] = []
    labels: list[list[float]] = []
    for start in range(0, len(rows), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        for row, record, margin, encoded in _encode_chunk(rows[chunk], named[chunk], layout, tokenizer, report):
            try:
                texts = _answers(record) if answers and isinstance(record, Pair) else ("", "")
                values = labelling.values(record.label) if labelling and isinstance(record, Labelled) else []
                fitted = _fit(encoded, source, kind, tokenizer, report)
            except RowError as e:
                report.refused.append(Refusal(row.origin, row.number, str(e)))
                continue
            if fitted is None:
                continue
            table.encoded.append(fitted)
            table.origins.append(row.origin)
            weights.append(getattr(record, "weight", 1.0))
            desirable.append(getattr(record, "desirable", True))
            margins.append(float("nan") if margin is None else margin)
            labels.append(values)
            if table.rows is not None and isinstance(record, Prompt):
                table.rows.append(_prompt_row(row, record, report))
            if table.answers is not None and isinstance(record, Pair):
                table.answers.append((_messages(record.prompt), dict(row.values), texts))
    table.weights, table.desirable = np.array(weights, np.float32), np.array(desirable, bool)
    table.margins = np.array(margins, np.float32)
    if labelling:
        table.label_columns = labelling.labels.columns
        table.labels = np.array(labels, np.float32).reshape(-1, len(table.label_columns))
        report.labels = distribution(table.labels, labelling.labels)
    _finish(table, tokenizer)
    return table


def _encode_chunk(
    rows: Sequence[Row], named: Sequence[dict[str, Any]], layout: Layout, tokenizer: ChatTokenizer, report: SourceReport
) -> list[tuple[Row, Record, float | None, Encoded]]:
    """Convert, check and tokenise; rows that cannot be are added to the report. Beside a pair stands its margin."""
    good: list[tuple[Row, Record, float | None]] = []
    drafts = []
    for row, values in zip(rows, named, strict=True):
        try:
            refuse_media(values)
            record = _convert(layout, values)
            check(record)
            margin = margin_of(values) if layout.kind == "pair" else None
            drafts.append(draft(record, tokenizer))
        except RowError as e:
            report.refused.append(Refusal(row.origin, row.number, str(e)))
            continue
        good.append((row, record, margin))
    out = []
    for (row, record, margin), encoded in zip(good, encode(drafts, tokenizer), strict=True):
        if isinstance(encoded, RowError):
            report.refused.append(Refusal(row.origin, row.number, str(encoded)))
        else:
            report.plain_text += isinstance(record.prompt, str)
            out.append((row, record, margin, encoded))
    return out


def _convert(layout: Layout, values: dict[str, Any]) -> Record:
    missing = [name for name in sorted(layout.required) if values.get(name) is None]
    if missing:
        raise RowError(
            f"no `{missing[0]}` (layout {layout.name}); the row has: {', '.join(sorted(values)) or 'nothing'}"
        )
    return layout.convert(values)


def _fit(
    encoded: Encoded, source: DataSource, kind: Kind, tokenizer: ChatTokenizer, report: SourceReport
) -> Encoded | None:
    """The record within max_length; None for a prompt that is filtered. Counts in the report. Raises RowError."""
    if kind == "prompt":
        if source.max_length is None or encoded.length <= source.max_length:
            return encoded
        if source.overlong_prompts == "filter":
            report.filtered += 1
            return None
        raise RowError(
            f"the prompt has {encoded.length} tokens, more than max_length {source.max_length} "
            "(`overlong_prompts: filter` leaves such prompts out)"
        )
    fitted, cut = fit(encoded, source.max_length, source.truncate, tokenizer.bos_id, scored=kind != "labelled")
    report.truncated += cut
    return fitted


def _prompt_row(row: Row, record: Prompt, report: SourceReport) -> tuple[tuple[dict[str, Any], ...], dict[str, Any]]:
    values = dict(row.values)
    if record.reference_answer is not None:
        values["reference_answer"] = record.reference_answer
        report.reference_answers += 1
    return _messages(record.prompt), values


def _messages(prompt: Text) -> tuple[dict[str, Any], ...]:
    """A prompt as rewards see it."""
    if isinstance(prompt, str):
        return ({"role": "text", "content": prompt},)
    return tuple(m.as_dict() for m in prompt)


def _answers(record: Pair) -> tuple[str, str]:
    """The texts of chosen and rejected. Raises RowError where one is several turns: rewards judge one answer."""
    texts = []
    for name in ("chosen", "rejected"):
        completion: Text = getattr(record, name)
        if not isinstance(completion, str) and len(completion) != 1:
            raise RowError(f"{name} has {len(completion)} turns, and rewards judge one answer")
        texts.append(completion if isinstance(completion, str) else completion[0].content)
    return texts[0], texts[1]


def _finish(table: Table, tokenizer: ChatTokenizer) -> None:
    """Lengths, counts and notes of a finished source."""
    report = table.report
    report.refused.sort(key=lambda r: r.row)
    report.kept = len(table.encoded)
    report.lengths = np.array([e.length for e in table.encoded], np.int64)
    report.scored = np.array([e.scored for e in table.encoded], np.int64)
    if report.plain_text:
        report.notes.append(
            "plain text: no chat template is applied (use message, query or instruction columns for it)"
        )
    elif tokenizer.template is not None and tokenizer.template.reads_clock:
        report.notes.append("the chat template prints today's date; fix it with `model.template_args`")
    if table.kind not in ("prompt", "labelled") and tokenizer.eos_ids and not report.truncated:
        open_ended = sum(not _ends_with_eos(e, tokenizer.eos_ids) for e in table.encoded)
        if open_ended:
            report.notes.append(
                f"in {open_ended} rows the last scored token is no end-of-turn token "
                f"({', '.join(tokenizer.token(i) for i in tokenizer.eos_ids)}): the model will not learn to stop there"
            )


def _ends_with_eos(encoded: Encoded, eos_ids: Sequence[int]) -> bool:
    return all(int(part.ids[part.mask][-1]) in eos_ids for part in encoded.branches or [encoded.trunk])
