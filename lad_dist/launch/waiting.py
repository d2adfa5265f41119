"""Wait for a chain of SLURM jobs to end, reporting changes and how it failed. No submitit here."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Sequence
from shlex import quote

from lad_dist.errors import ClusterError
from lad_dist.rundir import RunDir
from lad_dist.slurm_jobs import SlurmQueue, TaskState
from lad_dist.status import Follower

LOOK_SECONDS = 2.0  # between polls of the run's files; squeue is polled less often
PROGRESS_SECONDS = 10.0  # between two progress lines of one stage


def wait(run: RunDir, ids: Container[str], say: Callable[[str], None]) -> None:
    """Wait until the jobs ``ids`` of the run are over. An interruption ends only the wait.

    Raises:
        ClusterError: a stage of theirs is not done; names the job, its reason and its log.
        LadDistError: what the run folder holds is damaged.
    """
    queue, follower, told = SlurmQueue(run), Follower(run.root), _Told(say)
    while True:
        states = [state for state in queue.states() if state.job.id in ids]
        told.jobs(states, queue.fault)
        for stage in follower.read().stages:
            if stage.state in ("running", "done"):
                told.progress(stage.name, f"{stage.name}: {stage.state}{', ' if stage.detail else ''}{stage.detail}")
        if queue.fault is None and all(one.over for one in states):
            break
        time.sleep(LOOK_SECONDS)
    done = _done_by_others(states, run)
    failed = failure([state for state in states if state.stage not in done], run)
    if failed is not None:
        raise failed


def _done_by_others(states: Sequence[TaskState], run: RunDir) -> set[str]:
    """Return the stages that are done, by what is on disk, although one of their jobs did not finish.

    Results and reports may be there from before, so for these stages a job must have finished as well.
    """
    from lad_dist import recipe_file
    from lad_dist.launch.chain import stages_left

    doubtful = {state.stage for state in states if state.state != "done"}
    if not doubtful:
        return set()
    finished = {state.stage for state in states if state.state == "done"} | {"experts", "distill"}
    return (doubtful & finished) - set(stages_left(recipe_file.load(run.recipe), run, list(doubtful)))


def failure(states: Sequence[TaskState], run: RunDir) -> ClusterError | None:
    """Return the failure of the chain, by its first job that did not finish; None if all have."""
    wrong = [one for one in states if one.over and one.state != "done"]
    if not wrong:
        return None
    first = next((one for one in wrong if one.state in ("failed", "gone")), wrong[0])
    never = [one.stage for one in wrong if one.state == "cancelled" and one.stage != first.stage]
    after = f"; not started, as they need it: {', '.join(dict.fromkeys(never))}" if never else ""
    log = f"; its log: {quote(str(first.log))}" if first.log.exists() else ""
    return ClusterError(
        f"{first.line()}{after}{log}; finished work is kept, and the same command submits the rest (run folder {run.root})"
    )


class _Told:
    """Reporter of changes: prints only what is new."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._lines: dict[str, str] = {}
        self._last: dict[str, float] = {}

    def jobs(self, states: Sequence[TaskState], fault: str | None) -> None:
        if fault is not None:
            self._once("squeue", f"SLURM: {fault}")
        for one in states:
            known = (one.state, one.words.partition(",")[0])  # without the time left, which always changes
            if self._lines.get(one.id) != str(known):
                self._lines[one.id] = str(known)
                self._say(one.line())
                if one.dashboard and one.state == "running":
                    self._once(f"{one.id} dashboard", one.dashboard)

    def progress(self, stage: str, text: str) -> None:
        if (
            text != self._lines.get(stage)
            and time.monotonic() - self._last.get(stage, -PROGRESS_SECONDS) >= PROGRESS_SECONDS
        ):
            self._lines[stage], self._last[stage] = text, time.monotonic()
            self._say(text)

    def _once(self, key: str, text: str) -> None:
        if self._lines.get(key) != text:
            self._lines[key] = text
            self._say(text)
