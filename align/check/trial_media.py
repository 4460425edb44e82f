"""Media of the rows that a reward is tried on, named as a run names them: {"type", "path"}.

A run names the pictures that the policy saw, resized; a trial has no policy, and names those of the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.data.media.sources import Allowed, Blob, Finder
from align.data.records import MediaPart
from align.mediastore import VIEW_SUFFIX

_ANYWHERE = (Path("/"),)  # who tries a reward names the file of rows: they may name any file of theirs
_MAX_BYTES = 1 << 28


class TrialMedia:
    """aside: a folder for pictures that rows hold as data URIs or bytes; rewards open files."""

    def __init__(self, aside: Path):
        self.aside = aside
        self._finder = Finder(Allowed(_ANYWHERE, _MAX_BYTES, _not_fetched))

    def describe(self, part: MediaPart, folder: Path | None) -> dict[str, str]:
        """A medium's kind and file; no file where it is an address, or a video that is a list of frames.

        folder: that of the data file. Raises RowError where there is no such file.
        """
        if isinstance(part.source, str) and part.source[:7].lower() in ("http://", "https:/"):
            return {"type": part.kind}
        found = self._finder.find(part, folder)
        if found.is_list:
            return {"type": part.kind}
        [blob] = found.blobs
        return {"type": part.kind, "path": str(blob.path or self._written(blob))}

    def _written(self, blob: Blob) -> Path:
        assert blob.data is not None, "a blob is a file, or bytes"
        path = self.aside / blob.sha256
        if not path.exists():
            path.write_bytes(blob.data)
        return path


def _not_fetched(address: str) -> Path:
    raise AssertionError(f"{address}: addresses are left alone")


def media_of_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, str], ...]:
    """Descriptions of the media in a prompt, in order: what `Sample.media` holds."""
    contents = (message["content"] for message in messages)
    return tuple(part for parts in contents if isinstance(parts, list) for part in parts if part["type"] in VIEW_SUFFIX)


def with_files(messages: Sequence[dict[str, Any]], paths: Sequence[str]) -> tuple[dict[str, Any], ...]:
    """The messages with other files for their media, in order: those that a run's rollouts name.

    As they are where the numbers differ, or a file is gone from the media store.
    """
    if len(paths) != len(media_of_messages(messages)) or not all(Path(path).is_file() for path in paths):
        return tuple(messages)
    files = iter(paths)

    def shown(content: Any) -> Any:
        if not isinstance(content, list):
            return content
        return [part | {"path": next(files)} if part["type"] in VIEW_SUFFIX else part for part in content]

    return tuple({**message, "content": shown(message["content"])} for message in messages)
