"""Generated data: `file.py:function`, called with `options` in a child process that has a time limit.

The function yields rows (dicts that JSON can hold). They are written to a file that is named after the source's hash
and the options, so an unchanged generator runs once.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import align
from align.errors import DataError, PluginError
from align.recipe.schema import DataSource

TIMEOUT_S = 600.0

_GENERATOR = re.compile(r"(?P<file>.+\.py):(?P<function>[A-Za-z_]\w*)")


def is_generator(path: str) -> bool:
    return _GENERATOR.fullmatch(path) is not None


def run(
    source: DataSource,
    *,
    folder: Path | None = None,
    cache: Path | None = None,
    limit: int | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Path:
    """The .jsonl file of a generator's rows, made now unless it is there. limit: stop after that many rows.

    Raises PluginError where the file or function is missing or fails, DataError where a row is no JSON object.
    """
    match = _GENERATOR.fullmatch(source.path)
    if match is None:
        raise DataError("not a generator (file.py:function)", where=source.path)
    file = Path(match["file"]) if folder is None else folder / match["file"]
    if not file.is_file():
        raise PluginError("there is no such generator file", where=file, remedy="check `data.path`")
    name = f"{file.stem}-{match['function']}-{_key(file, match['function'], source.options, limit)}.jsonl"
    target = (cache or _temporary()) / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        _run_child(file, match["function"], source.options, limit, target, timeout_s)
    return target


def _key(file: Path, function: str, options: dict[str, Any], limit: int | None) -> str:
    """Hash of the call and of every Python file beside the generator, for it may import them."""
    h = hashlib.sha256(json.dumps([file.name, function, options, limit], sort_keys=True).encode())
    for sibling in sorted(file.parent.glob("*.py")):
        h.update(sibling.name.encode() + b"\0" + sibling.read_bytes())
    return h.hexdigest()[:16]


@lru_cache(maxsize=1)
def _temporary() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="align-data-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _run_child(
    file: Path, function: str, options: dict[str, Any], limit: int | None, target: Path, timeout_s: float
) -> None:
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    job = {
        "file": str(file.resolve()),
        "function": function,
        "options": options,
        "limit": limit,
        "out": str(aside.resolve()),
    }
    # Our own root replaces the working directory at the head of sys.path: a user's json.py there must not be imported.
    root = str(Path(align.__file__).parent.parent)
    code = f"import sys; sys.path[0] = {root!r}; from align.data.generator_child import main; main()"
    try:
        child = subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if child.returncode == 0:
            aside.replace(target)
            return
    except subprocess.TimeoutExpired as e:
        raise PluginError(
            f"the generator {function} did not finish in {timeout_s:g} s",
            where=file,
            remedy="make it faster, or write its rows to a .jsonl file once and name that",
        ) from e
    finally:
        aside.unlink(missing_ok=True)
    lines = child.stderr.strip().splitlines() or [f"exit status {child.returncode}"]
    raise PluginError(
        f"the generator {function} failed: {lines[-1]}",
        where=file,
        remedy="run it alone to see more:\n     " + "\n     ".join(lines[-6:]),
    )
