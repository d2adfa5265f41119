"""Submit a run's stages to SLURM as a chain of jobs, each of which depends on the one before it.

The only file that imports submitit: it writes the sbatch scripts, passes on the orders, and requeues a job that was
warned of its time limit. ``job.py`` runs a stage on a node, ``chain.py`` builds the requests, ``slurm_jobs.py`` reads
the states of jobs.
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

from lad_dist.data.datasets import look
from lad_dist.errors import ClusterError, RecipeError
from lad_dist.extras import missing
from lad_dist.launch.chain import Request, StageSelection, request, resources, stages_left, waits_for
from lad_dist.launch.job import Order, SlurmTask, carry_out
from lad_dist.launch.local import store_of
from lad_dist.launch.shortage import shortage
from lad_dist.pipeline import check_nobody_distils
from lad_dist.profile import OWN_OPTIONS, Profile
from lad_dist.recipe import Recipe
from lad_dist.rundir import STAGES, RunDir
from lad_dist.slurm_jobs import (
    SlurmJob,
    SlurmQueue,
    Submission,
    TaskState,
    read_submissions,
    reason,
    slurm_command,
    write_submissions,
)

try:
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError, UncompletedJobError
    from submitit.helpers import DelayedSubmission
except ImportError as error:
    raise missing("submitit", "slurm", "a job on SLURM", ClusterError) from error

_REFUSED = "{stage}: SLURM refused the job: {why}; no job of this run is left in the queue"
_NOT_NOW = ("busy", "DOWN, DRAINED", "reserved")  # nodes that may be available when the job's turn comes
_REQUEUED_SECONDS = 120.0  # within which SLURM ends the tasks of a requeued job


class StageJob:
    """Callable that submitit runs on the node: carries out an order, and requeues a job that is to continue later."""

    def __init__(self, order: Order) -> None:
        self.order = order

    def __call__(self) -> None:
        """Carry out the order. Raises SystemExit if the stage failed, or the job is to start again."""
        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's handler: saves the order again and calls scontrol
        if carry_out(self.order) == "finished":
            return
        task = SlurmTask(self.order.logs)
        if task.rank != 0:  # SLURM ends all tasks once the first one has requeued the job
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
                "finished work is kept, and the same command continues"
            )
            task.write(state="failed", error=error)
            print(f"error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(ClusterError.exit_code) from None

    def checkpoint(self) -> DelayedSubmission:
        """Return the same order for the next start: progress is on disk."""
        return DelayedSubmission(StageJob(self.order))


@dataclass(frozen=True)
class Submitted:
    """Result of ``submit``: the new jobs (None: nothing was left to submit), and stages that were queued already.

    ``replaced``: jobs that depended on one that ended without doing its stage; they were cancelled and resubmitted.
    """

    submission: Submission | None
    queued: tuple[TaskState, ...]
    replaced: tuple[TaskState, ...] = ()

    @property
    def ids(self) -> set[str]:
        """Ids of the jobs that do the requested stages."""
        new = () if self.submission is None else self.submission.jobs
        return {job.id for job in new} | {state.job.id for state in self.queued}


def submit(
    recipe: Recipe,
    out: Path,
    profile: Profile,
    buffers: Path | str | None,
    wanted: StageSelection,
    say: Callable[[str], None],
) -> Submitted:
    """Submit those of the wanted stages that are neither done nor queued, each depending on those before it.

    ``buffers``: as for ``local.run``. ``say`` receives what each stage asks for, then each job as it is submitted. For a
    new run the data are checked first: if they are refused, nothing is left behind.

    Raises:
        ClusterError: SLURM refused a job (with its reason; nothing of the chain stays queued) or cannot be reached, or
            the log folder cannot be written.
        RecipeError: a field of the profile is not valid here.
        DataError: the data cannot be used.
        RunDirError: the run folder cannot be written.
    """
    identity = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    store = store_of(buffers, profile)
    todo = _Todo.of(recipe, out, profile, store, wanted, identity)
    run = RunDir.open(out, recipe, store, keep_recipe=wanted.again)
    queued, replaced = tuple(todo.queued), tuple(todo.replaced)
    if not todo.requests:
        return Submitted(None, queued)
    submission = Submission(identity, time.time(), profile.name, str(_log_folder(run, profile, identity)))
    _cancel(replaced)
    chain = Chain(run, submission, profile, todo.before, todo.ending)
    for one in todo.requests:
        say(f"{one.stage}: asks for {resources(one)}")
    try:
        for one in todo.requests:
            job = chain.add(one)
            say(f"{job.stage}: job {job.id}{_array_of(job)}: {quote(job.script)}")
            say(f"  output: {job.output(submission.logs)}")
    except BaseException:
        chain.withdraw()
        raise
    return Submitted(chain.submission, queued, replaced)


def dry_run(
    recipe: Recipe,
    out: Path,
    profile: Profile,
    buffers: Path | str | None,
    wanted: StageSelection,
    say: Callable[[str], None],
) -> None:
    """Print what ``submit`` would do, and whether SLURM would accept it; submit and write nothing.

    Raises ClusterError if SLURM would refuse a stage, and what ``submit`` raises.
    """
    todo = _Todo.of(recipe, out, profile, store_of(buffers, profile), wanted, "SUBMISSION")
    for state in todo.queued:
        say(f"already queued: {state.line()}")
    for state in todo.replaced:
        say(f"to be submitted again, since its dependency has ended: {state.line()}")
    jobs, refused = dict(todo.before), list[str]()
    for one in todo.requests:
        waits = waits_for(one.stage, jobs, todo.ending, profile.slurm.dependency)
        jobs[one.stage] = job = SlurmJob(one.stage, f"<{one.stage}>", one.count if one.count > 1 else None, "")
        why = _refused(one, profile)
        refused += [] if why is None else [one.stage]
        ranks = f", {one.profile.ranks} ranks" if one.stage == "distill" else ""
        verdict = "SLURM would take it" if why is None else f"SLURM would refuse it: {why}"
        say(
            f"{one.stage}: {_array_of(job).removeprefix(', ') or 'one job'}{ranks}, on the {_device_of(one)}; {verdict}"
        )
        say(f"  asks for {resources(one)}")
        say(f"  sbatch {' '.join(_asked(one, profile, waits))}")
    say(f"dry run: nothing submitted, nothing written; the run folder would be {quote(str(out))}" if todo.requests
        else "dry run: nothing to submit")  # fmt: skip
    if refused:
        raise ClusterError(
            f"SLURM would refuse {', '.join(refused)}; correct the profile, or see `lad-dist doctor --on PROFILE`"
        )


def _array_of(job: SlurmJob) -> str:
    return "" if job.array is None else f", an array of {job.array} jobs"


def _device_of(one: Request) -> str:
    gpus = one.parameters.get("gpus_per_node")
    return {"cpu": "CPU", "cuda": "GPU"}.get(one.profile.device, "GPU" if gpus else "CPU, or a GPU where there is one")


@dataclass(frozen=True)
class _Todo:
    """Plan of a submission, made before anything is written or submitted.

    ``before``: the jobs of queued stages; ``ending``: jobs whose processes SLURM is ending; ``replaced``: queued jobs
    that depend on one that has ended, to be cancelled and resubmitted.
    """

    requests: list[Request]
    queued: list[TaskState]
    replaced: list[TaskState]
    before: dict[str, SlurmJob]
    ending: list[SlurmJob]

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        out: Path,
        profile: Profile,
        store: Path | str | None,
        wanted: StageSelection,
        identity: str,
    ) -> _Todo:
        if shutil.which("sbatch") is None:
            raise ClusterError(
                "sbatch: not found; submit from a login node of the cluster, or choose another profile with --on"
            )
        run, buffer = RunDir(out), None
        if run.recipe.exists():
            run.check_recipe(recipe)
            check_nobody_distils(run, recipe)
        else:
            RunDir.check_free(out)
            look(recipe.data)
            buffer = RunDir.buffer_to_come(out, recipe, store)
        left = list(wanted.stages) if wanted.again else stages_left(recipe, run, wanted.stages, buffer)
        queue = SlurmQueue(run)
        states = [state for state in queue.states(now=True) if wanted.means(state.job)]
        if queue.fault:
            raise ClusterError(queue.fault)
        queued = [state for state in states if state.live]
        todo = [stage for stage in left if stage not in {state.stage for state in queued}]
        replaced = _in_vain(queued, todo[0]) if todo and not wanted.again else []
        queued = [state for state in queued if state not in replaced]
        todo = [stage for stage in STAGES if stage in todo or stage in {state.stage for state in replaced}]
        requests = [request(stage, recipe, profile, out.name, identity, wanted.question) for stage in todo]
        for one in requests:
            _executor(Path(tempfile.gettempdir()), profile, one.parameters)  # rejects options unknown to submitit
        ending = [state.job for state in states if state.state == "ending"]
        return cls(requests, queued, replaced, {state.stage: state.job for state in queued}, ending)


def _in_vain(queued: Sequence[TaskState], stage: str) -> list[TaskState]:
    """Return the later stages' jobs that have not begun: if ``stage`` is resubmitted, they depend on its old job."""
    later = STAGES[STAGES.index(stage) + 1 :]
    begun = {state.job.id for state in queued if state.state == "running" or state.restarts}
    return [state for state in queued if state.stage in later and state.job.id not in begun]


