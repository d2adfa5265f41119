"""Ray nodes as processes on the loopback address, with ports, folders and a token of their own, and what is left of them."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

# `ray start` takes 127.0.0.1 for the host's address in the network, on which other hosts could reach it.
RAY_START = """
import ray._private.services as services
services.get_node_ip_address = lambda address=None: "127.0.0.1"
from ray.scripts.scripts import main
main()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(reached: Callable[[], bool], seconds: float, what: str = "") -> None:
    until = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < until, f"not within {seconds} s: {what}"
        time.sleep(0.05)


def session(leader: int) -> dict[int, str]:
    """The living processes of a session (``start_new_session``): number -> command line."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            # pid (name) state ppid pgrp session ...; the name may hold spaces and parentheses
            state, _, _, of = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(of) == leader and state != "Z":
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return found


def kill_session(leader: int) -> None:
    """SIGKILL to all its processes until none is left."""
    until = time.monotonic() + 20
    while (members := session(leader)) and time.monotonic() < until:
        for member in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(member, signal.SIGKILL)
        time.sleep(0.05)
    assert not session(leader)


class RayNodes:
    """``head()`` first, then ``node()``; each returns the number of its session. ``close()`` kills what is left."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="lr-", dir="/tmp"))  # Ray's sockets need a short path
        self.port, self.metrics_port, self.dashboard_port = free_port(), free_port(), free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # a user of the cluster has it
        self._started: list[subprocess.Popen[bytes]] = []

    def head(self, cpus: int) -> int:
        client = f"--ray-client-server-port={free_port()}"
        metrics = f"--metrics-export-port={self.metrics_port}"
        dashboard = (f"--dashboard-port={self.dashboard_port}", "--dashboard-host=127.0.0.1")
        leader = self._start(cpus, "--head", f"--port={self.port}", client, metrics, *dashboard)
        wait_until(self._listens, 60, self._log("head"))
        return leader

    def node(self, cpus: int) -> int:
        return self._start(cpus, f"--address={self.address}")

    def actors(self) -> list[dict[str, Any]]:
        """What the dashboard shows of the actors that have begun, each with its ``log``."""
        found = json.loads(self._dashboard("actors?detail=1&limit=1000"))["data"]["result"]["result"]
        begun: list[dict[str, Any]] = [actor for actor in found if actor["pid"]]
        for actor in begun:
            actor["log"] = self._dashboard(f"logs/file?actor_id={actor['actor_id']}&lines=-1")
        return begun

    def _dashboard(self, path: str) -> str:
        asked = urllib.request.Request(f"http://127.0.0.1:{self.dashboard_port}/api/v0/{path}")
        asked.add_header("Authorization", f"Bearer {self.token['RAY_AUTH_TOKEN']}")
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return str(answer.read().decode())

    def close(self) -> None:
        for process in self._started:
            kill_session(process.pid)
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, cpus: int, *arguments: str) -> int:
        name = "head" if "--head" in arguments else f"node{len(self._started)}"
        ports = [f"--{of}-port={free_port()}" for of in ("node-manager", "object-manager", "runtime-env-agent")]
        agent = [f"--dashboard-agent-{of}-port={free_port()}" for of in ("listen", "grpc")]
        command = [sys.executable, "-c", RAY_START, "start", "--block", "--node-ip-address=127.0.0.1", *ports, *agent,
                   f"--num-cpus={cpus}", "--num-gpus=0", f"--object-store-memory={80 * 2**20}",
                   f"--temp-dir={self.folder / name}", *arguments]  # fmt: skip
        environment = {**os.environ, **self.token, "RAY_USAGE_STATS_ENABLED": "0",
                       "RAY_metrics_report_interval_ms": "1000", "OMP_NUM_THREADS": "1"}  # fmt: skip
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._started.append(process)
        return process.pid

    def _listens(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False

    def _log(self, name: str) -> str:
        return f"see {self.folder / name}.log"
