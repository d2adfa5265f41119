"""A private Ray cluster over the nodes of one SLURM job, for the fleet of experts. Ray runs only in child processes.

The first task starts the head and the driver; every other task runs a node until the first one is done:

    head    the first task, around the stage: yields a profile that joins the cluster
    serve   the other tasks

Nodes are shared with other jobs, so nothing is left to Ray's defaults: ports derive from the job's number, the
socket folder is private and short, CPUs and GPUs are those of the job, addresses are explicit, and clients need the
job's token, a file that only its owner can read. The supervisor ends whatever is left when a task ends.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lad_dist.environment import environment
from lad_dist.errors import ClusterError
from lad_dist.experts.cluster import own_environment
from lad_dist.experts.private import access, write_token
from lad_dist.launch.job import SlurmTask
from lad_dist.launch.supervisor import private_folder
from lad_dist.profile import Profile
from lad_dist.rundir import published

LOOPBACK = "127.0.0.1"
_FIRST_PORT, _PORTS, _EACH = 11_000, 20_000, 10  # below Linux's ephemeral ports; ten per node
_TRIES = 50
_START_SECONDS = 180.0  # for the head to start; imports over a network file system are slow
_END_SECONDS = 5.0  # for Ray to end
_HEAD_SECONDS = 15.0  # for a head that has ended to report it
_LOOK_SECONDS = 0.2
_MIB = 2**20
# `ray start` replaces 127.0.0.1 by the host's network address, which several virtual nodes of one host lack.
_ON_LOOPBACK = (
    "import ray._private.services as s; s.get_node_ip_address = lambda address=None: '127.0.0.1'; "
    "from ray.scripts.scripts import main; main()"
)


@dataclass(frozen=True)
class Ports:
    """The ports of one Ray node."""

    gcs: int
    client: int
    dashboard: int
    metrics: int
    node_manager: int
    object_manager: int
    runtime_env: int
    agent: int
    agent_grpc: int

    @classmethod
    def of(cls, job: int, node: int) -> Ports:
        """Choose the ports of a node from its job and node number, trying others if one is taken.

        Raises ClusterError if no free ones are found.
        """
        for attempt in range(_TRIES):
            first = _FIRST_PORT + ((job * 8 + node) * _EACH + attempt * 7919 * _EACH) % _PORTS
            numbers = range(first, first + 9)
            if all(_free(number) for number in numbers):
                return cls(*numbers)
        raise ClusterError(f"ray: no {_EACH} consecutive free ports on {socket.gethostname()} after {_TRIES} tries")


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def own_address(variables: Mapping[str, str] = os.environ) -> str:
    """Return this node's address for the job's other nodes, resolved from its SLURM name; else the loopback address."""
    try:
        return socket.gethostbyname(variables.get("SLURMD_NODENAME", ""))
    except OSError:  # several virtual nodes on one host
        return LOOPBACK


class Files:
    """Files through which the tasks of one start of a job communicate, in its log folder, which all nodes share."""

    def __init__(self, task: SlurmTask) -> None:
        self.where = task.folder / f"ray-{task.restarts}.json"
        self.token = task.folder / f"ray-token-{task.restarts}"
        self.done = task.folder / f"ray-done-{task.restarts}"


@contextmanager
def head(task: SlurmTask, profile: Profile) -> Iterator[Profile]:
    """Start the Ray head in the first task; yield the profile with which this process drives the cluster.

    Raises ClusterError if the head does not start.
    """
    files, address, ports = Files(task), own_address(), Ports.of(int(task.number), task.rank)
    write_token(files.token)
    arguments = [
        "--head",
        "--disable-usage-stats",
        f"--port={ports.gcs}",
        f"--ray-client-server-port={ports.client}",
        f"--include-dashboard={str(profile.ray.dashboard).lower()}",
        f"--dashboard-port={ports.dashboard}",
        f"--dashboard-host={LOOPBACK}",
    ]
    at = f"{address}:{ports.gcs}"
    try:
        with _node(task, profile, ports, address, files, arguments) as process, environment(access(files.token)):
            _await_head(process, address, ports.gcs, task)
            with published(files.where) as temporary:
                temporary.write_text(json.dumps({"address": at}))
            _tell(task, profile, ports, files)
            yield profile.model_copy(update={"fleet": "on", "ray": profile.ray.model_copy(update={"address": at})})
            files.done.touch()
    finally:
        files.done.touch()
        files.token.unlink(missing_ok=True)


def serve(task: SlurmTask, profile: Profile) -> None:
    """Run a node of the cluster, in every other task, until the first task is done.

    Raises ClusterError if there is no head to join, or the node ends before that.
    """
    files = Files(task)
    until = time.monotonic() + _START_SECONDS
    while not files.where.exists():
        if files.done.exists():
            return
        if time.monotonic() > until:
            raise ClusterError(f"ray: the head did not start within {_START_SECONDS:.0f} s; see the log of task 0")
        time.sleep(_LOOK_SECONDS)
    address = json.loads(files.where.read_text())["address"]
    ports = Ports.of(int(task.number), task.rank)
    with _node(task, profile, ports, own_address(), files, [f"--address={address}"]) as process:
        while process.poll() is None and not files.done.exists():
            time.sleep(_LOOK_SECONDS)
        until = time.monotonic() + _HEAD_SECONDS  # an ending head stops its nodes a moment before it reports so
        while not files.done.exists():
            if time.monotonic() > until:
                raise ClusterError(
                    f"ray: the node on {task.node} ended with code {process.returncode} before its head did"
                )
            time.sleep(_LOOK_SECONDS)


@contextmanager
def _node(
    task: SlurmTask, profile: Profile, ports: Ports, address: str, files: Files, arguments: list[str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a Ray node as a child of this process until the block ends, with its output beside the job's log."""
    folder = private_folder(os.environ)
    _make_private(folder)
    cpus = max(int(os.environ.get("SLURM_CPUS_PER_TASK", "1")), profile.threads_per_expert)
    store = [f"--object-store-memory={profile.ray.object_store_mb * _MIB}"] if profile.ray.object_store_mb else []
    start = ["-c", _ON_LOOPBACK] if address == LOOPBACK else ["-m", "ray.scripts.scripts"]
    command = [
        sys.executable,
        *start,
        "start",
        "--block",
        f"--node-ip-address={address}",
        f"--num-cpus={cpus}",
        f"--num-gpus={profile.gpus_per_node}",
        f"--temp-dir={folder / 'r'}",  # Ray makes it accessible to everybody
        f"--node-manager-port={ports.node_manager}",
        f"--object-manager-port={ports.object_manager}",
        f"--runtime-env-agent-port={ports.runtime_env}",
        f"--dashboard-agent-listen-port={ports.agent}",
        f"--dashboard-agent-grpc-port={ports.agent_grpc}",
        f"--metrics-export-port={ports.metrics}",
        "--min-worker-port=0",  # workers use ephemeral ports
        "--max-worker-port=0",
        *store,
        *arguments,
    ]
    given = {**os.environ, **own_environment(profile, files.token), "RAY_ADDRESS": None}
    with (task.folder / f"ray-{task.rank}.log").open("ab") as log:
        process = subprocess.Popen(  # noqa: S603 - this interpreter
            command,
            env={name: value for name, value in given.items() if value is not None},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    except BaseException:  # SLURM gives an ending task only a few seconds; a node has nothing to save
        process.kill()
        raise
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_SECONDS)
        if process.poll() is None:
            process.kill()
            process.wait()


