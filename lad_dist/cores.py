"""CPU cores: how threads wait for each other, and how many cores are available to this process."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path

_BLOCK = bytes(2**22)  # large enough for hashlib to release the interpreter's lock
FREE_ABOVE = 0.85  # fraction of the requested cores above which a machine counts as idle


def wait_asleep() -> None:
    """Make OpenMP's threads sleep, not spin, while they wait for each other. Call before importing torch or numba.

    A spinning thread occupies the core that the thread it waits for needs if other processes run: two threads on two
    cores beside a busy process are then tens of times slower than one (benchmarks/threads.py). An existing
    OMP_WAIT_POLICY is kept.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def available() -> int:
    """Return the number of CPU cores that this process may use."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        cores = os.cpu_count() or 1
    try:  # a container's share (control groups, version 2): microseconds of CPU time in each period
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


def of_each_rank(asked: int | None, ranks: int) -> tuple[int, str | None]:
    """Return (threads of each of ``ranks`` processes on this machine, warning or None).

    Together the ranks have no more threads than there are cores; the warning states that this is fewer than ``asked``.
    With more threads than cores a rank's threads wait for a core while the other ranks wait for that rank in every sum.
    """
    cores = available()
    most = max(1, cores // ranks)
    if asked is None or asked <= most or ranks == 1:  # a single process uses what was requested
        return asked or most, None
    what = f"{ranks} ranks x {asked} threads exceed the {cores} cores here"
    return most, f"threads: {what}; each rank uses {most} (threads are per rank)"


def obtained(threads: int, seconds: float = 0.3) -> float:
    """Measure the cores that the system gives ``threads`` busy threads.

    That is ``threads`` if the cores are free, fewer if other processes run or a container's share is smaller.
    """
    shares = [0.0] * threads

    def spin(i: int) -> None:
        began, used = time.perf_counter(), time.thread_time()
        while time.perf_counter() - began < seconds:
            hashlib.sha256(_BLOCK).digest()
        shares[i] = (time.thread_time() - used) / (time.perf_counter() - began)

    workers = [threading.Thread(target=spin, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(shares)
