"""Consecutive rows of a source, tokenised: rows in, records checked, media shown, ids and counts out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from align.data.audit import MediaReport, Refusal, SourceReport
from align.data.beginnings import with_beginning
from align.data.doubts import doubts, numbers, refuse_written_calls
from align.data.encode import encode
from align.data.encoded import Encoded, cut, split
from align.data.formats.base import margin_of, weight_of
from align.data.formats.choosing import refuse_stray
from align.data.formats.flags import refuse_token_masks
from align.data.formats.guess import read_under_a_guess
from align.data.formats.needed import asked_as_text, beside_text, needed
from align.data.formats.written import Values, are_texts_in_json, refuse_unread_messages, said_in_json
from align.data.labels import Labelling
from align.data.laid_out import LaidOut
from align.data.media.library import Library
from align.data.media.shown import Shown
from align.data.parts import Part, empty_table, ends_with_eos
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
from align.data.sources import value_at
from align.data.table import Kept
from align.data.thinking import Thoughts
from align.data.tokenizer import ChatTokenizer
from align.data.unread import Reading, unread_columns
from align.data.world import Offered, with_tools
from align.recipe.inputs import DataSource

_NOT_IN_PROMPT = "the column {!r} is not in the prompt, which may depend on it (rewards see it)"


@dataclass
class _Row:
    """A row on its way: margin of a pair, None where it gives none; weight: of its terms in the loss; unread: columns
    that nothing reads; written: columns that hold messages as JSON text, beside: what stands with them; numbers: what
    is said of such answers."""

    row: Row
    record: Record
    margin: float | None
    weight: float
    shown: Sequence[Shown] = ()
    unread: Sequence[str] = ()
    written: frozenset[str] = frozenset()
    beside: Sequence[str] = ()
    numbers: Sequence[str] = ()


@dataclass
class Tokeniser:
    """How the rows of one source become a table. library: of a model that takes media; answers, records: see
    `prepare`; labelling: of labelled rows; offered: by environments, to prompts."""

    source: DataSource
    kind: Kind
    tokenizer: ChatTokenizer
    library: Library | None = None
    answers: bool = False
    labelling: Labelling | None = None
    records: bool = False
    offered: Offered | None = None

    @property
    def label_columns(self) -> tuple[str, ...]:
        return self.labelling.labels.columns if self.labelling else ()

    @property
    def thoughts(self) -> Thoughts | None:
        """No row's yet."""
        return Thoughts(self.source.thinking) if self.source.thinking else None

    def part(self, items: Sequence[Item], laid: LaidOut, media: MediaReport) -> Part:
        """Convert, check and tokenise. Rows that cannot be used are in the part's report. laid: their layout, of
        whichever rows of the source it holds the values. media: counts those that kept rows show."""
        self.tokenizer.forget_rows()
        part = Part(empty_table(self.kind, self.answers, self.label_columns), thoughts=self.thoughts)
        part.table.report.read = len(items)
        part.table.report.refused += [item for item in items if isinstance(item, Refusal)]
        rows = [item for item in items if isinstance(item, Row)]
        _Chunk(self, laid.of([row.values for row in rows]), part, media).read(rows)
        return part


