"""Generated data: `file.py:function`, called with `options` in a child process that has a time limit.

The function yields rows (dicts that JSON can hold). In a cache folder they are kept in a file that is named after the
generator's source, its options, the Python files beside it and that it imports, and the files that source or options
name, so an unchanged generator runs once. What it reads unnamed (the network, every file of a folder) is not known.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import align
from align.errors import DataError, PluginError
from align.plugin_modules import installed_hashes, module_hashes, read_hashes, texts_in
from align.recipe.inputs import DataSource

TIMEOUT_S = 600.0
log = logging.getLogger(__name__)

_GENERATOR = re.compile(r"(?P<file>.+\.py):(?P<function>[A-Za-z_]\w*)")


def is_generator(path: str) -> bool:
    return _GENERATOR.fullmatch(path) is not None


def folder_of(path: str, folder: Path | None = None) -> Path:
    """The folder of a generator's file, to which paths in its rows are relative."""
    file = Path(path.rpartition(":")[0])
    return (file if folder is None else folder / file).parent


def run(
    source: DataSource,
    *,
    folder: Path | None = None,
    cache: Path | None = None,
    limit: int | None = None,
    timeout_s: float = TIMEOUT_S,
) -> bytes:
    """A generator's rows as JSON lines. limit: stop after that many rows. cache: folder where rows are kept.

    Raises PluginError where the file or function is missing, fails, takes too long, or yields what is no dict.
    """
    match = _GENERATOR.fullmatch(source.path)
    if match is None:
        raise DataError("not a generator (file.py:function)", where=source.path)
    file, function = Path(match["file"]), match["function"]
    file = file if folder is None else folder / file
    if not file.is_file():
        raise PluginError(
            "there is no such generator file",
            where=file,
            remedy="check the path; in a recipe it starts at the recipe's folder",
        )
    if cache is None:
        return _run_child(file, function, source.options, limit, timeout_s)
    name = f"{file.stem}-{function}-{_key(file, function, source.options, limit)}"
    rows = _kept(cache, name)
    if rows is None:
        rows = _run_child(file, function, source.options, limit, timeout_s)
        _keep(cache / f"{name}-{_content(rows)}.jsonl", rows)
    return rows


def _kept(cache: Path, name: str) -> bytes | None:
    """Rows of an earlier call, where they are what it left: their digest stands in the file's name."""
    for path in sorted(cache.glob(f"{glob.escape(name)}-*.jsonl")):
        try:
            rows = path.read_bytes()
        except OSError as error:
            log.warning("the generated rows in %s cannot be read and are made again: %s", path, error.strerror or error)
            continue
        if path.stem == f"{name}-{_content(rows)}":
            return rows
        log.warning("the generated rows in %s are not what was written, and are made again", path)
        with contextlib.suppress(OSError):
            path.unlink()
    return None


def _keep(path: Path, rows: bytes) -> None:
    """Where the folder cannot be written to (another user's, a full disk), they are not kept, which is said."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        aside.write_bytes(rows)
        aside.replace(path)
    except OSError as error:
        log.warning("the generated rows are not kept: %s: %s", path.parent, error.strerror or error)
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def _content(rows: bytes) -> str:
    return hashlib.sha256(rows).hexdigest()[:32]


def _key(file: Path, function: str, options: dict[str, Any], limit: int | None) -> str:
    """Hash of the call, of every Python file beside the generator, for it may import them, and of what it names."""
    name, folder = str(file.absolute()), file.absolute().parent
    parts = [module_hashes([name], folder), installed_hashes([name], folder), files_read(file, options)]
    h = hashlib.sha256(json.dumps([file.name, function, options, limit, *parts], sort_keys=True).encode())
    for sibling in sorted(file.parent.glob("*.py")):
        h.update(sibling.name.encode() + b"\0" + sibling.read_bytes())
    return h.hexdigest()[:16]


def files_read(file: Path, options: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of the files that a generator's source or options name, by path."""
    return read_hashes(str(file.absolute()), file.absolute().parent, texts_in(options))


def _run_child(file: Path, function: str, options: dict[str, Any], limit: int | None, timeout_s: float) -> bytes:
    job = {"file": str(file.resolve()), "function": function, "options": options, "limit": limit}
    # Our own root replaces the working directory at the head of sys.path: a user's json.py there must not be imported.
    root = str(Path(align.__file__).parent.parent)
    code = f"import sys; sys.path[0] = {root!r}; from align.data.generator_child import main; main()"
    command = [sys.executable, "-c", code]
    try:
        # rows come through a pipe and not through a file: nothing is left behind whoever is killed
        child = subprocess.run(
            command, input=json.dumps(job).encode(), capture_output=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as e:
        raise PluginError(
            f"the generator {function} did not finish in {timeout_s:g} s",
            where=file,
            remedy="make it faster, or write its rows to a .jsonl file once and name that",
        ) from e
    if child.returncode == 0:
        rows, _, count = child.stdout.rstrip(b"\n").rpartition(b"\n")
        if not count.isdigit() or len(rows.splitlines()) != int(count):
            raise PluginError(
                f"the generator {function} ended its process before its rows were complete",
                where=file,
                remedy="let the function return: os._exit and the like leave rows unwritten",
            )
        return rows + b"\n" if rows else b""
    lines = child.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {child.returncode}"]
    raise PluginError(
        f"the generator {function} failed: {lines[-1]}",
        where=file,
        remedy="run it alone to see more:\n     " + "\n     ".join(lines[-6:]),
    )
