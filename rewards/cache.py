"""Scores that were had before, in one SQLite file that runs share: a judge is not paid twice for one answer.

A run's file is `rewards.sqlite` in the `.cache` beside the run's folder. A score is found again by its plugin (name in
its file, hash of the file, version, signature, arguments, objectives) and by what was scored (prompt, row, completion,
its ids and whether it was cut off); of a plugin that sees groups, by the group. A module beside the plugin is part of
its hash; whatever else a score depends on is not: raise the plugin's `version`. Failures are never kept. Metrics that a
plugin logged are not logged again; infos and columns are kept.

Each score stands with a digest of its key and value: one that is not what was written is had anew, with a warning.

Several processes may use the file at once. It holds at most BYTES; the oldest scores go first. Where it cannot be
opened, is locked for long or damaged, scoring goes on without it, with a warning.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import sqlite3
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rewards import wire
from rewards.api import Sample
from rewards.plugin import PluginSpec

log = logging.getLogger(__name__)

BYTES = 512 * 2**20
_WAIT_SECONDS = 10.0
_AT_ONCE = 256  # scores written in one transaction, keys looked up in one query
_TABLE = (
    "CREATE TABLE IF NOT EXISTS scores (number INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, value TEXT NOT NULL, "
    "digest BLOB NOT NULL)"
)


def plugin_key(spec: PluginSpec, described: Mapping[str, Any]) -> bytes:
    """Everything about a plugin that its scores depend on. described: `Plugin.describe`."""
    parts = [spec.own_name, spec.signature, *(described[k] for k in ("sha256", "version", "args", "objectives"))]
    parts += [described["modules"]] if described.get("modules") else []
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).digest()


def sample_key(plugin: bytes, samples: Sequence[Sample]) -> bytes | None:
    """The key of samples that are scored together; None where they cannot be written down, nor sent to the plugin."""
    parts = [
        [s.messages, s.row, s.media, s.completion, s.token_ids, s.truncated, *(() if s.raw is None else (s.raw,))]
        for s in samples
    ]
    try:
        return hashlib.sha256(plugin + wire.encode({"samples": parts})).digest()
    except (TypeError, ValueError, RecursionError):
        return None


class ScoreCache:
    """`get` and `put` by key, on a thread of its own. Values are JSON objects. Opened when it is first used."""

    def __init__(self, path: Path, limit: int = BYTES):
        self.path = path
        self.limit = limit
        self.usable = True
        self._waiting: dict[bytes, str] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reward-cache")
        self._open: sqlite3.Connection | None = None

    async def get(self, keys: Sequence[bytes]) -> dict[bytes, Any]:
        """Those of the keys that are there."""
        return await self._on_thread(self._get, keys) or {}

    def put(self, key: bytes, value: Mapping[str, Any]) -> None:
        """Keep a value; it is written with others, at the latest by `flush`."""
        self._waiting[key] = json.dumps(value)
        if len(self._waiting) >= _AT_ONCE and self.usable:
            waiting, self._waiting = self._waiting, {}
            self._thread.submit(self._guarded, self._put, waiting)

    async def flush(self) -> None:
        """Write what waits."""
        waiting, self._waiting = self._waiting, {}
        if waiting:
            await self._on_thread(self._put, waiting)

    def close(self) -> None:
        self._thread.shutdown()
        if self._open is not None:
            self._open.close()
            self._open = None

    async def _on_thread(self, work: Any, argument: Any) -> Any:
        if self.usable:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._guarded, work, argument)
        return None

    def _guarded(self, work: Any, argument: Any) -> Any:
        try:
            return work(argument)
        except (sqlite3.Error, OSError, json.JSONDecodeError) as error:
            self.usable = False
            log.warning("scores are no longer cached: %s: %s", self.path, error)
            return None

    def _connection(self) -> sqlite3.Connection:
        if self._open is None:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._open = sqlite3.connect(self.path, timeout=_WAIT_SECONDS, check_same_thread=False)
            self._open.execute("PRAGMA synchronous = OFF")  # only a crash of the machine can damage it
            columns = [column[1] for column in self._open.execute("PRAGMA table_info(scores)")]
            if columns and "digest" not in columns:  # of a version that kept none: nothing vouches for what it holds
                self._open.execute("DROP TABLE scores")
            self._open.execute(_TABLE)
        return self._open

    def _get(self, keys: Sequence[bytes]) -> dict[bytes, Any]:
        found: dict[bytes, Any] = {}
        damaged: list[bytes] = []
        for first in range(0, len(keys), _AT_ONCE):
            some = keys[first : first + _AT_ONCE]
            asked = f"SELECT key, value, digest FROM scores WHERE key IN ({','.join('?' * len(some))})"
            for key, value, digest in self._connection().execute(asked, some):
                if digest == _digest(key, value):
                    found[key] = json.loads(value)
                else:
                    damaged.append(key)
        if damaged:
            log.warning("%s: %d scores are not what was written, and are had anew", self.path, len(damaged))
            with self._connection() as connection:
                connection.executemany("DELETE FROM scores WHERE key = ?", [(key,) for key in damaged])
        return found

    def _put(self, values: Mapping[bytes, str]) -> None:
        with self._connection() as connection:
            rows = [(key, value, _digest(key, value)) for key, value in values.items()]
            connection.executemany("INSERT OR IGNORE INTO scores (key, value, digest) VALUES (?, ?, ?)", rows)
            while self._bytes(connection) > self.limit:
                oldest = "SELECT number FROM scores ORDER BY number LIMIT (SELECT 1 + count(*) / 8 FROM scores)"
                if connection.execute(f"DELETE FROM scores WHERE number IN ({oldest})").rowcount == 0:
                    break

    @staticmethod
    def _bytes(connection: sqlite3.Connection) -> int:
        """Bytes in use: pages of the file without those that are free again."""
        one = [
            connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
        ]
        return int((one[0] - one[1]) * one[2])


def _digest(key: bytes, value: str | bytes) -> bytes:
    """SHA-256 of what stands in a row; sqlite gives bytes where a damaged row no longer says that it is text."""
    text = value if isinstance(value, bytes) else str(value).encode("utf-8", errors="surrogatepass")
    return hashlib.sha256(len(key).to_bytes(8, "little") + key + text).digest()
