"""Data layouts, one file per family. A new format is a new file with `LAYOUTS`, named here, or the user's own: `format:
PATH:NAME` or `package.module:NAME`, where NAME is a `Layout` or several of them (PATH alone: its `LAYOUTS`), or a
function of a row that returns it in a layout of ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from inspect import isfunction
from os.path import expanduser
from pathlib import Path
from typing import Any

from align.data.formats.base import COMMON, Layout, Row
from align.data.formats.users import guarded, guarded_rows
from align.errors import PluginError
from align.plugins import asked_in_child, is_users, resolve

_FAMILIES = (
    "trl", "openai", "sharegpt", "alpaca", "swift", "spoken", "ranked", "labelled", "trees", "paddle", "moss", "exams",
    "calling", "verdicts",
)  # fmt: skip

LAYOUTS: tuple[Layout, ...] = tuple(
    layout for family in _FAMILIES for layout in import_module(f"{__name__}.{family}").LAYOUTS
)


def fields_of(layouts: tuple[Layout, ...]) -> frozenset[str]:
    """Every column name that some of the layouts reads: what `columns:` may map to."""
    return frozenset().union(*(COMMON if layout.verbatim else layout.columns for layout in layouts))


def layouts_of(format: str | None) -> tuple[tuple[Layout, ...], str | None]:
    """The layouts that `format:` chooses among, and the name that it chooses by: ours by name, or all of a user's.

    Raises PluginError where the user's cannot be loaded, or is none."""
    if format is None or not is_users(format):
        return LAYOUTS, format
    return _of_user(format)[0] or LAYOUTS, None


def row_function(format: str | None) -> Callable[[Row], Row] | None:
    """What a user's function makes of each row before its layout is looked for, where `format:` names one."""
    return None if format is None or not is_users(format) else _of_user(format)[1]


def file_of(format: str) -> Path | None:
    """The file of a user's format; None of one of ours, or where there is none."""
    if not is_users(format):
        return None
    place = format if format.endswith(".py") else format.rpartition(":")[0]
    if place.endswith(".py"):
        return Path(expanduser(place)).absolute()
    found = find_spec(place)
    return Path(found.origin) if found and found.origin else None


@lru_cache
def _of_user(name: str) -> tuple[tuple[Layout, ...], Callable[[Row], Row] | None]:
    """Layouts, or else a function of rows."""
    asked_in_child(f"{__name__}:described", name)
    return _loaded(name)


def described(name: str) -> dict[str, Any]:
    """A user's layouts in words. It runs user code."""
    return {"layouts": [layout.describe() for layout in _loaded(name)[0]]}


def _loaded(name: str) -> tuple[tuple[Layout, ...], Callable[[Row], Row] | None]:
    found = resolve(name, group=__name__)
    if name.endswith(".py"):
        found = getattr(found, "LAYOUTS", None)
    if isfunction(found):
        return (), guarded_rows(found, name)
    layouts = tuple(found) if isinstance(found, list | tuple) else (found,)
    if not layouts or not all(isinstance(layout, Layout) for layout in layouts):
        raise PluginError(
            f"a format is a Layout, a list of them, or a function of a row; this is {type(found).__name__}",
            where=name,
            remedy="align/data/formats/alpaca.py is a short example of a Layout",
        )
    return tuple(guarded(layout, name) for layout in layouts), None
