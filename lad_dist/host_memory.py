"""Memory of this host that the process may use: all, or less in a container or a SLURM job (control groups, version 2)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
_HOST = Path("/proc/meminfo")
_UNKNOWN = 8 * 2**30  # where the system does not say


def total() -> int:
    """Return the bytes of the host, or of the tightest limit on this process."""
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *(limit for limit, _ in _limits())])


def free() -> int:
    """Return the bytes that this process may still take. Files that the kernel keeps in memory count as free."""
    host = dict(line.split(":", 1) for line in _read(_HOST).splitlines() if ":" in line)
    available = int(host["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in host else _UNKNOWN
    return max(0, min([available, *(limit - used for limit, used in _limits())]))


def _limits() -> Iterator[tuple[int, int]]:
    """Yield (limit, used) bytes of this process's control group and of those above it that have a limit."""
    own = next((line[3:] for line in _read(_OWN).splitlines() if line.startswith("0::")), "/")
    group = _GROUPS / own.lstrip("/")
    for folder in (group, *group.parents):
        limit, used = _read(folder / "memory.max").strip(), _read(folder / "memory.current").strip()
        if limit.isdigit() and used.isdigit():
            kept = dict(line.split() for line in _read(folder / "memory.stat").splitlines() if len(line.split()) == 2)
            yield int(limit), int(used) - int(kept.get("inactive_file", 0))
        if folder == _GROUPS:
            break


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""
