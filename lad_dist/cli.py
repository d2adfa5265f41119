"""The command line: ``lad-dist VERB JOB``. Commands only; what they do is said in ``pipeline.py``.

Turns the types of ``errors.py`` into one message and an exit code. Whatever is slow to import is imported inside the
commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import hashlib
import io
import re
import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from lad_dist import __version__

if TYPE_CHECKING:
    from rich.console import Console

    from lad_dist.catalog import Job
    from lad_dist.errors import LadDistError
    from lad_dist.pipeline import Pipeline
    from lad_dist.profile import Profile
    from lad_dist.recipe import Recipe
    from lad_dist.trajectories.reader import Buffer

_LONGEST_NAME = 150  # bytes that the options may add to a run folder's name


class _Commands(TyperGroup):
    """Reports the errors that are the user's to see; all others are bugs and keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        from lad_dist.errors import LadDistError

        try:
            return super().invoke(ctx)
        except LadDistError as error:
            _complain(error)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            _stderr().print("interrupted; what is finished is kept, and the same command continues")
            raise typer.Exit(130) from None


class Device(StrEnum):
    """What ``--device`` takes."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Baseline(StrEnum):
    """What ``--baseline`` takes."""

    random = "random"
    full = "full"


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
buffer_app = typer.Typer(no_args_is_help=True, help="Look into a trajectory buffer.")
app.add_typer(buffer_app, name="buffer")

JobOption = Annotated[str, typer.Argument(metavar="JOB", help="A shipped job's name, a file, or a run folder.")]
Out = Annotated[Path | None, typer.Option(help="The run folder; default: runs/NAME, with --set's options in its name.")]
On = Annotated[str, typer.Option(metavar="PROFILE", help="Where to run: a shipped profile's name, or a file.")]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="Override a field of the recipe, for example distill.iterations=500."
    ),
]
Buffers = Annotated[Path | None, typer.Option(help="Folder of trajectory buffers; jobs with the same experts share.")]
DeviceOption = Annotated[Device | None, typer.Option(help="Overrides the profile's device.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; overrides the profile's.")]
RunOrBuffer = Annotated[Path, typer.Argument(metavar="DIR", help="A run folder or a buffer folder.")]


def main() -> None:
    """The entry point of ``lad-dist``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that the terminal lacks must not end a run
            stream.reconfigure(errors="replace")
    app()


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"lad-dist {__version__}")
        raise typer.Exit


