"""What SLURM says about a run's jobs, joined with what the run has written down about them.

    Submission, Job    what was submitted: slurm/jobs.json of the run, published by rename
    TaskState          one job, or one job of an array, now: from squeue while SLURM remembers it, then from what it left
    Queue              asks squeue, and remembers the answer for a moment

Needs no accounting database: ``squeue --states=all`` also lists jobs that have ended, for MinJobAge seconds. A job writes
task.json beside its log when it starts and when it ends; one that was killed could not write the second.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lad_dist.errors import ClusterError, RunDirError
from lad_dist.rundir import RunDir, published

State = Literal["waiting", "running", "done", "failed", "cancelled", "gone"]
ASK_SECONDS = 5.0  # between two calls of squeue
_COMMAND_SECONDS = 30.0  # that squeue may take
_WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT")
_RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING", "STAGE_OUT")
_WORDS = {
    "FAILED": "failed",
    "TIMEOUT": "ran out of time",
    "NODE_FAIL": "lost its node",
    "OUT_OF_MEMORY": "ran out of memory (slurm.mem_gb)",
    "PREEMPTED": "was preempted",
    "DEADLINE": "passed its deadline",
    "BOOT_FAIL": "could not start its node",
}
_TAIL = 2**14  # bytes of a log that are searched for an error
_LONGEST_LINE = 500


@dataclass(frozen=True)
class Job:
    """A job as it was submitted. ``array``: how many jobs it consists of; None: it is no array."""

    stage: str
    id: str
    array: int | None
    script: str

    @property
    def tasks(self) -> tuple[str, ...]:
        """SLURM's ids of the jobs that it consists of."""
        return (self.id,) if self.array is None else tuple(f"{self.id}_{i}" for i in range(self.array))


@dataclass(frozen=True)
class Submission:
    """Jobs that were submitted together. ``time``: Unix seconds; ``logs``: their folder."""

    id: str
    time: float
    profile: str
    logs: str
    jobs: tuple[Job, ...] = ()


def read_submissions(run: RunDir) -> list[Submission]:
    """Everything that was submitted for a run, oldest first. Raises RunDirError where the record is damaged."""
    try:
        document = json.loads(run.slurm_jobs.read_text(encoding="utf-8"))
        return [
            Submission(**{**one, "jobs": tuple(Job(**job) for job in one["jobs"])}) for one in document["submissions"]
        ]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirError(
            f"{run.slurm_jobs}: is not a record of submitted jobs ({error}); remove it once none of them is queued"
        ) from error


def write_submissions(run: RunDir, submissions: Sequence[Submission]) -> None:
    """Publish the record."""
    with published(run.slurm_jobs) as temporary:
        document = {"format_version": 1, "submissions": [asdict(one) for one in submissions]}
        temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def task_file(logs: Path, task: str) -> Path:
    """Where the job ``task`` (``12``, of an array ``12_3``) writes down how it began and ended."""
    return logs / task / "task.json"


@dataclass(frozen=True)
class TaskState:
    """One job now. ``words`` say it to people; ``log`` is its standard output's file, ``why`` what it failed of."""

    stage: str
    id: str
    state: State
    words: str
    log: Path
    why: str | None = None
    dashboard: str | None = None

    @property
    def live(self) -> bool:
        """Whether it is queued or at work."""
        return self.state in ("waiting", "running")

    def line(self) -> str:
        """``experts, job 12: running on n1, 0:40 left``."""
        return f"{self.stage}, job {self.id}: {self.words}"


@dataclass
class Queue:
    """The jobs of the newest submission of every stage, and what became of them.

    ``fault`` says why squeue could not be asked; states are then what the jobs have written down.
    """

    run: RunDir
    fault: str | None = None
    _asked: float = -math.inf
    _states: tuple[TaskState, ...] = field(default=())

    def states(self, now: bool = False) -> tuple[TaskState, ...]:
        """Every job of the newest submission of each stage, in the order of stages; ``now``: ask squeue in any case.

        Raises RunDirError where the record is damaged.
        """
        if not now and time.monotonic() - self._asked < ASK_SECONDS:
            return self._states
        newest: dict[str, tuple[Submission, Job]] = {}
        for submission in read_submissions(self.run):
            newest |= {job.stage: (submission, job) for job in submission.jobs}
        listed: dict[str, dict[str, str]] = {}
        self.fault = None
        if newest:
            try:
                listed = squeue(job.id for _, job in newest.values())
            except ClusterError as error:
                self.fault = str(error)
        order = ("experts", "distill", "evaluate", "report")
        self._states = tuple(
            _state_of(submission, job, task, listed.get(task), self.fault is None)
            for _, (submission, job) in sorted(newest.items(), key=lambda item: order.index(item[0]))
            for task in job.tasks
        )
        self._asked = time.monotonic()
        return self._states

    @property
    def version(self) -> tuple[object, ...]:
        """Differs from the last one's if a job's state does."""
        return (self.fault, *((one.id, one.state) for one in self._states))

    def lines(self) -> list[str]:
        """For people; nothing where nothing was submitted."""
        states = self.states()
        said = [f"SLURM: {self.fault}"] if self.fault and states else []
        for one in states:
            said.append(f"SLURM: {one.line()}")
            if one.state in ("failed", "gone"):
                said.append(f"SLURM:   log: {one.log}")
            if one.state == "running" and one.dashboard:
                said.append(f"SLURM:   {one.dashboard}")
        return said


