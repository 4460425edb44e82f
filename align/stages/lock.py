"""One driver in a run folder: a lock that holds on shared file systems, and says who has it.

The holder's file is `.lock.<n>`; whoever wants the folder makes `.lock.<n+1>`, where n is the newest there is and its
holder is done or dead. A hard link to a file of one's own is what makes it: that succeeds for one of many, on NFS too,
where neither O_EXCL of old servers nor flock can be relied on. Numbers only grow, so that nobody who looked a moment
ago can take the place of one who came since.

A holder of this machine, boot and container is looked up among the processes; any other counts as alive while its
heartbeat, the file's time of change, is younger than STALE_S. Both times are the file server's: no clocks are compared.
"""

from __future__ import annotations

import contextlib
import errno
import getpass
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from align.errors import RunFolderError
from align.stages import processes
from align.stages.processes import ProcessId

BEAT_S = 10.0
STALE_S = 120.0
_NAME = re.compile(r"\.lock\.([0-9]+)")
_ASIDE = ".locking-"
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)  # FAT, some network mounts


@dataclass(frozen=True)
class Holder:
    """Who has the lock, as its file says. thread: number of the thread that took it, as the system counts them; since:
    seconds since 1970."""

    process: ProcessId
    host: str
    user: str
    thread: int
    since: float
    released: bool = False

    @classmethod
    def here(cls) -> Holder:
        process = processes.this_process()
        return cls(process, socket.gethostname(), _user(), threading.get_native_id(), round(time.time(), 3))

    def to_json(self) -> dict[str, Any]:
        said = {"host": self.host, "user": self.user, "thread": self.thread, "since": self.since}
        return {**self.process.to_json(), **said, "released": self.released}

    @classmethod
    def read(cls, text: bytes) -> Holder | None:
        """None where the file does not say: its writer was killed, or is just about to."""
        try:
            value = json.loads(text)
            process, numbers = ProcessId.from_json(value), (int(value["thread"]), float(value["since"]))
            time.localtime(numbers[1])  # a time that no clock shows is no holder's
            return cls(process, str(value["host"]), str(value["user"]), *numbers, value["released"] is True)
        except (ValueError, KeyError, TypeError, OverflowError, OSError, RecursionError):
            return None

    @property
    def works_here(self) -> bool:
        """Whether it lives, of a process on this machine. One thread is never two drivers: it has begun again."""
        return processes.is_alive(self.process) and not self.is_this_thread

    @property
    def is_this_thread(self) -> bool:
        return self.process.pid == os.getpid() and self.thread == threading.get_native_id()


class FolderLock:
    """A lock that is held, and beats until it is released. note: from whom it was taken over, if from anybody.

    on_lost: called once, from the thread that beats, where somebody took the lock (this process was stopped for longer
    than STALE_S) or the folder is gone.
    """

    def __init__(self, path: Path, holder: Holder, note: str | None):
        self.path, self.holder, self.note = path, holder, note
        self.lost: RunFolderError | None = None
        self.on_lost: Callable[[RunFolderError], object] | None = None
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run-folder-lock", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, folder: Path) -> FolderLock:
        """Raises RunFolderError naming the holder where there is one; OSError where the folder cannot be written to."""
        holder = Holder.here()
        text = json.dumps(holder.to_json()).encode()
        aside = folder / f"{_ASIDE}{uuid4().hex}"
        _write(aside, text)
        try:
            while True:
                newest, path = _newest(folder)
                note = None if path is None else _vacated(path, _now(aside))
                mine = folder / f".lock.{newest + 1:06d}"
                if not _linked(aside, mine, text):
                    continue  # another was faster: look who
                if _newest(folder)[0] == newest + 1:
                    break
                mine.unlink(missing_ok=True)  # what was listed was older than what is there
        finally:
            aside.unlink(missing_ok=True)
        _tidy(folder, newest)
        return cls(mine, holder, note)

    def require(self) -> None:
        """Raise RunFolderError where the lock is no longer this driver's: what it would write now is another's."""
        if self.lost is None and not self._released.is_set():
            self._look()
        if self.lost is not None:
            raise self.lost

    def release(self) -> None:
        """Give the folder to whoever comes next; its file stays, so that numbers grow."""
        if self._released.is_set():
            return
        self._released.set()
        self._thread.join()
        if self.lost is not None:
            return
        done = Holder(**{**vars(self.holder), "released": True})
        aside = self.path.with_name(f"{_ASIDE}{uuid4().hex}")
        with contextlib.suppress(OSError):  # a full disk, a folder that is gone: this process's end says the same
            _write(aside, json.dumps(done.to_json()).encode())
            os.replace(aside, self.path)

    def _beat(self) -> None:
        beaten = time.monotonic()
        while not self._released.wait(BEAT_S):
            try:
                self._look()
                if self.lost is None:
                    os.utime(self.path)
                    beaten = time.monotonic()
            except OSError as error:  # a server that does not answer for a moment
                if time.monotonic() - beaten > STALE_S:
                    self._lose(f"its lock cannot be renewed: {error.strerror or error}", "look at the file system")
            if self.lost is not None:
                return

    def _look(self) -> None:
        folder = self.path.parent
        try:
            path = _newest(folder)[1]
        except FileNotFoundError:
            path = None
        if path is None:
            self._lose("it was removed while this driver worked in it", "run the recipe again")
        elif path != self.path:
            self._lose(
                f"another driver has taken it, for this one gave no sign of life for {STALE_S:.0f} s "
                "(was it stopped, or the machine asleep?)",
                "look at what the other one does; --resume continues once it has ended",
            )

    def _lose(self, what: str, remedy: str) -> None:
        if self.lost is None:
            self.lost = RunFolderError(f"this run has lost its folder: {what}", where=self.path.parent, remedy=remedy)
            if self.on_lost is not None:
                self.on_lost(self.lost)


