"""Which system calls a sandboxed process may make: a list of what Python needs; everything else fails with EPERM.

Not on it, and so impossible whatever the namespaces allow: sockets of any kind (only connected pairs within the
process), new processes and programs, namespaces and mounts, ptrace and other processes' memory, kernel keys, io_uring,
BPF, perf events, signals to anybody but oneself, raising a limit of another process, and every call that is newer than
this list. Where a call does both, its arguments decide.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence

from rewards.sandbox import kernel

# name: its number on x86-64 and on arm64, None where the machine has no such call
_ALLOWED: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "pwrite64": (18, 68), "lseek": (8, 62), "close": (3, 57), "close_range": (436, 436), "dup": (32, 23),
    "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59), "sendfile": (40, 71),
    "copy_file_range": (326, 285), "recvfrom": (45, 207), "shutdown": (48, 210),
    "select": (23, None), "pselect6": (270, 72), "poll": (7, None), "ppoll": (271, 73),
    "epoll_create": (213, None), "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None),
    "epoll_pwait": (281, 22), "eventfd2": (290, 19),
    "open": (2, None), "openat": (257, 56), "creat": (85, None), "stat": (4, None), "lstat": (6, None),
    "fstat": (5, 80), "newfstatat": (262, 79), "statx": (332, 291), "statfs": (137, 43), "fstatfs": (138, 44),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "getcwd": (79, 17), "chdir": (80, 49),
    "fchdir": (81, 50), "getdents64": (217, 61), "readlink": (89, None), "readlinkat": (267, 78),
    "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None), "link": (86, None), "linkat": (265, 37),
    "unlink": (87, None), "unlinkat": (263, 35), "symlink": (88, None), "symlinkat": (266, 36),
    "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "truncate": (76, 45),
    "ftruncate": (77, 46), "fallocate": (285, 47), "fadvise64": (221, 223), "chmod": (90, None), "fchmod": (91, 52),
    "fchmodat": (268, 53), "utimensat": (280, 88), "umask": (95, 166), "flock": (73, 32), "fsync": (74, 82),
    "fdatasync": (75, 83),
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216), "madvise": (28, 233),
    "msync": (26, 227), "brk": (12, 214),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132), "pause": (34, None),
    "alarm": (37, None), "getitimer": (36, 102), "setitimer": (38, 103), "restart_syscall": (219, 128),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153), "getrusage": (98, 165),
    "getrlimit": (97, 163), "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "getcpu": (309, 168),
    "futex": (202, 98), "set_robust_list": (273, 99), "get_robust_list": (274, 100), "rseq": (334, 293),
    "membarrier": (324, 283), "getrandom": (318, 278), "uname": (63, 160), "sysinfo": (99, 179),
    "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "getgroups": (115, 158), "getresuid": (118, 148),
    "getresgid": (120, 150), "getpgrp": (111, None), "getpgid": (121, 155), "getsid": (124, 156),
    "wait4": (61, 260), "waitid": (247, 95), "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip
_CLONE, _CLONE3, _FCNTL, _IOCTL, _KILL, _TGKILL = (56, 220), (435, 435), (72, 25), (16, 29), (62, 129), (234, 131)
_PRLIMIT64, _SOCKETPAIR, _SENDTO = (302, 261), (53, 199), (44, 206)

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data

_CLONE_THREAD = 0x10000
_NEW_NAMESPACES = 0x7E020080  # every CLONE_NEW*
_FCNTLS = (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032)  # none that names who gets a signal, or sizes a pipe
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FI(O)(N)CLEX
_SELF = 1  # a sandboxed process is the first of its pid namespace


def program() -> bytes:
    """The filter for this machine, as 8-byte instructions of classic BPF."""
    own = kernel.MACHINES.index(kernel.MACHINE)
    refuse = _ERRNO | errno.EPERM
    code = [(_LOAD, 0, 0, _ARCH), (_JUMP_EQUAL, 1, 0, _AUDIT_ARCH[kernel.MACHINE]), (_RETURN, 0, 0, _KILL_PROCESS)]
    code += [(_LOAD, 0, 0, _NUMBER)]
    if kernel.MACHINE == "x86_64":  # the x32 calls have numbers of their own
        code += [(_JUMP_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL_PROCESS)]
    for number in (numbers[own] for numbers in _ALLOWED.values()):
        if number is not None:
            code += [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    code += _on(_CLONE[own], [*_argument(0), (_AND, 0, 0, _CLONE_THREAD | _NEW_NAMESPACES), *_one_of([_CLONE_THREAD])])
    code += _on(_FCNTL[own], [*_argument(1), *_one_of(_FCNTLS)])
    code += _on(_IOCTL[own], [*_argument(1), *_one_of(_IOCTLS)])
    code += _on(_KILL[own], [*_argument(0), *_one_of([_SELF])])
    code += _on(_TGKILL[own], [*_argument(0), *_one_of([_SELF])])
    code += _on(_PRLIMIT64[own], [*_argument(0), *_one_of([0])])
    code += _on(_SOCKETPAIR[own], [*_argument(0), *_one_of([1])])  # AF_UNIX
    # No address: to the other end of a pair, and nobody else.
    code += _on(_SENDTO[own], [*_argument(4), (_JUMP_EQUAL, 1, 0, 0), (_RETURN, 0, 0, refuse),
                               *_argument(4, high=True), *_one_of([0])])  # fmt: skip
    # Its flags lie in memory, where a filter cannot look; on ENOSYS the C library falls back to clone.
    code += [(_JUMP_EQUAL, 0, 1, _CLONE3[own]), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS), (_RETURN, 0, 0, refuse)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


Instruction = tuple[int, int, int, int]


def _on(number: int, body: list[Instruction]) -> list[Instruction]:
    """`body` for that call, which decides; the next instruction for others."""
    refused = (_RETURN, 0, 0, _ERRNO | errno.EPERM)
    return [(_JUMP_EQUAL, 0, len(body) + 1, number), *body, refused]


def _argument(index: int, high: bool = False) -> list[Instruction]:
    return [(_LOAD, 0, 0, _ARGUMENTS + 8 * index + 4 * high)]


def _one_of(values: Sequence[int]) -> list[Instruction]:
    return [part for v in values for part in ((_JUMP_EQUAL, 0, 1, v), (_RETURN, 0, 0, _ALLOW))]
