"""The layers that contain a process, in the order in which it enters them, each with a trial: the forbidden thing,
really tried. `Leak` where a trial succeeds.

    namespaces    its own users, processes, mounts, network, IPC and host name. Its root holds the interpreter's
                  library, the system's shared libraries and three devices, read-only, and one empty folder that is its
                  own: a file system in memory, of bounded size. No /proc, /sys, /tmp, /etc, /home. No network device.
    privileges    no capability, and none to be had
    limits        CPU seconds, address space, threads, open files, file size, no core dumps
    system calls  `seccomp.py`

A process that runs as root becomes nobody first: limits on processes do not bind root, and file permissions still
stand where a layer has a hole.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

from rewards.sandbox import kernel, seccomp

FOLDER = "/work"
_NOBODY = 65534
_STAGING = "/tmp"  # covered by the new root until that becomes /, in our mount namespace alone
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_OTHERS = (
    kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC
    | kernel.CLONE_NEWUTS | kernel.CLONE_NEWCGROUP
)  # fmt: skip


class Leak(Exception):
    """Something that a layer forbids was possible."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one process. cpu_s, wall_s: seconds. memory_mb: MiB of address space beside what the interpreter has.
    files_mb: MiB of its folder. threads: beside the first. output_kb: KiB that it may print (`Sandbox.run_script`)."""

    cpu_s: float = 4.0
    wall_s: float = 9.0
    memory_mb: int = 512
    files_mb: int = 16
    threads: int = 16
    output_kb: int = 1024


# ------------------------------------------------------------------------------------------------ namespaces


def prepare_root() -> None:
    """Once, in the zygote: the later root stands at _STAGING, in a mount namespace of ours, and root is nobody.

    Root builds it as root, so that an interpreter in root's own folder is found, and is nobody afterwards; where it may
    not, or for other users, a user namespace of ours gives the right to mount.
    """
    if os.geteuid() == 0:
        try:
            kernel.unshare(kernel.CLONE_NEWNS)
        except PermissionError:
            _become_nobody()
        else:
            _build()
            _become_nobody()
            return
    _new_user(kernel.CLONE_NEWNS)
    _build()


def _become_nobody() -> None:
    """Where there is no nobody to become (root of a user namespace alone), the trial of the limits decides."""
    with contextlib.suppress(OSError):
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    kernel.own_proc_files()


def _new_user(more: int) -> None:
    """A user namespace, and others: we are its user 0, and nobody else is anybody there."""
    user, group = os.geteuid(), os.getegid()
    kernel.unshare(kernel.CLONE_NEWUSER | more)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        Path("/proc/self", name).write_text(text)


def _build() -> None:
    kernel.mount(None, "/", None, kernel.MS_REC | kernel.MS_PRIVATE)  # first: nothing of this reaches the machine
    kernel.mount("tmpfs", _STAGING, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755,size=1m")
    prefixes = (sys.base_prefix, sys.base_exec_prefix)
    wanted = [str(Path(p, name)) for p in prefixes for name in ("lib", "lib64")]
    wanted += ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo", *_DEVICES]
    real = sorted({os.path.realpath(path) for path in wanted if os.path.exists(path)})
    for path in real:
        if not any(path.startswith(other + "/") for other in real):
            _bind(path)
    for path in wanted:
        place = Path(_STAGING + path)
        if os.path.islink(path) and not place.exists() and not place.is_symlink():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(os.readlink(path))
    library = Path(os.__file__).parent
    for packages in (library / "site-packages", library / "dist-packages", library.parent / "python3/dist-packages"):
        if packages.is_dir():
            flags = kernel.MS_NOSUID | kernel.MS_NODEV
            kernel.mount("tmpfs", f"{_STAGING}{packages}", "tmpfs", flags, "mode=755,size=4k")
    os.mkdir(_STAGING + FOLDER)
    kernel.make_read_only(_STAGING)


def _bind(path: str) -> None:
    place = Path(_STAGING + path)
    if os.path.isdir(path):
        place.mkdir(parents=True, exist_ok=True)
    else:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    kernel.mount(path, str(place), None, kernel.MS_BIND | kernel.MS_REC)


def enter_namespaces(limits: Limits) -> None:
    """This process and its children; the children are in the new pid namespace, this process is not."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # where memory runs out all the same, this goes first
    _new_user(_OTHERS)
    socket.sethostname("sandbox")
    kernel.mount(_STAGING, _STAGING, None, kernel.MS_BIND | kernel.MS_REC)  # a mount of our own may become /
    flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    kernel.mount("tmpfs", _STAGING + FOLDER, "tmpfs", flags, f"mode=700,size={limits.files_mb}m,nr_inodes=1024")
    kernel.make_root(_STAGING)
    os.chdir(FOLDER)


