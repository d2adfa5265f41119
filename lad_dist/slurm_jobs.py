"""States of a run's SLURM jobs: what SLURM reports, joined with what the run has recorded.

    Submission, SlurmJob   what was submitted: slurm/jobs.json of the run, published by rename. Jobs are identified by
                           the ids that sbatch returned, whatever their comment or name
    TaskState              one job, or one job of an array, now: from squeue while SLURM remembers it, then from the
                           files that it left
    SlurmQueue             asks squeue, and caches the answer for a moment

Needs no accounting database: ``squeue --states=all`` also lists jobs that have ended, for MinJobAge seconds. A job
writes task.json beside its log when it starts and when it ends; a killed job cannot write the second.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import subprocess
import time
from collections.abc import Container, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any, Literal

from lad_dist.errors import ClusterError, RunDirError
from lad_dist.rundir import STAGES, RunDir, published

State = Literal["waiting", "running", "ending", "done", "failed", "cancelled", "gone"]
ASK_SECONDS = 5.0  # between calls of squeue
_COMMAND_SECONDS = 30.0  # time limit of a SLURM command
_WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT")
_RUNNING = ("RUNNING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING", "STAGE_OUT")
_WORDS = {
    "FAILED": "failed",
    "TIMEOUT": "ran out of time",
    "NODE_FAIL": "lost its node",
    "OUT_OF_MEMORY": "ran out of memory (slurm.mem_gb)",
    "PREEMPTED": "was preempted",
    "DEADLINE": "passed its deadline",
    "BOOT_FAIL": "could not start its node",
}
_FORMAT_VERSION = 1  # of slurm/jobs.json
NOT_BEGUN = "not begun"  # recorded by a job that found the stage before it not done
_TAIL = 2**14  # last bytes of a log, searched for an error
_LONGEST_LINE = 500


@dataclass(frozen=True)
class SlurmJob:
    """A job as submitted. ``array``: its number of jobs; None: not an array.

    ``question``: name of an evaluation's own question; empty: the run's recipe.
    """

    stage: str
    id: str
    array: int | None
    script: str
    question: str = ""

    def output(self, logs: str) -> str:
        """Return the files that its tasks write to, as a shell pattern (errors: ``..._log.err``)."""
        each = "" if self.array is None else "_*"
        return f"{quote(f'{logs}/{self.id}')}{each}/{self.id}_*_log.out"

    @property
    def tasks(self) -> tuple[str, ...]:
        """SLURM's ids of its jobs."""
        return (self.id,) if self.array is None else tuple(f"{self.id}_{i}" for i in range(self.array))


@dataclass(frozen=True)
class Submission:
    """Jobs submitted together. ``time``: Unix seconds; ``logs``: their folder."""

    id: str
    time: float
    profile: str
    logs: str
    jobs: tuple[SlurmJob, ...] = ()


def read_submissions(run: RunDir) -> list[Submission]:
    """Return a run's submissions, oldest first. Raises RunDirError if the record is damaged."""
    try:
        document = json.loads(run.slurm_jobs.read_text(encoding="utf-8"))
        if document.get("format_version") != _FORMAT_VERSION:
            raise ValueError(f"format_version is {document.get('format_version')!r:.80}; valid: {_FORMAT_VERSION}")
        said = document.get("sha256")  # absent from records of older versions
        if said is not None and said != _sum_of(document["submissions"]):
            raise ValueError("it does not match its own checksum")
        return [
            Submission(**{**one, "jobs": tuple(SlurmJob(**job) for job in one["jobs"])})
            for one in document["submissions"]
        ]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunDirError(
            f"{run.slurm_jobs}: is not a record of submitted jobs ({error}); remove it once none of them is queued"
        ) from error


def write_submissions(run: RunDir, submissions: Sequence[Submission]) -> None:
    """Publish the record of submissions."""
    with published(run.slurm_jobs) as temporary:
        made = json.loads(json.dumps([asdict(one) for one in submissions]))
        document = {"format_version": _FORMAT_VERSION, "submissions": made, "sha256": _sum_of(made)}
        temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _sum_of(submissions: Any) -> str:
    """Return a checksum: with a flipped bit in a number, ``cancel`` would end a stranger's job."""
    return hashlib.sha256(json.dumps(submissions, sort_keys=True).encode()).hexdigest()