class Chain:
    """Jobs of one submission, recorded as they are submitted.

    ``before``: the job of each queued stage; ``ending``: jobs whose processes SLURM is ending.
    """

    def __init__(
        self,
        run: RunDir,
        submission: Submission,
        profile: Profile,
        before: dict[str, SlurmJob],
        ending: Sequence[SlurmJob] = (),
    ) -> None:
        self.run, self.submission, self.profile = run, submission, profile
        self._jobs, self._ending = dict(before), ending

    def add(self, wanted: Request) -> SlurmJob:
        """Submit one stage, to begin after the queued stages before it."""
        logs = Path(self.submission.logs)
        waits = waits_for(wanted.stage, self._jobs, self._ending, self.profile.slurm.dependency)
        earlier = [stage for stage in STAGES[: STAGES.index(wanted.stage)] if stage in self._jobs]
        executor = _executor(logs, self.profile, wanted.parameters, waits)
        calls = [StageJob(one) for one in wanted.orders(self.run, logs, earlier[-1] if earlier else None)]
        with _refusals(wanted), _outside_of_jobs():
            jobs = executor.submit_array(calls) if len(calls) > 1 else [executor.submit(calls[0])]
        number = str(jobs[0].job_id).split("_")[0]
        script = str(logs / number / f"{number}_submission.sh")
        question = "" if wanted.question is None else wanted.question.name
        job = SlurmJob(wanted.stage, number, len(calls) if len(calls) > 1 else None, script, question)
        self._jobs[job.stage] = job
        self.submission = replace(self.submission, jobs=(*self.submission.jobs, job))
        others = [one for one in read_submissions(self.run) if one.id != self.submission.id]
        write_submissions(self.run, [*others, self.submission])
        if waits:
            _check(job, wanted)
        return job

    def withdraw(self) -> None:
        """Cancel what was submitted, and remove it from the record."""
        if self.submission.jobs:
            with contextlib.suppress(ClusterError):
                slurm_command(["scancel", *(job.id for job in self.submission.jobs)])
            write_submissions(self.run, [one for one in read_submissions(self.run) if one.id != self.submission.id])


