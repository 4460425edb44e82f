"""What a stage's result depends on, as plain JSON that two runs can compare key by key."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from align.data.generators import files_read, is_generator
from align.losses import names as loss_names
from align.plugin_modules import installed_hashes, module_hashes, texts_in
from align.plugins import REWARDS, builtin_names, entry_point_target
from align.recipe.inputs import DataSource
from align.recipe.schema import Recipe
from align.recipe.stages import Stage
from align.stages.files import sha256_file, tree_files

_LONGEST = 4096  # characters of a path
_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")


LATER = ("modules", "named", "installed", "read")  # keys that versions before did not write: nothing to compare with


def fingerprint(recipe: Recipe, stage: Stage, plugins: Mapping[str, str], folder: Path | None = None) -> dict[str, Any]:
    """The stage's resolved recipe part, the model, seed and media, hashes of its data, plugins, their modules, the
    installed packages that these lie in, and of model files and others that it names.

    plugins: reward name to source hash. folder: the recipe's, where plugins are looked for. Where and how fast it runs
    (placement, report) is no part of it.
    """
    part = stage.model_dump(mode="json", by_alias=True)
    part.get("save", {}).pop("keep", None)
    for limit in ("heartbeat_s", "request_timeout_s"):  # when an engine counts as lost: its groups are the same
        part.get("rollout", {}).pop(limit, None)
    if not part.get("environment"):  # as versions before wrote it
        part.pop("environment", None)
    for one in part.get("environment") or ():
        for pace in ("max_live", "timeout_s"):  # how fast, and when something counts as hanging
            one.pop(pace, None)
    for reward in part.get("rewards", ()):
        for pace in ("processes", "rate"):  # when scores come: they are the same
            reward.pop(pace, None)
    code = sorted(_code(recipe, stage))
    return {
        "stage": part,
        "model": recipe.model.model_dump(mode="json"),
        "media": recipe.media.model_dump(mode="json", exclude={"workers", "timeout_s", "cache_gb"}),
        "seed": recipe.seed,
        "data": {source.path: _content(source) for source in _sources(recipe, stage)},
        "plugins": {name: plugins[name] for name in sorted(reward_names(stage))},
        "files": _model_files(recipe),
        "modules": module_hashes(code, folder) if folder is not None else {},
        "installed": installed_hashes(code, folder) if folder is not None else {},
        "named": _named_files(part, recipe),
        "read": _read_files(recipe, stage),
    }


def without_folder(value: Any, folder: str | None) -> Any:
    """A fingerprint with paths below the recipe's folder named from there: a copy of it elsewhere gives the same (a job
    of a cluster runs in one, and its successor in another)."""
    if isinstance(value, str) and folder:
        return value.removeprefix(f"{folder}/")
    if isinstance(value, dict):
        return {without_folder(key, folder): without_folder(inner, folder) for key, inner in value.items()}
    return [without_folder(inner, folder) for inner in value] if isinstance(value, list) else value


def reward_names(stage: Stage) -> list[str]:
    """Every reward a stage uses, its evaluation's included, and its environments."""
    worlds = (use for world in stage.worlds for use in world.uses)
    return [*(reward.use for reward in stage.every_reward), *worlds]


def _code(recipe: Recipe, stage: Stage) -> set[str]:
    """Everything that the stage takes from files of Python: rewards, losses, generators of data and their formats, the
    combiner of its objectives, an engine. Entry points by what they stand for."""
    ours = (*builtin_names("rewards.builtins"), *REWARDS)
    rewards = {entry_point_target(name, "align.rewards", ours) for name in reward_names(stage)}
    losses = {entry_point_target(term.name, "align.losses", loss_names()) for term in stage.losses}
    data = {name for source in _sources(recipe, stage) for name in (source.path, source.format) if name}
    combiners = {stage.weighed.combine} if stage.weighed is not None else set()
    engines = {stage.engines.name} if stage.engines is not None else set()
    return {*rewards, *losses, *data, *combiners, *engines}


def _read_files(recipe: Recipe, stage: Stage) -> dict[str, str]:
    """What the generators of its data read, as far as they name it: the rows depend on it."""
    found: dict[str, str] = {}
    for source in _sources(recipe, stage):
        if is_generator(source.path):
            found |= files_read(Path(source.path.rpartition(":")[0]), source.options)
    return found


def _named_files(part: Any, recipe: Recipe) -> dict[str, str]:
    """Other files and model folders that the stage's settings name (a reference, arguments of a reward), and the chat
    template where it is a file."""
    known = {recipe.model.path, recipe.model.adapter}
    data, held = part.get("data"), (part.get("eval") or {}).get("data")
    sources = {*texts_in(data), *texts_in(held)}
    found: dict[str, str] = {}
    for text in sorted({*texts_in(part), *texts_in(recipe.model.chat_template)} - sources - known):
        path = Path(text)
        if not path.is_absolute() or len(text) > _LONGEST:
            continue
        try:
            if path.is_file() and path.suffix != ".py":
                found[text] = f"{path.stat().st_size} bytes" if path.suffix in _WEIGHTS else sha256_file(path)
            elif any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
                found |= _folder_files(path)
        except OSError:  # no path at all
            continue
    return found


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Differences of two fingerprints; what the older one's version did not write down is not compared."""
    return differences(dict(old), {key: value for key, value in new.items() if key in old or key not in LATER})


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted keys whose values differ, with both values; [] where equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{prefix}{key}.")]
    if old == new:
        return []
    return [f"{prefix.rstrip('.')}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _sources(recipe: Recipe, stage: Stage) -> Iterator[DataSource]:
    for sources in stage.datasets.values():
        yield from sources
    if recipe.model.tokenizer is not None:
        yield from recipe.model.tokenizer.train_on


def _content(source: DataSource) -> str:
    """Hash of a local file or folder (of a stream, of its files' ends); of a `file.py:function`, the file's; of a hub
    id, nothing to hash here."""
    hashed = _ends if source.stream else sha256_file
    path = Path(source.path)
    if not path.exists():
        path = Path(source.path.rpartition(":")[0] or source.path)
    if path.is_file():
        return hashed(path)
    if path.is_dir():
        digest = hashlib.sha256()
        for file in tree_files(path):
            digest.update(f"{file.relative_to(path)}|{hashed(file)}|".encode())
        return digest.hexdigest()
    return "hub"


def _ends(path: Path) -> str:
    """Size, and hash of the first and last part: to read all of a stream's files would take longer than to begin."""
    with path.open("rb") as f:
        size = f.seek(0, os.SEEK_END)
        digest = hashlib.sha256(f"{size}|".encode())
        for start in (0, max(0, size - _END)):
            f.seek(start)
            digest.update(f.read(_END))
    return digest.hexdigest()


_END = 1 << 20  # bytes


def _model_files(recipe: Recipe) -> dict[str, str]:
    """Small files of local model and adapter folders by hash, weights by size: a swapped model is noticed."""
    found: dict[str, str] = {}
    for name in (recipe.model.path, recipe.model.adapter):
        if name and Path(name).is_dir():
            found |= _folder_files(Path(name))
        elif name and Path(name).is_file():
            found[name] = f"{Path(name).stat().st_size} bytes"
    return found


def _folder_files(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.iterdir() if p.is_file())
    return {str(f): f"{f.stat().st_size} bytes" if f.suffix in _WEIGHTS else sha256_file(f) for f in files}
