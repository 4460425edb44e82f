"""A recipe and what it names beside itself, as one folder that can be sent to a cluster.

Shipped are the resolved recipe, the files and folders below the recipe's own folder that it names, and the Python files
and packages beside recipe and plugins, which they may import. They are named relative to the recipe again, so that it
reads them wherever the folder lies. Everything else is taken to be where the cluster finds it: on storage that its
nodes mount, or on the hub.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.errors import RecipeError
from align.recipe.document import dump
from align.recipe.schema import Recipe

RECIPE = "recipe.yaml"
LARGEST_BYTES = 100 << 20  # Ray keeps what is shipped in the memory of its head


def pack(recipe: Recipe, folder: Path, target: Path) -> list[str]:
    """Write the recipe and what belongs to it into `target`, an empty folder; the names of what was copied.

    folder: the recipe's. Raises RecipeError where a file that it names is missing, or where all are too large.
    """
    resolved = recipe.model_dump(mode="json", by_alias=True)
    output = resolved.pop("output")
    named = {_file_of(text) for text in _texts(resolved)} | {str(path) for path in python_files(recipe, folder)}
    below = (_below(name, folder) for name in named)
    wanted = {Path(name) for name in below if name is not None}
    copied, size = [], 0
    for name in sorted(wanted):
        for path in _files(folder / name):
            size += path.stat().st_size
            if size > LARGEST_BYTES:
                raise RecipeError(
                    f"what lies beside the recipe is more than {LARGEST_BYTES >> 20} MiB ({name} is the next)",
                    where=folder,
                    remedy="put data and models on storage that the cluster mounts, and name them there",
                )
            placed = target / path.relative_to(folder)
            placed.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, placed)
        copied.append(str(name))
    (target / RECIPE).write_text(dump({**_relative(resolved, folder), "output": output}), encoding="utf-8")
    return copied


def python_files(recipe: Recipe, folder: Path) -> list[Path]:
    """The Python files that plugins can import by a plain name: beside the recipe and beside each plugin that is a
    file, with the packages there."""
    texts = (_file_of(text) for text in _texts(recipe.model_dump(mode="json", by_alias=True)))
    places = {folder} | {Path(text).parent for text in texts if text.startswith("/") and text.endswith(".py")}
    found: set[Path] = set()
    for place in places:
        found.update(place.glob("*.py"))
        for package in place.glob("*/__init__.py"):
            found.update(package.parent.rglob("*.py"))
    return sorted(found)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.is_file())
    if not path.is_file():
        raise RecipeError("the recipe names this file, and it is not there", where=path, remedy="check the path")
    return [path]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _below(text: str, folder: Path) -> str | None:
    """What a path says from `folder` on; None where it is none, or lies elsewhere."""
    return text.removeprefix(f"{folder}/") if text.startswith(f"{folder}/") else None


def _file_of(name: str) -> str:
    """A path; of `/a/plugin.py:function`, without the function."""
    head, _, _ = name.rpartition(":")
    return head if head.endswith(".py") else name


def _relative(value: Any, folder: Path) -> Any:
    if isinstance(value, str):
        name = _below(value, folder)
        return value if name is None else f"./{name}"
    if isinstance(value, dict):
        return {key: _relative(inner, folder) for key, inner in value.items()}
    return [_relative(inner, folder) for inner in value] if isinstance(value, list) else value