def _check(job: SlurmJob, wanted: Request) -> None:
    """Test a job without its dependencies: SLURM checks resources only when it could begin, too late to report.

    Raises ClusterError if no node could ever take it.
    """
    lines = Path(job.script).read_text(encoding="utf-8").splitlines(keepends=True)
    script = "".join(line for line in lines if not line.startswith("#SBATCH --dependency"))
    why = _why_refused(script, wanted)
    if why is not None:
        raise ClusterError(_REFUSED.format(stage=job.stage, why=why))


def refusal(stage: str, recipe: Recipe, profile: Profile) -> str | None:
    """Return why SLURM would refuse a stage's job; None: it would accept it. Nothing is submitted.

    Raises RecipeError if the profile's numbers contradict each other, or an option is not submitit's.
    """
    return _refused(request(stage, recipe, profile, "doctor", "doctor"), profile)


def _refused(wanted: Request, profile: Profile) -> str | None:
    return _why_refused(_script(wanted, profile, None), wanted)  # without dependencies, see _check


def _why_refused(script: str, wanted: Request) -> str | None:
    try:
        slurm_command(["sbatch", "--test-only"], text=script, unless=_NOT_NOW)
    except ClusterError as error:
        return _with_shortage(str(error).removeprefix("sbatch: "), wanted)
    return None


