"""`align data`: what a file holds for a model: layout, lengths, doubles, and what an exam would know already.

Rows are read as a stage reads them. Nothing is changed; `--write` writes them in our own layout, in which nothing has
to be guessed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from align.check.memory.sizes import read_config
from align.check.scratch import scratch
from align.check.shown_rows import shown_row
from align.cli.arguments import columns_of, whole
from align.data.carried import carried
from align.data.kinds import STAGES, kinds_of
from align.data.likeness import THRESHOLD, nearly_same, same
from align.data.media.library import Library
from align.data.media.opening import takes_media
from align.data.own_layout import row_of
from align.data.prepare import Prepared, prepare
from align.data.records import Kind, MediaPart, Message, Record, Text, texts, with_texts
from align.data.table import Kept
from align.data.tokenizer import ChatTokenizer
from align.errors import DataError, UserError
from align.hub import resolve_model_folder
from align.recipe.inputs import DataSource, Media
from align.stages.files import write_text

_BARS = "▁▂▃▄▅▆▇█"
_SHOWN = 5


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="whose tokenizer and chat template read it: folder or hub id")
    parser.add_argument("data", metavar="DATA", help="as a recipe's `data.path`: a file, a folder, file.py:function")
    parser.add_argument("--for", dest="stage", choices=tuple(STAGES.values()), help="the stage that is to read it")
    parser.add_argument("--columns", default="", metavar="query=frage", help="our columns to the data's, with commas")
    parser.add_argument("--format", metavar="NAME", help="the data's layout, where several fit")
    parser.add_argument("--split", metavar="NAME", help="of a folder or a hub data set")
    parser.add_argument("--limit", type=whole(1), metavar="N", help="read so many rows")
    parser.add_argument("--max-length", type=whole(1), metavar="N", help="tell how many rows are longer, in tokens")
    parser.add_argument("--chat-template", metavar="NAME", help="as `model.chat_template`")
    parser.add_argument(
        "--exam", metavar="DATA", help="rows that should not be known: which of their prompts are here?"
    )
    parser.add_argument("--write", metavar="FILE", help="new .jsonl: the usable rows in our own layout")


def run(arguments: argparse.Namespace) -> int:
    """Print what is found. Raises DataError where no row can be used, UserError where the file to write exists."""
    if arguments.write and Path(arguments.write).exists():
        raise UserError("the file exists", where=arguments.write, remedy="remove it, or choose another name")
    folder = resolve_model_folder(arguments.model, weights=False)
    source = DataSource(
        path=arguments.data,
        columns=columns_of(arguments.columns, "query=question,response=reply"),
        format=arguments.format,
        split=arguments.split,
        limit=arguments.limit,
        on_bad_row="skip",
    )
    chat = carried(folder, None, chat_template=arguments.chat_template)
    with scratch() as store, ExitStack() as stack:
        library = None
        if takes_media(read_config(folder)):
            library = Library(Media(), folder, store)
            stack.callback(library.close)
        kind = _kind(source, arguments.stage)
        prepared = prepare((source,), kind, chat.tokenizer, seed=0, media=library, records=True)
    print(f"template: {_template(chat.tokenizer)}")
    print("\n".join(prepared.report.summary))
    _lengths(prepared, arguments.max_length, chat.tokenizer)
    _doubles(prepared.records)
    if arguments.exam:
        _known(prepared.records, DataSource(path=arguments.exam, on_bad_row="skip"), chat.tokenizer)
    if arguments.write:
        _write(prepared.records, Path(arguments.write))
    return 0


def _kind(source: DataSource, stage: str | None) -> Kind:
    """What the rows are read as: as asked for, else as the kind that reads most of them."""
    found = kinds_of(source)
    for kind, words in found.items():
        print(f"{STAGES[kind]}: {words}")
    if stage is not None:
        return next(kind for kind, name in STAGES.items() if name == stage)
    if not found:
        raise DataError(
            "no stage reads these columns", where=source.path, remedy="--for sft says what each lacks for one of them"
        )
    return next(iter(found))


# ------------------------------------------------------------------------------------------------- what is told


def _template(tokenizer: ChatTokenizer) -> str:
    """One turn of each side, as the template writes it."""
    if tokenizer.template is None:
        return "none: text is read as it stands, and turns cannot be"
    turns = [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]
    return repr(tokenizer.render(turns))


def _lengths(prepared: Prepared, limit: int | None, tokenizer: ChatTokenizer) -> None:
    """A histogram of lengths, what is longer than a limit, and the shortest and the longest row."""
    lengths = prepared.report.lengths
    counts, marks = np.histogram(lengths, bins=min(40, max(1, int(lengths.max() - lengths.min()))))
    bars = "".join(_BARS[int(np.ceil(count / counts.max() * (len(_BARS) - 1)))] for count in counts)
    half, most, nearly_all = (int(at) for at in np.quantile(lengths, [0.5, 0.9, 0.99]))
    print(f"tokens {int(marks[0])} {bars} {int(marks[-1])}: half have at most {half}, 90 % {most}, 99 % {nearly_all}")
    if limit is not None:
        longer = int((lengths > limit).sum())
        print(f"longer than {limit} tokens: {longer} of {lengths.size} rows ({longer / lengths.size:.1%})")
    for name, at in (("shortest", int(lengths.argmin())), ("longest", int(lengths.argmax()))):
        print(f"{name}, {int(lengths[at])} tokens, {prepared.records[at].origin}, scored tokens in ⟦⟧:")
        print("\n".join(shown_row(prepared.items[at], tokenizer)))


def _doubles(records: Sequence[Kept]) -> None:
    whole = [_said(one.record) for one in records]
    groups = same(whole)
    told = [" = ".join(records[at].origin for at in group[:_SHOWN]) for group in groups[:_SHOWN]]
    print(
        _counted(
            sum(len(group) - 1 for group in groups),
            "row says what an earlier one says",
            "rows say what an earlier one says",
            told,
        )
    )
    near = nearly_same(whole)
    told = [f"{records[a].origin} ~ {records[b].origin} ({likeness:.0%})" for a, b, likeness in near[:_SHOWN]]
    nearly = f"nearly an earlier one (at least {THRESHOLD:.0%} of its runs of words)"
    print(_counted(len(near), f"row is {nearly}", f"rows are {nearly}", told))
    asked = same([_asked(one.record) for one in records])
    again = sum(len(group) - 1 for group in asked)
    print(_counted(again, "row asks what an earlier one asks", "rows ask what an earlier one asks"))


def _known(records: Sequence[Kept], exam: DataSource, tokenizer: ChatTokenizer) -> None:
    """Which prompts of the exam are in the data."""
    kinds = kinds_of(exam)
    if not kinds:
        raise DataError("no stage reads these columns", where=exam.path, remedy="name a file of prompts")
    kind = "prompt" if "prompt" in kinds else next(iter(kinds))
    asked = prepare((exam,), kind, tokenizer, seed=0, records=True).records
    here, there = [_asked(one.record) for one in records], [_asked(one.record) for one in asked]
    groups = same([*there, *here])
    pairs = [(a, b - len(there)) for group in groups for a in group for b in group if a < len(there) <= b]
    seen = {a for a, _ in pairs}
    near = [(a, b, likeness) for a, b, likeness in nearly_same(there, here) if a not in seen]
    told = [f"{asked[a].origin} = {records[b].origin}" for a, b in dict(reversed(pairs)).items()][:_SHOWN]
    print(f"{exam.path}: {len(asked)} prompts")
    print("  " + _counted(len(seen), "prompt of the exam is in the data", "prompts of the exam are in the data", told))
    told = [f"{asked[a].origin} ~ {records[b].origin} ({likeness:.0%})" for a, b, likeness in near[:_SHOWN]]
    words = "prompt of the exam is nearly in the data", "prompts of the exam are nearly in the data"
    print("  " + _counted(len(near), *words, told))


def _counted(count: int, one: str, several: str, told: Sequence[str] = ()) -> str:
    return f"{count or 'no'} {one if count == 1 else several}" + (f": {'; '.join(told)}" if told else "")


def _said(record: Record) -> str:
    return "\n".join(_plain(text) for _, text in texts(record))


def _asked(record: Record) -> str:
    """The prompt; of a conversation its turns before the last answer; of plain text all of it."""
    prompt = record.prompt
    completion = getattr(record, "completion", ())
    if prompt or isinstance(completion, str):
        return _plain(prompt or completion)
    return _plain(tuple(message for message in completion[:-1] if message.role == "user"))


def _plain(text: Text) -> str:
    return text if isinstance(text, str) else "\n".join(message.text for message in text)


# ------------------------------------------------------------------------------------------------- what is written


def _write(records: Sequence[Kept], out: Path) -> None:
    lines = []
    for one in records:
        row = row_of(_with_places(one.record, one.folder))
        if one.margin is not None:
            row["margin"] = one.margin
        lines.append(json.dumps(row, ensure_ascii=False))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, "\n".join(lines) + "\n")
    print(f"{out}: {len(lines)} rows in our own layout")


def _with_places(record: Record, folder: Path | None) -> Record:
    """The record with the whole path of each of its files. Raises DataError for media that are bytes."""
    changed = {name: _placed(text, folder) for name, text in texts(record) if not isinstance(text, str)}
    return with_texts(record, **changed) if changed else record


def _placed(text: tuple[Message, ...], folder: Path | None) -> tuple[Message, ...]:
    def part(one: Any) -> Any:
        if not isinstance(one, MediaPart):
            return one
        if not isinstance(one.source, str):
            raise DataError(
                f"a row holds an {one.kind} itself ({type(one.source).__name__}), which no line of JSON can",
                remedy="leave --write out: such rows are read as they are",
            )
        whole = (folder or Path()) / one.source
        return replace(one, source=str(whole.absolute())) if whole.is_file() else one

    return tuple(
        message if isinstance(message.content, str) else replace(message, content=tuple(map(part, message.content)))
        for message in text
    )