def require_free(folder: Path) -> None:
    """Raise RunFolderError where a driver works in `folder`; nothing is written unless there is a lock."""
    path = _newest(folder)[1]
    if path is not None:
        aside = folder / f"{_ASIDE}{uuid4().hex}"
        try:
            _write(aside, b"")
            _vacated(path, _now(aside))
        except OSError:
            return  # a folder that cannot be written to is refused for that
        finally:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)


def _newest(folder: Path) -> tuple[int, Path | None]:
    """The newest lock's number and file; 0 and None where there is none."""
    found = [(int(match[1]), name) for name in os.listdir(folder) if (match := _NAME.fullmatch(name))]
    number, name = max(found, default=(0, ""))
    return number, folder / name if name else None


def _vacated(path: Path, now: float) -> str | None:
    """What to say of a lock that may be taken over; None where it was given up. Raises RunFolderError where it is held.

    now: the file server's time.
    """
    try:
        # opening asks a server for what is there, where a listing may be remembered; a pipe there is not waited for
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as handle:
            beaten, holder = os.fstat(handle.fileno()).st_mtime, Holder.read(handle.read(1 << 16))
    except FileNotFoundError:
        return None
    except PermissionError:
        beaten, holder = path.stat().st_mtime, None
    age = max(0.0, now - beaten)
    if holder is None:
        if age > STALE_S:
            return f"took over a lock that cannot be read and was not renewed for {age:.0f} s"
        raise RunFolderError(
            f"somebody is taking this run folder, or holds it by a lock that cannot be read ({path.name}, renewed "
            f"{age:.0f} s ago)",
            where=path.parent,
            remedy=f"wait for who works here; where nobody does, try again in {STALE_S - age:.0f} s",
        )
    here = holder.process.where == processes.here()
    if holder.released or (here and holder.is_this_thread):
        return None
    who = f"process {holder.process.pid} on {holder.host}"
    if here and not holder.works_here:
        return f"took over from {who}, which is gone"
    if not here and age > STALE_S:
        return f"took over from {who}, which gave no sign of life for {age:.0f} s"
    raise _held(holder, who, here, age, path.parent)


def _held(holder: Holder, who: str, here: bool, age: float, folder: Path) -> RunFolderError:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.since))
    remedy = "wait for it, or stop it with Ctrl-C (it saves a checkpoint)"
    if not here:
        remedy += f"; if it is gone for good, its lock is free {max(0.0, STALE_S - age) + 1:.0f} s from now"
    return RunFolderError(
        f"{who} is working in this run folder (user {holder.user}, since {since}, last heartbeat {age:.0f} s ago)",
        where=folder,
        remedy=remedy,
    )


def _linked(aside: Path, target: Path, text: bytes) -> bool:
    """Whether `target` is ours now; False where it was there."""
    try:
        os.link(aside, target)
        return True
    except OSError as error:
        if aside.stat().st_nlink == 2:  # a server did it, its answer was lost, and the second try found the first
            return True
        if isinstance(error, FileExistsError):
            return False
        if error.errno not in _NO_LINKS:
            raise
    try:
        _write(target, text)
        return True
    except FileExistsError:
        return False


def _write(path: Path, text: bytes) -> None:
    """A new file, on disk. Raises FileExistsError."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0), 0o644)
    try:
        os.write(descriptor, text)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _now(aside: Path) -> float:
    os.utime(aside)
    return aside.stat().st_mtime


def _tidy(folder: Path, newest: int) -> None:
    """Remove locks before the last one (which stays: who lists while numbers change must see one) and what a kill left
    of a try."""
    now = time.time()
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            match = _NAME.fullmatch(path.name)
            left = path.name.startswith(_ASIDE) and now - path.stat().st_mtime > STALE_S
            if left or (match and int(match[1]) < newest):
                path.unlink()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
