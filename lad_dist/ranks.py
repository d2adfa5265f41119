"""Ranks: the processes that share one distillation. The only file that uses torch.distributed.

A rank is one process with one device. Callers of each collective:

    total       distill/student.py: the gradient of one student step, once per step and phase.
    replicate   distill/student.py: the same sum, by DistributedDataParallel's reducer, where no graph is kept.
    total       distill/loop.py: once per iteration, a few numbers on which all ranks must agree (finite? stop? losses).
    total       distill/loop.py: with several windows on groups of ranks (``split``), once per iteration and phase, the
                set's gradients between groups, and whether any group failed.
    share       distill/loop.py: once, data that only rank 0 has read (images' facts, the initial set).
    gather      distill/state.py and loop.py: once per checkpoint, and once at the start, small Python values.

``ALONE`` is a single process: every collective returns its argument.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from lad_dist import errors
from lad_dist.environment import environment
from lad_dist.errors import Interrupted, LadDistError, RankError, first_line
from lad_dist.interrupts import in_main_thread

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_Value = TypeVar("_Value")
TIMEOUT = 600.0  # seconds that a collective waits for the other ranks
_GRACE = 30.0  # seconds for ranks to save and end when asked to stop
# Environment variables that the launcher sets in each process.
_OF_THE_LAUNCHER = re.compile(
    r"((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE|NAME)|MASTER_(ADDR|PORT)|TORCH(ELASTIC|_NCCL)_.*"
)
_UNREAD = 3.0  # seconds that a rank waits for the launcher to read its outcome, once it was asked to stop
_PRELOADED = [  # imported once by the process that the ranks of this machine are forked from; initialises no GPU
    "torch.distributed",
    "lad_dist.pipeline",
    "lad_dist.distill.loop",
    "lad_dist.evaluate.measure",
    "lad_dist.models.compiled",
]
_ROLL_CALL = 5.0  # seconds that the remaining ranks wait for each other's reports when a rank is gone


@dataclass(frozen=True)
class Ranks:
    """This process among ``world`` processes. ``calls`` counts the collectives by name, which wait ``timeout`` seconds.

    ``members``: the numbers of these processes among all, where they are a part of them, and ``group`` is torch's.
    """

    rank: int = 0
    world: int = 1
    calls: Counter[str] = field(default_factory=Counter, compare=False)
    timeout: float = field(default=TIMEOUT, compare=False)
    members: tuple[int, ...] = ()
    group: Any = field(default=None, compare=False, repr=False)

    @property
    def first(self) -> bool:
        """Whether this rank writes and reports for all."""
        return self.rank == 0

    def total(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place; bitwise equal on every rank. Raises RankError if a rank is gone."""
        if self.world > 1:
            import torch.distributed as dist

            with self._naming_the_missing("total"):
                dist.all_reduce(tensor, group=self.group)
        return tensor

    def replicate(self, module: nn.Module) -> nn.Module:
        """Wrap ``module`` in DistributedDataParallel: its backward pass averages the gradients over the ranks."""
        from torch.nn.parallel import DistributedDataParallel

        def counted(bucket: Any) -> Any:
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

            self.calls["bucket"] += 1
            return allreduce_hook(self.group, bucket)

        with self._naming_the_missing("replicate"):
            wrapped = DistributedDataParallel(  # networks here have no buffers
                module, process_group=self.group, gradient_as_bucket_view=True
            )
            wrapped.register_comm_hook(None, lambda _, bucket: counted(bucket))
        return wrapped

    def split(self, count: int) -> Groups:
        """Split all ranks into ``count`` groups of neighbours. All ranks call it, once; ``count`` divides their number."""
        assert not self.members and self.world % count == 0, f"{self.world} ranks in {count} groups"
        size = self.world // count
        if count == 1:
            return Groups(0, 1, self, self, Ranks(calls=self.calls))
        index, place = divmod(self.rank, size)
        rows = [tuple(range(g * size, (g + 1) * size)) for g in range(count)]
        columns = [tuple(range(p, self.world, size)) for p in range(size)]
        within, across = self._joined_in(rows, index), self._joined_in(columns, place)
        return Groups(
            index,
            count,
            self,
            Ranks(place, size, self.calls, self.timeout, rows[index], within),
            Ranks(index, count, self.calls, self.timeout, columns[place], across),
        )

    def _joined_in(self, parts: Sequence[tuple[int, ...]], own: int) -> Any:
        """Make torch's groups of the parts, on all ranks in the same order; return part ``own``."""
        import torch.distributed as dist

        with self._naming_the_missing("split"):
            limit = timedelta(seconds=self.timeout)
            return [dist.new_group(list(part), timeout=limit) for part in parts][own]

    def share(self, value: _Value) -> _Value:
        """Return rank 0's value on every rank (pickled: between processes of one run only)."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        box: list[Any] = [value if self.first else None]
        with self._naming_the_missing("share"):
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: _Value) -> list[_Value]:
        """Return every rank's value, ordered by rank, on every rank. Also serves as a barrier."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world
        with self._naming_the_missing("gather"):
            dist.all_gather_object(values, value)
        return values

    @contextmanager
    def _naming_the_missing(self, name: str) -> Iterator[None]:
        self.calls[name] += 1
        try:
            yield
        except RuntimeError as error:  # raised by both backends when a peer is gone or too late
            import torch.distributed as dist

            missing, everyone = self._missing(), dist.get_world_size()
            who = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} of {everyone} gone or stuck"
            raise RankError(
                f"{who if missing else 'a rank did not answer'}; the last checkpoint is kept, and the same command "
                f"continues from it ({first_line(error)[:200]})"
            ) from error

    def _missing(self) -> list[int]:
        """Return the ranks that do not report to the store within a few seconds; none if the store itself is gone."""
        import torch.distributed as dist

        try:
            store = dist.distributed_c10d._get_default_store()
            members = self.members or tuple(range(self.world))
            store.set(f"ladist/alive/{members[self.rank]}", str(time.time()))
            until = time.monotonic() + _ROLL_CALL
            waiting = set(members) - {members[self.rank]}
            while waiting and time.monotonic() < until:
                waiting -= {r for r in waiting if store.check([f"ladist/alive/{r}"])}
                time.sleep(0.05)
        except (RuntimeError, ValueError):
            return []
        return sorted(waiting)


