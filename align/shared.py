"""Paths that every node of a cluster must see: the run folder, and what was resolved on the driver's machine."""

from __future__ import annotations

import socket
from pathlib import Path

from align.errors import RunFolderError


def require_shared(token: Path, *others: str | Path | None) -> None:
    """Raise RunFolderError where this node does not see `token`, the file that the driver put into the run folder, or
    one of `others` (model folders; None is skipped)."""
    node = socket.gethostname()
    if not token.is_file():
        raise RunFolderError(
            f"node {node} does not see the run folder",
            where=token.parent,
            remedy="use a shared path: output=<a folder that every node mounts>",
        )
    for path in others:
        if path is not None and not Path(path).exists():
            raise RunFolderError(
                f"node {node} does not see this path, and the driver does",
                where=path,
                remedy="use a shared path; for models of the hub, the same HF_HOME on every node",
            )
