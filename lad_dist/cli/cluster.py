"""The verbs on SLURM: submit, wait if asked to, cancel."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from lad_dist.cli import terminal
from lad_dist.cli.options import JobOptions

if TYPE_CHECKING:
    from lad_dist.launch.chain import StageSelection
    from lad_dist.profile import Profile
    from lad_dist.recipe import Recipe
    from lad_dist.rundir import RunDir

WaitOption = Annotated[
    bool,
    typer.Option(
        "--wait", help="On SLURM: show progress until the jobs end, exit as they do; Ctrl-C keeps them running."
    ),
]


def submit(asked: JobOptions, recipe: Recipe, profile: Profile, wanted: StageSelection, wait: bool) -> None:
    """Submit stages of the job by the profile. Raises as ``launch.slurm.submit``."""
    from lad_dist.errors import RecipeError
    from lad_dist.launch import slurm
    from lad_dist.rundir import RunDir

    if not wanted.stages:
        raise RecipeError(
            f"profile {profile.name}: submits whole stages to SLURM, not this option; valid: another --on"
        )
    out = asked.folder(recipe)
    made = slurm.submit(recipe, out, profile, asked.buffers, wanted, _say)
    for state in made.replaced:
        _say(f"submitted again, since its dependency has ended: {state.line()}")
    for state in made.queued:
        _say(f"already queued: {state.line()}")
    if made.ids:
        _say(f"watch: lad-dist status {quote(str(out))} --watch")
        _say(f"cancel: lad-dist cancel {quote(str(out))}")
    else:
        _say("all stages are done; nothing was submitted")
    if wait:
        _stay(RunDir(out), made.ids)
        _print_results(RunDir(out))


def dry_run(asked: JobOptions, profile: Profile, wanted: StageSelection) -> None:
    """Print what ``submit`` would submit. Raises ClusterError if SLURM would refuse it, and what ``submit`` raises."""
    from lad_dist.errors import RecipeError
    from lad_dist.launch import slurm

    if profile.launcher != "slurm":
        raise RecipeError(
            f"--dry-run: profile {profile.name} submits no jobs; valid: a SLURM profile with --on; `lad-dist plan` "
            "estimates a run on this machine"
        )
    recipe = asked.recipe()
    slurm.dry_run(recipe, asked.folder(recipe), profile, asked.buffers, wanted, _say)


def _say(text: str) -> None:
    terminal.stdout().print(text, soft_wrap=True)


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

    folder = quote(str(run.root))
    try:
        with as_exceptions():
            wait(run, ids, _say)
    except Interrupted as left:
        raise Interrupted(
            f"no longer waiting; the jobs continue (lad-dist status {folder} --watch, lad-dist cancel {folder})"
        ) from left


def logs(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    stage: Annotated[
        str | None, typer.Argument(metavar="[STAGE]", help="experts, distill, evaluate or report; default: all.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Continue until the jobs are over.")] = False,
) -> None:
    """Print the logs of a run's SLURM jobs, of every rank."""
    from lad_dist.launch.logs import show
    from lad_dist.rundir import RunDir

    with terminal.until_interrupted():
        show(RunDir.existing(folder), stage, follow, lambda text: typer.echo(text, nl=False))


def cancel(folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]) -> None:
    """Cancel the run's queued and running SLURM jobs. Finished work is kept."""
    from lad_dist.launch import slurm
    from lad_dist.rundir import RunDir

    screen = terminal.stdout()
    ended = slurm.cancel(RunDir.existing(folder))
    for state in ended:
        screen.print(f"cancelled: {state.line()}", soft_wrap=True)
    if not ended:
        screen.print("no job of this run is queued or running", soft_wrap=True)