def groups_of(windows: int, world: int) -> int:
    """Return the number of groups that ``world`` ranks form for ``windows`` windows of an iteration."""
    return math.gcd(windows, world)


@dataclass(frozen=True)
class Groups:
    """This rank's group, ``index`` of ``count``: ``within`` are the group's ranks, ``across`` one rank of each group."""

    index: int
    count: int
    all: Ranks
    within: Ranks
    across: Ranks


ALONE = Ranks()


@dataclass(frozen=True)
class ProcessRank:
    """The launcher's placement of this process: its rank, the number of ranks, and its index on this host."""

    rank: int
    world: int
    local_rank: int


def place(environment: Mapping[str, str] = os.environ) -> ProcessRank | None:
    """Read the placement from torchrun's or, inside a job step, SLURM's environment; None for a single process.

    Raises:
        RankError: the variables contradict each other.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
        if "SLURM_STEP_ID" not in environment or not all(n in environment for n in names):
            return None
    try:
        rank, world, local = (int(environment.get(n, "0")) for n in names)
    except ValueError:
        rank, world, local = -1, 0, 0
    if not 0 <= rank < world:
        found = ", ".join(f"{n}={environment.get(n)}" for n in names)
        raise RankError(f"environment: {found} do not name a rank of a world; valid: 0 <= {names[0]} < {names[1]}")
    return ProcessRank(rank, world, local) if world > 1 else None


def on_this_host(environment: Mapping[str, str] = os.environ) -> int:
    """Return how many ranks torchrun has started on this host, which share its cores.

    1 without torchrun, or if SLURM has given each rank its own cores.
    """
    said = environment.get("LOCAL_WORLD_SIZE", "") if "RANK" in environment else ""
    return int(said) if said.isdecimal() and int(said) > 0 else 1


@contextmanager
def joined(where: ProcessRank, device: torch.device, timeout: float = TIMEOUT) -> Iterator[Ranks]:
    """Connect the ranks, by NCCL between GPUs or gloo between CPUs, until the block ends.

    All ``where.world`` ranks must connect within ``timeout`` seconds. Raises RankError if they do not.
    """
    import torch.distributed as dist

    _rendezvous_from_slurm(os.environ)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend,
            init_method="env://",
            rank=where.rank,
            world_size=where.world,
            timeout=timedelta(seconds=timeout),
            device_id=device if backend == "nccl" else None,
        )
    except (RuntimeError, ValueError) as error:
        meeting = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RankError(
            f"rank {where.rank} of {where.world}: could not connect to the others at {meeting} ({first_line(error)}); "
            "check that every rank was started and that the hosts reach each other"
        ) from error
    try:
        yield Ranks(where.rank, where.world, timeout=timeout)
    finally:
        dist.destroy_process_group()


def _rendezvous_from_slurm(environment: Any) -> None:
    """Set MASTER_ADDR and MASTER_PORT if SLURM started the ranks: the step's first node, a port from the job's id."""
    if "MASTER_ADDR" in environment and "MASTER_PORT" in environment:
        return
    if "SLURM_STEP_ID" not in environment:
        raise RankError("environment: MASTER_ADDR and MASTER_PORT are missing; torchrun sets them")
    nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    environment.setdefault("MASTER_ADDR", first_host(nodes))
    environment.setdefault("MASTER_PORT", str(20_000 + int(environment["SLURM_JOB_ID"]) % 20_000))


def first_host(nodes: str) -> str:
    """Return the first host of a SLURM node list, ``gpu[03-04,7],login`` -> ``gpu03``; 127.0.0.1 if unresolvable."""
    prefix, bracket, rest = nodes.partition("[")
    name = nodes.split(",")[0]
    if bracket and "," not in prefix:
        inside, _, after = rest.partition("]")
        name = prefix + inside.split(",")[0].split("-")[0] + after.split(",")[0]
    try:
        socket.getaddrinfo(name, None)
    except OSError:  # several virtual nodes on one host
        return "127.0.0.1"
    return name


# --- starting ranks on this machine -----------------------------------------------------------------------------------


def launch(
    world: int, function: Callable[..., None], args: Sequence[Any], restarts: int, say: Callable[[str], None]
) -> None:
    """Run ``function(*args)`` in ``world`` processes of this machine, as torchrun would, until all have returned.

    ``function`` must be importable by name, ``args`` picklable. When a process dies (a signal, an error that is not one
    of errors.py), the others are stopped and all are restarted, up to ``restarts`` times; ``say`` reports it.

    Raises:
        LadDistError: the first error of a process that is not merely about another's absence.
        RankError: processes kept dying, or this is not the main thread, which alone can stop them.
        Interrupted: this process was asked to stop; the others have been stopped too.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    if not in_main_thread():
        raise RankError("ranks are started from the main thread only; valid: call this there, or use one rank")
    for attempt in range(restarts + 1):
        try:
            with (
                tempfile.TemporaryDirectory(prefix="ladist-ranks-") as logs,
                _signals_restored(),
                _quiet_elastic(),
                _loopback_only(),
            ):
                start = elastic_launch(_launch_config(world, logs), _outcome)
                outcomes = start(dict(os.environ), function, *args)
        except SignalException as stopped:
            name = signal.Signals(stopped.sigval).name
            raise Interrupted(f"interrupted by {name}; finished work is kept, and the same command continues") from None
        except ChildFailedError as failed:
            rank, failure = failed.get_first_failure()
            code = failure.exitcode
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            if attempt == restarts:
                again = f"after {restarts} restarts" if restarts else "and no restart is allowed"
                raise RankError(
                    f"rank {rank} of {world} {how}, {again}; the last checkpoint is kept, and the same command continues"
                ) from failed
            say(f"rank {rank} of {world} {how}; starting again from the last checkpoint ({attempt + 1} of {restarts})")
            continue
        raise_first([outcomes[rank] for rank in sorted(outcomes)])
        return


