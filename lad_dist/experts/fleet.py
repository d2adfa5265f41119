"""Train many experts at once: one Ray actor per expert, as many as fit. The only file that imports ray.

This process (the driver) prepares the data once, puts them into Ray's object store, starts actors, and records their
reports; the actors write their parts directly to the buffer. A failed actor is replaced by a new one that continues
from the last published part: the driver counts the attempts, Ray restarts nothing. An expert does not depend on who
trains it, so an actor that was lost and turns out to be alive does no harm.

    connected   the cluster: the named one, else a private one on the loopback address
    Fleet       actors and their reports
    _Metrics    Prometheus metrics
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lad_dist.environment import environment
from lad_dist.errors import ExpertError, LadDistError, RecipeError, StorageError, TrajectoryError, first_line
from lad_dist.experts.actor import Claimed, ExpertActor, Finished, Orders, SharedData, Started
from lad_dist.experts.cluster import (
    LOOPBACK,
    Cluster,
    end_processes_of,
    listens,
    nothing_left_on_error,
    own_arguments,
    own_environment,
    signals_heeded,
    undisturbed,
)
from lad_dist.experts.private import check_token, private_folder, write_token
from lad_dist.experts.scheduler import ExpertLog, ExpertQueue, Failure, Process, cluster_address, name_of
from lad_dist.experts.train import Epoch, ExpertTrainer
from lad_dist.extras import missing
from lad_dist.interrupts import deferred
from lad_dist.location import is_uri
from lad_dist.profile import Profile
from lad_dist.progress import Events, Screen
from lad_dist.trajectories.reader import Buffer

try:
    import ray
    from ray.exceptions import RayError
    from ray.util import metrics
except ImportError as error:
    raise missing("ray", "ray", "a fleet of experts", ExpertError, ", or --fleet off") from error

WAIT_SECONDS = 0.5  # for reports, before checking anything else
LOOK_SECONDS = 5.0  # between two checks of the cluster, and of the buffer's size
SEEN_SECONDS = 5.0  # until parts that an actor has published must be visible here
END_SECONDS = 3.0  # wait for finished actors to exit
TOKEN = "token"  # noqa: S105 - the name of the file in the private folder of a cluster of its own
GONE_SECONDS = 3.0  # without an answer from the cluster's head, after which it counts as lost


def train(
    trainer: ExpertTrainer,
    profile: Profile,
    run: str,
    queue: ExpertQueue,
    record: ExpertLog,
    events: Events,
    screen: Screen,
) -> None:
    """Train the remaining experts, many at a time. ``run`` names the run on Ray's dashboard.

    Experts that failed for good are in ``record``. On an interruption or error, the actors are ended, and so is a
    private cluster.

    Raises:
        ExpertError: no cluster could be started or joined, or it is gone.
        RecipeError: the profile's ray.address cannot be used.
        TrajectoryError, StorageError: the buffer cannot be used.
    """
    shared = SharedData.of(trainer.data)
    namespace = f"lad-dist-{run}-{queue.owner}"
    with connected(profile, shared.nbytes) as cluster:
        events.emit("ray-started", address=cluster.address, dashboard=cluster.dashboard, namespace=namespace)
        for line in cluster.directions():
            screen.say(line)
        Fleet(cluster, profile, Staff(trainer, shared, namespace), queue, record, screen).run()


# The cluster


@contextmanager
def connected(profile: Profile, data_bytes: int) -> Iterator[Cluster]:
    """Connect to the cluster named by the profile or RAY_ADDRESS, else start a private one, which ends with the block.

    A process that is already connected keeps its connection. Raises ExpertError if there is no cluster or others can
    read its token, RecipeError if the address cannot be used.
    """
    if ray.is_initialized():
        context = ray.get_runtime_context()
        yield Cluster(context.gcs_address, None, own=False)
        return
    address = cluster_address(profile)
    with _own_surroundings(profile) if address is None else nullcontext() as folder, _without_state_dumps():
        try:
            with signals_heeded(), nothing_left_on_error():
                cluster = _joined(str(address)) if folder is None else _started(profile, data_bytes, folder)
            yield cluster
        finally:
            with deferred():
                ray.shutdown()


@contextmanager
def _own_surroundings(profile: Profile) -> Iterator[Path]:
    """Create a private folder with a new token, which processes started in the block require."""
    with private_folder() as folder:
        write_token(folder / TOKEN)
        try:
            with environment(own_environment(profile, folder / TOKEN)):
                _read_token_settings()
                yield folder
        finally:
            _read_token_settings()
            end_processes_of(folder)


def _read_token_settings() -> None:
    """Make Ray's compiled code reread RAY_AUTH_*, which it reads once when ray is imported."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _started(profile: Profile, data_bytes: int, folder: Path) -> Cluster:
    """Start a private cluster, which ends with this process.

    It listens only on the loopback address and requires the token in ``folder``.
    """
    arguments = own_arguments(profile, data_bytes, folder)
    with _loopback():
        try:
            context: Any = ray.init(**arguments)
        except LadDistError:
            raise
        except Exception as error:  # of no common type: a plain Exception where Ray's node does not start in time
            raise ExpertError(
                f"ray: no cluster could be started on this machine: {first_line(error)}; lad-dist experts --fleet off "
                "trains without one"
            ) from error
    return Cluster(context.address_info["gcs_address"], context.dashboard_url or None, own=True, token=folder / TOKEN)


