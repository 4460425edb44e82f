"""Data layouts, one file per family. A new format is a new file with `LAYOUTS`, named here, or the user's own: `format:
PATH:NAME` or `package.module:NAME`, where NAME is a `Layout` or several of them (PATH alone: its `LAYOUTS`)."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from os.path import expanduser
from pathlib import Path
from typing import Any

from align.data.formats.base import Layout
from align.data.formats.users import guarded
from align.errors import PluginError
from align.plugins import asked_in_child, is_users, resolve

_FAMILIES = ("trl", "openai", "sharegpt", "alpaca", "swift", "ranked", "labelled")

LAYOUTS: tuple[Layout, ...] = tuple(
    layout for family in _FAMILIES for layout in import_module(f"{__name__}.{family}").LAYOUTS
)


def fields_of(layouts: tuple[Layout, ...]) -> frozenset[str]:
    """Every column name that some of the layouts reads: what `columns:` may map to."""
    return frozenset().union(*(layout.columns for layout in layouts))


def layouts_of(format: str | None) -> tuple[tuple[Layout, ...], str | None]:
    """The layouts that `format:` chooses among, and the name that it chooses by: ours by name, or all of a user's.

    Raises PluginError where the user's cannot be loaded, or is none."""
    if format is None or not is_users(format):
        return LAYOUTS, format
    return _of_user(format), None


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
def _of_user(name: str) -> tuple[Layout, ...]:
    asked_in_child(f"{__name__}:described", name)
    return _loaded(name)


def described(name: str) -> dict[str, Any]:
    """A user's layouts in words. It runs user code."""
    return {"layouts": [layout.describe() for layout in _loaded(name)]}


def _loaded(name: str) -> tuple[Layout, ...]:
    found = resolve(name, group=__name__)
    if name.endswith(".py"):
        found = getattr(found, "LAYOUTS", None)
    layouts = tuple(found) if isinstance(found, list | tuple) else (found,)
    if not layouts or not all(isinstance(layout, Layout) for layout in layouts):
        raise PluginError(
            f"a format is a Layout or a list of them; this is {type(found).__name__}",
            where=name,
            remedy="align/data/formats/alpaca.py is a short example",
        )
    return tuple(guarded(layout, name) for layout in layouts)
