"""The usable rows of one source, tokenised: rows in, records checked, media shown, ids and a report out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from align.data.audit import MediaReport, Refusal, SourceReport
from align.data.beginnings import with_beginning
from align.data.doubts import doubts
from align.data.encode import encode
from align.data.encoded import Encoded, cut, split
from align.data.ends import ending_notes, last_said
from align.data.formats.base import margin_of, weight_of
from align.data.formats.choosing import refuse_stray
from align.data.formats.flags import refuse_token_masks
from align.data.formats.written import Values
from align.data.labels import Labelling, distribution
from align.data.laid_out import LaidOut, lay_out
from align.data.media.library import Library
from align.data.media.shown import Shown
from align.data.placing import place_media
from align.data.records import (
    Kind,
    Labelled,
    MediaPart,
    Pair,
    Prompt,
    Record,
    RowError,
    check,
    media_of,
    messages_of,
)
from align.data.render import draft
from align.data.rows import Item, Row
from align.data.seen import answer_texts, light, seen_messages
from align.data.soundness import UNFORESEEN, refuse_endless, refuse_unusable, too_long, unforeseen
from align.data.sources import Opened, value_at
from align.data.table import Kept, Table
from align.data.thinking import Thoughts
from align.data.tokenizer import ChatTokenizer
from align.data.unread import Reading, Unread, unread_columns
from align.recipe.inputs import DataSource

_CHUNK = 4096  # rows tokenised in one call


# ------------------------------------------------------------------------------------------------- rows to tables


@dataclass
class _Row:
    """A row on its way: margin of a pair, None where it gives none; weight: of its terms in the loss; unread: columns
    that nothing reads; written: columns that hold messages as JSON text."""

    row: Row
    record: Record
    margin: float | None
    weight: float
    shown: Sequence[Shown] = ()
    unread: Sequence[str] = ()
    written: frozenset[str] = frozenset()


@dataclass
class Tokeniser:
    """How the rows of one source become a table. library: of a model that takes media; answers, records: see
    `prepare`; labelling: of labelled rows."""

    source: DataSource
    kind: Kind
    tokenizer: ChatTokenizer
    library: Library | None = None
    answers: bool = False
    labelling: Labelling | None = None
    records: bool = False

    @property
    def label_columns(self) -> tuple[str, ...]:
        return self.labelling.labels.columns if self.labelling else ()

    def table(self, opened: Opened, limit: int | None) -> Table:
        """Read, convert, check and tokenise. Rows that cannot be used are in the table's report."""
        items = list(opened.rows(limit))
        return self.of(opened, items, lambda rows: lay_out(self.source, self.kind, opened, rows))

    def of(
        self, opened: Opened, items: Sequence[Item], laid_out: Callable[[Sequence[dict[str, Any]]], LaidOut]
    ) -> Table:
        """Items of a source as a table. laid_out: how the values of its rows are read."""
        self.report = report = SourceReport(opened.path, read=len(items))
        self.media = MediaReport()
        self.unread = Unread()
        self.thoughts = Thoughts(self.source.thinking) if self.source.thinking else None
        report.refused += [i for i in items if isinstance(i, Refusal)]
        rows = [i for i in items if isinstance(i, Row)]
        none = np.zeros(0, np.float32)
        table = Table(self.kind, report, [], [], none, np.zeros(0, bool), none, [] if self.kind == "prompt" else None)
        table.answers = [] if self.answers else None
        if not rows:
            return table
        self.laid = laid_out([row.values for row in rows])
        report.layout, report.guessed = self.laid.words, self.laid.guessed
        known = 0 if self.library is None else self.library.processed
        columns: list[tuple[float, bool, float]] = []
        self.labels: list[list[float]] = []
        for start in range(0, len(rows), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            for one, encoded in self._encoded(rows[chunk], self.laid.values[chunk]):
                try:
                    kept = self._keep(table, one, encoded)
                except (RowError, *UNFORESEEN) as e:
                    self._refuse(one.row, e if isinstance(e, RowError) else unforeseen(e))
                    continue
                margin = float("nan") if one.margin is None else one.margin
                columns += [(one.weight, getattr(one.record, "desirable", True), margin)] * kept
        table.weights = np.array([c[0] for c in columns], np.float32)
        table.desirable = np.array([c[1] for c in columns], bool)
        table.margins = np.array([c[2] for c in columns], np.float32)
        if self.labelling is not None:
            table.label_columns = self.label_columns
            table.labels = np.array(self.labels, np.float32).reshape(-1, len(self.label_columns))
            report.labels = distribution(table.labels, self.labelling.labels)
        self.media.processed = 0 if self.library is None else self.library.processed - known
        report.media = self.media.to_json()
        report.unread = self.unread.to_json()
        report.notes += self.unread.notes() + (self.thoughts.notes() if self.thoughts else [])
        _finish(table, self.tokenizer)
        return table

    @property
    def _answers_every_row(self) -> bool:
        """`align classify` judges rows whatever their weight; a stage leaves those of weight 0 out."""
        return self.labelling is not None and self.labelling.optional

    def _refuse(self, row: Row, reason: RowError) -> None:
        self.report.refused.append(Refusal(row.origin, row.number, str(reason)))

    def _encoded(self, rows: Sequence[Row], named: Sequence[Values]) -> list[tuple[_Row, Encoded]]:
        """Convert, check and tokenise; rows that cannot be are added to the report."""
        good: list[_Row] = []
        for row, values in zip(rows, named, strict=True):
            reading = Reading(values, columnar=row.columnar, written=values.written)
            try:
                record, margin, weight = self._record(values, reading)
            except RowError as e:
                self._refuse(row, e)
                continue
            if weight == 0 and not self._answers_every_row:
                self.report.note_weightless(row.origin)
                continue
            to_rewards = self.kind == "prompt" or self.answers
            unread = () if to_rewards else unread_columns(row.values, reading, self.laid.columns)
            good.append(_Row(row, record, margin, weight, unread=unread, written=values.written))
        drafts, drafted = [], []
        for one in self._shown(good):
            try:
                drawn = draft(one.record, self.tokenizer, one.shown, self.library)
                if self.thoughts is not None:
                    self.thoughts.require(drawn.left_out)
                drafts.append(drawn)
            except (RowError, *UNFORESEEN) as e:
                self._refuse(one.row, e if isinstance(e, RowError) else unforeseen(e))
                continue
            drafted.append(one)
        out = []
        for one, d, encoded in zip(drafted, drafts, encode(drafts, self.tokenizer), strict=True):
            if isinstance(encoded, RowError):
                self._refuse(one.row, encoded)
            else:
                said = [what for message in messages_of(one.record) for what in message.unread]
                doubtful = doubts(one.record, self.tokenizer, one.written)
                self.unread.add(one.row.origin, one.unread, said, d.left_out, doubtful)
                out.append((one, encoded))
        return out

    def _record(self, values: dict[str, Any], reading: Reading) -> tuple[Record, float | None, float]:
        """A row's record, a pair's margin, and the row's weight; a row of weight 0 is left out by the caller, whatever
        else is wrong with it. Raises RowError, whatever the row holds."""
        layout = self.laid.layout
        try:
            refuse_stray(layout, self.laid.others, values)
            if self.kind in ("conversation", "pair", "unpaired"):
                refuse_token_masks(values)
            weight = weight_of(reading)
            record = place_media(with_beginning(layout.convert(reading), self.tokenizer), reading)
            record = record if self.thoughts is None else self.thoughts.of(record)
            if weight or self._answers_every_row:
                check(record)
                refused = self.source.too_long == "error"
                refuse_endless(record, self.tokenizer, self.source.max_length if refused else None)
            return record, margin_of(reading) if layout.kind == "pair" else None, weight
        except UNFORESEEN as e:
            raise unforeseen(e) from e

    def _shown(self, rows: Sequence[_Row]) -> list[_Row]:
        """Rows whose media are in the store, and those without media; the others are refused."""
        wanted = [(one, media) for one in rows if (media := media_of(one.record))]
        found: list[list[Shown] | RowError]
        if self.library is None:
            reason = "the row has {}, and the model takes text alone: use one with a vision part, or other data"
            found = [RowError(reason.format(_named(media))) for _, media in wanted]
        else:
            found = self.library.show([(media, one.row.folder) for one, media in wanted])
        refused: set[int] = set()
        for (one, _), shown in zip(wanted, found, strict=True):
            if isinstance(shown, RowError):
                refused.add(id(one))
                self.media.refused[str(shown)] += 1
                self._refuse(one.row, shown)
            else:
                one.shown = shown
        return [one for one in rows if id(one) not in refused]

    def _keep(self, table: Table, one: _Row, encoded: Encoded) -> int:
        """Add a row to the table; how many it became there, 0 of one that is left out. Raises RowError."""
        record = one.record
        texts = answer_texts(record) if self.answers and isinstance(record, Pair) else ("", "")
        labels = self.labelling.values(record.label) if self.labelling and isinstance(record, Labelled) else []
        parts = self._fit(encoded)
        if not parts:
            return 0
        fitted = parts[0]
        self.report.plain_text += isinstance(record.prompt, str)
        self.labels.append(labels)
        table.encoded += parts
        named = [f"{one.row.origin}, part {n} of {len(parts)}" for n in range(1, len(parts) + 1)]
        table.origins += named if len(parts) > 1 else [one.row.origin]
        if table.rows is not None and isinstance(record, Prompt):
            values = light(one.row.values)
            values |= {ours: value_at(values, theirs) for ours, theirs in self.laid.for_rewards.items()}
            if record.reference_answer is not None:
                values["reference_answer"] = record.reference_answer
                self.report.reference_answers += 1
            table.rows.append((seen_messages(record.prompt, fitted.trunk.media), values))
        if table.answers is not None and isinstance(record, Pair):
            values = light(one.row.values)
            table.answers.append((seen_messages(record.prompt, fitted.trunk.media), values, texts))
        if self.records:
            row = one.row
            table.records.append(Kept(row.origin, record, one.margin, row.folder))
        shown = sum((part.shows for part in parts), start=Counter[str]())
        self.media.add_row(one.shown, encoded.shows - shown, one.row.origin)
        for medium in one.shown:
            table.files.update(medium.files)
        return len(parts)

    def _fit(self, encoded: Encoded) -> list[Encoded]:
        """The record within max_length: itself, cut, or in parts; none where it is left out. Counts in the report.
        Raises RowError."""
        limit, how = self.source.max_length, self.source.too_long
        if limit is None or encoded.length <= limit:
            fitted = [encoded]
        elif how == "error":
            raise too_long(encoded, self.kind, limit)
        elif how == "drop":
            self.report.filtered += 1
            return []
        elif how == "split":
            fitted = split(encoded, limit)
        else:
            fitted = [cut(encoded, limit, how, self.tokenizer.bos_id, scored=self.kind != "labelled")]
        for part in fitted:
            refuse_unusable(part, self.kind, self.tokenizer, part is not encoded, limit)
        if fitted[0] is not encoded and how == "split":
            self.report.split += 1
            self.report.parts += len(fitted)
        elif fitted[0] is not encoded:
            self.report.truncated += 1
        return fitted


def _named(media: Sequence[MediaPart]) -> str:
    kinds = sorted({part.kind for part in media})
    return " and ".join(f"{kind}s" for kind in kinds)


# ------------------------------------------------------------------------------------------------- the report


def _finish(table: Table, tokenizer: ChatTokenizer) -> None:
    """Lengths, counts and notes of a finished source."""
    report = table.report
    report.refused.sort(key=lambda r: r.row)
    report.kept = len(table.encoded)
    report.weigh(table.weights, table.origins)
    report.lengths = np.array([e.length for e in table.encoded], np.int64)
    report.scored = np.array([e.scored for e in table.encoded], np.int64)
    templated = report.plain_text < report.kept
    if report.plain_text:
        some = f" to {report.plain_text} rows, and one to the others" if templated else ""
        report.notes.append(
            f"plain text: no chat template is applied{some} (use message, query or instruction columns for it)"
        )
    if templated and tokenizer.template is not None and tokenizer.template.reads_clock:
        report.notes.append("the chat template prints today's date; fix it with `model.template_args`")
    if templated:
        report.notes += ending_notes(tokenizer, whole=table.kind == "conversation")
    if table.kind not in ("prompt", "labelled") and tokenizer.eos_ids and not report.truncated:
        open_ended = sum(not _ends_with_eos(e, tokenizer) for e in table.encoded)
        if open_ended:
            report.notes.append(
                f"in {open_ended} rows the last scored token is no end-of-turn token "
                f"({', '.join(tokenizer.token(i) for i in tokenizer.eos_ids)}): the model will not learn to stop "
                "there; end the template's generation block behind its end of turn, or name the token: "
                "`model.end_of_turn`"
            )


def _ends_with_eos(encoded: Encoded, tokenizer: ChatTokenizer) -> bool:
    return all(
        last_said(part.ids[part.mask], tokenizer) in tokenizer.eos_ids for part in encoded.branches or [encoded.trunk]
    )
