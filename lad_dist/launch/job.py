"""Run one stage inside a SLURM job, as ``lad-dist STAGE RUN`` would on that node.

    Order       the job's arguments: plain values, so that they can be pickled and read years later
    carry_out   runs the stage and returns how it ended; records its state in task.json
    Warning     turns the signal that SLURM sends before it ends a job into a stop at the next safe point

A job that is started again, after its warning, a preemption or a node failure, continues from what is on disk.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lad_dist.environment import environment
from lad_dist.errors import ClusterError, Interrupted, LadDistError
from lad_dist.interrupts import as_exceptions
from lad_dist.launch.supervisor import WARNING
from lad_dist.profile import Profile
from lad_dist.rundir import RunDir, published
from lad_dist.slurm_jobs import NOT_BEGUN, slurm_command, task_file

if TYPE_CHECKING:
    from lad_dist.pipeline import Pipeline
    from lad_dist.recipe import Recipe

Ended = Literal["finished", "requeue"]
_LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Order:
    """``stage`` to run in the run folder ``run`` with a dumped profile, as job ``index`` of an array of ``count``.

    ``after``: the preceding stage, if the job was chained to it; it must be done by now. ``question``: for an
    evaluation, the sources and the dumped recipe that replace the run's own.
    """

    stage: str
    run: str
    profile: dict[str, Any]
    logs: str
    index: int = 0
    count: int = 1
    fleet: bool = False  # a Ray cluster over the job's nodes
    after: str | None = None
    question: dict[str, Any] | None = None


class SlurmTask:
    """This process in the job: its SLURM ids, and what it has recorded in task.json."""

    def __init__(self, logs: str, variables: Mapping[str, str] = os.environ) -> None:
        array, index = variables.get("SLURM_ARRAY_JOB_ID"), variables.get("SLURM_ARRAY_TASK_ID")
        self.number = variables["SLURM_JOB_ID"]
        self.id = f"{array}_{index}" if array else self.number
        self.rank = int(variables.get("SLURM_PROCID", "0"))
        self.tasks = int(variables.get("SLURM_NTASKS", "1"))
        self.restarts = int(variables.get("SLURM_RESTART_COUNT", "0"))
        self.node = variables.get("SLURMD_NODENAME", socket.gethostname())
        self.folder = task_file(Path(logs), self.id).parent
        self._document: dict[str, Any] = {}

    def write(self, **fields: Any) -> None:
        """Add fields to task.json; only the first task of a job does."""
        if self.rank == 0:
            self._document |= {"restarts": self.restarts, "node": self.node, "time": round(time.time(), 3), **fields}
            with published(self.folder / "task.json") as temporary:
                temporary.write_text(json.dumps(self._document) + "\n", encoding="utf-8")


def carry_out(order: Order) -> Ended:
    """Carry out the order; return ``requeue`` if the job was asked to stop and is to continue later.

    Raises:
        SystemExit: the stage failed, with the exit code of its error, which is in task.json and at the end of the log.
    """
    task = SlurmTask(order.logs)
    task.write(state="started")
    print(f"job {task.id}, task {task.rank} of {task.tasks} on {task.node}: {order.stage} of {order.run}", flush=True)
    warning = Warning()
    try:
        _import_all()
        with as_exceptions(), warning:
            _stage(order, task)
    except Interrupted as stopped:
        if warning.came or _preempted(task):
            print(f"{stopped}; the job is requeued and continues from there", flush=True)
            return "requeue"
        task.write(state="failed", error=str(stopped))
        _complain(stopped)
        raise SystemExit(stopped.exit_code) from None
    except LadDistError as error:
        task.write(state=NOT_BEGUN if isinstance(error, _NotBegun) else "failed", error=str(error))
        _complain(error)
        raise SystemExit(error.exit_code) from None
    except Exception as error:
        task.write(state="failed", error=f"{type(error).__name__}: {error}")
        raise
    task.write(state="finished")
    return "finished"


def _import_all() -> None:
    """Import the slow modules before the warning is awaited: imports swallow interruptions; it stays pending."""
    import torch

    from lad_dist import pipeline
    from lad_dist.data import prepare
    from lad_dist.trajectories import reader

    _ = torch, pipeline, prepare, reader


class Warning:
    """Context manager that turns SLURM's warning into SIGTERM for this process and sets ``came``.

    So whatever handles SIGTERM saves its state, on every rank. The warning signal stays blocked, in this process and
    in its children, which SLURM sends it to as well.
    """

    def __init__(self) -> None:
        self.came = False
        self._ended = threading.Event()

    def __enter__(self) -> Warning:
        signal.pthread_sigmask(signal.SIG_BLOCK, [WARNING])  # as the supervisor has done already
        self._thread = threading.Thread(target=self._wait, name="slurm-warning", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _wait(self) -> None:
        while not self._ended.is_set():
            if signal.sigtimedwait([WARNING], _LOOK_SECONDS) is not None and not self._ended.is_set():
                self.came = True
                print(f"{WARNING.name}: SLURM will end this job soon; stopping at the next safe point", flush=True)
                os.kill(os.getpid(), signal.SIGTERM)
                return


def _preempted(task: SlurmTask) -> bool:
    """Return whether SLURM has preempted the job and gives it time to save, rather than cancelled it."""
    try:
        said = slurm_command(["scontrol", "--oneliner", "show", "job", task.number])
    except ClusterError:
        return False
    return re.search(r" PreemptTime=\d", said) is not None


class _NotBegun(ClusterError):
    """The preceding stage is not done."""


def _check_done(stage: str, recipe: Recipe, run: RunDir) -> None:
    """Raise _NotBegun if the preceding stage is not done: of an array, SLURM knows only that its jobs have ended."""
    from lad_dist.launch.chain import experts_left, stages_left

    if not stages_left(recipe, run, [stage]):
        return
    missing = f" (missing: {', '.join(map(str, experts_left(recipe, run.trajectories)))})" if stage == "experts" else ""
    raise _NotBegun(
        f"{stage}: its jobs have ended and it is not done{missing}; see their logs; the same command submits the rest"
    )


def _complain(error: LadDistError) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)


def _stage(order: Order, task: SlurmTask) -> None:
    from rich.console import Console

    from lad_dist import recipe_file
    from lad_dist.launch import local, ray_in_slurm
    from lad_dist.progress import Screen

    run = RunDir.existing(Path(order.run))
    recipe = recipe_file.load(run.recipe)
    if order.after is not None:
        _check_done(order.after, recipe, run)
    profile = Profile.model_validate(order.profile)
    screen = Screen(Console(width=160, highlight=False))
    stages: dict[str, Callable[[Pipeline], None]] = {
        "experts": lambda p: p.experts(),
        "distill": lambda p: p.distill(),
        "evaluate": lambda p: _evaluate(order, p),
        "report": lambda p: p.report(),
    }
    if order.fleet and task.rank > 0:
        return ray_in_slurm.serve(task, profile)
    place: AbstractContextManager[None]
    if order.stage == "distill":  # every task is a rank
        place = nullcontext()
    elif order.stage == "evaluate" and order.count > 1:  # every job of the array is a rank; they do not communicate
        place = environment({"RANK": str(order.index), "WORLD_SIZE": str(order.count), "LOCAL_RANK": "0"})
    else:
        place = environment({"SLURM_NTASKS": None})
    own_log = order.stage == "evaluate"  # each job of an array has its own
    with place, ray_in_slurm.head(task, profile) if order.fleet else nullcontext(profile) as here:
        local.run(recipe, run.root, here, None, screen, [stages[order.stage]], keep_recipe=True, own_log=own_log)


def _evaluate(order: Order, pipeline: Pipeline) -> None:
    from lad_dist.recipe import Recipe

    if order.question is None:
        pipeline.evaluate_all()
    else:
        pipeline.ask(Recipe.model_validate(order.question["recipe"]), order.question["sources"])
