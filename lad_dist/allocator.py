"""glibc's allocator settings for computing on a CPU: keep freed memory in the process.

glibc's malloc requests every block above 32 MiB from the system and returns it when freed; the kernel then zeroes each
of its pages again at the next use. A student step allocates and frees gigabytes in such blocks, and spends half of its
time on this (benchmarks/notes.md). Configured to keep freed memory (mallopt(3)), it reuses the same memory.
"""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # malloc.h
_NEVER = -1
_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Keep freed memory in this process until ``give_back``; return whether that is possible.

    Does nothing with another C library, or if the environment already configures the allocator (``MALLOC_MMAP_MAX_``
    and similar).
    """
    libc = _glibc()
    if libc is None or any(name in os.environ for name in _OWN):
        return False
    return bool(libc.mallopt(_MMAP_MAX, 0) and libc.mallopt(_TRIM_THRESHOLD, _NEVER))


def give_back() -> None:
    """Return kept free memory to the system."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """Return the C library of this process if it is glibc, else None."""
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 - whether it is there is the question
    except (OSError, AttributeError, TypeError):
        return None
    return libc