def _launch_config(world: int, logs: str) -> Any:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    multiprocessing.set_forkserver_preload(_PRELOADED)
    forked = "forkserver" in multiprocessing.get_all_start_methods()
    known = {f.name for f in fields(LaunchConfig)}
    newer: dict[str, Any] = {"shutdown_timeout": int(_GRACE)} if "shutdown_timeout" in known else {}
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world,
        run_id=f"ladist-{os.getpid()}-{time.monotonic_ns()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,  # launch() counts them itself, to report which rank died
        monitor_interval=0.1,
        start_method="forkserver" if forked else "spawn",
        logs_specs=DefaultLogsSpecs(log_dir=logs),
        **newer,
    )


def _outcome(environment: dict[str, str], function: Callable[..., None], *args: Any) -> tuple[str, str] | None:
    """Return the outcome of one process: None, or the name and text of an error of errors.py.

    ``environment`` is the caller's now; the server that this process was forked from may have that of an earlier call.
    """
    for name in {*os.environ, *environment}:
        if _OF_THE_LAUNCHER.fullmatch(name):
            continue
        if name in environment:
            os.environ[name] = environment[name]
        else:
            del os.environ[name]
    threading.Thread(target=_end_with_the_launcher, daemon=True).start()
    signals, writer = os.pipe()
    for end in (signals, writer):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(writer)  # notes a signal even while a sum waits in C for a rank that has stopped
    try:
        function(*args)
    except LadDistError as error:
        return type(error).__name__, str(error)
    except Exception:  # a bug: printed here, since the launcher only learns that the process ended
        traceback.print_exc()
        raise
    finally:
        with suppress(BlockingIOError):
            # A launcher that is stopped too reads no outcome, and would wait for its limit.
            if {signal.SIGINT, signal.SIGTERM} & set(os.read(signals, 64)):
                leave = threading.Timer(_UNREAD, os._exit, (Interrupted.exit_code,))
                leave.daemon = True
                leave.start()
    return None