def _joined(address: str) -> Cluster:
    """Join the running cluster at ``address`` without changing it."""
    if address.startswith("ray://"):
        raise RecipeError(
            f"profile: ray.address: {address}: Ray's client protocol cannot pass on reports; valid: host:port of the "
            "cluster's head, from a node of the cluster, or auto"
        )
    host, _, port = address.rpartition(":")
    missing = f"ray.address {address}: no Ray cluster answers there; `ray start --head` starts one, and with no "
    missing += "address in the profile or RAY_ADDRESS one is started on this machine"
    if port.isdigit() and not listens(address):
        raise ExpertError(missing)
    if address == "auto" or os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
        check_token(os.environ)
    # Send a token to a named address only if RAY_AUTH_MODE asks for it, as Ray does: the address may be wrong.
    with _loopback(host in LOOPBACK):
        try:
            context: Any = ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except LadDistError:
            raise
        except Exception as error:  # see _started
            secured = "if it requires a token (as `ray start` does when one exists), set RAY_AUTH_MODE=token"
            raise ExpertError(f"{missing}; {secured} ({first_line(error)})") from error
    return Cluster(context.address_info["gcs_address"], context.dashboard_url or None, own=False)


@contextmanager
def _without_state_dumps() -> Iterator[None]:
    """Suppress what Ray prints to its drivers' output when a node ends.

    That is "Raylet is terminated. Termination is unexpected" and the last lines of the raylet's log, even if a job's
    scheduler ended the node as planned. ``log_to_driver`` does not cover it. Ray's other messages (memory, for one) are
    printed as before, and ``ExpertLog`` reports actors that are lost with a node.
    """
    from ray._private import worker

    printed = worker.print_to_stdstream

    def chosen(data: Any, ignore_prefix: bool) -> None:
        if not any(line.startswith("Raylet is terminated.") for line in data["lines"]):
            printed(data, ignore_prefix)

    worker.print_to_stdstream = chosen
    try:
        yield
    finally:
        worker.print_to_stdstream = printed


@contextmanager
def _loopback(wanted: bool = True) -> Iterator[None]:
    """Make Ray use 127.0.0.1 instead of this host's network address.

    Ray does so on macOS and Windows, where it forms no multi-host clusters; the switch is read when ray is imported,
    which may have happened already. With it no process of the cluster listens to other hosts.
    """
    from ray._private import ray_constants

    before, name = ray_constants.ENABLE_RAY_CLUSTER, ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    if not wanted:
        yield
        return
    with environment({name: "0"}):
        ray_constants.ENABLE_RAY_CLUSTER = False
        try:
            yield
        finally:
            ray_constants.ENABLE_RAY_CLUSTER = before


# The actors


@dataclass(frozen=True)
class Staff:
    """The inputs for creating actors."""

    trainer: ExpertTrainer
    shared: SharedData
    namespace: str


@dataclass
class _Member:
    """A running actor: its handle, its pending reports, and its process once known."""

    expert: int
    handle: Any
    reports: Any
    process: Process | None = None


