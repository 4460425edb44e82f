"""The bytes of a data file, compressed or not, and what is refused before it is read as text."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import IO, cast

from align.errors import DataError

_BOMS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)


def open_bytes(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.name.endswith(".gz") else path.open("rb")


def whole_bytes(path: Path) -> bytes:
    with open_bytes(path) as f:
        return f.read()


def refuse_pointer(path: Path) -> None:
    with path.open("rb") as f:
        head = f.read(len(_POINTER))
    if head == _POINTER:
        raise DataError(
            "a pointer of Git LFS, in place of the file itself",
            where=path,
            remedy="fetch it where it was cloned (`git lfs pull`), or name the data set by its hub id",
        )


_POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_utf16(head: bytes, path: Path) -> None:
    name = next((name for bom, name in _BOMS if head.startswith(bom)), None)
    if name is not None:
        raise DataError(
            f"the file is {name} text, and must be UTF-8",
            where=f"{path}:1",
            remedy=f"convert it: iconv -f {name} -t UTF-8 {path.name} > converted{path.suffix}",
        )


def whole_text(path: Path) -> str:
    """The whole file as text. Bytes that are no UTF-8 become lone surrogates, by which their rows are found."""
    data = whole_bytes(path)
    refuse_utf16(data[:4], path)
    return data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="surrogateescape")