@dataclass
class _Chunk:
    """Rows that become a part. laid: their values."""

    how: Tokeniser
    laid: LaidOut
    part: Part
    media: MediaReport
    _columns: list[tuple[float, bool, float]] = field(default_factory=list)
    _labels: list[list[float]] = field(default_factory=list)

    @property
    def report(self) -> SourceReport:
        return self.part.table.report

    def read(self, rows: Sequence[Row]) -> None:
        """Add them to the part."""
        table = self.part.table
        for one, encoded in self._encoded(rows):
            try:
                kept = self._keep(one, encoded)
            except (RowError, *UNFORESEEN) as e:
                self._refuse(one.row, e if isinstance(e, RowError) else unforeseen(e))
                continue
            margin = float("nan") if one.margin is None else one.margin
            self._columns += [(one.weight, getattr(one.record, "desirable", True), margin)] * kept
        table.weights = np.array([c[0] for c in self._columns], np.float32)
        table.desirable = np.array([c[1] for c in self._columns], bool)
        table.margins = np.array([c[2] for c in self._columns], np.float32)
        if self.how.labelling is not None:
            table.labels = np.array(self._labels, np.float32).reshape(-1, len(self.how.label_columns))

    @property
    def _answers_every_row(self) -> bool:
        """`align classify` judges rows whatever their weight; a stage leaves those of weight 0 out."""
        return self.how.labelling is not None and self.how.labelling.optional

    def _refuse(self, row: Row, reason: RowError) -> None:
        self.report.refused.append(Refusal(row.origin, row.number, str(reason)))

    def _encoded(self, rows: Sequence[Row]) -> list[tuple[_Row, Encoded]]:
        """Convert, check and tokenise; rows that cannot be are added to the report."""
        tokenizer, library, thoughts = self.how.tokenizer, self.how.library, self.part.thoughts
        good: list[_Row] = []
        for row, values in zip(rows, self.laid.values, strict=True):
            reading = Reading(values, columnar=row.columnar, written=values.written)
            try:
                record, margin, weight = self._record(values, reading)
            except RowError as e:
                self._refuse(row, e)
                continue
            if weight == 0 and not self._answers_every_row:
                self.report.note_weightless(row.origin)
                continue
            unread = unread_columns(row.values, reading, self.laid.columns)
            if (late := self._late(values, unread)) is not None:
                self._refuse(row, late)
                continue
            digits = numbers(values, reading.read)
            made = _Row(row, record, margin, weight, unread=unread, written=values.written, numbers=digits)
            made.beside = values.beside
            good.append(made)
        drafts, drafted = [], []
        for one in self._shown(good):
            try:
                drawn = draft(one.record, tokenizer, one.shown, library)
                if thoughts is not None:
                    thoughts.require(drawn.left_out)
                drafts.append(drawn)
            except (RowError, *UNFORESEEN) as e:
                self._refuse(one.row, e if isinstance(e, RowError) else unforeseen(e))
                continue
            drafted.append(one)
        out = []
        for one, d, encoded in zip(drafted, drafts, encode(drafts, tokenizer), strict=True):
            if isinstance(encoded, RowError):
                self._refuse(one.row, encoded)
            else:
                said = [f"`{name}`, which stands beside the rows of the file," for name in one.row.beside]
                said += one.beside
                said += [what for message in messages_of(one.record) for what in message.unread]
                doubtful, unread = doubts(one.record, tokenizer, one.written) + list(one.numbers), list(one.unread)
                if self.how.kind == "prompt" or self.how.answers:  # rewards see every column
                    doubtful += [_NOT_IN_PROMPT.format(name) for name in unread if needed(name)]
                    unread = []
                self.part.unread.add(one.row.origin, unread, said, d.left_out, doubtful)
                out.append((one, encoded))
        return out

    def _late(self, values: dict[str, Any], unread: Sequence[str]) -> RowError | None:
        """Why a row cannot be read as those were by which its layout was found, or its columns guessed."""
        layout, late = self.laid.layout, [name for name in unread if name not in self.laid.seen]
        asked = asked_as_text(layout.required) if self.laid.free and self.how.kind != "prompt" else None
        if not self.laid.guessed and late and asked is not None:
            beside = beside_text(layout.columns, asked, [values])
            late = [name for name in late if name == beside]
            if late:
                return RowError(
                    f"the row has `{late[0]}`, on which the answer may depend, and the first rows, by which the layout "
                    f"was found ({self.laid.words}), have none; `columns: {{{asked}: {asked}}}` leaves it out"
                )
        late = [name for name in late if self.laid.guessed and read_under_a_guess(name)]
        if not late:
            return None
        return RowError(
            f"the row has `{late[0]}`, and the first rows, by which the columns were guessed ({self.laid.words}), have "
            "none; say what is meant with `columns`"
        )

    def _record(self, values: Values, reading: Reading) -> tuple[Record, float | None, float]:
        """A row's record, a pair's margin, and the row's weight; a row of weight 0 is left out by the caller, whatever
        else is wrong with it. Raises RowError, whatever the row holds."""
        layout, how, thoughts = self.laid.layout, self.how, self.part.thoughts
        try:
            refuse_stray(layout, self.laid.others, values)
            refuse_unread_messages(values, self.laid.written)
            if how.kind in ("conversation", "pair", "unpaired"):
                refuse_token_masks(values)
            weight = weight_of(reading)
            record = place_media(with_beginning(layout.convert(reading), how.tokenizer), reading)
            if self.laid.guessed or (self.laid.free and asked_as_text(layout.required)):
                refuse_written_calls(record)
            record = record if thoughts is None else thoughts.of(record)
            record = with_tools(record, how.offered, values)
            if self.laid.guessed:
                self._refuse_json(record)
            if weight or self._answers_every_row:
                check(record)
                refused = how.source.too_long == "error"
                refuse_endless(record, how.tokenizer, how.source.max_length if refused else None)
            return record, margin_of(reading) if layout.kind == "pair" else None, weight
        except UNFORESEEN as e:
            if not layout.fits(values):
                raise RowError(f"the row is not laid out as most rows of its source ({layout.describe()})") from e
            raise unforeseen(e) from e

    def _refuse_json(self, record: Record) -> None:
        """Raises RowError for a turn that is messages or calls as JSON text, where columns were guessed: those of the
        first rows were texts."""
        turns = list(messages_of(record))
        if turns and all(are_texts_in_json(message.text) for message in turns):
            raise RowError("every text of the row is a list of texts as JSON: turns, or parts; say what is meant")
        for message in turns:
            what = said_in_json(message.text)
            if what is not None:
                raise RowError(
                    f"a text of the {message.role} holds {what} as JSON, and the columns were guessed as texts "
                    f"({self.laid.words}); say what is meant with `columns`"
                )

    def _shown(self, rows: Sequence[_Row]) -> list[_Row]:
        """Rows whose media are in the store, and those without media; the others are refused."""
        wanted = [(one, media) for one in rows if (media := media_of(one.record))]
        found: list[list[Shown] | RowError]
        if self.how.library is None:
            reason = "the row has {}, and the model takes text alone: use one with a vision part, or other data"
            found = [RowError(reason.format(_named(media))) for _, media in wanted]
        else:
            found = self.how.library.show([(media, one.row.folder) for one, media in wanted])
        refused: set[int] = set()
        for (one, _), shown in zip(wanted, found, strict=True):
            if isinstance(shown, RowError):
                refused.add(id(one))
                self.part.refused_media[str(shown)] += 1
                self._refuse(one.row, shown)
            else:
                one.shown = shown
        return [one for one in rows if id(one) not in refused]

    def _keep(self, one: _Row, encoded: Encoded) -> int:
        """Add a row to the table; how many it became there, 0 of one that is left out. Raises RowError."""
        record, table, labelling = one.record, self.part.table, self.how.labelling
        texts = answer_texts(record) if self.how.answers and isinstance(record, Pair) else ("", "")
        labels = labelling.values(record.label) if labelling and isinstance(record, Labelled) else []
        parts = self._fit(encoded)
        if not parts:
            return 0
        fitted = parts[0]
        if fitted is encoded and self.how.kind not in ("prompt", "labelled") and self.how.tokenizer.eos_ids:
            self.report.open_ended += not ends_with_eos(encoded, self.how.tokenizer)
        self.report.plain_text += isinstance(record.prompt, str)
        self._labels.append(labels)
        table.encoded += parts
        named = [f"{one.row.origin}, part {n} of {len(parts)}" for n in range(1, len(parts) + 1)]
        table.origins += named if len(parts) > 1 else [one.row.origin]
        if table.rows is not None and isinstance(record, Prompt):
            values = light(one.row.values)
            values |= {ours: value_at(values, theirs) for ours, theirs in self.laid.for_rewards.items()}
            if record.reference_answer is not None:
                values["reference_answer"] = record.reference_answer
                self.report.reference_answers += 1
            table.rows.append((seen_messages(record.prompt, fitted.trunk.media), values, dict(record.arguments)))
        if table.answers is not None and isinstance(record, Pair):
            values = light(one.row.values)
            table.answers.append((seen_messages(record.prompt, fitted.trunk.media), values, texts))
        if self.how.records:
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
        kind, tokenizer = self.how.kind, self.how.tokenizer
        limit, how = self.how.source.max_length, self.how.source.too_long
        if limit is None or encoded.length <= limit:
            fitted = [encoded]
        elif how == "error":
            raise too_long(encoded, kind, limit)
        elif how == "drop":
            self.report.filtered += 1
            return []
        elif how == "split":
            fitted = split(encoded, limit)
        else:
            fitted = [cut(encoded, limit, how, tokenizer.bos_id, scored=kind != "labelled")]
        for part in fitted:
            refuse_unusable(part, kind, tokenizer, part is not encoded, limit)
        if fitted[0] is not encoded and how == "split":
            self.report.split += 1
            self.report.parts += len(fitted)
        elif fitted[0] is not encoded:
            self.report.truncated += 1
        return fitted


def _named(media: Sequence[MediaPart]) -> str:
    kinds = sorted({part.kind for part in media})
    return " and ".join(f"{kind}s" for kind in kinds)
