"""Freed memory stays with a process that trains on a CPU.

An update allocates the same activations as the one before it. glibc gives large ones back to the system as soon as they
are freed, and gets them again page by page, each zeroed by the kernel: on a virtual machine a first touch of 10 MB
costs as much as ten passes over it. Kept, they are found where they were.

Tensors of 2 MiB and more ask for huge pages, which torch does if its environment says so before its first tensor: fewer
first touches, and smaller gaps where large tensors were.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h, mallopt(3)
_NEVER = 2**31 - 1
ENVIRONMENT = {"THP_MEM_ALLOC_ENABLE": "1"}  # of a process that trains (c10/core/impl/alloc_cpu.cpp)


def keep_freed_memory() -> bool:
    """Ask malloc to keep what is freed, for the rest of this process; False where there is no glibc to ask.

    The process then stays as large as it was at its largest: an update's activations, which the next one needs again.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl, or another allocator
        log.debug("this C library has no mallopt: freed memory goes back to the system")
        return False
    return all(mallopt(option, _NEVER) == 1 for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))


def give_back_freed_memory() -> None:
    """Return to the system what malloc keeps, of a process that has nothing to train for now."""
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def resident_bytes() -> int | None:
    """Of this process; None where the system does not tell (it is no Linux)."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
