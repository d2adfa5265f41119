"""Connection to a Ray cluster: addresses, environment and signal handling. Does not import Ray (see ``fleet.py``)."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any, ParamSpec, TypeVar

from lad_dist.experts import private
from lad_dist.experts.scheduler import cores_to_use, gpu_count
from lad_dist.interrupts import deferred
from lad_dist.profile import Profile

P = ParamSpec("P")
R = TypeVar("R")
MIB = 2**20
SMALLEST_STORE = 80 * MIB  # Ray refuses less than 75 MiB
LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster that this process is connected to. ``address`` and ``dashboard`` are host:port.

    ``token`` is the token file of a private cluster.
    """

    address: str
    dashboard: str | None
    own: bool
    token: Path | None = None

    def directions(self) -> list[str]:
        """Return instructions for users on how to open the dashboard."""
        where = "started on this machine" if self.own else f"joined the cluster at {self.address}"
        if not self.dashboard:
            return [f"ray: {where}, without a dashboard"]
        port = self.dashboard.rpartition(":")[2]
        token = f"in {self.token}" if self.token else "`ray get-auth-token`, or ~/.ray/auth_token"
        return [
            f"ray: {where}; dashboard: http://{self.dashboard} (its token: {token})",
            f"ray: from another machine: ssh -L {port}:{self.dashboard} {socket.gethostname()}",
        ]

    def answers(self) -> bool:
        """Return whether the cluster's head responds; Ray itself would wait a minute, then terminate this process."""
        return listens(self.address)


def listens(address: str) -> bool:
    """Return whether anything accepts connections at host:port."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:
        return False
    return True


def own_arguments(profile: Profile, data_bytes: int, folder: Path) -> dict[str, Any]:
    """Return the arguments of ``ray.init`` for a private cluster that holds ``data_bytes`` of images.

    ``folder`` is private; Ray's own folder, which it makes accessible to everybody, is created inside.
    """
    r = profile.ray
    return {
        "address": "local",  # never another user's cluster on the same machine
        "num_cpus": max(cores_to_use(profile), profile.threads_per_expert),
        "num_gpus": gpu_count(),
        "include_dashboard": r.dashboard,
        "object_store_memory": r.object_store_mb * MIB
        if r.object_store_mb
        else max(SMALLEST_STORE, data_bytes * 13 // 10),
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "_temp_dir": str(folder / "r"),
    }


def own_environment(profile: Profile, token: Path) -> dict[str, str | None]:
    """Return environment variables for the processes of a private cluster, which require the token in a file."""
    unless_set = {
        "RAY_USAGE_STATS_ENABLED": "0",  # no telemetry unless asked for
        "RAY_worker_niceness": "0",  # Ray's default of 15 yields to all other processes
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's future default; it warns if unset
    }
    chosen = {name: os.environ.get(name, value) for name, value in unless_set.items()}
    return chosen | {"OMP_NUM_THREADS": str(profile.threads_per_expert)} | private.access(token)


@contextmanager
def signals_heeded() -> Iterator[None]:
    """Make Ctrl-C and SIGTERM act at once, and lose none.

    ``ray.init`` replaces our handler by its own, and Ray's compiled code drops exceptions raised by handlers.
    """
    noted: list[tuple[int, FrameType | None]] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.getsignal(number) for number in numbers}

    def act(number: int, frame: FrameType | None) -> None:
        handler = previous[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)

    def note(number: int, frame: FrameType | None) -> None:
        noted.append((number, frame))
        act(number, frame)

    try:
        for number in numbers:
            signal.signal(number, note)
    except ValueError:  # not the main thread: it receives no signals, and Ray sets no handler for it
        yield
        return
    try:
        yield
    except SystemExit:  # by Ray's handler
        act(signal.SIGTERM, None)
        raise
    finally:
        if not noted:
            for number, handler in previous.items():
                signal.signal(number, handler)
    if noted:
        act(*noted[0])


@contextmanager
def nothing_left_on_error() -> Iterator[None]:
    """Kill the processes started by an interrupted or failed ``ray.init``: Ray only ends those of a completed one."""
    psutil: Any = import_module("psutil")  # Ray's own copy, importable after ray was imported
    this = psutil.Process()
    before = {child.pid for child in this.children(recursive=True)}
    try:
        yield
    except BaseException:
        stopped: dict[int, Any] = {}
        while new := [c for c in this.children(recursive=True) if c.pid not in before and c.pid not in stopped]:
            for child in new:
                stopped[child.pid] = child
                with suppress(psutil.NoSuchProcess):
                    child.suspend()  # so that it starts no others while they are collected
        for child in stopped.values():
            with suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(stopped.values(), timeout=2)
        raise


def end_processes_of(folder: Path) -> None:
    """Kill this user's processes whose command line contains a cluster's private folder.

    A Ctrl-C also reaches the raylet; if it ends before this process looks, its children are orphans.
    """
    psutil: Any = import_module("psutil")
    left = []
    for process in psutil.process_iter(["pid", "uids", "cmdline"]):
        seen = process.info
        mine = seen["uids"] is not None and seen["uids"].real == os.getuid() and seen["pid"] != os.getpid()
        if mine and any(f"{folder}{os.sep}" in word for word in seen["cmdline"] or ()):
            left.append(process)
            with suppress(psutil.Error):
                process.kill()
    psutil.wait_procs(left, timeout=2)


def undisturbed(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call into Ray with signals held back until it returns: its compiled code drops exceptions raised by handlers."""
    with deferred():
        return function(*args, **kwargs)
