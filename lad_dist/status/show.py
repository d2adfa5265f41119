"""A run's status as text and tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from lad_dist import methods, results
from lad_dist.errors import RunDirError
from lad_dist.progress import shortened
from lad_dist.recipe import Recipe
from lad_dist.report import tables
from lad_dist.results import ranking
from lad_dist.results.paired import Paired, differences, gains, points
from lad_dist.rundir import RunDir
from lad_dist.status.read import RunStatus, State

_STYLES: dict[State, str] = {
    "done": "green",
    "running": "cyan",
    "stopped": "red",
    "not finished": "yellow",
    "not started": "dim",
}


def status_lines(status: RunStatus) -> Iterator[Text]:
    """Yield the status as text, without results. Lines that may be cut at the terminal's width set ``no_wrap``."""
    r = status.recipe
    what = f"{r.name}, method {r.method}, {r.data.dataset}, {_imbalance(r)}, IPC {r.ipc}, seed {r.seed}"
    yield Text(f"{status.folder}: {what}")
    width = max(len(stage.name) for stage in status.stages)
    for stage in status.stages:
        yield Text.assemble(f"  {stage.name:{width}}  ", (f"{stage.state:14}", _STYLES[stage.state]), stage.detail)
        for line in shortened(status.experts) if stage.name == "experts" else ():
            yield Text(f"    {line}", style="dim", no_wrap=True, overflow="ellipsis")
    for note in status.notes:
        yield Text(note)
    if status.error:
        yield Text.assemble(("last error: ", "bold red"), status.error)


def renderables(status: RunStatus) -> Iterator[RenderableType]:
    """Yield the status with the results, for a live view."""
    yield from status_lines(status)
    if status.rows:
        yield results_table(status.rows)
        yield from (Text(note) for note in results_notes(status.rows))


def print_status(status: RunStatus, console: Console) -> None:
    """Print the status with the results. Lines are cut only in a terminal, and only those of a fleet's experts."""
    for line in status_lines(status):
        if line.no_wrap and console.is_terminal:
            console.print(line, no_wrap=True, overflow="ellipsis")  # print ignores a Text's own settings
        else:
            console.print(line, soft_wrap=True)
    print_results(status.rows, console)


def print_results(rows: Sequence[results.Row], console: Console) -> None:
    """Print the results of a run as a table with its notes; nothing if there are none."""
    if rows:
        console.print(results_table(rows))
        for note in results_notes(rows):
            console.print(note, soft_wrap=True)


def _imbalance(recipe: Recipe) -> str:
    return "natural" if recipe.data.imbalance == "natural" else f"factor {recipe.data.imbalance_factor:g}"


def results_table(rows: Sequence[results.Row]) -> Table:
    """Return mean and standard deviation over seeds per source, in percent."""
    lines = tables.result_lines(results.summary(rows))
    many = len({line.architecture for line in lines}) > 1
    table = Table("source", *(["architecture"] if many else []))
    for figure in tables.FIGURES:
        table.add_column(f"{figure} %", justify="right")
    table.add_column("seeds", justify="right")
    unlike = tables.trained_unlike(rows)
    if unlike:
        table.add_column("epochs, lr", justify="right")
    for line in lines:
        more = [line.trained] if unlike else []
        table.add_row(line.source, *([line.architecture] if many else []), *line.figures, line.seeds, *more)
    return table


def results_notes(rows: Sequence[results.Row]) -> Iterator[str]:
    """Yield notes for the table's reader: the split measured on, and how the distilled set was selected."""
    splits = " and ".join(sorted({row["split"] for row in rows}))
    yield f"top-1 accuracy on the {splits} split, mean and standard deviation over seeds"
    yield "head, medium, tail: thirds of the classes by their number of training images"
    for selection in sorted({row["selection"] for row in rows if row["source"] == "distilled"}):
        published = "selected on the test set, as published. " if selection == "test-as-published" else ""
        yield published + tables.SELECTION.get(selection, f"selection: {selection}")
    yield from tables.label_notes(rows)
    yield from tables.protocol_notes(rows)
    yield from tables.gain_notes(rows)
    yield from tables.unpaired_notes(rows)
    for architecture, found in ranking.scores(rows).items():
        figures = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
        yield f"DD-Ranking, {architecture}: {figures}; real is the whole long-tailed set, random has soft labels (arXiv 2505.13300)"


