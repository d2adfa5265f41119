"""The verbs that do the work: ``run`` and one for each stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lad_dist.cli import cluster, terminal
from lad_dist.cli.cluster import WaitOption
from lad_dist.cli.options import FleetOption, JobOptions, RanksOption

if TYPE_CHECKING:
    from lad_dist.launch.chain import StageSelection
    from lad_dist.pipeline import Pipeline


def run(
    asked: JobOptions,
    quick: Annotated[
        bool, typer.Option("--quick", help="Short trial: budgets cut to ten minutes on two CPU cores.")
    ] = False,
    fleet: FleetOption = None,
    ranks: RanksOption = None,
    wait: WaitOption = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="On SLURM: print what would be submitted; submit and write nothing."),
    ] = False,
) -> None:
    """Run all stages not done yet: experts, distillation, evaluation, report. Resumes."""
    from lad_dist.launch.chain import StageSelection
    from lad_dist.rundir import STAGES

    if quick:
        asked = _quick(asked)
    if dry_run:
        return cluster.dry_run(asked, asked.profile(fleet=fleet, ranks=ranks), StageSelection(STAGES))
    _print_results(_execute(asked, [lambda p: p.all()], StageSelection(STAGES), wait=wait, fleet=fleet, ranks=ranks))


def _quick(asked: JobOptions) -> JobOptions:
    """Return the job with its budgets shortened, in a run folder of its own; print what was shortened."""
    from lad_dist.errors import RecipeError
    from lad_dist.interrupts import as_exceptions
    from lad_dist.plan.dataset_info import dataset_info
    from lad_dist.plan.quick import SECONDS, quick

    if asked.found_job().run is not None:
        raise RecipeError(
            f"--quick: {asked.job} is a run folder, whose recipe is fixed; valid: a recipe, or no --quick"
        )
    recipe = asked.recipe()
    with as_exceptions():
        made = quick(recipe, dataset_info(recipe.data))
    folder, say = asked.folder(recipe), terminal.stdout().print
    say(f"quick: about {made.seconds / 60:.1f} min on two CPU cores by the table of `lad-dist plan`", soft_wrap=True)
    changes = ", ".join(f"{field} {before} -> {now}" for field, before, now in made.changes)
    say(f"quick: shortened: {changes}" if changes else "quick: nothing had to be shortened", soft_wrap=True)
    if made.seconds > SECONDS:
        say("quick: it takes longer on these images; a smaller data.image_size or ipc shortens it", soft_wrap=True)
    sets = [*(asked.sets or ()), *(f"{field}={now}" for field, _, now in made.changes)]
    return replace(asked, out=asked.out or folder.with_name(folder.name + "+quick"), sets=sets)


def experts(asked: JobOptions, fleet: FleetOption = None, wait: WaitOption = False) -> None:
    """Train the experts into the trajectory buffer."""
    from lad_dist.launch.chain import StageSelection

    _execute(asked, [lambda p: p.experts()], StageSelection(("experts",)), wait=wait, fleet=fleet)


def distill(
    asked: JobOptions,
    ranks: RanksOption = None,
    replay: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Use the windows recorded by this run, which reproduces its set."),
    ] = None,
    wait: WaitOption = False,
) -> None:
    """Distil the synthetic set from the experts, by the recipe's method."""
    from lad_dist.launch.chain import StageSelection

    replay = None if replay is None else replay.expanduser()
    wanted = StageSelection(()) if replay is not None else StageSelection(("distill",))
    _execute(asked, [lambda p: p.distill(replay)], wanted, wait=wait, ranks=ranks)


def evaluate(
    asked: JobOptions,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Measure this instead of the distilled set: a name of evaluate.baselines (docs/recipes.md). Repeatable.",
        ),
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Networks to train: convnet, vgg11, resnet18, alexnet, mlp, vit or module:attribute.",
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Networks to train per source and architecture.")] = None,
    ranks: RanksOption = None,
    wait: WaitOption = False,
) -> None:
    """Measure what networks learn from the distilled set, from chosen real images, or from the whole training set.

    The run's own recipe stays unchanged, whatever is asked here; its report is rewritten, if it has one.
    """
    from lad_dist.launch.chain import Question, StageSelection
    from lad_dist.results import check_source

    sources = tuple(dict.fromkeys(map(check_source, baseline))) if baseline else ("distilled",)
    more = [] if arch is None else [f"evaluate.architectures=[{arch}]"]
    more += [] if seeds is None else [f"evaluate.seeds={seeds}"]
    in_this_way = asked.recipe(more)
    wanted = StageSelection(("evaluate",), again=True, question=Question(sources, in_this_way))
    _print_results(_execute(asked, [lambda p: p.ask(in_this_way, sources)], wanted, wait=wait, ranks=ranks))


def report(asked: JobOptions, wait: WaitOption = False) -> None:
    """Write the tables, pictures and the page of a run."""
    from lad_dist.launch.chain import StageSelection

    _say_where(_execute(asked, [lambda p: p.report()], StageSelection(("report",), again=True), wait=wait))


def _execute(
    asked: JobOptions,
    stages: Sequence[Callable[[Pipeline], None]],
    wanted: StageSelection,
    wait: bool = False,
    **overrides: object,
) -> Pipeline:
    """Run stages of the job by the profile, with those ``overrides`` of its fields that are not None.

    With a SLURM profile, ``wanted`` is submitted instead, and the command ends here.
    """
    from lad_dist.launch import local
    from lad_dist.progress import Screen

    recipe, profile = asked.recipe(), asked.profile(**overrides)
    if profile.launcher == "slurm":
        cluster.submit(asked, recipe, profile, wanted, wait)
        raise typer.Exit
    screen = Screen(terminal.stdout())
    return local.run(recipe, asked.folder(recipe), profile, asked.buffers, screen, stages, keep_recipe=wanted.again)


def _print_results(pipeline: Pipeline) -> None:
    """Print the table of results, once if a launcher started several ranks."""
    from lad_dist import ranks, results
    from lad_dist.results.paired import added
    from lad_dist.status import print_results

    where = ranks.place()
    if where is not None and where.rank != 0:
        return
    rows = results.read(pipeline.run.results)
    print_results(rows, terminal.stdout())
    for line in added(rows):
        terminal.stdout().print(line, soft_wrap=True)
    _say_where(pipeline)


def _say_where(pipeline: Pipeline) -> None:
    page = pipeline.run.report / "index.html"
    later = f"run folder: {pipeline.run.root} (`lad-dist report {pipeline.run.root}` writes the report)"
    where = f"report: {page}" if page.exists() else later
    terminal.stdout().print(where, soft_wrap=True)
