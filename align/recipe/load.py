"""YAML in, `Recipe` out; every problem at once, each with its place and a remedy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from align.errors import RecipeError
from align.recipe import overrides as overrides_
from align.recipe.document import Document, dump, parse
from align.recipe.paths import absolutise
from align.recipe.problems import booleans, from_validation, raise_problems
from align.recipe.schema import Recipe


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, cwd: str | Path | None = None) -> Recipe:
    """Read, override and validate a recipe.

    Args:
        path: a YAML file; relative paths in it are relative to its folder.
        overrides: `key=value` each; relative paths in them are relative to `cwd` (default: the working directory).

    Returns the recipe with absolute paths; `output`, where nobody gave one, is `runs` in `cwd`.

    Raises RecipeError (or Unsupported, where all that is wrong is planned but not built) naming every problem.
    """
    return load_document(path, overrides, cwd=cwd)[0]


def load_document(
    path: str | Path, overrides: Sequence[str] = (), *, cwd: str | Path | None = None
) -> tuple[Recipe, Document]:
    """`load_recipe` with the document beside it, for messages about a place in the file."""
    here = Path(cwd) if cwd is not None else Path.cwd()
    document = parse(_read(Path(path)), _shown(Path(path), here), Path(path).absolute().parent)
    overrides_.apply(document, overrides, here)
    if "output" not in document.data:
        document.data["output"] = "runs"
        document.bases[("output",)] = here
    absolutise(document)
    problems = list(document.problems)
    try:
        recipe = Recipe.model_validate(document.data)
    except ValidationError as error:
        problems += from_validation(error, document)
        recipe = None
    else:
        problems += booleans(document)
    raise_problems(problems, document.name)
    assert recipe is not None, "a validation error without a problem"
    return recipe, document


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML: `load_recipe` of it gives an equal recipe."""
    return dump(recipe.model_dump(mode="json", by_alias=True))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        remedy = f"recipes in that folder: {', '.join(near[:10])}" if near else "check the path"
        raise RecipeError("no such recipe", where=path, remedy=remedy) from None
    except IsADirectoryError:
        raise RecipeError("this is a folder, not a recipe", where=path, remedy="name the YAML file in it") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"not UTF-8 text (byte {error.start})", where=path, remedy="save it as UTF-8") from None
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", where=path) from None


def _shown(path: Path, cwd: Path) -> str:
    """The file's name as a user would write it: relative where that is shorter."""
    relative = os.path.relpath(path.absolute(), cwd)
    return relative if not relative.startswith("..") else str(path)