def compare_table(runs: Sequence[Path]) -> Table:
    """Return the results of several runs in one table; a shared baseline (same images, same training) is shown once.

    Raises:
        RunDirError: a folder is not a run, or holds no results yet.
        DistilledError: a distilled set is damaged.
    """
    from lad_dist.distilled import DistilledSet

    table = Table("run", "set", box=box.SIMPLE, padding=(0, 1, 0, 0), title="accuracy in percent")
    for heading in (*tables.FIGURES, "IPC", "seeds"):
        table.add_column(heading, justify="right", no_wrap=True)
    shown: set[tuple[object, ...]] = set()
    lines, every = [], list[results.Row]()
    for folder in runs:
        run = RunDir.existing(folder)
        if run.distilled.exists():
            DistilledSet.load(run.distilled)  # results of a set that is damaged now could not be reproduced
        rows = results.read(run.results)
        if not rows:
            raise RunDirError(f"{folder}: holds no results yet; `lad-dist evaluate {folder}` makes them")
        groups = results.by_way(rows)
        for line, (what, members) in zip(tables.result_lines(results.summary(rows)), groups.items(), strict=True):
            key = (*what, results.data_of(members[0]), len(members))
            if key in shown:
                continue
            shown.add(key)
            ipc = "" if members[0].get("ipc") is None else str(members[0]["ipc"])
            lines.append((folder.name, _short(members[0]), *line.figures, ipc, line.seeds, line.trained))
            every += members
    if tables.trained_unlike(every):
        table.add_column("epochs, lr", justify="right")
    for cells in lines:
        table.add_row(*cells[: len(table.columns)])
    return table


def _short(row: results.Row) -> str:
    """Return a short name of a row's training set: ``LAD``, ``LAD, hard labels``, ``Random real, resnet18``."""
    title = tables.source_name(row["source"])
    if row["source"] in results.DISTILLED:
        _, comma, how = title.partition(",")
        title = f"{methods.title(row['method'])}{comma}{how}"
    return title if row["architecture"] == "convnet" else f"{title}, {row['architecture']}"


def compare_document(runs: Sequence[Path]) -> dict[str, Any]:
    """Return a comparison as plain values for JSON: each run's results and gains, and differences to the first run.

    Accuracies are fractions; differences are of networks paired by seed. Raises RunDirError if a results file is
    damaged.
    """
    every = [(folder, results.read(RunDir.existing(folder).results)) for folder in runs]
    (first, reference), *others = every
    return {
        "runs": [
            {
                "run": str(folder),
                "results": results.summary(rows),
                "gains": [
                    {"over": gain.reference, "architecture": gain.architecture}
                    | {figure: _plain(one) for figure, one in gain.figures.items()}
                    for gain in gains(rows)
                ],
            }
            for folder, rows in every
        ],
        "pairs": [
            {"run": str(folder), "minus": str(first), "not_comparable": results.not_comparable(rows, reference) or None}
            | {"differences": _differences(rows, reference)}
            for folder, rows in others
        ],
    }


def _differences(rows: Sequence[results.Row], reference: Sequence[results.Row]) -> list[dict[str, Any]]:
    if results.not_comparable(rows, reference):
        return []
    return [
        {"architecture": architecture, "figure": figure, "unlike": changed} | _plain(found)
        for architecture, figure, found, changed in differences(rows, reference)
    ]


def _plain(found: Paired) -> dict[str, Any]:
    return {"mean": found.mean, "error": found.error, "seeds": list(found.seeds)}


def compare_notes(runs: Sequence[Path]) -> Iterator[str]:
    """Yield how much each run's distilled set differs from the first's, over networks paired by seed.

    Runs on different data cannot be paired: a line says so instead. Also yields how much each run's distilled set
    differs from its starting set.

    Raises RunDirError if a results file is damaged.
    """
    every = [(folder.name, results.read(RunDir.existing(folder).results)) for folder in runs]
    first, *others = every
    for name, rows in every:
        yield from (f"{name}: {note}" for note in (*tables.gain_notes(rows), *tables.unpaired_notes(rows)))
    yield from tables.protocol_notes([row for _, rows in every for row in rows])
    for name, rows in others:
        reason = results.not_comparable(rows, first[1])
        if reason:
            yield f"{name} - {first[0]}: not compared in pairs: {reason}"
            continue
        for architecture, figure, found, changed in differences(rows, first[1]):
            unlike = f"; trained differently: {', '.join(changed)}" if changed else ""
            yield f"{name} - {first[0]}, {architecture}, {figure}: {difference(found)}{unlike}"


def difference(found: Paired) -> str:
    """Format as ``+3.1 ± 0.4 (standard error) points over 5 paired seeds, t = 7.8 with 4 degrees of freedom``."""
    if found.error is None:
        return f"{points(found)} points, one paired seed"
    t = "" if found.t is None else f", t = {found.t:.1f} with {found.degrees} degrees of freedom"
    return f"{points(found)} (standard error) points over {len(found.seeds)} paired seeds{t}"
