"""Completions that are in a file, as the samples that a run would hand to a reward: with their prompt and row."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from align.check.trial_media import TrialMedia, media_of_messages, with_files
from align.data.audit import Refusal
from align.data.formats import LAYOUTS
from align.data.formats.choosing import choose
from align.data.formats.written import Values
from align.data.placing import place_media
from align.data.records import Prompt, RowError
from align.data.rows import Row
from align.data.seen import light
from align.data.sources import apply_columns, open_source, renamed
from align.data.unread import Reading
from align.errors import DataError
from align.recipe.inputs import DataSource
from align.recipe.load import load_recipe
from align.stages.runfolder import RECIPE, RUN
from rewards.api import Sample

_ROLLOUTS = {"step", "group_id", "sample", "origin", "prompt", "completion", "finish", "token_ids", "version"}
_PLACE = re.compile(r"(?P<path>.+?)(?::\d+| row \d+)")


@dataclass
class Trial:
    """samples of one row stand side by side; origins: where each is from; column: that was scored."""

    path: Path
    column: str
    media: TrialMedia
    samples: list[Sample] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_trial(path: Path, column: str, columns: dict[str, str], limit: int | None, aside: Path) -> Trial:
    """The first rows of a file, each with one completion or a list of them. Raises DataError, naming the row.

    aside: an empty folder for media that rows hold themselves; it must outlive the trial.
    """
    path = _of_one_model(path)
    rows = _rows(path, limit)
    trial = Trial(path, column, TrialMedia(aside))
    if not rows:
        raise DataError("there are no rows", where=path)
    if all(row.values.keys() >= _ROLLOUTS for row in rows):
        _read_rollouts(rows, trial, columns)
    else:
        _read_data(_named(rows, path, columns), trial, columns)
    return trial


def _of_one_model(path: Path) -> Path:
    """An evaluation has a folder of rollouts for each model that it examined: the only one, or a DataError."""
    inner = sorted({file.parent for file in path.glob("*/step-*.parquet")}) if path.is_dir() else []
    if not inner or any(path.glob("step-*.parquet")):
        return path
    if len(inner) > 1:
        names = ", ".join(str(folder) for folder in inner)
        raise DataError("these are the rollouts of several models", where=path, remedy=f"name one of {names}")
    return inner[0]


def _rows(path: Path, limit: int | None) -> list[Row]:
    items = list(open_source(DataSource(path=str(path.absolute()))).rows(limit))
    refused = next((item for item in items if isinstance(item, Refusal)), None)
    if refused is not None:
        raise DataError(refused.reason, where=refused.origin)
    return [item for item in items if isinstance(item, Row)]


def _named(rows: Sequence[Row], path: Path, columns: dict[str, str]) -> list[Row]:
    """The rows under our names."""
    named = apply_columns(rows, DataSource(path=str(path.absolute()), columns=columns))
    return [replace(row, values=values) for values, row in zip(named, rows, strict=True)]


def _read_data(rows: Sequence[Row], trial: Trial, columns: dict[str, str]) -> None:
    # what is scored must not be read as the answer that the row knows
    prompts = _prompts([_without(row, trial.column) for row in rows], trial, frozenset(columns))
    _note_answers(rows, trial, columns, prompts)
    for row, (messages, more) in zip(rows, prompts, strict=True):
        shown, values = media_of_messages(messages), {**light(row.values), **more}
        for sample, text in enumerate(_texts(row, trial.column)):
            own = Sample(text, messages, values, group_id=row.number, sample_id=sample, media=shown)
            trial.samples.append(own)
            trial.origins.append(row.origin)


def _note_answers(
    rows: Sequence[Row],
    trial: Trial,
    columns: dict[str, str],
    prompts: Sequence[tuple[tuple[dict[str, Any], ...], dict[str, Any]]],
) -> None:
    """Say where the column that is scored is the answer that a stage keeps for its rewards: they miss it here."""
    if any(more for _, more in prompts):
        return
    as_in_a_stage = replace(trial, notes=[])
    try:
        whole = _prompts(rows, as_in_a_stage, frozenset(columns))
    except DataError:
        return
    if any(more for _, more in whole):
        trial.notes.append(
            f"column {trial.column!r} is these rows' answer: a stage takes it off and gives it to rewards as "
            "row['reference_answer'], which is missing here, because it is what is scored. For a reward that compares "
            "with it, add a column with the completions to try, or try it on a run's rollouts"
        )


def _without(row: Row, column: str) -> Row:
    return replace(row, values={k: v for k, v in row.values.items() if k != column})


def _texts(row: Row, column: str) -> list[str]:
    """A text, a conversation whose last assistant turn counts, or a list of either."""
    if column not in row.values:
        have = ", ".join(sorted(row.values)) or "nothing"
        raise DataError(f"the row has no column {column!r}; it has: {have}", where=row.origin, remedy="name another")
    value = row.values[column]
    several = isinstance(value, list) and not _is_chat(value)
    texts = [_text(one) for one in (value if several else [value])]
    if not texts or None in texts:
        raise DataError(
            f"column {column!r} holds {str(value)[:80]!r}, which is no text, no list of texts and no conversation",
            where=row.origin,
        )
    return [text for text in texts if text is not None]


def _text(value: Any) -> str | None:
    if isinstance(value, list) and _is_chat(value):
        value = next((m.get("content") for m in reversed(value) if m.get("role") == "assistant"), None)
    return value if isinstance(value, str) else None


def _is_chat(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


def _prompts(
    rows: Sequence[Row], trial: Trial, mapped: frozenset[str] = frozenset()
) -> list[tuple[tuple[dict[str, Any], ...], dict[str, Any]]]:
    """Per row the prompt's messages, and the reference answer where a run would take one off; ((), {}) without."""
    values = [Values.read(row.values) for row in rows]
    try:
        layout, guess = choose(LAYOUTS, "prompt", values, where=str(trial.path), mapped=mapped)
    except DataError as error:
        if mapped:
            raise
        trial.notes.append(f"no prompt was found, so `messages` is empty (--columns prompt=...): {error.what}")
        return [((), {})] * len(rows)
    if guess is not None:
        trial.notes.append(f"prompts are read as {guess.words}")
        values = [Values.read(one) for one in renamed(values, guess.columns, str(trial.path))]
    found: list[tuple[tuple[dict[str, Any], ...], dict[str, Any]]] = []
    for row, own in zip(rows, values, strict=True):
        try:
            reading = Reading(own, columnar=row.columnar, written=own.written)
            record = place_media(layout.convert(reading), reading)
            assert isinstance(record, Prompt)
            messages = _messages(record, trial.media, row.folder)
        except RowError as error:
            raise DataError(str(error), where=row.origin) from None
        more = {} if record.reference_answer is None else {"reference_answer": record.reference_answer}
        found.append((messages, more))
    return found


