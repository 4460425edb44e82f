"""run.json as it is read: every key that this version relies on has the form that it writes, or is named."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from align.errors import RunFolderError
from align.stages.files import RESTORE, read_object, write_json
from align.stages.processes import ProcessId

_DIGEST = "sha256"
STATES = ("running", "finished")


def read_state(path: Path) -> dict[str, Any]:
    """The content of a run.json. Raises RunFolderError with the key that is not what a run writes."""
    state = read_object(path)

    def require(holds: bool, key: str, value: Any) -> None:
        if not holds:
            said = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
            raise RunFolderError(f"it is damaged: {key} is {said}", where=path, remedy=RESTORE)

    stages = state.get("stages")
    require(isinstance(stages, dict), "stages", stages)
    for stage_id, entry in (stages or {}).items():
        _check_stage(entry, f"stages.{stage_id}", require)
    starts = state.setdefault("starts", 0)
    require(_is_count(starts), "starts", starts)
    for number, process in enumerate(_list(state, "processes", require)):
        try:
            ProcessId.from_json(process)
        except ValueError:
            require(False, f"processes.{number}", process)
    for number, entry in enumerate(_list(state, "restarts", require)):
        known = isinstance(entry, dict) and isinstance(entry.get("stage"), str)
        require(known, f"restarts.{number}", entry)
    threads = state.get("threads", {})
    require(_is_mapping(threads, int) and min(threads.values(), default=1) > 0, "threads", threads)
    for key in ("folder", "recipe"):
        require(state.get(key) is None or isinstance(state[key], str), key, state.get(key))
    return state


def _check_stage(entry: Any, key: str, require: Callable[[bool, str, Any], None]) -> None:
    require(isinstance(entry, dict), key, entry)
    require(entry.get("state") in STATES, f"{key}.state", entry.get("state"))
    require(isinstance(entry.get("fingerprint"), dict), f"{key}.fingerprint", entry.get("fingerprint"))
    start = entry.get("start", {})
    require(isinstance(start, dict), f"{key}.start", start)
    for name, value in start.items():
        require(value is None or isinstance(value, str), f"{key}.start.{name}", value)
    require(entry.get("folder") is None or isinstance(entry["folder"], str), f"{key}.folder", entry.get("folder"))
    for name in ("begun", "ended"):
        value = entry.get(name, 0)
        require(isinstance(value, int | float) and math.isfinite(value), f"{key}.{name}", value)
    if entry["state"] == "finished":
        artefacts = entry.get("artefacts")
        require(_is_mapping(artefacts, str), f"{key}.artefacts", artefacts)
        manifest = entry.get("manifest")
        require(manifest is None or isinstance(manifest, str), f"{key}.manifest", manifest)


def _digest(summary: Mapping[str, Any]) -> str:
    """SHA-256 of what its JSON says, whatever its spaces; keys that are numbers count as the text that JSON has."""
    read = json.loads(json.dumps(summary))
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()


def _list(state: dict[str, Any], key: str, require: Callable[[bool, str, Any], None]) -> list[Any]:
    value = state.setdefault(key, []) if key == "processes" else state.get(key, [])
    require(isinstance(value, list), key, value)
    return list(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_mapping(value: Any, kind: type) -> bool:
    return isinstance(value, Mapping) and all(isinstance(inner, kind) for inner in value.values())


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Replace a summary.json; a digest of its content stands in it."""
    write_json(path, {**summary, _DIGEST: _digest(summary)})


def read_summary(path: Path) -> dict[str, Any]:
    """The content of a summary.json, without its digest. Raises RunFolderError where it is not what was written."""
    summary = read_object(path)
    noted = summary.pop(_DIGEST, None)  # versions before wrote none
    if noted is not None and noted != _digest(summary):
        raise RunFolderError("it is not what the run wrote: something in it was changed", where=path, remedy=RESTORE)
    stages: Any = summary.get("stages")
    if not _is_mapping(stages, dict) or not all(isinstance(e.get("metrics", {}), dict) for e in stages.values()):
        raise RunFolderError("it is damaged: `stages` is not what a run writes", where=path, remedy=RESTORE)
    return summary
