"""Checkpoints that are complete or absent.

A checkpoint is written aside in the same folder, every file is forced to disk and listed with size and SHA-256 in
`manifest.json`, and only then does the folder take its name `step-000100`. What has no manifest, or differs from it,
is no checkpoint: the newest one that holds is the latest.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import CheckpointError, RunFolderError
from align.stages.files import (
    read_json,
    read_object,
    remove_folder,
    remove_leftovers,
    tree_files,
    write_json,
    written_aside,
)
from align.stages.listing import difference, listing, read_listing
from align.stages.metrics_file import METRICS, metrics_mark

MANIFEST = "manifest.json"
STATE = "state.json"
TRAINER = "trainer"
_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. `trainer` is the folder that `Trainer.save` filled; `state` is the loop's own; `metrics`:
    what the stage's metrics file was when it was written (`metrics_mark`), None where there was none."""

    path: Path
    step: int
    state: Mapping[str, Any]
    metrics: Mapping[str, Any] | None = None

    @property
    def trainer(self) -> Path:
        return self.path / TRAINER


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}"


def step_of(path: Path) -> int | None:
    """The step in a checkpoint's folder name, None where it is not one."""
    found = _NAME.fullmatch(path.name)
    return int(found.group(1)) if found else None


async def write_checkpoint(
    folder: Path, step: int, state: Mapping[str, Any], save: Callable[[Path], Awaitable[None]]
) -> Path:
    """Write `folder/step-<step>`: what `save` puts into an empty folder, and the loop's `state`. The metrics file
    beside `folder` is noted, that a resumed run goes on with what was written.

    Raises CheckpointError when `save` leaves nothing; whatever `save` raises passes through. In both cases no folder
    with the checkpoint's name exists afterwards, unless an older complete one stood there.
    """
    target = folder / checkpoint_name(step)
    with written_aside(target) as aside:
        (aside / TRAINER).mkdir()
        await save(aside / TRAINER)
        if not tree_files(aside / TRAINER):
            raise CheckpointError("the trainer wrote no file into its checkpoint", where=target)
        write_json(aside / STATE, dict(state))
        await asyncio.to_thread(_write_manifest, aside, step, folder.parent / METRICS)
    return target


def _write_manifest(folder: Path, step: int, metrics: Path) -> None:
    manifest = {"step": step, "files": listing(folder), "metrics": metrics_mark(metrics)}
    write_json(folder / MANIFEST, manifest)


def verify(path: Path) -> Checkpoint:
    """Read a checkpoint after comparing every file with the manifest. Raises CheckpointError naming the difference."""
    if not (path / MANIFEST).is_file():
        raise CheckpointError("no manifest.json: the checkpoint was never completed", where=path)
    try:
        manifest = read_object(path / MANIFEST)
        step, listed, metrics = manifest["step"], read_listing(manifest["files"]), manifest.get("metrics")
        if metrics is not None:
            read_listing({METRICS: metrics})
    except (RunFolderError, ValueError, KeyError, OSError) as error:
        why = error.what if isinstance(error, RunFolderError) else f"it has no {error}"
        raise CheckpointError(f"manifest.json cannot be read: {why}", where=path) from error
    if step != step_of(path):
        raise CheckpointError(f"manifest.json speaks of step {step}", where=path)
    present = {str(p.relative_to(path)) for p in tree_files(path)} - {MANIFEST}
    if present != set(listed):
        strange = sorted(present.symmetric_difference(listed))
        raise CheckpointError(f"files differ from manifest.json: {', '.join(strange[:5])}", where=path)
    found = difference(path, listed)
    if found is not None:
        raise CheckpointError(found, where=path)
    return Checkpoint(path=path, step=step, state=read_json(path / STATE), metrics=metrics)


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders with a checkpoint's name, oldest first; not verified."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if p.is_dir() and step_of(p) is not None), key=lambda p: step_of(p) or 0)


def find_latest(folder: Path) -> tuple[Checkpoint | None, list[CheckpointError]]:
    """The newest checkpoint that holds, and why each newer one does not."""
    refused: list[CheckpointError] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return verify(path), refused
        except CheckpointError as error:
            refused.append(error)
    return None, refused


def discard_after(folder: Path, step: int) -> None:
    """Remove checkpoints newer than `step` (the run goes on from there) and what killed writers left."""
    for path in list_checkpoints(folder):
        if (step_of(path) or 0) > step:
            remove_folder(path)
    if folder.is_dir():
        remove_leftovers(folder)


def prune(folder: Path, keep: int, best: int | None) -> None:
    """Keep the newest `keep` checkpoints and, beside them, the one of step `best`."""
    for path in list_checkpoints(folder)[:-keep]:
        if step_of(path) != best:
            remove_folder(path)
