"""Where a medium may come from. A row is somebody else's text: it must not name files or hosts that nobody meant.

A path is relative to the data file and stays inside its folder, symbolic links resolved, or inside a folder that
`media.folders` allows; a generator's rows are relative to its file. Data URIs and bytes (also {bytes, path} structs, as
Parquet files of `datasets` hold them) come with the row. http(s) is for `media.hosts` only (see web.py).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path
from typing import Any

from align.data.records import MediaKind, MediaPart, RowError

_DATA_URI = re.compile(r"data:(?P<type>[\w.+*/-]*)(?:;[\w=-]+)*;base64,", re.IGNORECASE)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(?=//|[^\\/])")


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes that were found: in a file, or at hand. name: as messages show it; sha256: of the bytes."""

    name: str
    sha256: str
    path: Path | None = None
    data: bytes | None = None


@dataclass(frozen=True, slots=True)
class Located:
    """A medium that was found: one blob, or one per frame of a video that is a list of them."""

    kind: MediaKind
    blobs: tuple[Blob, ...]
    is_list: bool = False

    @property
    def name(self) -> str:
        return f"{len(self.blobs)} frames from {self.blobs[0].name}" if self.is_list else self.blobs[0].name


@dataclass(frozen=True)
class Allowed:
    """folders: where files may lie beside the data file's own; max_bytes: of one file. fetch: an address to the file
    that it was written to (RowError where it may not be fetched)."""

    folders: tuple[Path, ...]
    max_bytes: int
    fetch: Callable[[str], Path]


class Finder:
    """Finds media and hashes them; a file that has not changed since is hashed once."""

    def __init__(self, allowed: Allowed):
        self.allowed = allowed
        self._hashes: dict[tuple[str, int, int], str] = {}

    def find(self, part: MediaPart, folder: Path | None) -> Located:
        """The medium of a part. folder: that of the data file. Raises RowError with the reason and what to do."""
        source = _plain(part.source)
        if isinstance(source, list | tuple):
            if part.kind != "video":
                raise RowError(f"one {part.kind} is a list of {len(source)}; only a video may be a list, of its frames")
            if not source:
                raise RowError("a video is an empty list of frames")
            return Located("video", tuple(self._blob(_plain(frame), "image", folder) for frame in source), True)
        return Located(part.kind, (self._blob(source, part.kind, folder),))

    def _blob(self, source: Any, kind: MediaKind, folder: Path | None) -> Blob:
        if isinstance(source, bytes):
            return self._given(source, f"{kind} bytes")
        if not isinstance(source, str):
            raise RowError(
                f"{_article(kind)} is a {type(source).__name__}; give a path, a data URI, bytes or an address"
            )
        if not source.strip():
            raise RowError(f"the path of {_article(kind)} is empty")
        if source[:5].lower() == "data:":
            return self._given(_from_uri(source, kind, self.allowed.max_bytes), f"{kind} data URI")
        if source[:7].lower() in ("http://", "https:/"):
            path = self.allowed.fetch(source)
            return Blob(_short(source), self.hash(path), path)
        scheme = _SCHEME.match(source)
        if scheme and scheme[1].lower() == "file":
            source = source[7:] if source[5:7] == "//" else source[5:]
        elif scheme and len(scheme[1]) > 1:
            raise RowError(f"{_short(source)}: {scheme[1]} addresses are not read; give a path, a data URI or http(s)")
        path = self._inside(source, folder)
        return Blob(_short(source), self.hash(path), path)

    def _given(self, data: bytes, name: str) -> Blob:
        if not data:
            raise RowError(f"the {name} are empty" if name.endswith("bytes") else f"the {name} is empty")
        if len(data) > self.allowed.max_bytes:
            raise RowError(_too_many(name, len(data), self.allowed.max_bytes))
        return Blob(name, hashlib.sha256(data).hexdigest(), data=data)

    def _inside(self, source: str, folder: Path | None) -> Path:
        """The file behind a path, once it is sure that it may be read. Raises RowError."""
        if "\0" in source:
            raise RowError(f"a path has a null character: {_short(source)!r}")
        homes = ([] if folder is None else [folder]) + list(self.allowed.folders)
        if not homes:
            raise RowError(f"{_short(source)}: rows of a hub data set have no folder; name one with `media.folders`")
        roots = [home.resolve() for home in homes]
        outside: Path | None = None
        for home in homes:
            path = _resolved(home, source)
            if not any(path.is_relative_to(root) for root in roots):
                outside = outside or path
            elif path.is_file():
                size = path.stat().st_size
                if size > self.allowed.max_bytes:
                    raise RowError(_too_many(_short(source), size, self.allowed.max_bytes))
                if not size:
                    raise RowError(f"{_short(source)}: the file is empty")
                return path
            elif path.is_dir():
                raise RowError(f"{_short(source)} is a folder, not a file")
        if outside is not None:
            raise RowError(
                f"{_short(source)} lies outside the data file's folder; if that is meant, allow its folder with "
                f"`media.folders: [{outside.parent}]`"
            )
        raise RowError(f"there is no file {_short(source)} (looked in {', '.join(map(str, homes))})")

    def hash(self, path: Path) -> str:
        """SHA-256 of a file. Raises RowError where it cannot be read."""
        stat = path.stat()
        known = (str(path), stat.st_size, stat.st_mtime_ns)
        if known not in self._hashes:
            try:
                with path.open("rb") as f:
                    self._hashes[known] = hashlib.file_digest(f, "sha256").hexdigest()
            except OSError as e:
                raise RowError(f"{path.name} cannot be read: {e.strerror}") from e
        return self._hashes[known]