class Fleet:
    """Start actors while there is room, collect their reports, and replace those that fail."""

    def __init__(
        self, cluster: Cluster, profile: Profile, staff: Staff, queue: ExpertQueue, record: ExpertLog, screen: Screen
    ) -> None:
        self.cluster, self.profile, self.staff = cluster, profile, staff
        self.queue, self.record, self.screen = queue, record, screen
        self._members: list[_Member] = []
        self._ending: list[Any] = []  # termination of each stopped actor: ready when it has ended
        self._attempts, self._started = Counter[int](), Counter[int]()
        self._room, self._looked_at = 0, -LOOK_SECONDS
        self._metrics = _Metrics(staff.trainer.folder, record)

    def run(self) -> None:
        """Train until no expert is left. Raises ExpertError, TrajectoryError, StorageError, Interrupted."""
        self._device = self._choose_device()
        trainer, threads = self.staff.trainer, self.profile.threads_per_expert
        # Absolute, because an actor has its node's working folder.
        location = trainer.folder if is_uri(trainer.folder) else Path(trainer.folder).absolute()
        self._orders = Orders(trainer.recipe, location, self.queue.owner, self._device, threads)
        self._data = undisturbed(ray.put, self.staff.shared)
        try:
            while self._members or len(self.queue):
                self._fill()
                if not self._members:
                    self.queue.say_waiting(self.screen)
                    time.sleep(WAIT_SECONDS)
                elif not self._take_reports():
                    self._look()
                self._metrics.update(len(self._members))
            if self._ending:  # before this process exits, which would kill them as orphans
                undisturbed(ray.wait, self._ending, num_returns=len(self._ending), timeout=END_SECONDS)
        finally:
            if self.cluster.answers():
                for member in self._members:
                    self._kill(member)

    def _choose_device(self) -> str:
        """Return this process's device; on a joined cluster with device ``auto``, GPUs if the cluster has any."""
        here = self.staff.trainer.data.device.type
        if self.cluster.own or self.profile.device != "auto":
            return here
        return "cuda" if undisturbed(ray.cluster_resources).get("GPU", 0) >= 1 else "cpu"

    def _fill(self) -> None:
        """Start actors for the next experts while there is room."""
        while len(self._members) < self._fits():
            expert = self.queue.take(self.record)
            if expert is None:
                return
            self._start(expert)

    def _fits(self) -> int:
        """Return the number of actors that fit, as of the last look: at least one, which then waits for a node."""
        if time.monotonic() - self._looked_at >= LOOK_SECONDS:
            p, gpu = self.profile, self._device == "cuda"
            nodes = [node["Resources"] for node in undisturbed(ray.nodes) if node["Alive"]]
            if self.cluster.own and not nodes:
                raise self._gone()
            each = [
                int(node.get("GPU", 0)) * p.experts_per_gpu if gpu else int(node.get("CPU", 0)) // p.threads_per_expert
                for node in nodes
            ]
            if not sum(each) and self._room != 1:
                self.screen.say("ray: no node has room for an expert; waiting")
            self._room, self._looked_at = max(1, sum(each)), time.monotonic()
        return self._room

    def _start(self, expert: int) -> None:
        p, self._started[expert] = self.profile, self._started[expert] + 1
        times = self._started[expert]
        options: dict[str, Any] = {
            # A name is released only after the cluster has noticed that the actor is gone.
            "name": name_of(expert) + (f"-start-{times}" if times > 1 else ""),
            "namespace": self.staff.namespace,
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        if self._device == "cuda":
            options |= {"num_gpus": int(1e4 / p.experts_per_gpu) / 1e4, "num_cpus": 0}  # Ray counts in ten-thousandths
        else:
            options |= {"num_cpus": p.threads_per_expert}
        if not self.cluster.own:
            options["runtime_env"] = {"env_vars": {"OMP_NUM_THREADS": str(p.threads_per_expert)}}
        actor: Any = ray.remote(ExpertActor)
        with deferred():
            handle = actor.options(**options).remote(self._orders, self._data, expert, self.record.trained(expert))
            reports = handle.train.options(num_returns="streaming").remote()
            self._members.append(_Member(expert, handle, reports))
        self.record.starting(expert)

    def _take_reports(self) -> bool:
        """Wait briefly for reports and take one from each actor that has any; return whether there were some."""
        waiting = {member.reports: member for member in self._members}
        ready, _ = undisturbed(ray.wait, list(waiting), num_returns=1, timeout=WAIT_SECONDS)
        if ready:
            ready, _ = undisturbed(ray.wait, list(waiting), num_returns=len(waiting), timeout=0)
        for reports in ready:
            self._take(waiting[reports])
        return bool(ready)

    def _take(self, member: _Member) -> None:
        try:
            report = undisturbed(lambda: ray.get(next(member.reports)))
        except StopIteration:
            report = Failure(member.expert, "its process ended without a report")
        except RayError as error:
            report = self._lost(member, error)
            self._kill(member)  # it may only be unreachable
        if isinstance(report, Started):
            member.process = report.process
            self.record.started(member.expert, member.process)
        elif isinstance(report, Epoch):
            self.record.epoch(report, member.process)
            self._metrics.epoch()
        else:
            self._members.remove(member)
            self._ending.append(member.handle.__ray_terminate__.remote())  # it has no work left, and exits by itself
            if isinstance(report, Failure):
                self._failed(report)
            elif isinstance(report, Finished):
                self._finished(member.expert)
            elif isinstance(report, Claimed):
                self.record.stopped(member.expert)
                self.queue.put_back(member.expert)

    def _finished(self, expert: int) -> None:
        """Accept an expert as finished once its parts are visible here, which a network file system may delay."""
        until = time.monotonic() + SEEN_SECONDS
        while self.staff.trainer.left([expert])[expert]:
            if time.monotonic() > until:
                raise StorageError(
                    f"{self._orders.location}: lacks parts that an actor wrote there; valid: a folder that all nodes of "
                    "the cluster share under one name, or a URI (--buffers s3://...)"
                )
            time.sleep(WAIT_SECONDS)
        self.record.finished(expert)

    def _lost(self, member: _Member, error: RayError) -> Failure:
        """Describe an actor whose process is gone or unreachable. Raises ExpertError if the whole cluster is."""
        self._looked_at = -LOOK_SECONDS
        if not self.cluster.answers():
            raise self._gone() from error
        return Failure(
            member.expert, f"{member.process or 'its process'} is gone ({type(error).__name__})", None, str(error)
        )

    def _failed(self, failure: Failure) -> None:
        """Retry the expert or give it up. Raises StorageError if every other actor would fail the same way."""
        expert = failure.expert
        self._attempts[expert] += 1
        attempts, retries = self._attempts[expert], self.profile.expert_retries
        if failure.lasting:
            self.record.failed(failure, attempts)
            raise failure.error()
        if attempts > retries:
            self.record.failed(failure, attempts)
        else:
            self.record.restarted(failure, attempts, retries)
            self.queue.again(expert)

    def _kill(self, member: _Member) -> None:
        """Kill an actor's process, whatever it is doing. It is no error if it is already gone."""
        with deferred():
            ray.kill(member.handle)

    def _look(self) -> None:
        """Detect a lost cluster while nothing is reported."""
        silent_since: float | None = None
        while not self.cluster.answers():
            silent_since = silent_since or time.monotonic()
            if time.monotonic() - silent_since >= GONE_SECONDS:
                raise self._gone()
            time.sleep(WAIT_SECONDS)

    def _gone(self) -> ExpertError:
        whose = "of this process" if self.cluster.own else f"at {self.cluster.address}"
        return ExpertError(f"the Ray cluster {whose} is gone; published parts are kept, and the same command continues")


class _Metrics:
    """Gauges and counters on every node's Prometheus port; Ray prefixes their names with ``ray_``."""

    def __init__(self, location: Path | str, record: ExpertLog) -> None:
        self._location, self._record = location, record
        gauge, counter = metrics.Gauge, metrics.Counter
        self._done = gauge("ladist_experts_done", "Experts whose checkpoints are all in the buffer")
        self._total = gauge("ladist_experts_total", "Experts of the recipe")
        self._active = gauge("ladist_experts_active", "Experts being trained by this driver")
        self._epochs = counter("ladist_epochs_total", "Epochs trained by this driver")
        self._speed = gauge("ladist_images_per_second", "Of an expert's last epoch; 0 when it has ended", ("expert",))
        self._size = gauge("ladist_buffer_bytes", "Size of the parts in the buffer")
        self._written = counter("ladist_bytes_written_total", "Bytes by which the buffer grew since this driver began")
        self._bytes, self._shown, self._looked_at = 0, set[int](), time.monotonic()
        self._bytes = self._buffer_bytes()

    def epoch(self) -> None:
        """Count one trained epoch."""
        self._epochs.inc()

    def update(self, active: int) -> None:
        """Update the metrics from the record."""
        r = self._record
        self._done.set(r.experts_done)
        self._total.set(r.experts_total)
        self._active.set(active)
        for expert in self._shown - r.images_per_second.keys():
            self._speed.set(0.0, {"expert": name_of(expert)})
        for expert, speed in r.images_per_second.items():
            self._speed.set(speed, {"expert": name_of(expert)})
        self._shown = set(r.images_per_second)
        if time.monotonic() - self._looked_at >= LOOK_SECONDS:
            now, self._looked_at = self._buffer_bytes(), time.monotonic()
            self._size.set(now)
            if now > self._bytes:
                self._written.inc(now - self._bytes)
            self._bytes = now

    def _buffer_bytes(self) -> int:
        try:
            buffer = Buffer(self._location)
            return int(buffer.inspect(digest=False)["bytes"]) if buffer.parts else 0
        except TrajectoryError:  # a metric is no reason to stop: readers of the buffer report the error
            return self._bytes
