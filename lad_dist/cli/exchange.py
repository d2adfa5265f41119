"""``lad-dist export`` and ``lad-dist import``: distilled sets to and from other tools."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lad_dist.cli import terminal
from lad_dist.cli.options import JobOptions

if TYPE_CHECKING:
    from lad_dist.data.whitening import Kind
    from lad_dist.distilled import DistilledSet
    from lad_dist.exchange import about
    from lad_dist.exchange.incoming import Incoming
    from lad_dist.pipeline import Pipeline


class ExportFormat(StrEnum):
    """Values of ``--to``."""

    pt = "pt"
    png = "png"
    folder = "folder"
    parquet = "parquet"
    hf = "hf"


class Readable(StrEnum):
    """Values of ``--from``."""

    pt = "pt"
    parquet = "parquet"
    hf = "hf"
    set = "set"


class Labels(StrEnum):
    """Values of ``--labels``."""

    logits = "logits"
    probabilities = "probabilities"
    indices = "indices"


class Preprocessing(StrEnum):
    """Values of ``--preprocessing``."""

    zca = "zca"
    standardize = "standardize"
    none = "none"


def export(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A run folder, the folder of a distilled set, or hf://OWNER/NAME.")
    ],
    to: Annotated[
        ExportFormat,
        typer.Option(
            "--to",
            help="pt: the files of MTT, DATM and LAD; png: grids; folder: ImageFolder and soft labels; parquet; "
            "hf: a Hugging Face data set.",
        ),
    ],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The new folder; default: exports/RUN-FORM.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an older export.")] = False,
) -> None:
    """Write a run's distilled set as files that other tools read."""
    from lad_dist.exchange.export import export as write
    from lad_dist.exchange.publishing import refuse_what_is_there
    from lad_dist.interrupts import as_exceptions
    from lad_dist.progress import Screen

    target = (out or _default_out(run, to)).expanduser()
    distilled = _load(run)
    refuse_what_is_there(target, force)
    screen = Screen(terminal.stdout())
    form: about.Form = to.value
    if to is ExportFormat.pt:
        with as_exceptions():
            files = write(distilled, form, target, force)
    else:
        with as_exceptions(), screen.task(f"export to {to}", len(distilled), "images") as task:
            files = write(distilled, form, target, force, task.advance)
    screen.say(
        f"{len(files)} files, {sum(f.stat().st_size for f in files) / 1e6:.2f} MB, {len(distilled)} images in {target}"
    )


def _load(place: str) -> DistilledSet:
    """Return the distilled set of a folder or an address. Raises DistilledError, SharingError."""
    from lad_dist import load

    return load(place if "://" in place else Path(place).expanduser())


def _default_out(source: str, to: ExportFormat) -> Path:
    """Return exports/RUN-FORM, named after the run folder even if its distilled set was given, or after the address."""
    from lad_dist.sharing.address import parse

    if "://" in source:
        return Path("exports") / f"{parse(source).name}-{to}"
    whole = Path(source).expanduser().resolve()
    return Path("exports") / f"{whole.parent.name if whole.name == 'distilled' else whole.name}-{to}"


def import_(
    asked: JobOptions,
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="The folder of the set; with --from set also its address.")
    ],
    from_: Annotated[
        Readable,
        typer.Option(
            "--from",
            help="pt: images_best.pt, labels_best.pt, lr_best.pt; parquet, hf: what export wrote; "
            "set: a distilled or shared set, such as hf://OWNER/NAME.",
        ),
    ] = Readable.pt,
    labels: Annotated[Labels | None, typer.Option(help="What labels_best.pt holds; default: detected.")] = None,
    lr: Annotated[float | None, typer.Option(help="The learning rate to train with; default: that of the set.")] = None,
    preprocessing: Annotated[
        Preprocessing | None,
        typer.Option(
            help="How the images were prepared; none: pixels in [0, 1]; default: as the recipe's data.whitening."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the run's distilled set.")] = False,
) -> None:
    """Import a set distilled elsewhere as a job's distilled set, to evaluate it."""
    from lad_dist import rundir
    from lad_dist.errors import LadDistError
    from lad_dist.launch import local
    from lad_dist.progress import Screen

    incoming = _read(folder, from_, labels, lr)
    recipe, profile = asked.recipe(), asked.profile()
    out, screen = asked.folder(recipe), Screen(terminal.stdout())
    is_new = not out.exists()
    try:
        stage = _installing(incoming, preprocessing, force)
        local.run(recipe, out, profile, asked.buffers, screen, [stage])
    except LadDistError:
        experts = out / "trajectories"  # of another process, or claims of some
        others = any(experts.rglob("*.parquet")) or any((experts / "claims").glob("*"))
        # Removed, or the corrected command would find a run of another recipe.
        if is_new and not others and not (out / "distilled").exists():
            rundir.remove(out)
        raise


def _read(place: str, form: Readable, labels: Labels | None, lr: float | None) -> Incoming:
    """Read the set in a folder or at an address. Raises DistilledError, SharingError."""
    from dataclasses import replace

    from lad_dist.errors import DistilledError
    from lad_dist.exchange import pt, tables

    if lr is not None:
        pt.check_rate(lr, "--lr")
    folder = Path(place).expanduser()
    if form is Readable.pt:
        return pt.read(folder, lr, None if labels is None else labels.value)
    if labels is not None:
        raise DistilledError(f"--labels {labels}: --from {form} holds logits and says so; --labels is for --from pt")
    if form is Readable.set:
        from lad_dist.exchange.incoming import of_set

        found = of_set(_load(place), place)
        return found if lr is None else replace(found, lr=lr)
    return tables.read(folder, lr)


def _installing(incoming: Incoming, preprocessing: Preprocessing | None, force: bool) -> Callable[[Pipeline], None]:
    """Return the stage that installs the set in the run."""

    def stage(pipeline: Pipeline) -> None:
        from lad_dist.exchange.install import install, refuse_second

        refuse_second(pipeline.run, force)  # before the data are read
        way: Kind | None = None if preprocessing is None else preprocessing.value
        found = install(incoming, pipeline.recipe, pipeline.data, pipeline.run, way, force)
        made, count = found.distilled, len(found.distilled)
        pipeline.events.emit(
            "distilled-imported",
            source=incoming.source,
            images=count,
            labels=incoming.kind,
            lr=made.lr,
            largest_label_is_class=found.largest_is_class,
            pixels_inside=found.inside,
        )
        pipeline.screen.say(
            f"imported {count} images with {incoming.kind} as labels, learning rate {made.lr:.6g}, into {pipeline.run.distilled}"
        )
        pipeline.screen.say(
            f"the largest label is the image's class for {found.largest_is_class} of {count}; {found.inside:.1%} of the values are "
            f"pixels in [0, 1] once the recipe's whitening ({pipeline.recipe.data.whitening}) is undone"
        )

    return stage