def _resolved(home: Path, source: str) -> Path:
    try:
        path = (home / Path(expanduser(source))).resolve()
        path.lstat()
    except FileNotFoundError:
        return path
    except (OSError, RuntimeError) as e:  # a name too long, a circle of links, no such user's home
        raise RowError(
            f"{_short(source)} is no path: {getattr(e, 'strerror', None) or e} (base64 needs `data:image/png;base64,` "
            "before it)"
        ) from e
    return path


def _plain(source: Any) -> Any:
    """A {bytes, path} struct as its bytes, or its path where it has none."""
    if isinstance(source, Mapping):
        data, path = source.get("bytes"), source.get("path")
        if data is None and path is None:
            known = ", ".join(sorted(map(str, source))) or "nothing"
            raise RowError(f"a medium's struct has neither bytes nor path (it has: {known})")
        return path if data is None else bytes(data)
    return bytes(source) if isinstance(source, bytearray | memoryview) else source


def _from_uri(uri: str, kind: MediaKind, limit: int) -> bytes:
    found = _DATA_URI.match(uri)
    if found is None:
        raise RowError(f"a data URI without `;base64,`: {_short(uri)}")
    given = found["type"].partition("/")[0].lower()
    if given not in ("", "*", kind, "application"):
        raise RowError(f"a data URI of type {found['type']} where {_article(kind)} should be")
    if (len(uri) - found.end()) * 3 // 4 > limit:
        raise RowError(_too_many("a data URI", (len(uri) - found.end()) * 3 // 4, limit))
    try:
        return base64.b64decode("".join(uri[found.end() :].split()), validate=True)
    except (binascii.Error, ValueError) as e:
        raise RowError(f"a data URI is not valid base64: {e}") from e


def _too_many(name: str, size: int, limit: int) -> str:
    return f"{name} has {size:,} bytes, more than `media.max_bytes` ({limit:,}) allows"


def _article(kind: str) -> str:
    return f"{'a' if kind == 'video' else 'an'} {kind}"


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:50]}...{text[-20:]}"


def frames_of(count: int, wanted: int) -> Sequence[int]:
    """Which of `count` frames are taken: evenly, first and last among them; all where there are no more."""
    if count <= wanted:
        return range(count)
    if wanted == 1:
        return [count // 2]
    return [round(i * (count - 1) / (wanted - 1)) for i in range(wanted)]
