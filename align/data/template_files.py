"""Which chat template a model folder has: its own, one of several by its name, or what the recipe names instead."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.data.templates import NAMED
from align.errors import ModelError

MORE = "additional_chat_templates"  # transformers' folder of templates beside the default, each by its name


def template_source(
    folder: Path, config: Mapping[str, Any], legacy: Mapping[str, Any], wanted: str | None
) -> tuple[str | None, str]:
    """(Jinja text or None, where it came from).

    config: tokenizer_config.json. legacy: chat_template.json. wanted: a template of the folder by name (`tool_use`), a
    file, the Jinja text itself, or the name of one of ours. Raises ModelError where there is none of that name, or
    several and no default.
    """
    found, where = _templates(folder, config, legacy)
    if wanted is not None:
        return (found[wanted], where) if wanted in found else _named(wanted, found)
    if not found or "default" in found:
        return found.get("default"), where
    raise ModelError(
        f"the model has several chat templates ({', '.join(sorted(found))}) and no default",
        where=where,
        remedy=f"name one: `model.chat_template: {min(found)}`",
    )


def _templates(folder: Path, config: Mapping[str, Any], legacy: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """The folder's templates by name, and the place of the default."""
    found = {path.stem: path.read_text(encoding="utf-8") for path in sorted((folder / MORE).glob("*.jinja"))}
    path = folder / "chat_template.jinja"
    if path.is_file():
        return {**found, "default": path.read_text(encoding="utf-8")}, str(path)
    value, path = config.get("chat_template"), folder / "tokenizer_config.json"
    if value is None:
        value, path = legacy.get("chat_template"), folder / "chat_template.json"
    if isinstance(value, str):
        value = {"default": value}
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        value = {item.get("name"): item.get("template") for item in value}
    if value is None:
        return found, str(path)
    if not isinstance(value, dict) or not all(isinstance(text, str) for pair in value.items() for text in pair):
        raise ModelError(
            "`chat_template` is neither a text nor texts by name", where=path, remedy="copy the file again"
        )
    return {**found, **value}, str(path)


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
