"""A user's layouts, which may be anything: looked at before a row is read, and each row's failure told as the row's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from align.data.formats.base import Layout, Row
from align.data.records import RECORDS, Record, RowError, known_roles, messages_of
from align.data.values import kind_of, problem_of
from align.errors import PluginError
from align.plugins import place_of, users_code, words_of


def guarded(layout: Layout, name: str) -> Layout:
    """The same layout. What its `read` raises is the row's, what its `fits` raises a PluginError. name: of the plugin.

    Raises PluginError where a field is of another type, or names a kind that no stage reads.
    """
    _require_sound(layout, name)
    return replace(layout, read=_reading(layout), fits=_fitting(layout.fits, layout.name, name))


def guarded_rows(function: Callable[[Row], Row], name: str) -> Callable[[Row], Row]:
    """A user's function of a row, from which comes a row of text keys, or RowError. name: of the plugin."""

    called = name.rpartition(":")[2]

    def row_of(row: Row) -> Row:
        with _of_the_row(f"`{called}` failed on the row"):
            made = function(dict(row))
        if not isinstance(made, dict) or not all(isinstance(key, str) for key in made):
            raise RowError(f"`{called}` must return a dict with the row, got {str(made)[:60]}")
        if (wrong := problem_of(made) or _strange(made)) is not None:
            raise RowError(f"`{called}` returned a row that cannot be read: {wrong}")
        return made

    return row_of


@contextmanager
def _of_the_row(failed: str) -> Iterator[None]:
    """What a user's code raises on a row as its RowError. failed: what did."""
    try:
        yield
    except (RowError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        place = place_of(error)
        said = f"{failed}: {words_of(error)[:200]}"
        raise RowError(f"{said} ({place})" if place else said) from error


def _strange(value: Any) -> str | None:
    """What no file of rows could hold."""
    if isinstance(value, dict):
        return next((what for one in value.values() if (what := _strange(one))), None)
    if isinstance(value, list | tuple):
        return next((what for one in value if (what := _strange(one))), None)
    return None if value is None or isinstance(value, str | bytes | int | float) else f"it holds {kind_of(value)}"


def _require_sound(layout: Layout, name: str) -> None:
    where = f"the layout {layout.name!r}"
    problems = [
        (not isinstance(layout.name, str) or not layout.name, "a layout's `name` is a text", 'name it: name="mine"'),
        (
            layout.kind not in RECORDS,
            f"{where} is of kind {layout.kind!r}, which no stage reads",
            f"use {' or '.join(RECORDS)}",
        ),
        *(
            (
                not isinstance(columns, frozenset | set) or not all(isinstance(column, str) for column in columns),
                f"`{key}` of {where} is {columns!r}, where a set of column names is needed",
                f'write {key}=frozenset({{"column", ...}})',
            )
            for key, columns in (("required", layout.required), ("optional", layout.optional))
        ),
        *(
            (not callable(function), f"`{key}` of {where} is no function", f"write {key}=a function of the row")
            for key, function in (("read", layout.read), ("fits", layout.fits))
        ),
    ]
    for wrong, what, remedy in problems:
        if wrong:
            raise PluginError(what, where=name, remedy=remedy)


def _reading(layout: Layout) -> Callable[[Row], Record]:
    def read(row: Row) -> Record:
        with _of_the_row(f"`read` of the layout {layout.name} failed"):
            record = layout.read(row)
        if isinstance(record, RECORDS[layout.kind]):
            known_roles(messages_of(record))
        return record

    return read


def _fitting(fits: Callable[[Row], bool], layout: str, name: str) -> Callable[[Row], bool]:
    def fitting(row: Row) -> bool:
        with users_code(name, f"`fits` of the layout {layout} failed"):
            return bool(fits(row))

    return fitting