def _with_shortage(why: str, wanted: Request) -> str:
    lacks = shortage(wanted.parameters)
    return why if lacks is None else f"{why} ({lacks})"


def _script(wanted: Request, profile: Profile, waits: str | None) -> str:
    """Return a script like the one that submitit would submit."""
    executor = _executor(Path(tempfile.gettempdir()), profile, wanted.parameters, waits)
    text: str = executor._executor._make_submission_file_text("true", "doctor")
    return text


def _asked(wanted: Request, profile: Profile, waits: str | None) -> list[str]:
    """Return sbatch's options of a stage's jobs, except those for the log files."""
    lines = _script(wanted, profile, waits).splitlines()
    found = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    array = [f"--array=0-{wanted.count - 1}"] if wanted.count > 1 else []
    return array + [one for one in found if not one.startswith(("--output", "--error", "--open-mode", "--wckey"))]


def cancel(run: RunDir) -> list[TaskState]:
    """Cancel the run's queued and running jobs; return them. Raises ClusterError if SLURM cannot be asked."""
    queue = SlurmQueue(run)
    live = [state for state in queue.states(now=True) if state.live]
    if queue.fault:
        raise ClusterError(queue.fault)
    _cancel(live)
    return live


def _cancel(states: Sequence[TaskState]) -> None:
    """Cancel jobs, dependent ones first. Raises ClusterError."""
    if states:
        slurm_command(["scancel", *dict.fromkeys(state.job.id for state in reversed(states))])


def _executor(logs: Path, profile: Profile, parameters: dict[str, Any], waits: str | None = None) -> Any:
    """Return submitit's executor. Raises RecipeError for an option unknown to submitit."""
    python = profile.slurm.python or quote(sys.executable)
    executor = submitit.AutoExecutor(
        folder=logs / "%j",
        cluster="slurm",  # submitit would choose by PATH
        slurm_python=f"{python} -m lad_dist.launch.supervisor",
        slurm_max_num_timeout=profile.slurm.max_requeues,
    )
    try:
        executor.update_parameters(**parameters, **({} if waits is None else {"slurm_dependency": waits}))
    except (NameError, TypeError, ValueError) as error:
        known = {f"slurm_{name}" for name in submitit.SlurmExecutor._valid_parameters()} - OWN_OPTIONS.keys()
        what = " ".join(str(error).split()).partition(". Valid")[0]
        raise RecipeError(f"profile: slurm.options: {what}; valid: {', '.join(sorted(known))}") from None
    return executor


def _log_folder(run: RunDir, profile: Profile, identity: str) -> Path:
    """Make a new log folder for one submission: in an older one submitit would take old results for the new jobs'.

    Raises ClusterError if it cannot be written.
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
def _refusals(wanted: Request) -> Iterator[None]:
    """Raise SLURM's refusal as one ClusterError, and keep submitit from printing it."""
    heard = io.StringIO()
    try:
        with contextlib.redirect_stderr(heard):
            yield
    except (FailedJobError, FailedSubmissionError, OSError) as error:
        said = _with_shortage(reason(str(error)) or "no reason was given", wanted)
        raise ClusterError(_REFUSED.format(stage=wanted.stage, why=said)) from error


@contextlib.contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Hide the settings of an enclosing job, which sbatch would apply to the new one."""
    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    keep = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    with submitit.helpers.clean_env():
        os.environ.update(keep)
        yield
