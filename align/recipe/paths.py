"""Paths of a recipe made absolute: relative to the recipe's file, or to the working directory for an override.

A name that could be a hub id stays as it is unless something of that name is there: `path: org/name` is a folder where
such a folder exists, and a hub id otherwise. What plainly is a file (`data/x.jsonl`, `./x`, `x.py:function`) is made
absolute even where it is missing, so that the error names the place that was looked at.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from os.path import expanduser
from pathlib import Path
from typing import Any

from align.plugins import REWARDS
from align.recipe.document import Document, Path_, Problem

_LONGEST_NAME, _LONGEST_PATH = 255, 4000  # bytes, of Linux and macOS; a run appends to them
DATA_SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst", ".txt")


def absolutise(document: Document) -> None:
    """Rewrite every path of the document's data in place. Values of a wrong type are left for validation to name."""
    data = document.data
    for path, kind in _places(data):
        holder = _get(data, path[:-1])
        value = holder[path[-1]]
        template = kind == "template" and "{" in value if isinstance(value, str) else False
        if isinstance(value, str) and value and (template or _is_name(document, path, value)):
            holder[path[-1]] = _absolute(value, document.base_of(path), kind)
    output = data.get("output")
    if isinstance(output, str) and "://" not in output and _is_name(document, ("output",), output):
        data["output"] = _join(output, document.base_of(("output",)))


def _is_name(document: Document, path: Path_, value: str) -> bool:
    """Whether a file system could have it; otherwise that is a problem of the document."""
    if "://" in value and path[-1] != "output":
        hub = re.match(r"hf://(?:datasets/)?([^/]+/[^/]+)", value) or re.match(
            r"https://huggingface\.co/(?:datasets/)?([^/]+/[^/?#]+)", value
        )
        what = f"`{document.called(path)}` is an address, and none is fetched"
        remedy = f"write the hub id, {hub[1]}" if hub else "download it, and name the file or folder; or give a hub id"
        document.problems.append(Problem(what, document.where(path), remedy))
        return False
    variable = re.search(r"\$\{?[A-Za-z_]\w*\}?", value)
    if variable is not None and not os.path.lexists(_join(value, document.base_of(path))):
        what = f"`{document.called(path)}` has {variable[0]} in it, and a recipe knows no variables of the shell"
        remedy = "write the path, or give it as an override, where the shell puts the value in"
        document.problems.append(Problem(what, document.where(path), remedy))
        return False
    longest = max(len(os.fsencode(part)) for part in value.split("/"))
    if longest <= _LONGEST_NAME and len(os.fsencode(value)) <= _LONGEST_PATH:
        return True
    what = f"`{document.called(path)}` is a path of {len(value)} characters, longer than file systems allow"
    document.problems.append(Problem(what, document.where(path), "give a shorter one"))
    return False


def _absolute(value: str, base: Path, kind: str) -> str:
    if kind == "plugin" and value.endswith(".py"):
        return _join(value, base)
    head, colon, attribute = value.rpartition(":")
    if colon and head.endswith(".py"):
        return f"{_join(head, base)}:{attribute}"
    if kind == "plugin":  # a bare name or a dotted path
        return value
    if kind == "program":  # a bare name is looked for on the PATH
        return _join(value, base) if "/" in value else value
    if kind == "template" and "{" in value:  # the template itself
        return value
    if _plainly_a_file(value, kind) or Path(_join(value, base)).exists():
        return _join(value, base)
    return value


def _plainly_a_file(value: str, kind: str) -> bool:
    if kind == "folder" or value.startswith(("/", "./", "../", "~")) or value in (".", ".."):
        return True
    if kind == "template":  # otherwise the name of one of ours
        return value.endswith((".jinja", ".jinja2", ".j2", ".txt"))
    return kind == "data" and value.lower().endswith(DATA_SUFFIXES)


def _join(value: str, base: Path) -> str:
    return os.path.normpath(base / Path(expanduser(value)))


def _places(data: dict[str, Any]) -> Iterator[tuple[Path_, str]]:
    """Every place of the grammar that holds a path: (where, data | model | template | plugin | program | folder)."""
    model = data.get("model")
    if isinstance(model, dict):
        for key, kind in (("path", "model"), ("adapter", "model"), ("chat_template", "template")):
            if key in model:
                yield ("model", key), kind
        yield from _data_places(model.get("tokenizer"), "train_on", ("model", "tokenizer"))
    yield from ((place, "folder") for place in _listed(data.get("media"), "folders", "path", ("media",)))
    stages = data.get("stages")
    for i, stage in enumerate(stages if isinstance(stages, list) else []):
        if not isinstance(stage, dict):
            continue
        here: Path_ = ("stages", i)
        yield from _data_places(stage, "data", here)
        yield from _reward_places(stage, here)
        yield from ((place, "plugin") for place in _listed(stage, "loss", "name", here))
        yield from ((place, "plugin") for place in _listed(stage, "environment", "use", here))
        yield from _environment_places(stage, here)
        if isinstance(stage.get("objectives"), dict) and "combine" in stage["objectives"]:
            yield (*here, "objectives", "combine"), "plugin"
        if isinstance(stage.get("eval"), dict):
            yield from _data_places(stage["eval"], "data", (*here, "eval"))
            yield from _reward_places(stage["eval"], (*here, "eval"))
        if isinstance(stage.get("reference"), dict):
            for key in ("path", "adapter"):
                if key in stage["reference"]:
                    yield (*here, "reference", key), "model"


def _data_places(holder: Any, key: str, path: Path_) -> Iterator[tuple[Path_, str]]:
    yield from ((place, "data") for place in _listed(holder, key, "path", path))
    yield from ((place, "plugin") for place in _listed(holder, key, "format", path) if place[-1] == "format")


def _listed(holder: Any, key: str, inner: str, path: Path_) -> Iterator[Path_]:
    """Places of text in `key`: text, a map with `inner`, or a list of these."""
    value = holder.get(key) if isinstance(holder, dict) else None
    here: Path_ = (*path, key)
    items = [(here, value)] if not isinstance(value, list) else [((*here, i), v) for i, v in enumerate(value)]
    for place, item in items:
        if isinstance(item, str):
            yield place
        elif isinstance(item, dict) and inner in item:
            yield (*place, inner)


def _reward_places(holder: dict[str, Any], path: Path_) -> Iterator[tuple[Path_, str]]:
    for place in _listed(holder, "rewards", "use", path):
        yield place, "plugin"
        reward = _get(holder, place[len(path) : -1]) if place[-1] == "use" else {}
        if reward.get("use") in REWARDS and isinstance(reward.get("args"), dict) and "path" in reward["args"]:
            yield (*place[:-1], "args", "path"), "model"


def _environment_places(stage: dict[str, Any], path: Path_) -> Iterator[tuple[Path_, str]]:
    yield from ((place, "plugin") for place in _listed(stage, "environment", "use", path))
    given, here = stage.get("environment"), (*path, "environment")
    items = [(here, given)] if not isinstance(given, list) else [((*here, i), one) for i, one in enumerate(given)]
    for place, item in items:
        yield from ((inner, "plugin") for inner in _listed(item, "tools", "use", place))
        if isinstance(item, dict) and "python" in item:
            yield (*place, "python"), "program"


def _get(data: Any, path: Path_) -> Any:
    for step in path:
        data = data[step]
    return data
