"""What a trained folder says of its language beside its weights: tokenizer, chat template, and the tokens that end a
turn. What was trained with is what is written, in adapters, checkpoints and whole models alike.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import ModelError

MORE_TEMPLATES = "additional_chat_templates"  # transformers' folder of those beside the default, each by its name
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    MORE_TEMPLATES,
)
TEMPLATE, GENERATION = "chat_template.jinja", "generation_config.json"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def carries_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file()


def carries_template(folder: Path) -> bool:
    """Whether a folder has a chat template, in any of the places where one may stand."""
    if any((folder / name).is_file() for name in (TEMPLATE, "chat_template.json")):
        return True
    return bool(read_settings(folder / "tokenizer_config.json").get("chat_template"))


@dataclass(frozen=True)
class ChatFiles:
    """tokenizer: the folder whose tokenizer it is. template: Jinja text in place of the folder's own. end_ids: tokens
    that end a turn."""

    tokenizer: Path
    template: str | None = None
    end_ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, base: Path, adapter: Path | None) -> ChatFiles:
        """What the folders themselves say: the adapter's, as far as it says anything."""
        if adapter is None:
            return cls(base)
        ends = tuple(declared_ends(adapter))
        if carries_tokenizer(adapter):
            template = None if carries_template(adapter) else templates_of(base)[0].get("default")
            return cls(adapter, template, ends)
        return cls(base, templates_of(adapter)[0].get("default"), ends)

    def write(self, folder: Path, base: Path) -> None:
        """Into a folder beside weights. base: the model folder that the weights come from."""
        for name in TOKENIZER_FILES:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        copy_tokenizer(self.tokenizer, folder)
        if self.template is not None:
            (folder / TEMPLATE).write_text(self.template, encoding="utf-8")
        write_ends(folder, self.end_ids, base)


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer's files and the chat template; returns the names copied."""
    copied = []
    for name in TOKENIZER_FILES:
        path = source / name
        if path.is_dir():
            shutil.copytree(path, target / name)
        elif path.is_file():
            shutil.copy2(path, target / name)
        else:
            continue
        copied.append(name)
    return copied


def write_ends(folder: Path, end_ids: Iterable[int], base: Path) -> None:
    """Have generation_config.json of `folder` list these tokens among those that end a generation; its other fields,
    or those of the base's, stay. Servers and `generate` read it; the tokenizer's own EOS stays what it is."""
    file = folder / GENERATION
    config = read_settings(file if file.is_file() else base / GENERATION)
    if not config:
        model = read_settings(base / "config.json")
        text = model.get("text_config") if isinstance(model.get("text_config"), dict) else {}
        config = {key: value for key in _IDS if (value := model.get(key, (text or {}).get(key))) is not None}
    known = _ends(config, file)
    ends = [*known, *sorted(set(end_ids) - set(known))]
    if not ends or (file.is_file() and ends == known):
        return
    config["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def declared_ends(folder: Path) -> list[int]:
    """Tokens that a folder's generation_config.json calls ends. Raises ModelError where those are no token ids."""
    return _ends(read_settings(folder / GENERATION), folder / GENERATION)


def _ends(config: dict[str, Any], file: Path) -> list[int]:
    found = config.get("eos_token_id")
    ids = [] if found is None else list(found) if isinstance(found, list) else [found]
    if wrong := [i for i in ids if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < 1 << 31]:
        raise ModelError(
            f"`eos_token_id` must be a token's number or a list of them, and holds {wrong[0]!r:.60}",
            where=file,
            remedy="copy the file again, or correct it",
        )
    return ids


def unread_tokenizer(folder: Path) -> list[str]:
    """The files of a tokenizer that is not read: it has no tokenizer.json, which alone is."""
    if carries_tokenizer(folder):
        return []
    templates = (TEMPLATE, "chat_template.json", MORE_TEMPLATES)
    return [name for name in TOKENIZER_FILES if name not in templates and (folder / name).is_file()]


def templates_of(folder: Path) -> tuple[dict[str, str], str]:
    """A folder's chat templates by name, and the place of the default. Raises ModelError for what is no template."""
    found = {path.stem: path.read_text(encoding="utf-8") for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
    path = folder / TEMPLATE
    if path.is_file():
        return {**found, "default": path.read_text(encoding="utf-8")}, str(path)
    path = folder / "tokenizer_config.json"
    value = read_settings(path).get("chat_template")
    if value is None:
        path = folder / "chat_template.json"
        value = read_settings(path).get("chat_template")
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


def read_settings(file: Path) -> dict[str, Any]:
    """A JSON object of a model folder; {} where there is none. Raises ModelError for any other file."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"not valid JSON: {error}", where=file, remedy="copy the file again") from None
    if not isinstance(value, dict):
        raise ModelError("must hold a JSON object", where=file, remedy="copy the file again")
    return value