def _messages(prompt: Prompt, media: TrialMedia, folder: Path | None) -> tuple[dict[str, Any], ...]:
    if isinstance(prompt.prompt, str):
        return ({"role": "text", "content": prompt.prompt},)
    return tuple(m.as_dict(partial(media.describe, folder=folder)) for m in prompt.prompt)


# ------------------------------------------------------------------------------------------------- a run's rollouts


def _read_rollouts(rows: Sequence[Row], trial: Trial, columns: dict[str, str]) -> None:
    """Completions that a run sampled, with the data rows that they were sampled for, where those are still there.
    columns: of those rows, in place of what the run's recipe says."""
    known = _origin_rows({row.values["origin"] for row in rows}, trial, columns)
    for row in sorted(rows, key=lambda r: (r.values["step"], r.values["group_id"], r.values["sample"])):
        v = row.values
        messages, values = known.get(v["origin"], (({"role": "text", "content": v["prompt"]},), {}))
        messages = with_files(messages, v.get("media") or ())
        [text] = _texts(row, trial.column)
        trial.samples.append(
            Sample(
                completion=text,
                messages=messages,
                media=media_of_messages(messages),
                row=values,
                token_ids=v["token_ids"],
                truncated=v["finish"] == "length",
                group_id=v["group_id"],
                sample_id=v["sample"],
                policy_version=-1 if v["version"] is None else v["version"],
                raw=v.get("completion_raw") if trial.column == "completion" else None,
            )
        )
        trial.origins.append(f"{v['origin']} (step {v['step']}, group {v['group_id']}, sample {v['sample']})")


def _origin_rows(
    origins: set[str], trial: Trial, columns: dict[str, str]
) -> dict[str, tuple[tuple[dict[str, Any], ...], dict[str, Any]]]:
    """The data rows that rollouts name as `file:line` or `file row n`."""
    found: dict[str, tuple[tuple[dict[str, Any], ...], dict[str, Any]]] = {}
    files = {place["path"] for origin in sorted(origins) if (place := _PLACE.fullmatch(origin))}
    for name in sorted(files):
        if not Path(name).is_file():
            trial.notes.append(f"{name} is not there: its samples have no `row`, and their prompt is plain text")
            continue
        renamed = columns or _columns_of(Path(name), trial.path)
        rows = [row for row in _named(_rows(Path(name), None), Path(name), renamed) if row.origin in origins]
        for row, (messages, more) in zip(rows, _prompts(rows, trial, frozenset(renamed)), strict=True):
            found[row.origin] = (messages, {**light(row.values), **more})
    return found


def _columns_of(file: Path, rollouts: Path) -> dict[str, str]:
    """What the recipe of the run that wrote `rollouts` says of the columns of a data file; the stage's own word first.
    {} for rollouts that stand alone."""
    folders = list(rollouts.absolute().parents)
    run = next((folder for folder in folders if (folder / RECIPE).is_file() and (folder / RUN).is_file()), None)
    if run is None:
        return {}
    stages = sorted(load_recipe(run / RECIPE).stages, key=lambda stage: run / stage.id not in folders)
    sources = [source for stage in stages for several in stage.datasets.values() for source in several]
    named = (source for source in sources if {file, *file.parents} & {Path(source.path), Path(source.path).resolve()})
    source = next(named, None)
    return dict(source.columns) if source is not None else {}