def task_file(logs: Path, task: str) -> Path:
    """Return the file in which job ``task`` (``12``, of an array ``12_3``) records its start and end."""
    return logs / task / "task.json"


@dataclass(frozen=True)
class TaskState:
    """Current state of one job. ``words``: for display; ``log``: file of its standard output; ``why``: its error.

    ``ending``: SLURM has ended it and waits for its processes; it will do nothing more, and is not queued.
    """

    job: SlurmJob
    id: str
    state: State
    words: str
    log: Path
    why: str | None = None
    dashboard: str | None = None
    restarts: int = 0

    @property
    def stage(self) -> str:
        """The stage that it does, in whole or in part."""
        return self.job.stage

    @property
    def live(self) -> bool:
        """Whether it is queued or running."""
        return self.state in ("waiting", "running")

    @property
    def over(self) -> bool:
        """Whether none of its processes is left."""
        return not self.live and self.state != "ending"

    def line(self) -> str:
        """Return ``experts, job 12: running on n1, 0:40 left``."""
        return f"{self.stage}, job {self.id}: {self.words}"


@dataclass
class SlurmQueue:
    """The newest job of every stage, any older one that is not over, and their states.

    ``fault``: why squeue could not be asked; states are then those that the jobs have recorded.
    """

    run: RunDir
    fault: str | None = None
    _asked: float = -math.inf
    _states: tuple[TaskState, ...] = field(default=())

    def states(self, now: bool = False) -> tuple[TaskState, ...]:
        """Return the jobs, in the order of stages; ``now``: ask squeue in any case.

        Raises RunDirError if the record is damaged.
        """
        if not now and time.monotonic() - self._asked < ASK_SECONDS:
            return self._states
        every = [(submission, job) for submission in read_submissions(self.run) for job in submission.jobs]
        newest = {(job.stage, job.question): job.id for _, job in every}
        listed: dict[str, dict[str, str]] = {}
        self.fault = None
        if every:
            try:
                listed = squeue(job.id for _, job in every)
            except ClusterError as error:
                self.fault = str(error)
        found: list[TaskState] = []
        for submission, job in sorted(every, key=lambda item: STAGES.index(item[1].stage)):
            new = newest[job.stage, job.question] == job.id
            if new or any(task in listed for task in job.tasks):
                states = [_state_of(submission, job, task, listed.get(task), self.fault is None) for task in job.tasks]
                found += states if new or not all(one.over for one in states) else []
        self._states = tuple(found)
        self._asked = time.monotonic()
        return self._states

    @property
    def over(self) -> bool:
        """Whether there were jobs at the last poll, and all of them are over."""
        return self.fault is None and bool(self._states) and all(one.over for one in self._states)

    @property
    def version(self) -> tuple[object, ...]:
        """Value that changes with the state of any job."""
        return (self.fault, *((one.id, one.state) for one in self._states))

    def lines(self, done: Container[str] = ()) -> list[str]:
        """Return lines for display; none if nothing was submitted. ``done``: stages done even if a job failed."""
        states = self.states()
        said = [f"SLURM: {self.fault}"] if self.fault and states else []
        for one in states:
            harmless = one.over and one.state != "done" and one.stage in done
            said.append(f"SLURM: {one.line()}{'; the stage is done nevertheless' if harmless else ''}")
            if one.state in ("failed", "gone") and not harmless:
                said.append(f"SLURM:   log: {quote(str(one.log))}")
            if one.state == "running" and one.dashboard:
                said.append(f"SLURM:   {one.dashboard}")
        return said