def _end_with_the_launcher() -> None:
    """Interrupt this process once the launcher is gone, which is not its parent where it was forked from a server."""
    launcher = multiprocessing.parent_process()
    if launcher is not None:
        multiprocessing.connection.wait([launcher.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


def raise_first(outcomes: Sequence[tuple[str, str] | None]) -> None:
    """Raise the first error among the ranks' outcomes, (name of its class, text); a RankError only if there is no other."""
    faults = [o for o in outcomes if o is not None]
    if not faults:
        return
    name, text = next((f for f in faults if f[0] != RankError.__name__), faults[0])
    kind: type[LadDistError] = getattr(errors, name)
    raise kind(text)


@contextmanager
def _quiet_elastic() -> Iterator[None]:
    """Silence the launcher's own log, which repeats at length what ``launch`` reports."""
    quiet = ("torch.distributed.elastic", "torch.distributed.launcher", "torch.multiprocessing")
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith(quiet)]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextmanager
def _signals_restored() -> Iterator[None]:
    """Restore the signal handlers, which the launcher replaces."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _loopback_only() -> Iterator[None]:
    """Restrict gloo's connections to this machine, unless the user has set an interface."""
    name = "GLOO_SOCKET_IFNAME"
    with environment({name: "lo"} if name not in os.environ and sys.platform == "linux" else {}):
        yield
