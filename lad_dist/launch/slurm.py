"""Submitting a run's stages to SLURM as a chain of jobs, each of which waits for the one before it.

The only file that imports submitit: it writes the sbatch scripts, hands the orders over, and requeues a job that was warned
of its time limit. What a job does is in ``job.py``, what is asked for in ``chain.py``, what became of it in ``status/slurm.py``.
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError, UncompletedJobError
from submitit.helpers import DelayedSubmission

from lad_dist.errors import ClusterError, RecipeError
from lad_dist.launch.chain import Request, request, stages_left
from lad_dist.launch.job import Order, Task, carry_out
from lad_dist.pipeline import STAGES
from lad_dist.profile import OWN_OPTIONS, Profile
from lad_dist.recipe import Recipe
from lad_dist.rundir import RunDir
from lad_dist.status.slurm import (
    Job,
    Queue,
    Submission,
    TaskState,
    read_submissions,
    reason,
    slurm_command,
    write_submissions,
)

_REFUSED = "{stage}: SLURM refused the job: {why}; nothing of this run was left in the queue"
_NOT_NOW = ("busy", "DOWN, DRAINED", "reserved")  # nodes that may be there when the job's turn comes
_REQUEUED_SECONDS = 120.0  # within which SLURM ends the tasks of a job that it has requeued


class StageJob:
    """What submitit calls on the node: carries an order out, and requeues the job where it is to go on later."""

    def __init__(self, order: Order) -> None:
        self.order = order

    def __call__(self) -> None:
        """Raises SystemExit where the stage failed, or the job is to start again."""
        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's: writes the order down again, and calls scontrol
        if carry_out(self.order) == "finished":
            return
        task = Task(self.order.logs)
        if task.rank != 0:  # SLURM ends all tasks when the first one has requeued the job
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(_REQUEUED_SECONDS)
            raise SystemExit(1)
        assert callable(requeue), "submitit has installed its handler"
        task.write(state="requeued")
        try:
            requeue(signal.SIGUSR2, None)
        except UncompletedJobError:
            error = (
                "it ran out of time and was requeued as often as slurm.max_requeues allows; "
                "what is finished is kept, and the same command continues"
            )
            task.write(state="failed", error=error)
            print(f"error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(ClusterError.exit_code) from None

    def checkpoint(self) -> DelayedSubmission:
        """The same order again: what was done is on disk."""
        return DelayedSubmission(StageJob(self.order))


@dataclass(frozen=True)
class Submitted:
    """What ``submit`` came to: the new jobs (None: nothing was left to submit), and stages that were queued already.

    ``replaced``: jobs that waited for one that has ended without doing its stage; they were cancelled and submitted again.
    """

    submission: Submission | None
    queued: tuple[TaskState, ...]
    replaced: tuple[TaskState, ...] = ()

    @property
    def ids(self) -> set[str]:
        """The jobs that do what was asked."""
        new = () if self.submission is None else self.submission.jobs
        return {job.id for job in new} | {state.job.id for state in self.queued}


def submit(
    recipe: Recipe,
    out: Path,
    profile: Profile,
    buffers: Path | str | None,
    wanted: Sequence[str],
    say: Callable[[str], None],
) -> Submitted:
    """Submit those of the stages ``wanted`` that are neither done nor queued, each to begin when the one before it is done.

    ``buffers``: as for ``local.run``. ``say`` is told every job as it is submitted.

    Raises:
        ClusterError: SLURM refused a job (with its reason; nothing of the chain stays queued) or cannot be reached.
        RecipeError: a field of the profile is not valid here.
        RunDirError: the run folder or the folder of logs cannot be written.
    """
    from lad_dist.launch.local import store_of

    if shutil.which("sbatch") is None:
        raise ClusterError(
            "sbatch: not found; submit from a login node of the cluster, or choose another profile with --on"
        )
    run = RunDir.open(out, recipe, store_of(buffers, profile))
    left = stages_left(recipe, run, wanted)
    queue = Queue(run)
    states = queue.states(now=True)
    if queue.fault:
        raise ClusterError(queue.fault)
    queued = [state for state in states if state.live]
    todo = [stage for stage in left if stage not in {state.stage for state in queued}]
    if not todo:
        return Submitted(None, tuple(queued))
    replaced = _in_vain(queued, todo[0])
    queued = [state for state in queued if state not in replaced]
    todo = [stage for stage in STAGES if stage in todo or stage in {state.stage for state in replaced}]
    identity = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    requests = [request(stage, recipe, profile, run.root.name, identity) for stage in todo]
    submission = Submission(identity, time.time(), profile.name, str(_log_folder(run, profile, identity)))
    _cancel(replaced)
    ending = [state.job for state in states if state.state == "ending"]
    chain = Chain(run, submission, profile, {state.stage: state.job for state in queued}, ending)
    try:
        for one in requests:
            job = chain.add(one)
            say(
                f"{job.stage}: job {job.id}{f', an array of {job.array}' if job.array is not None else ''}: {job.script}"
            )
    except BaseException:
        chain.withdraw()
        raise
    return Submitted(chain.submission, tuple(queued), tuple(replaced))


def _in_vain(queued: Sequence[TaskState], stage: str) -> list[TaskState]:
    """The jobs of later stages that have not begun, where ``stage`` has to be submitted again: they wait for its old job."""
    later = STAGES[STAGES.index(stage) + 1 :]
    begun = {state.job.id for state in queued if state.state == "running" or state.restarts}
    return [state for state in queued if state.stage in later and state.job.id not in begun]


class Chain:
    """Jobs of one submission, written down as they are submitted.

    ``before``: the job of each stage that is queued; ``ending``: jobs whose processes SLURM is ending.
    """

    def __init__(
        self, run: RunDir, submission: Submission, profile: Profile, before: dict[str, Job], ending: Sequence[Job] = ()
    ) -> None:
        self.run, self.submission, self.profile = run, submission, profile
        self._jobs, self._ending = dict(before), ending

    def add(self, wanted: Request) -> Job:
        """Submit one stage, to begin after those before it that are queued.

        Of an array, jobs may have been cancelled whose share the others did: it need only be over, and the new job looks.
        """
        logs = Path(self.submission.logs)
        earlier = [self._jobs[s] for s in STAGES[: STAGES.index(wanted.stage)] if s in self._jobs]
        own = self.profile.slurm.dependency
        waits = [own] if own else []
        waits += [f"{'afterok' if job.array is None else 'afterany'}:{job.id}" for job in earlier]
        waits += [f"afterany:{i}" for i in dict.fromkeys(j.id for j in self._ending if j.stage == wanted.stage)]
        more = {"slurm_dependency": ",".join(waits)} if waits else {}
        executor = _executor(logs, self.profile, wanted.parameters | more)
        calls = [StageJob(one) for one in wanted.orders(self.run, logs, earlier[-1].stage if earlier else None)]
        with _refusals(wanted.stage), _outside_of_jobs():
            jobs = executor.submit_array(calls) if len(calls) > 1 else [executor.submit(calls[0])]
        number = str(jobs[0].job_id).split("_")[0]
        job = Job(
            wanted.stage, number, len(calls) if len(calls) > 1 else None, str(logs / number / f"{number}_submission.sh")
        )
        self._jobs[job.stage] = job
        self.submission = replace(self.submission, jobs=(*self.submission.jobs, job))
        others = [one for one in read_submissions(self.run) if one.id != self.submission.id]
        write_submissions(self.run, [*others, self.submission])
        if waits:
            _check(job)
        return job

    def withdraw(self) -> None:
        """Cancel what was submitted, and forget it."""
        if self.submission.jobs:
            with contextlib.suppress(ClusterError):
                slurm_command(["scancel", *(job.id for job in self.submission.jobs)])
            write_submissions(self.run, [one for one in read_submissions(self.run) if one.id != self.submission.id])


def _check(job: Job) -> None:
    """SLURM looks at what a job asks for when it could begin, which of one that waits for others is too late to say so.

    Raises ClusterError where no node could ever take it.
    """
    lines = Path(job.script).read_text(encoding="utf-8").splitlines(keepends=True)
    script = "".join(line for line in lines if not line.startswith("#SBATCH --dependency"))
    try:
        slurm_command(["sbatch", "--test-only"], text=script, unless=_NOT_NOW)
    except ClusterError as error:
        why = str(error).removeprefix("sbatch: ")
        raise ClusterError(_REFUSED.format(stage=job.stage, why=why)) from error


def refusal(stage: str, recipe: Recipe, profile: Profile) -> str | None:
    """Why SLURM would not take a stage's job; None: it would. Nothing is submitted.

    Raises RecipeError where the profile's numbers contradict each other, or an option is not submitit's.
    """
    wanted = request(stage, recipe, profile, "doctor", "doctor").parameters
    asked = {name: value for name, value in wanted.items() if name != "slurm_dependency"}  # see _check
    executor = _executor(Path(tempfile.gettempdir()), profile, asked)
    script = executor._executor._make_submission_file_text("true", "doctor")
    try:
        slurm_command(["sbatch", "--test-only"], text=script, unless=_NOT_NOW)
    except ClusterError as error:
        return str(error).removeprefix("sbatch: ")
    return None


def cancel(run: RunDir) -> list[TaskState]:
    """Cancel the run's jobs that are queued or at work; returns them. Raises ClusterError where SLURM cannot be asked."""
    queue = Queue(run)
    live = [state for state in queue.states(now=True) if state.live]
    if queue.fault:
        raise ClusterError(queue.fault)
    _cancel(live)
    return live


