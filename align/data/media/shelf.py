"""The store as its writer sees it: what is there, who uses it, and what goes when it grows beyond its bound.

Whoever prepares data holds a lease: a file that is locked while its process lives and lists the keys in use. Pruning
removes what was used longest ago and is on no live lease, so that a run's own media are never taken from it.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from align.mediastore import VIEW_SUFFIX, tensors_path

FACTS = "align"
"""Name under which a tensor file's header holds the facts of its medium, as JSON."""

_LEASES = "leases"
_MAX_HEADER = 1 << 24
_STALE_S = 24 * 3600.0  # unfinished files older than that were left by a process that was killed


class Shelf:
    """A store's folder, with a lease on what is used. Close it to give the lease up."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._lease: Any = None
        self._held: set[str] = set()

    def facts(self, key: str) -> dict[str, Any] | None:
        """The facts of a medium that is there, which counts as its use; None where it is not (or not whole)."""
        path = tensors_path(self.folder, key)
        try:
            with path.open("rb") as f:
                (length,) = struct.unpack("<Q", f.read(8))
                if length > _MAX_HEADER:
                    return None
                header = json.loads(f.read(length))
            facts: dict[str, Any] = json.loads(header["__metadata__"][FACTS])
            os.utime(self.folder / f"{key}{VIEW_SUFFIX[facts['kind']]}")
            os.utime(path)
        except (OSError, ValueError, KeyError, struct.error):
            return None  # damaged or absent: it is processed again
        return facts

    def tokens(self, key: str) -> Any:
        """i64[n]: the tokens that stand for a medium."""
        from safetensors import safe_open

        from align.mediastore import TOKENS

        with safe_open(tensors_path(self.folder, key), framework="np") as f:
            return f.get_tensor(TOKENS)

    def hold(self, keys: Iterable[str]) -> None:
        """Keep these while this process lives."""
        new = [key for key in keys if key not in self._held]
        if not new:
            return
        if self._lease is None:
            leases = self.folder / _LEASES
            leases.mkdir(parents=True, exist_ok=True)
            self._in_use()  # what killed runs left goes
            self._lease = _locked(leases)
        self._lease.write("".join(f"{key}\n" for key in new))
        self._lease.flush()
        self._held.update(new)

    def retain(self, keys: set[str]) -> None:
        """Give up all but these."""
        if self._lease is None or self._held <= keys:
            return
        old, self._held = self._lease, self._held & keys
        self._lease = _locked(self.folder / _LEASES)  # before the old one goes: what is kept is on one at any time
        self._lease.write("".join(f"{key}\n" for key in sorted(self._held)))
        self._lease.flush()
        os.unlink(old.name)
        old.close()

    def close(self) -> None:
        if self._lease is not None:
            os.unlink(self._lease.name)
            self._lease.close()
            self._lease = None
            self._held.clear()

    def prune(self, max_bytes: float, now: float) -> int:
        """Remove what was used longest ago until the rest fits, never what is on a live lease; how many files went."""
        if not self.folder.is_dir():
            return 0
        in_use = self._in_use()
        groups: dict[str, list[Path]] = {}
        for path in self.folder.iterdir():
            if path.is_file():
                groups.setdefault(path.name.lstrip(".").partition(".")[0], []).append(path)
        sizes = {key: _size(paths) for key, paths in groups.items()}
        total, removed = sum(size for size, _ in sizes.values()), 0
        for key in sorted(groups, key=lambda k: sizes[k][1]):
            size, used = sizes[key]
            unfinished = any(path.name.startswith(".") for path in groups[key])
            if key in in_use or (unfinished and now - used < _STALE_S) or (total <= max_bytes and not unfinished):
                continue
            for path in groups[key]:
                path.unlink(missing_ok=True)
                removed += 1
            total -= size
        return removed

    def _in_use(self) -> set[str]:
        """Keys on live leases; leases that no process holds any more are removed."""
        keys = set(self._held)
        for path in (self.folder / _LEASES).glob("*"):
            if self._lease is not None and path.name == Path(self._lease.name).name:
                continue
            try:
                with path.open(encoding="ascii") as f:
                    try:
                        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        keys.update(f.read().split())
                    else:
                        path.unlink(missing_ok=True)
            except FileNotFoundError:
                continue
        return keys


def _locked(folder: Path) -> Any:
    """A new lease, open and locked. One that a pruner took for abandoned, in the moment before it was locked, is made
    again."""
    while True:
        path = folder / f"{os.getpid()}-{os.urandom(4).hex()}"
        lease = path.open("w", encoding="ascii")
        fcntl.flock(lease, fcntl.LOCK_EX)
        if path.exists():
            return lease
        lease.close()


def _size(paths: Iterable[Path]) -> tuple[int, float]:
    """(bytes, latest use)."""
    total, used = 0, 0.0
    for path in paths:
        try:
            stat = path.stat()
        except FileNotFoundError:
            continue
        total, used = total + stat.st_size, max(used, stat.st_mtime)
    return total, used
