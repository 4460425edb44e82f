"""What the system refuses (a full disk, a read-only folder, a long name), as errors with place and remedy."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from align.errors import AlignError, RunFolderError, SetupError

_OF_RUST = re.compile(r"\(os error ([0-9]{1,4})\)")
_REMEDIES = {
    errno.ENOSPC: "free space there, or choose another place (output=<folder>); --resume continues a run",
    errno.EDQUOT: "your quota there is used up: free space, or choose another place (output=<folder>)",
    errno.EROFS: "it is mounted read-only: choose another place (output=<folder>)",
    errno.EACCES: "you may not: ask its owner, or choose another place",
    errno.EPERM: "you may not: ask its owner, or choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "was it removed or renamed meanwhile? check the path",
    errno.ENOTDIR: "a part of this path is a file: check the path",
    errno.EISDIR: "a folder has the place of a file there: move it",
    errno.EEXIST: "something else has this name: move it, or choose another",
    errno.ENOTEMPTY: "something else writes there: move it, or choose another place",
    errno.ELOOP: "symbolic links lead in a circle there: mend them",
    errno.EINVAL: "the file system refuses this name or this use of it: choose another",
    errno.EILSEQ: "the file system refuses this name: choose one in plain letters",
    errno.EMFILE: "too many files are open: raise the limit (`ulimit -n`)",
    errno.ENFILE: "the machine has too many files open",
    errno.ENOMEM: "end other programs, or ask for less",
    errno.EIO: "the disk or its server fails: look at the system's log, and copy what is there",
    errno.ESTALE: "the file server has lost it: mount it again; --resume continues a run",
    errno.EFBIG: "the file system takes no file of this size: choose another place",
    errno.EBUSY: "something else uses it",
    errno.EXDEV: "it leads to another file system: use one for the whole run",
}


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Errors of the system inside say which file they are about: a write to an open one does not, and neither do
    libraries that have words of their own for it (`of_system`), which become OSErrors."""
    try:
        yield
    except AlignError:
        raise
    except Exception as error:
        system = of_system(error)
        if system is None:
            raise
        if system.filename is None and system.errno is not None:  # one without a number would lose its words
            system.filename = str(path)
        if system is error:
            raise
        raise system from error


def of_system(error: BaseException) -> OSError | None:
    """The system's refusal that an exception stands for: itself, or what a library in Rust (safetensors, tokenizers)
    makes of one, `... No space left on device (os error 28)`. None where it is something else."""
    if isinstance(error, OSError):
        return error
    found = _OF_RUST.search(str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


def is_known(error: OSError) -> bool:
    """Whether the cause is the machine's or the user's, and not a fault of this program."""
    return error.errno in _REMEDIES


def described(error: OSError, place: str | Path | None = None) -> AlignError:
    """The same as one of ours. place: where it happened, for errors that do not name their file."""
    what = error.strerror or str(error) or type(error).__name__
    where = error.filename if isinstance(error.filename, str | bytes) else place
    remedy = _REMEDIES.get(error.errno or 0, "look at that file or folder")
    kind = RunFolderError if place is not None else SetupError
    return kind(what, where=None if where is None else os.fsdecode(where), remedy=remedy)
