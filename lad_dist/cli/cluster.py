"""What the verbs do where the profile says SLURM: submit, stay with it if asked to, cancel."""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lad_dist.cli import terminal
from lad_dist.cli.options import JobOptions

if TYPE_CHECKING:
    from lad_dist.profile import Profile
    from lad_dist.recipe import Recipe
    from lad_dist.rundir import RunDir

WaitOption = Annotated[
    bool,
    typer.Option("--wait", help="On SLURM: stay, show progress, and end as the jobs do; Ctrl-C leaves them alone."),
]


def submit(asked: JobOptions, recipe: Recipe, profile: Profile, stages: Sequence[str], wait: bool) -> Path:
    """Submit stages of the job as the profile says; returns the run folder. Raises what ``launch.slurm.submit`` raises."""
    from lad_dist.errors import RecipeError
    from lad_dist.launch import slurm
    from lad_dist.rundir import RunDir

    if not stages:
        raise RecipeError(
            f"profile {profile.name}: submits whole stages to SLURM, which this option is none of; valid: another --on"
        )
    out, screen = asked.folder(recipe), terminal.stdout()

    def say(text: str) -> None:
        screen.print(text, soft_wrap=True)

    made = slurm.submit(recipe, out, profile, asked.buffers, stages, say)
    for state in made.replaced:
        say(f"submitted again, since what it waited for has ended: {state.line()}")
    for state in made.queued:
        say(f"already queued: {state.line()}")
    if made.submission is None and not made.queued:
        say("all stages are done; nothing was submitted")
    if made.submission is not None:
        say(f"logs: {made.submission.logs}/%j/%j_%t_log.out (%j: the job's id, %t: its task; errors in ..._log.err)")
    if not (made.submission is None and not made.queued):
        say(f"watch: lad-dist status {out} --watch")
        say(f"cancel: lad-dist cancel {out}")
    if wait:
        _stay(RunDir(out), made.ids)
        _print_results(RunDir(out))
    return out


def _print_results(run: RunDir) -> None:
    from lad_dist import results
    from lad_dist.status import print_results

    print_results(results.read(run.results), terminal.stdout())
    page = run.report / "index.html"
    terminal.stdout().print(f"report: {page}" if page.exists() else f"run folder: {run.root}", soft_wrap=True)


def _stay(run: RunDir, ids: Container[str]) -> None:
    from lad_dist.errors import Interrupted
    from lad_dist.interrupts import as_exceptions
    from lad_dist.launch.waiting import wait

    try:
        with as_exceptions():
            wait(run, ids, lambda text: terminal.stdout().print(text, soft_wrap=True))
    except Interrupted as left:
        raise Interrupted(
            f"no longer waiting; the jobs go on (lad-dist status {run.root} --watch, lad-dist cancel {run.root})"
        ) from left


def cancel(folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]) -> None:
    """Cancel the run's SLURM jobs, queued or at work. What is finished is kept."""
    from lad_dist.launch import slurm
    from lad_dist.rundir import RunDir

    screen = terminal.stdout()
    ended = slurm.cancel(RunDir.existing(folder))
    for state in ended:
        screen.print(f"cancelled: {state.line()}", soft_wrap=True)
    if not ended:
        screen.print("none of its jobs is queued or at work", soft_wrap=True)
