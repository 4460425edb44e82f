"""The system calls that make a sandbox and that Python does not offer, through ctypes. Linux on x86-64 and arm64."""

from __future__ import annotations

import ctypes
import os
import platform
import select
import signal
import sys

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 1, 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION_3 = 0x20080522

MACHINE = platform.machine()
MACHINES = ("x86_64", "aarch64")
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_MOUNT_SETATTR = 442  # Linux 5.12, the same number everywhere

_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _call(name: str, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None) -> None:
    """OSError with the call's name where it fails."""
    wrapped = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    if getattr(_libc, name)(*wrapped) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    _call("unshare", flags)


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    _call("mount", *(None if text is None else os.fsencode(text) for text in (source, target, kind)), flags,
          None if data is None else data.encode())  # fmt: skip


def unmount(target: str) -> None:
    """Detached: gone from here at once, and for good when nobody uses it."""
    _call("umount2", os.fsencode(target), MNT_DETACH)


def make_read_only(target: str) -> None:
    """`target` and every mount below it, without set-user-id programs."""
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    pointer = ctypes.cast(attributes, ctypes.c_void_p).value
    _call("syscall", _MOUNT_SETATTR, AT_FDCWD, os.fsencode(target), AT_RECURSIVE, pointer or 0, 32)


def make_root(folder: str) -> None:
    """`folder`, a mount, becomes / for this process; what was / is nowhere any more."""
    os.chdir(folder)
    _call("syscall", _PIVOT_ROOT[MACHINE], b".", b".")
    unmount(".")
    os.chdir("/")


def drop_capabilities() -> None:
    """For good: neither a program nor a new namespace gives one back (the filter of system calls forbids both)."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    _call("capset", *(ctypes.cast(a, ctypes.c_void_p).value or 0 for a in (header, nothing)))
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def die_with(parent: int) -> None:
    """SIGKILL for this process when its parent ends, the process behind that pidfd. Again after each change of user:
    that disarms it."""
    _call("prctl", _PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if select.select([parent], [], [], 0)[0]:  # it ended before the signal was armed
        os._exit(1)


def own_proc_files() -> None:
    """After a change of user /proc/self belongs to root until this is said."""
    _call("prctl", _PR_SET_DUMPABLE, 1, 0, 0, 0)


def install_filter(program: bytes) -> None:
    """A seccomp program (8 bytes an instruction) for this thread and all that come from it."""
    code = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))

    fprog = Program(len(program) // 8, ctypes.addressof(code))
    _call("prctl", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(fprog), 0, 0)