def _make_private(folder: Path) -> None:
    """Create ``folder`` with mode 0700. Raises ClusterError if another user made it first: its name can be guessed."""
    folder.mkdir(mode=0o700, exist_ok=True)
    there = folder.lstat()
    if not stat.S_ISDIR(there.st_mode) or there.st_uid != os.getuid() or there.st_mode & 0o077:
        raise ClusterError(f"ray: {folder}: is not private to this user (mode 0700); remove it, or ask its owner to")


def _await_head(process: subprocess.Popen[bytes], address: str, port: int, task: SlurmTask) -> None:
    until = time.monotonic() + _START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        with suppress(OSError), socket.create_connection((address, port), timeout=1):
            return
        time.sleep(_LOOK_SECONDS)
    how = "did not answer in time" if process.poll() is None else f"ended with code {process.returncode}"
    raise ClusterError(f"ray: the head {how}; see {task.folder / f'ray-{task.rank}.log'}")


def _tell(task: SlurmTask, profile: Profile, ports: Ports, files: Files) -> None:
    """Record how to open the dashboard, in the log and for ``status``."""
    if not profile.ray.dashboard:
        return
    login = os.environ.get("SLURM_SUBMIT_HOST", "LOGIN")
    port = ports.dashboard
    line = (
        f"dashboard: ssh -N -L {port}:{LOOPBACK}:{port} -J {login} {task.node}, then http://localhost:{port} "
        f"with the token in {files.token}"
    )
    print(f"ray: {line}", flush=True)
    task.write(dashboard=line)
