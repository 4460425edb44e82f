"""What a finished stage left, vouched for: `artefacts.json` in its folder lists every file of its artefacts.

It is written once, when the stage ends. Whoever uses an artefact later (a stage after it, a merge, an evaluation, a
run that names the folder as its model, a study of its rollouts) compares every byte once; a stage that is only kept is
compared where size or time differ. The file lies beside the artefacts and names them relative to itself: they may be
moved together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from align.errors import RunFolderError
from align.stages.files import read_object, write_json
from align.stages.listing import Listing, additions, difference, listing, read_listing
from align.stages.metrics_file import METRICS, metrics_mark, require_metrics

NAME = "artefacts.json"
ROLLOUTS = "rollouts"
BASE = "base"  # of a run folder: the model, where the recipe made it from scratch
_DEEPEST = 4  # <stage>/checkpoints/step-000100/trainer/adapter


def write_manifest(folder: Path, artefacts: Iterable[Path]) -> str:
    """Hash what lies in `artefacts`, folders below `folder`, the rollouts and the metrics file there; SHA-256 of the
    manifest.

    Folders elsewhere are another stage's, and vouched for there.
    """
    below = [path for path in artefacts if path.is_dir() and path.is_relative_to(folder)]
    found = {path.relative_to(folder).as_posix(): listing(path) for path in below}
    rollouts = {name: entry for name, entry in listing(folder / ROLLOUTS).items() if name.endswith(".parquet")}
    manifest = {"artefacts": found, "metrics": metrics_mark(folder / METRICS), "rollouts": rollouts}
    write_json(folder / NAME, manifest)
    return _sha(folder / NAME)


def require_stage(folder: Path, sha: str | None, stage_id: str) -> list[str]:
    """Look over what a finished stage left, where size or time of a file differ: what is to be said of it.

    sha: of its manifest, as run.json has it; None where the stage ended under a version that wrote none.

    Raises RunFolderError where a file is not what was written.
    """
    if sha is None:
        return [f"{stage_id}: finished under an earlier version, which wrote no {NAME}: its files cannot be checked"]
    if not folder.is_dir():
        return [f"{stage_id}: its folder is gone; nothing that is still to be run may need it"]
    manifest = _read(folder, sha, stage_id)
    said = []
    for name, listed in manifest["artefacts"].items():
        if not (folder / name).is_dir():
            said.append(f"{stage_id}: {name} is gone; nothing that is still to be run may need it")
            continue
        _require(folder / name, listed, stage_id, thorough=False)
    gone, changed = _rollouts(folder / ROLLOUTS, manifest["rollouts"], thorough=False)
    if changed is not None:
        raise RunFolderError(changed, where=folder / ROLLOUTS, remedy=_remedy(stage_id))
    if gone:
        said.append(
            f"{stage_id}: {len(gone)} files of its rollouts are gone ({gone[0]}); studies of it will be refused"
        )
    if manifest["metrics"] is not None and not (folder / METRICS).is_file():
        said.append(f"{stage_id}: {METRICS} is gone, and with it the curves")
    require_metrics(folder / METRICS, manifest["metrics"], "the stage's end")
    return said


def require_artefact(path: Path) -> None:
    """Compare every byte of an artefact with what its stage wrote; a folder that no manifest lists is let pass.

    Raises RunFolderError naming the file that is missing, damaged, or was not there.
    """
    folder = home_of(path)
    if folder is not None:
        listed = _read(folder, None, folder.name)["artefacts"].get(path.relative_to(folder).as_posix())
        if listed is not None:
            _require(path, listed, folder.name, thorough=True)


def require_rollouts(folder: Path) -> None:
    """Compare every byte of the completions in `folder` with what their stage wrote; those of a stage that has not
    finished, or whose manifest knows of none, are let pass.

    Raises RunFolderError naming the file that is missing, damaged, or was not there.
    """
    home = home_of(folder)
    if home is None or not folder.is_relative_to(home / ROLLOUTS):
        return
    below = folder.relative_to(home / ROLLOUTS)
    noted = _read(home, None, home.name)["rollouts"]
    listed = {name: entry for name, entry in noted.items() if Path(name).is_relative_to(below)}
    if not noted:
        return
    gone, changed = _rollouts(home / ROLLOUTS, listed, thorough=True)
    here = {path.relative_to(home / ROLLOUTS).as_posix() for path in folder.glob("*.parquet")}
    if gone:
        changed = f"{gone[0]} is gone, and with it what its turns sampled"
    elif changed is None and (new := sorted(here - listed.keys())):
        changed = f"{new[0]} was not written by the stage, and would be read with the rest"
    if changed is not None:
        raise RunFolderError(changed, where=home / ROLLOUTS, remedy=_remedy(home.name))


def _rollouts(folder: Path, listed: Listing, *, thorough: bool) -> tuple[list[str], str | None]:
    """Files of the list that are gone, and what of the others is not as it was written."""
    there = {name: entry for name, entry in listed.items() if (folder / name).exists()}
    return sorted(listed.keys() - there.keys()), difference(folder, there, thorough=thorough)


def home_of(path: Path) -> Path | None:
    """The folder of the stage that an artefact belongs to; None where nothing vouches for it."""
    return next((folder for folder in list(path.parents)[:_DEEPEST] if (folder / NAME).is_file()), None)


def _require(path: Path, listed: Listing, stage_id: str, *, thorough: bool) -> None:
    remedy = _remedy(stage_id)
    if path.name == BASE:
        stage_id, remedy = BASE, "restore it from a copy, or remove it: it is made again from the seed"
    if not path.is_dir():
        raise RunFolderError("it is gone", where=path, remedy=remedy)
    found = difference(path, listed, thorough=thorough)
    if found is None and (new := additions(path, listed)):
        found = f"{new[0]} was not written by the stage, and would be read with the rest"
    if found is not None:
        raise RunFolderError(f"what stage {stage_id!r} left has changed: {found}", where=path, remedy=remedy)


def _read(folder: Path, sha: str | None, stage_id: str) -> Mapping[str, Any]:
    path = folder / NAME
    if sha is not None and (not path.is_file() or _sha(path) != sha):
        what = "is not what was written" if path.is_file() else "is gone"
        raise RunFolderError(f"the list of what stage {stage_id!r} left {what}", where=path, remedy=_remedy(stage_id))
    manifest = read_object(path)
    try:
        artefacts, metrics = manifest["artefacts"], manifest["metrics"]
        read_listing(manifest.setdefault("rollouts", {}))  # versions before noted none
        if not isinstance(artefacts, dict):
            raise ValueError("artefacts")
        for listed in artefacts.values():
            read_listing(listed)
        if metrics is not None:
            read_listing({METRICS: metrics})
    except (KeyError, ValueError) as error:
        raise RunFolderError(f"it is damaged: no {error}", where=path, remedy=_remedy(stage_id)) from error
    return manifest


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _remedy(stage_id: str) -> str:
    return f"restore it from a copy, or --from-stage {stage_id} makes it again"
