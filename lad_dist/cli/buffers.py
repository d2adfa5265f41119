"""``lad-dist buffer VERB``: inspect and rewrite trajectory buffers, export them to other tools' files, or import those."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lad_dist.cli import terminal
from lad_dist.cli.options import JobOptions, JsonOption

if TYPE_CHECKING:
    from lad_dist.pipeline import Pipeline
    from lad_dist.trajectories.reader import Buffer
    from lad_dist.trajectories.schema import Stage


class BufferFormat(StrEnum):
    """Values of ``--to`` and ``--from``: file formats of other tools."""

    pt = "pt"


class Which(StrEnum):
    """Values of ``--stage``."""

    representation = "representation"
    classifier = "classifier"
    both = "both"

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The selected stages, in order."""
        from lad_dist.trajectories.schema import STAGES

        return tuple(stage for stage in STAGES if self.value in ("both", stage))


RunOrBuffer = Annotated[str, typer.Argument(metavar="DIR", help="A run folder, a buffer folder, or a buffer's URI.")]


def inspect(
    folder: RunOrBuffer,
    as_json: JsonOption = False,
    digest: Annotated[
        bool, typer.Option("--digest/--no-digest", help="Open every part to compute the digest of all weights.")
    ] = True,
) -> None:
    """Show each expert's epochs and sizes by stage, and a digest of all weights, from the checksums in the parts."""
    from lad_dist.progress import Screen

    buffer = _buffer(folder)
    if digest:
        with Screen(terminal.stderr()).task("digest", len(buffer.parts), "parts") as task:
            found = buffer.inspect(report=task.advance)
    else:
        found = buffer.inspect(digest=False)
    if as_json:
        return terminal.print_json(found)
    from rich.table import Table

    table = Table("stage", "expert", "epochs", "parts", "MB")
    for stage, members in found["stages"].items():
        for expert, has in members.items():
            table.add_row(stage, expert, _ranges(has["epochs"]), str(len(has["parts"])), f"{has['bytes'] / 1e6:.2f}")
    terminal.stdout().print(table)
    size = f"{found['bytes'] / 1e6:.2f} MB"
    lines = [
        f"{found['folder']}: {found['parts']} parts, {found['checkpoints']} checkpoints, {size}",
        f"experts: {found['meta']['experts_hash']}",
        *([] if found["kept"] == "all" else [f"keeps:   only {buffer.kept}"]),
        *([f"digest:  {found['digest']}"] if digest else []),
    ]
    terminal.stdout().print("\n".join(lines), soft_wrap=True)


def verify(folder: RunOrBuffer) -> None:
    """Read every byte of every part; exit code 1 and the file's name on any damage."""
    buffer = _buffer(folder)
    problems = buffer.verify()
    if problems:
        for problem in problems:
            terminal.stderr().print(terminal.styled(problem), soft_wrap=True)
        raise typer.Exit(1)
    checkpoints = sum(part.last - part.first + 1 for part in buffer.parts)
    typer.echo(f"{len(buffer.parts)} parts, {checkpoints} checkpoints, all intact")


def compact(
    folder: RunOrBuffer,
    epochs_per_part: Annotated[
        int, typer.Option(min=1, help="More make fewer files, and a window reads a larger footer.")
    ] = 25,
) -> None:
    """Rewrite the parts of complete experts as fewer, larger ones: the same checkpoints and digest.

    New parts are there before old ones go, so a stopped call continues, and running distillations read on. Refused
    while experts are trained or imported here.
    """
    from lad_dist.interrupts import as_exceptions
    from lad_dist.progress import Screen
    from lad_dist.trajectories import upkeep

    buffer = _buffer(folder)
    with as_exceptions(), Screen(terminal.stderr()).task("compact", len(buffer.keys), "experts") as task:
        before, after = upkeep.compact(buffer, epochs_per_part, task.advance)
    typer.echo(f"{before} parts before, {after} now")


