"""CPU cores: how threads wait for each other, and how much of the cores this process is given."""

from __future__ import annotations

import hashlib
import os
import threading
import time

_BLOCK = bytes(2**22)  # large enough for hashlib to release the interpreter's lock
FREE_ABOVE = 0.85  # share of the asked cores above which a machine counts as idle


def wait_asleep() -> None:
    """Have OpenMP's threads sleep, not spin, while they wait for each other. Call before torch or numba are imported.

    A spinning thread keeps the core that the thread it waits for needs, once other processes run: two threads on two cores
    beside a busy process are then tens of times slower than one (benchmarks/threads.py). OMP_WAIT_POLICY, where it is set
    already, stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def obtained(threads: int, seconds: float = 0.3) -> float:
    """Cores that ``threads`` busy threads are given by the system: ``threads`` where the cores are free, fewer where other
    processes run or a container's share is smaller."""
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