def squeue(ids: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return squeue's fields of jobs and of their arrays' jobs, by id (``12``, ``12_3``).

    Jobs that SLURM has forgotten are missing. Raises ClusterError if squeue fails.
    """
    names = ("id", "state", "reason", "node", "left", "end", "command")
    wanted = sorted(set(ids))
    # squeue fails for a single unknown id, not for two: repeat one.
    chosen = ",".join([*wanted, *wanted[:1]])
    command = ["squeue", "--states=all", "--noheader", "--array", f"--jobs={chosen}", "--format=%i|%T|%r|%N|%L|%e|%o"]
    output = slurm_command(command, unless=("Invalid job id",))
    rows = (dict(zip(names, line.split("|", len(names) - 1), strict=False)) for line in output.splitlines())
    return {row["id"].strip(): {k: v.strip() for k, v in row.items()} for row in rows if len(row) == len(names)}


def slurm_command(command: Sequence[str], unless: Sequence[str] = (), text: str = "") -> str:
    """Run a SLURM command with ``text`` as its input; return its output.

    Raises ClusterError with the reason if it fails, unless the reason contains one of ``unless``.
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
    """Return a SLURM command's error in one line: ``sbatch: error: Batch job submission failed: X`` -> ``X``."""
    lines = [re.sub(r"^[a-z_]+: (error|fatal): ", "", line.strip()) for line in stderr.splitlines() if line.strip()]
    lines = [
        re.sub(r"^(Batch job submission failed|allocation failure|slurm_load_jobs error): ", "", line) for line in lines
    ]
    return "; ".join(dict.fromkeys(lines))


def _state_of(submission: Submission, job: SlurmJob, task: str, row: dict[str, str] | None, asked: bool) -> TaskState:
    logs = Path(submission.logs)
    left = _left(task_file(logs, task))
    log = logs / task / f"{task}_0_log.out"
    dashboard = left.get("dashboard")
    if row is not None and row["command"].startswith("/") and not row["command"].startswith(submission.logs):
        row = None  # a job of this id on another or a reinstalled cluster: its script is not ours
    state, words = _in_words(row, left, asked)
    told = state in ("failed", "gone") or left.get("state") == NOT_BEGUN
    why = _why(left, logs / task / f"{task}_0_log.err") if told else None
    restarts = left.get("restarts") or 0
    return TaskState(job, task, state, f"{words}: {why}" if why else words, log, why, dashboard, restarts)


def _in_words(row: dict[str, str] | None, left: dict[str, Any], asked: bool) -> tuple[State, str]:
    told = left.get("state")
    if row is None:
        if told == "finished":
            return "done", "done"
        if told == "failed":
            return "failed", "failed"
        if told == NOT_BEGUN:
            return "cancelled", "did not start"
        if not asked:
            return "waiting", f"state unknown; its record says {told or 'nothing'}"
        return "gone", "SLURM no longer lists it, and it left no result"
    state, why = row["state"], row["reason"]
    again = f", requeued {left['restarts']} times" if left.get("restarts") else ""
    if state == "COMPLETING":
        if _is_time(row["end"]):
            return "ending", f"ending on {row['node']}"
        return "waiting", f"requeued{again}"  # it has no end time, since it will start again
    if state in _WAITING:
        return "waiting", state.lower() + (f" ({why})" if why not in ("", "None") else "") + again
    if state in _RUNNING:
        return "running", f"{state.lower()} on {row['node']}, {row['left']} left{again}"
    if state == "COMPLETED":
        return "done", f"done on {row['node']}"
    if state == "CANCELLED":
        if "Dependency" in why:
            return "cancelled", "cancelled, since a stage before it did not finish"
        return "cancelled", "cancelled (scancel)" + (f" on {row['node']}" if row["node"] else "")
    if told == NOT_BEGUN:
        return "cancelled", "did not start"
    where = f" on {row['node']}" if row["node"] else ""
    return "failed", f"{_WORDS.get(state, state.lower())}{where}" + (f" ({why})" if why != "None" else "")


def _is_time(text: str) -> bool:
    return re.match(r"\d{4}-", text) is not None


def _left(file: Path) -> dict[str, Any]:
    """Return what a job has recorded; empty if it could not."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _why(left: dict[str, Any], log: Path) -> str | None:
    """Return the error that a job has recorded, else the last one in its log."""
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
