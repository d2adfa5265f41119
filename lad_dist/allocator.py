"""Memory that a process keeps for itself while it computes on a CPU, where the C library is glibc.

glibc's malloc asks the system for every block above 32 MiB and gives it back when it is freed; the kernel then fills each of
its pages with zeros again at its next use. A student step makes and frees gigabytes in such blocks, and spends half of its time
there (benchmarks/notes.md). Told to keep what was freed (mallopt(3)), the same step takes the same memory again.
"""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # malloc.h
_NEVER = -1
_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Keep memory that is freed for this process's next use of it, until ``give_back``; True where that can be had.

    Does nothing where the C library is another, or where the environment sets its allocator already (``MALLOC_MMAP_MAX_`` and
    its like).
    """
    libc = _glibc()
    if libc is None or any(name in os.environ for name in _OWN):
        return False
    return bool(libc.mallopt(_MMAP_MAX, 0) and libc.mallopt(_TRIM_THRESHOLD, _NEVER))


def give_back() -> None:
    """Return to the system what was freed and kept."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library of this process, if it is glibc."""
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 - whether it is there is the question
    except (OSError, AttributeError, TypeError):
        return None
    return libc