def try_namespaces(outside: Mapping[str, Any]) -> None:
    """outside: port and abstract, the addresses of listening sockets; pid, a process; proc, a file of it."""
    if os.getpid() != 1:
        raise Leak("it sees the machine's processes")
    _fails(partial(_open, outside["proc"], "r"), f"it reads {outside['proc']}")
    for path in ("/", "/tmp", "/dev/shm", "/var/tmp", os.path.dirname(os.__file__)):
        _fails(partial(_open, f"{path}/sandbox-trial", "w"), f"it writes into {path}")
    for path in ("/proc", "/sys", "/home", "/root", "/etc/passwd"):
        if not _holds_interpreter(path):
            _fails(partial(os.stat, path), f"it sees {path}")
    _fails(partial(_connect, socket.AF_INET, ("127.0.0.1", outside["port"])), "it connects to 127.0.0.1")
    _fails(partial(_connect, socket.AF_UNIX, outside["abstract"]), "it connects to a UNIX socket")


def _open(path: str, mode: str) -> None:
    open(path, mode).close()


def _connect(family: int, address: Any) -> None:
    with socket.socket(family) as client:
        client.settimeout(1.0)
        client.connect(address)


def _holds_interpreter(path: str) -> bool:
    return os.__file__.startswith(path + "/")


# ------------------------------------------------------------------------------------------------ the other layers


def enter_privileges(limits: Limits) -> None:
    os.setsid()  # no terminal, and a process group of its own
    kernel.drop_capabilities()


def try_privileges(outside: Mapping[str, Any]) -> None:
    _fails(lambda: kernel.mount("tmpfs", FOLDER, "tmpfs", 0), "it mounts a file system")
    _fails(lambda: os.chroot(FOLDER), "it changes its root")


def enter_limits(limits: Limits) -> None:
    """The hard limits too, so that they cannot be raised. CPU seconds are whole ones, rounded up."""
    page = resource.getpagesize()
    bounds = {
        resource.RLIMIT_CPU: ceil(limits.cpu_s),
        resource.RLIMIT_AS: limits.memory_mb * 2**20 + _address_space * page,
        resource.RLIMIT_NPROC: limits.threads + 2,  # this process and its keeper count
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_FSIZE: limits.files_mb * 2**20,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for which, bound in bounds.items():
        hard = resource.getrlimit(which)[1]
        bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(which, (bound, bound))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file too large is an error, not the end


_address_space = 0


def note_address_space() -> None:
    """Pages that this process has mapped; asked where /proc is still there."""
    global _address_space
    _address_space = int(Path("/proc/self/statm").read_text().split()[0])


def try_limits(outside: Mapping[str, Any]) -> None:
    limit = resource.getrlimit(resource.RLIMIT_AS)[1]
    if limit == resource.RLIM_INFINITY:
        raise Leak("it has no limit of memory")
    _fails(lambda: bytearray(limit), f"it allocates {limit} bytes", MemoryError)
    size = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def fill() -> None:
        for name in "ab":
            with open(f"{FOLDER}/trial-{name}", "wb") as file:
                file.truncate(size)
                os.posix_fallocate(file.fileno(), 0, size)

    stop = threading.Event()

    def crowd() -> None:
        for _ in range(resource.getrlimit(resource.RLIMIT_NPROC)[1]):
            threading.Thread(target=stop.wait, daemon=True).start()

    _fails(crowd, "it starts threads without end", RuntimeError)
    stop.set()
    _fails(fill, f"it writes more than {size} bytes")
    for name in "ab":
        Path(FOLDER, f"trial-{name}").unlink(missing_ok=True)


def enter_filter(limits: Limits) -> None:
    kernel.install_filter(seccomp.program())


def try_filter(outside: Mapping[str, Any]) -> None:
    for family in (socket.AF_INET, socket.AF_UNIX, socket.AF_NETLINK, getattr(socket, "AF_VSOCK", 40)):
        _fails(partial(socket.socket, family, socket.SOCK_DGRAM), f"it makes a socket of family {family}")

    def fork() -> None:
        if os.fork() == 0:
            os._exit(0)

    _fails(fork, "it starts a process")
    _fails(lambda: os.execv(sys.executable, [sys.executable]), "it starts a program")
    _fails(lambda: kernel.unshare(kernel.CLONE_NEWUSER), "it makes a namespace")
    for target in (0, -1, 2, outside["pid"]):
        if target != 1:
            _fails(partial(os.kill, target, 0), f"it signals process {target}")


def _fails(attempt: Callable[[], object], what: str, error: type[BaseException] = OSError) -> None:
    try:
        attempt()
    except error:
        return
    raise Leak(what)


@dataclass(frozen=True, slots=True)
class Layer:
    name: str
    enter: Callable[[Limits], None]
    trial: Callable[[Mapping[str, Any]], None]


INNER = (
    Layer("privileges", enter_privileges, try_privileges),
    Layer("limits", enter_limits, try_limits),
    Layer("system calls", enter_filter, try_filter),
)
"""The layers that a process enters itself, after its keeper made the namespaces."""
