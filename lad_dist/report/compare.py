"""Self-contained page comparing several runs: results, paired differences, curves, images, cost.

Everything comes from the runs' folders. A baseline shared by several runs (same images, same training) is shown once.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from lad_dist import __version__, recipe_file, results
from lad_dist.data.longtail import head_medium_tail
from lad_dist.errors import RunDirError, StorageError
from lad_dist.recipe import Recipe, flat
from lad_dist.report import charts, contents, pictures, tables
from lad_dist.report.charts import Line
from lad_dist.report.contents import Contents
from lad_dist.report.figures import ITERATION_FIGURES, NARROW, WIDE, Figure
from lad_dist.report.history import Curve, History
from lad_dist.report.page import template
from lad_dist.results.paired import differences
from lad_dist.rundir import RunDir, published

COLOURS = ("s1", "s2", "s3", "s4", "s5", "s6")
MOST_RUNS = len(COLOURS)
WIDTHS = (("wide", WIDE), ("narrow", NARROW))
_PARTS = (("head", "Head classes"), ("medium", "Medium classes"), ("tail", "Tail classes"), ("backbone", "Backbone"))
_PHASES = ("representation", "classifier")


@dataclass(frozen=True)
class Named:
    """A run, its display name and its colour."""

    name: str
    colour: str
    found: Contents


def write_comparison(folders: Sequence[Path], out: Path) -> None:
    """Publish the page at ``out``.

    Raises:
        RunDirError: a folder is not a run or holds no results; there are too many, or duplicates.
        DistilledError: a distilled set is damaged.
        StorageError: the page cannot be written.
    """
    if out.is_dir():
        raise StorageError(f"{out}: is a folder; valid: a file, for example {out / 'compare.html'}")
    if len(folders) > MOST_RUNS:
        raise RunDirError(f"compare: {len(folders)} runs; valid on one page: at most {MOST_RUNS}")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise RunDirError("compare: a run is named twice; valid: different run folders")
    runs = []
    for name, colour, folder in zip(_names(folders), COLOURS, folders, strict=False):
        run = RunDir.existing(folder)
        found = contents.read(recipe_file.load(run.recipe), run)
        if not found.rows:
            raise RunDirError(f"{folder}: holds no results yet; `lad-dist evaluate {folder}` makes them")
        runs.append(Named(name, colour, found))
    with published(out) as temporary:
        temporary.write_text(render(runs), encoding="utf-8")


def _names(folders: Sequence[Path]) -> list[str]:
    """Return folder names, with as many parents as needed to make them unique."""
    parts = [folder.resolve().parts for folder in folders]
    length = 1
    while len({p[-length:] for p in parts}) < len(parts):
        length += 1
    return ["/".join(p[-length:]) for p in parts]


def render(runs: Sequence[Named]) -> str:
    """Return the page as HTML text."""
    return template("compare.html").render(
        runs=runs,
        differing=_differing([run.found.recipe for run in runs]),
        lines=_result_lines(runs),
        headings=("run", *tables.headings(), "IPC", "epochs, lr"),
        selections=_selections(runs),
        gains=_gains(runs),
        pairs=_pairs(runs),
        unpaired=_unpaired(runs),
        classes=_class_figures(runs),
        curves=_curves(runs),
        alignment=_alignment(runs),
        images=_images(runs),
        costs=[(run.name, _cost(run.found)) for run in runs],
        version=__version__,
    )


def _differing(recipes: Sequence[Recipe]) -> list[tuple[str, list[str]]]:
    """Return the fields in which the recipes differ, with each one's value; ``name`` is shown anyway."""
    each = [dict(flat(recipe.model_dump(mode="json"))) for recipe in recipes]
    fields = [name for name in each[0] if name != "name" and any(one[name] != each[0][name] for one in each)]
    return [(name, [str(one[name]) for one in each]) for name in fields]


def _result_lines(runs: Sequence[Named]) -> list[tuple[str, str, tuple[str, ...]]]:
    """Return (colour, source, cells) by run, source and architecture; shared results only for the first run."""
    lines: list[tuple[str, str, tuple[str, ...]]] = []
    shown: set[tuple[object, ...]] = set()
    for run in runs:
        groups = results.by_way(run.found.rows)
        summaries = results.summary(run.found.rows)
        for line, (what, members) in zip(tables.result_lines(summaries), groups.items(), strict=True):
            key = (*what, results.data_of(members[0]), len(members))
            if key not in shown:
                shown.add(key)
                colour = run.colour if line.key in results.DISTILLED else ""
                ipc = "" if members[0].get("ipc") is None else str(members[0]["ipc"])
                lines.append((colour, line.key, (run.name, *line.cells(), ipc, line.trained)))
    return lines


def _selections(runs: Sequence[Named]) -> list[str]:
    """Describe how each run's iteration was selected, and the split accuracy was measured on, one sentence each."""
    notes = []
    for run in runs:
        chosen = {row["selection"] for row in run.found.rows if row["source"] == "distilled"}
        splits = " and ".join(sorted({row["split"] for row in run.found.rows}))
        told = " ".join(tables.SELECTION.get(one, one) for one in sorted(chosen))
        notes.append(f"{run.name}: measured on the {splits} set. {told}")
    notes += tables.protocol_notes([row for run in runs for row in run.found.rows])
    return notes


def _gains(runs: Sequence[Named]) -> list[tuple[str, ...]]:
    """Return table cells: each run's gain over its starting set and over random images with experts' soft labels."""
    return [(run.name, *cells) for run in runs for cells in tables.gain_lines(run.found.rows)]


