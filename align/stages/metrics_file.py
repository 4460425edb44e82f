"""metrics.jsonl of a stage, as a start finds it: whole up to a checkpoint, which knows its content, and cut there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from align.errors import RunFolderError
from align.jsonl import read_lines
from align.stages.files import sha256_and_sync, write_bytes

METRICS = "metrics.jsonl"
_STEP = "step"


def metrics_mark(path: Path) -> dict[str, Any] | None:
    """Size and SHA-256 of a metrics file as it stands, forced to disk; None where there is none."""
    if not path.is_file():
        return None
    size = path.stat().st_size
    return {"bytes": size, "sha256": sha256_and_sync(path)}


def require_metrics(path: Path, mark: Mapping[str, Any] | None, what: str) -> None:
    """Require that what was in the file when `mark` was taken is there still, and unchanged.

    mark: of `metrics_mark`, None where nothing was noted; what: who noted it, for the message. Raises RunFolderError.
    """
    if mark is None or not path.is_file():
        return
    with path.open("rb") as handle:
        begun = handle.read(int(mark["bytes"]))
    if len(begun) < mark["bytes"] or hashlib.sha256(begun).hexdigest() != mark["sha256"]:
        missing = f"{mark['bytes'] - len(begun)} bytes are gone" if len(begun) < mark["bytes"] else "a line was changed"
        raise RunFolderError(
            f"it is not what it was at {what}: {missing}",
            where=path,
            remedy="restore it from a copy, or move it away: the run goes on, and its curves begin where it does",
        )


def cut_metrics(
    path: Path,
    step: int,
    mark: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Keep the lines of a metrics.jsonl up to `step`: a resumed run continues them. A torn last line goes too.

    mark: what the checkpoint of `step` noted of the file. say: is told what is missing or torn.

    Raises RunFolderError where a line is damaged, or the beginning is not what the checkpoint noted.
    """
    if not path.is_file():
        if mark is not None:
            say(f"{path} is gone: the curves begin after step {step}")
        return
    if step < 0:  # the stage starts over
        write_bytes(path, b"")
        return
    require_metrics(path, mark, f"the checkpoint of step {step}")
    lines, torn = read_lines(path, numbered=_STEP)
    if torn:
        say(f"{path}: its last line was torn ({len(torn)} bytes) and is cut")
    written = [line + b"\n" for line in path.read_bytes().split(b"\n")[:-1] if line.strip()]
    write_bytes(path, b"".join(raw for raw, line in zip(written, lines, strict=True) if line[_STEP] <= step))


def last_step(path: Path) -> int:
    """The last step in a metrics.jsonl whose lines are whole; 0 where there is none."""
    return int(last_line(path).get(_STEP, 0))


def last_line(path: Path) -> dict[str, Any]:
    """The last whole line of a metrics.jsonl; {} where there is none."""
    if not path.is_file():
        return {}
    lines, _ = read_lines(path, numbered=_STEP)
    return lines[-1] if lines else {}


def finite(line: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a line that are numbers."""
    known = {k: v for k, v in line.items() if k not in (_STEP, "time")}
    return {k: float(v) for k, v in known.items() if isinstance(v, int | float) and not isinstance(v, bool)}