@app.callback()
def lad_dist(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Distil a long-tailed image data set into a few synthetic images per class."""


# --- the stages -------------------------------------------------------------------------------------------------------


@app.command()
def run(
    job: JobOption,
    out: Out = None,
    on: On = "local",
    sets: Sets = None,
    buffers: Buffers = None,
    device: DeviceOption = None,
    threads: Threads = None,
) -> None:
    """Everything that is not done yet: experts, distillation, evaluation, report. Resumes."""
    pipeline = _execute(job, out, on, sets, buffers, device, threads, [lambda p: p.all()])
    _print_results(pipeline)


@app.command()
def experts(
    job: JobOption,
    out: Out = None,
    on: On = "local",
    sets: Sets = None,
    buffers: Buffers = None,
    device: DeviceOption = None,
    threads: Threads = None,
) -> None:
    """Train the experts into the trajectory buffer."""
    _execute(job, out, on, sets, buffers, device, threads, [lambda p: p.experts()])


@app.command()
def distill(
    job: JobOption,
    out: Out = None,
    on: On = "local",
    sets: Sets = None,
    buffers: Buffers = None,
    device: DeviceOption = None,
    threads: Threads = None,
) -> None:
    """Match the experts' trajectories with a synthetic set."""
    _execute(job, out, on, sets, buffers, device, threads, [lambda p: p.distill()])


@app.command()
def evaluate(
    job: JobOption,
    out: Out = None,
    on: On = "local",
    sets: Sets = None,
    buffers: Buffers = None,
    device: DeviceOption = None,
    threads: Threads = None,
    baseline: Annotated[
        list[Baseline] | None, typer.Option(help="Measure this instead of the distilled set; may be given twice.")
    ] = None,
) -> None:
    """Measure what networks learn from the distilled set, random real images, or the whole training set."""
    sources = [b.value for b in baseline] if baseline else ["distilled"]
    stages = [_evaluation(source) for source in dict.fromkeys(sources)]
    _print_results(_execute(job, out, on, sets, buffers, device, threads, stages))


def _evaluation(source: str) -> Callable[[Pipeline], None]:
    return lambda pipeline: pipeline.evaluate(source)


@app.command()
def report(
    job: JobOption,
    out: Out = None,
    on: On = "local",
    sets: Sets = None,
    buffers: Buffers = None,
    device: DeviceOption = None,
    threads: Threads = None,
) -> None:
    """Write the tables, pictures and the page of a run."""
    _say_where(_execute(job, out, on, sets, buffers, device, threads, [lambda p: p.report()]))


def _execute(
    text: str,
    out: Path | None,
    on: str,
    sets: Sequence[str] | None,
    buffers: Path | None,
    device: Device | None,
    threads: int | None,
    stages: Sequence[Callable[[Pipeline], None]],
) -> Pipeline:
    """Run stages of the job as the profile says."""
    from lad_dist import catalog, recipe_file
    from lad_dist.launch import local
    from lad_dist.progress import Screen

    sets = list(sets or ())
    job, profile = catalog.find_job(text), _profile(on, device, threads)
    recipe = recipe_file.load(job.recipe, sets)
    return local.run(recipe, out or default_out(job, recipe, sets), profile, buffers, Screen(_stdout()), stages)


def _profile(on: str, device: Device | None, threads: int | None) -> Profile:
    from lad_dist import catalog, recipe_file
    from lad_dist.profile import Profile

    file = catalog.find_profile(on)
    doc = recipe_file.read_document(file)
    asked = {"device": device.value if device else None, "threads": threads}
    return recipe_file.validated(Profile, doc | {k: v for k, v in asked.items() if v is not None}, str(file))


def default_out(job: Job, recipe: Recipe, sets: Sequence[str]) -> Path:
    """runs/NAME, with ``--set``'s options appended so that variants do not meet; a run folder stays where it is."""
    if job.run is not None:
        return job.run
    values = dict(item.split("=", 1) for item in sets)
    values.pop("name", None)
    suffix = "".join(f"+{field.strip()}={value.strip()}" for field, value in sorted(values.items()))
    clean = re.sub(r"[^A-Za-z0-9._=+-]+", "_", suffix)[:_LONGEST_NAME]
    if clean != suffix:  # what was replaced or cut must still tell variants apart
        clean += "-" + hashlib.sha256(suffix.encode()).hexdigest()[:8]
    return Path("runs") / f"{recipe.name}{clean}"


def _print_results(pipeline: Pipeline) -> None:
    from lad_dist import results

    _print_rows(results.read(pipeline.run.results))
    _say_where(pipeline)


def _print_rows(rows: Sequence[dict[str, Any]]) -> None:
    from lad_dist.status import results_notes, results_table

    if rows:
        _stdout().print(results_table(rows))
        for note in results_notes(rows):
            _stdout().print(note, soft_wrap=True)


def _say_where(pipeline: Pipeline) -> None:
    page = pipeline.run.report / "index.html"
    later = f"run folder: {pipeline.run.root} (`lad-dist report {pipeline.run.root}` writes the report)"
    where = f"report: {page}" if page.exists() else later
    _stdout().print(where, soft_wrap=True)


# --- looking ----------------------------------------------------------------------------------------------------------


@app.command()
def status(folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.")]) -> None:
    """What a run has done, what it is doing, and what has come out so far."""
    from lad_dist.status import read_status, status_lines

    found = read_status(folder)
    for line in status_lines(found):
        _stdout().print(line, soft_wrap=True)
    _print_rows(found.rows)


@app.command()
def compare(folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")]) -> None:
    """The results of several runs in one table."""
    from lad_dist.status import compare_table

    _stdout().print(compare_table(folders))


@app.command()
def jobs() -> None:
    """The recipes that ship with lad-dist."""
    from rich.table import Table

    from lad_dist import catalog, recipe_file

    table = Table("name", "purpose", "data", "factor", "IPC")
    for name, file in catalog.jobs().items():
        recipe = recipe_file.load(file)
        factor = f"{recipe.data.imbalance_factor:g}" if recipe.data.imbalance == "exponential" else "natural"
        table.add_row(name, catalog.purpose(file), recipe.data.dataset, factor, str(recipe.ipc))
    _stdout().print(table)


@app.command()
def clusters() -> None:
    """The cluster profiles that ship with lad-dist."""
    from rich.table import Table

    from lad_dist import catalog, recipe_file
    from lad_dist.profile import Profile

    table = Table("name", "purpose", "launcher", "device")
    for name, file in catalog.profiles().items():
        profile = recipe_file.validated(Profile, recipe_file.read_document(file), str(file))
        table.add_row(name, catalog.purpose(file), profile.launcher, profile.device)
    _stdout().print(table)


@buffer_app.command()
def inspect(
    folder: RunOrBuffer, as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False
) -> None:
    """Per stage and expert the epochs present, sizes, and a digest of all weights (reads every checkpoint)."""
    found = _buffer(folder).inspect()
    if as_json:
        import json

        typer.echo(json.dumps(found, indent=1))
        return
    from rich.table import Table

    table = Table("stage", "expert", "epochs", "parts", "MB")
    for stage, members in found["stages"].items():
        for expert, has in members.items():
            table.add_row(stage, expert, _ranges(has["epochs"]), str(len(has["parts"])), f"{has['bytes'] / 1e6:.2f}")
    _stdout().print(table)
    size = f"{found['bytes'] / 1e6:.2f} MB"
    _stdout().print(
        f"{found['folder']}: {found['parts']} parts, {found['checkpoints']} checkpoints, {size}\n"
        f"experts: {found['meta']['experts_hash']}\ndigest:  {found['digest']}",
        soft_wrap=True,
    )


@buffer_app.command()
def verify(folder: RunOrBuffer) -> None:
    """Read every byte of every part; exit code 1 and the file's name on any damage."""
    buffer = _buffer(folder)
    problems = buffer.verify()
    if problems:
        for problem in problems:
            _stderr().print(_styled(problem), soft_wrap=True)
        raise typer.Exit(1)
    checkpoints = sum(part.last - part.first + 1 for part in buffer.parts)
    typer.echo(f"{len(buffer.parts)} parts, {checkpoints} checkpoints, all whole")


def _buffer(folder: Path) -> Buffer:
    """The buffer in a run folder or a folder of its own. Raises TrajectoryError where there is none."""
    from lad_dist import recipe_file
    from lad_dist.errors import TrajectoryError
    from lad_dist.rundir import RunDir
    from lad_dist.trajectories.reader import Buffer

    if (folder / "recipe.yaml").is_file():
        run = RunDir.existing(folder)
        buffer = Buffer(run.trajectories, expected_hash=recipe_file.load(run.recipe).experts_hash())
    else:
        buffer = Buffer(folder)
    if not buffer.parts and not any(folder.rglob("*.parquet")):
        raise TrajectoryError(
            f"{folder}: holds no trajectory parts; valid: a run folder or a buffer folder, which "
            "`lad-dist experts JOB` makes"
        )
    return buffer


def _ranges(epochs: Sequence[int]) -> str:
    """``0-4, 7`` for 0, 1, 2, 3, 4, 7."""
    pieces: list[list[int]] = []
    for epoch in epochs:
        if pieces and pieces[-1][-1] == epoch - 1:
            pieces[-1] = [pieces[-1][0], epoch]
        else:
            pieces.append([epoch, epoch])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in pieces)


# --- the terminal -----------------------------------------------------------------------------------------------------


def _stdout() -> Console:
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def _complain(error: LadDistError) -> None:
    """One message on stderr: ``error: ...``; several faults of a recipe on a line each."""
    from lad_dist.errors import RecipeError

    text = str(error)
    if isinstance(error, RecipeError) and len(error.faults) > 1:
        text = "\n  ".join([f"{len(error.faults)} faults", *error.faults])
    _stderr().print(_styled(text), soft_wrap=True)


def _styled(text: str) -> Any:
    from rich.text import Text

    return Text.assemble(("error: ", "bold red"), text)


if __name__ == "__main__":
    main()
