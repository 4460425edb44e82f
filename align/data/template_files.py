"""Which chat template a model folder has: its own, one of several by its name, or what the recipe names instead."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from align.data.templates import NAMED
from align.errors import ModelError
from align.recipe.chat_files import templates_of


def template_source(folder: Path, wanted: str | None) -> tuple[str | None, str]:
    """(Jinja text or None, where it came from).

    wanted: a template of the folder by name (`tool_use`), a file, the Jinja text itself, or the name of one of ours.
    Raises ModelError where there is none of that name, or several and no default.
    """
    found, where = templates_of(folder)
    if wanted is not None:
        return (found[wanted], where) if wanted in found else _named(wanted, found)
    if not found or "default" in found:
        return found.get("default"), where
    raise ModelError(
        f"the model has several chat templates ({', '.join(sorted(found))}) and no default",
        where=where,
        remedy=f"name one: `model.chat_template: {min(found)}`",
    )


def _named(value: str, found: Mapping[str, str]) -> tuple[str, str]:
    if value in NAMED:
        return NAMED[value], f"chat_template: {value}"
    if "{%" in value or "{{" in value:
        return value, "model.chat_template"
    path = Path(value)
    if not path.is_file():
        own = f", one of the model's ({', '.join(sorted(found))})" if found else ""
        raise ModelError(
            f"`chat_template` names no file: {value}",
            where="model.chat_template",
            remedy=f"give a file, the Jinja text itself{own}, or one of ours: {', '.join(sorted(NAMED))}",
        )
    return path.read_text(encoding="utf-8"), str(path)