def _cancel(states: Sequence[TaskState]) -> None:
    """End jobs, those first that wait for others. Raises ClusterError."""
    if states:
        slurm_command(["scancel", *dict.fromkeys(state.job.id for state in reversed(states))])


def _executor(logs: Path, profile: Profile, parameters: dict[str, Any]) -> Any:
    """Raises RecipeError for an option that submitit does not know."""
    python = profile.slurm.python or _quoted(sys.executable)
    executor = submitit.AutoExecutor(
        folder=logs / "%j",
        cluster="slurm",  # submitit would choose by what is in PATH
        slurm_python=f"{python} -m lad_dist.launch.ward",
        slurm_max_num_timeout=profile.slurm.max_requeues,
    )
    try:
        executor.update_parameters(**parameters)
    except (NameError, TypeError, ValueError) as error:
        known = {f"slurm_{name}" for name in submitit.SlurmExecutor._valid_parameters()} - OWN_OPTIONS.keys()
        what = " ".join(str(error).split()).partition(". Valid")[0]
        raise RecipeError(f"profile: slurm.options: {what}; valid: {', '.join(sorted(known))}") from None
    return executor


def _quoted(path: str) -> str:
    return shlex.quote(path)


def _log_folder(run: RunDir, profile: Profile, identity: str) -> Path:
    """A new folder for the logs of one submission: submitit would take results in an older one for those of new jobs.

    Raises ClusterError where it cannot be written.
    """
    named = profile.slurm.logs
    base = run.slurm_logs if named is None else Path(named).expanduser() / run.root.name
    folder = base.resolve() / identity
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ClusterError(
            f"{'profile: slurm.logs' if named else run.slurm_logs}: {folder}: cannot be written: "
            f"{error.strerror or error}; valid: a folder that this machine and all nodes can write"
        ) from error
    return folder


@contextlib.contextmanager
def _refusals(stage: str) -> Iterator[None]:
    """SLURM's refusal as one error; submitit also prints it."""
    heard = io.StringIO()
    try:
        with contextlib.redirect_stderr(heard):
            yield
    except (FailedJobError, FailedSubmissionError, OSError) as error:
        said = reason(str(error)) or "no reason was given"
        raise ClusterError(_REFUSED.format(stage=stage, why=said)) from error


@contextlib.contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Inside another job, sbatch would take that job's settings for those of the new one."""
    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    keep = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    with submitit.helpers.clean_env():
        os.environ.update(keep)
        yield