def prune(
    folder: RunOrBuffer,
    for_: Annotated[
        list[str] | None,
        typer.Option(
            "--for",
            metavar="JOB",
            help="Keep what this recipe or run reads; repeatable. DIR itself, if it is a run, always counts.",
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove the epochs that no window, regression or teacher of the given recipes reads; says how much that frees.

    Name every recipe that shares the buffer. Others get an error afterwards, if they need more. Refused while experts
    are trained or imported here.
    """
    from lad_dist import catalog, recipe_file
    from lad_dist.errors import TrajectoryError
    from lad_dist.interrupts import as_exceptions
    from lad_dist.progress import Screen
    from lad_dist.trajectories import kept, upkeep

    buffer = _buffer(folder)
    files = [catalog.find_job(job).recipe for job in for_ or ()]
    own = Path(folder).expanduser() / "recipe.yaml"
    if own.is_file():
        files.append(own)
    if not files:
        raise TrajectoryError(
            f"{buffer.folder}: which epochs are needed is not known; valid: --for JOB, or a run folder"
        )
    needed, hash_ = None, buffer.meta.experts_hash
    for recipe, file in ((recipe_file.load(file), file) for file in files):
        if recipe.experts_hash() != hash_:
            raise TrajectoryError(
                f"{file}: has other experts than {buffer.folder}; valid: recipes that share its experts"
            )
        needed = kept.needed(recipe) if needed is None else needed.together(kept.needed(recipe))
    assert needed is not None
    plan = upkeep.plan_prune(buffer, needed)
    parts = len(plan.removed) + len(plan.rewritten)
    typer.echo(
        f"{buffer.folder}: keeps {needed}; frees about {plan.bytes / 1e6:,.1f} of "
        f"{sum(map(buffer.size_of, buffer.parts)) / 1e6:,.1f} MB in {parts} parts"
    )
    if not yes:
        typer.confirm("Other windows will need new experts. Remove them?", abort=True)
    with as_exceptions(), Screen(terminal.stderr()).task("prune", parts, "parts") as task:
        upkeep.prune(buffer, needed, task.advance)
    typer.echo(f"{len(buffer.parts)} parts, {sum(map(buffer.size_of, buffer.parts)) / 1e6:,.1f} MB")


def export(
    folder: RunOrBuffer,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write representation/ and classifier/ to.")],
    to: Annotated[
        BufferFormat, typer.Option("--to", help="pt: replay_buffer_N.pt, as MTT, DATM and LAD read them.")
    ] = BufferFormat.pt,
    stage: Annotated[Which, typer.Option(help="Stages to write.")] = Which.both,
    experts_per_file: Annotated[int, typer.Option(min=1, help="Other code reads 10 per file.")] = 10,
    force: Annotated[bool, typer.Option("--force", help="Replace existing replay_buffer_N.pt files.")] = False,
) -> None:
    """Write the complete experts to files that the code of other methods reads."""
    from lad_dist.interrupts import as_exceptions
    from lad_dist.trajectories.replay import complete_experts, export_pt

    buffer = _buffer(folder)
    with as_exceptions():
        files = export_pt(
            buffer,
            out.expanduser(),
            stage.stages,
            experts_per_file,
            lambda file: terminal.stdout().print(str(file), soft_wrap=True),
            force,
        )
    for each in stage.stages:
        whole = complete_experts(buffer, each)
        left_out = [expert for expert in buffer.experts(each) if expert not in whole]
        more = f"; left out as incomplete: {_ranges(left_out)}" if left_out else ""
        terminal.stdout().print(f"{each}: {len(whole)} experts{more}", soft_wrap=True)
    terminal.stdout().print(f"{len(files)} files in {out}", soft_wrap=True)


def import_(
    asked: JobOptions,
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="SOURCE",
            help="A folder with representation/ and classifier/, or, with --stage, files or their folder.",
        ),
    ],
    from_: Annotated[
        BufferFormat, typer.Option("--from", help="pt: replay_buffer_N.pt, as MTT, DATM and LAD write them.")
    ] = BufferFormat.pt,
    stage: Annotated[Which, typer.Option(help="Stages to read.")] = Which.both,
    first_expert: Annotated[int, typer.Option(min=0, help="Number of the first imported expert.")] = 0,
) -> None:
    """Import experts that another method's code trained into the buffer of a job's run."""
    from lad_dist.launch import local
    from lad_dist.progress import Screen

    files = {each: _pt_files(sources, each, stage) for each in stage.stages}
    recipe, profile = asked.recipe(), asked.profile()
    local.run(
        recipe,
        asked.folder(recipe),
        profile,
        asked.buffers,
        Screen(terminal.stdout()),
        [_importing(files, first_expert)],
    )


def _importing(files: dict[Stage, list[Path]], first_expert: int) -> Callable[[Pipeline], None]:
    """Return the stage that imports the files into the run."""

    def stage_of(pipeline: Pipeline) -> None:
        from lad_dist.experts.train import ExpertTrainer
        from lad_dist.trajectories.reader import Buffer
        from lad_dist.trajectories.replay import import_pt

        e, location, say = pipeline.recipe.experts, pipeline.run.trajectories, pipeline.screen.say
        trainer = ExpertTrainer(pipeline.recipe, pipeline.data, location)
        lasts: dict[Stage, int] = {"representation": e.epochs, "classifier": e.classifier_epochs}
        for stage, members in files.items():
            with pipeline.screen.board(f"import {stage}", max(1, e.count - first_expert), "experts") as board:
                count = import_pt(
                    members,
                    location,
                    trainer.meta,
                    stage,
                    lasts[stage],
                    first_expert,
                    e.epochs_per_part,
                    lambda _: board.advance(),
                )
            names = [str(member.absolute()) for member in members]
            pipeline.events.emit("experts-imported", stage=stage, experts=count, first=first_expert, files=names)
        buffer = Buffer(location)
        for stage, last in lasts.items():
            there = sum((buffer.last_contiguous_epoch(stage, expert) or -1) >= last for expert in range(e.count))
            say(f"{stage}: {there} of the {e.count} experts of the recipe (experts.count) are now in the buffer")

    return stage_of


def _pt_files(sources: Sequence[Path], stage: Stage, which: Which) -> list[Path]:
    """Return the sources' files of one stage, in order. Raises TrajectoryError."""
    from lad_dist.errors import TrajectoryError
    from lad_dist.trajectories.replay_file import pt_files

    files: list[Path] = []
    for source in (source.expanduser() for source in sources):
        if not source.exists():
            raise TrajectoryError(f"{source}: does not exist; valid: replay_buffer_N.pt files, or their folder")
        if (source / stage).is_dir():
            files += pt_files(source / stage)
        elif which is Which.both:
            raise TrajectoryError(
                f"{source}: has no folder {stage}/; valid: a folder with representation/ and classifier/, or name the "
                "experts' stage: --stage representation, or --stage classifier"
            )
        elif source.is_dir():
            files += pt_files(source)
        else:
            files.append(source)
    return files


def _buffer(text: str) -> Buffer:
    """Return the buffer in a run folder, in its own folder, or at a URI. Raises TrajectoryError if there is none."""
    from lad_dist import recipe_file
    from lad_dist.errors import TrajectoryError
    from lad_dist.location import is_uri, shown
    from lad_dist.rundir import RunDir
    from lad_dist.trajectories.reader import Buffer

    location = text if is_uri(text) else Path(text).expanduser()
    if isinstance(location, Path) and (location / "recipe.yaml").is_file():
        run = RunDir.existing(location)
        buffer = Buffer(run.trajectories, expected_hash=recipe_file.load(run.recipe).experts_hash())
    else:
        buffer = Buffer(location)
    # ``verify`` reports misnamed parts
    if not buffer.parts and not (isinstance(location, Path) and any(location.rglob("*.parquet"))):
        raise TrajectoryError(
            f"{shown(location)}: holds no trajectory parts; valid: a run folder, a buffer folder, or a buffer's URI, which "
            "`lad-dist experts JOB` makes"
        )
    return buffer


def _ranges(epochs: Sequence[int]) -> str:
    """Return ``0-4, 7`` for 0, 1, 2, 3, 4, 7."""
    pieces: list[list[int]] = []
    for epoch in epochs:
        if pieces and pieces[-1][-1] == epoch - 1:
            pieces[-1] = [pieces[-1][0], epoch]
        else:
            pieces.append([epoch, epoch])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in pieces)