def _unpaired(runs: Sequence[Named]) -> list[str]:
    """List runs, and sources of a run, that cannot be paired or were trained differently, with the reason."""
    first, *others = runs
    reasons = [(run.name, results.not_comparable(run.found.rows, first.found.rows)) for run in others]
    notes = [f"{name} and {first.name} are not compared in pairs: {reason}." for name, reason in reasons if reason]
    for run in others:
        pairs = differences(run.found.rows, first.found.rows, ("overall",))
        notes += [
            f"{run.name} and {first.name}, {architecture}: networks were trained differently: {', '.join(changed)}."
            for architecture, _, _, changed in pairs
            if changed
        ]
    return notes + [f"{run.name}: {note}" for run in runs for note in tables.unpaired_notes(run.found.rows)]


def _pairs(runs: Sequence[Named]) -> list[tuple[str, ...]]:
    """Return table cells: every other run's distilled set minus the first's, over networks of the same seed."""
    first, *others = runs
    lines: list[tuple[str, ...]] = []
    for run in others:
        if results.not_comparable(run.found.rows, first.found.rows):
            continue
        for architecture, figure, found, _ in differences(run.found.rows, first.found.rows, tables.FIGURES):
            interval = found.interval and "{:+.1f} to {:+.1f}".format(*(100 * x for x in found.interval))
            lines.append((
                f"{run.name} \N{MINUS SIGN} {first.name}", architecture, figure, f"{100 * found.mean:+.1f}",
                "" if found.error is None else f"{100 * found.error:.1f}", str(len(found.seeds)),
                "" if found.t is None else f"{found.t:.1f}", interval or "",
            ))  # fmt: skip
    return lines


def _class_figures(runs: Sequence[Named]) -> list[tuple[str, list[tuple[str, Markup]]]]:
    """Draw the distilled sets' accuracy by class, if the runs share classes and counts: (title, (CSS class, chart))."""
    first = runs[0].found
    if any((run.found.counts, run.found.class_names) != (first.counts, first.class_names) for run in runs):
        return []
    figures: list[tuple[str, list[tuple[str, Markup]]]] = []
    order = sorted(range(len(first.counts)), key=lambda c: -first.counts[c])
    names, counts = [first.class_names[c] for c in order], [first.counts[c] for c in order]
    thirds = head_medium_tail(first.counts)["by_thirds"]
    bands = [(name, len(thirds[name])) for name in ("head", "medium", "tail")]
    for architecture in dict.fromkeys(row["architecture"] for run in runs for row in run.found.rows):
        series = []
        for run in runs:
            mine = [r for r in run.found.main_rows if (r["source"], r["architecture"]) == ("distilled", architecture)]
            if mine:
                means = [statistics.mean(row["per_class"][c] for row in mine) for c in order]
                series.append(charts.ClassSeries(run.name, run.colour, means, None))
        if series:
            title = f"Accuracy by class, {architecture}"
            drawn = [(css, charts.class_chart(title, names, counts, series, bands, width)) for css, width in WIDTHS]
            figures.append((title, drawn))
    return figures


def _overlaid(
    runs: Sequence[Named], title: str, y_title: str, note: str, curve: Callable[[History], Curve], smooth: bool = True
) -> Figure:
    lines = [Line(run.name, run.colour, curve(run.found.history), smooth) for run in runs]
    return Figure(title, charts.line_chart(title, lines, "iteration", y_title), note)


def _curves(runs: Sequence[Named]) -> list[Figure]:
    figures = []
    for f in ITERATION_FIGURES:
        for phase in f.phases:
            title = f"{f.title}, {phase} phase" if len(f.phases) > 1 else f.title
            lines = [Line(r.name, r.colour, r.found.history.curve(f"{f.name}_{phase}")) for r in runs]
            figures.append(Figure(title, charts.line_chart(title, lines, "iteration", f.y_title, **f.options), f.note))
    title, note = "Learning rate of the student, alpha", "Learned with the images."
    figures.append(_overlaid(runs, title, "alpha", note, lambda h: h.curve("alpha"), False))
    return [figure for figure in figures if figure.chart != Markup("")]


def _alignment(runs: Sequence[Named]) -> list[Figure]:
    """Draw the cosine of student and expert in the classifier's rows of each class group, and in the backbone."""
    figures = []
    note = "Cosine of the student's displacement with the expert's, over these weights. Thick: running mean."
    for phase in _PHASES:
        for part, words in _PARTS:

            def curve(history: History, phase: str = phase, name: str = f"cosine_{part}") -> Curve:
                return history.alignment_curve(phase, name)

            figures.append(_overlaid(runs, f"{words}, {phase} phase", "cosine", note, curve))
    return [figure for figure in figures if figure.chart != Markup("")]


def _images(runs: Sequence[Named]) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """Return by class: (run, its images as data URIs)."""
    by_class: dict[str, list[tuple[str, list[str]]]] = {}
    for run in runs:
        if run.found.distilled is None:
            continue
        shown = pictures.gallery(run.found.distilled)
        for name, images in zip(shown.names, shown.synthetic_GMHHC, strict=True):
            by_class.setdefault(name, []).append((run.name, pictures.data_uris(images, shown.lossless)))
    return list(by_class.items())


def _cost(found: Contents) -> list[tuple[str, str, str]]:
    """Return (stage, time, peak host memory)."""
    return [(c.stage, tables.duration(c.seconds), tables.gigabytes(c.host_bytes)) for c in found.history.costs.values()]