def squeue(ids: Iterable[str]) -> dict[str, dict[str, str]]:
    """What squeue says about jobs and all that belong to them, by their ids (``12``, ``12_3``).

    Jobs that SLURM has forgotten are missing. Raises ClusterError where squeue cannot be asked.
    """
    names = ("id", "state", "reason", "node", "left", "time", "comment")
    wanted = sorted(set(ids))
    # A second id keeps squeue from failing because the only one is unknown.
    chosen = ",".join([*wanted, *wanted[:1]])
    command = ["squeue", "--states=all", "--noheader", "--array", f"--jobs={chosen}", "--format=%i|%T|%r|%N|%L|%M|%k"]
    output = slurm_command(command, unless=("Invalid job id",))
    rows = (dict(zip(names, line.split("|", len(names) - 1), strict=False)) for line in output.splitlines())
    return {row["id"].strip(): {k: v.strip() for k, v in row.items()} for row in rows if len(row) == len(names)}


def slurm_command(command: Sequence[str], unless: Sequence[str] = (), text: str = "") -> str:
    """What a command of SLURM prints, given ``text`` as its input.

    Raises ClusterError where it fails, with its reason; not if that holds one of ``unless``.
    """
    if shutil.which(command[0]) is None:
        raise ClusterError(f"{command[0]}: not found; SLURM's commands are on its login nodes")
    try:
        done = subprocess.run(  # noqa: S603 - SLURM's own commands
            list(command), input=text, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ClusterError(f"{command[0]}: {error}") from error
    if done.returncode != 0 and not any(words in done.stderr for words in unless):
        raise ClusterError(f"{command[0]}: {reason(done.stderr) or f'exit code {done.returncode}'}")
    return done.stdout


def reason(stderr: str) -> str:
    """What SLURM's commands complain of, in one line: ``sbatch: error: Batch job submission failed: X`` -> ``X``."""
    lines = [re.sub(r"^[a-z_]+: (error|fatal): ", "", line.strip()) for line in stderr.splitlines() if line.strip()]
    lines = [
        re.sub(r"^(Batch job submission failed|allocation failure|slurm_load_jobs error): ", "", line) for line in lines
    ]
    return "; ".join(dict.fromkeys(lines))


def _state_of(submission: Submission, job: Job, task: str, row: dict[str, str] | None, asked: bool) -> TaskState:
    logs = Path(submission.logs)
    left = _left(task_file(logs, task))
    log = logs / task / f"{task}_0_log.out"
    dashboard = left.get("dashboard")
    if row is not None and submission.id not in row["comment"]:  # another cluster's, or one that was wiped
        row = None
    state, words = _in_words(row, left, asked)
    why = _why(left, logs / task / f"{task}_0_log.err") if state in ("failed", "gone") else None
    return TaskState(job.stage, task, state, f"{words}: {why}" if why else words, log, why, dashboard)


def _in_words(row: dict[str, str] | None, left: dict[str, Any], asked: bool) -> tuple[State, str]:
    told = left.get("state")
    if row is None:
        if told == "finished":
            return "done", "done"
        if told == "failed":
            return "failed", "failed"
        if not asked:
            return "waiting", f"state unknown; it says {told or 'nothing'}"
        return "gone", "SLURM does not know it any more, and it left no result"
    state, why = row["state"], row["reason"]
    again = f", requeued {left['restarts']} times" if left.get("restarts") else ""
    if state in _WAITING:
        return "waiting", f"{state.lower()} ({why}){again}"
    if state in _RUNNING:
        return "running", f"{state.lower()} on {row['node']}, {row['left']} left{again}"
    if state == "COMPLETED":
        return "done", f"done on {row['node']}"
    if state == "CANCELLED":
        if "Dependency" in why:
            return "cancelled", "cancelled, since a stage before it did not finish"
        return "cancelled", "cancelled (scancel)" + (f" on {row['node']}" if row["node"] else "")
    where = f" on {row['node']}" if row["node"] else ""
    return "failed", f"{_WORDS.get(state, state.lower())}{where}" + (f" ({why})" if why != "None" else "")


def _left(file: Path) -> dict[str, Any]:
    """What a job has written down; nothing where it could not."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _why(left: dict[str, Any], log: Path) -> str | None:
    """The error that a job has written down, else the last one in its log."""
    if left.get("error"):
        return str(left["error"])
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    complaints = [line.strip() for line in lines if re.match(r"(\w+: )?error: |\w*Error: |.*: command not found", line)]
    return complaints[-1][:_LONGEST_LINE].removeprefix("error: ") if complaints else None
