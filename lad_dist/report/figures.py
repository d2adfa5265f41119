"""The page's charts: curves and bars, with explanations."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from lad_dist.data.longtail import head_medium_tail
from lad_dist.report import charts, tables
from lad_dist.report.charts import ClassSeries, Line
from lad_dist.report.contents import Contents
from lad_dist.report.history import History
from lad_dist.results import TITLES

COLOURS = {"distilled": "s1", "random": "s2", "full": "s3", "initial": "s4"}
ROWS_UP_TO, EXTREMES = 200, 10  # classes that a table lists; those at either end that it shows of more
WIDE, NARROW = 1060, 420  # widths of the chart by class, for large and small screens
PARTS = (("head", "head", "s1"), ("medium", "medium", "s2"), ("tail", "tail", "s3"))
ALIGNED = (
    (
        "cosine",
        "Direction",
        "cosine",
        (0.0, "at right angles"),
        "1 is the expert's direction, below 0 is away from it.",
    ),
    ("norm_ratio", "Length", "norm ratio", (1.0, "as far as the expert"), "1 is as far as the expert went."),
)


def _by_source(found: Contents) -> dict[str, list[list[float]]]:
    """Return per-class accuracies of every network on the first architecture, by source in legend order."""
    if not found.rows:
        return {}
    architecture = found.rows[0]["architecture"]
    all_of = {
        key: [
            row["per_class"] for row in found.main_rows if (row["source"], row["architecture"]) == (key, architecture)
        ]
        for key in tables.CHARTED
    }
    return {key: of for key, of in all_of.items() if of}


def class_charts(found: Contents) -> list[tuple[str, Markup]]:
    """Draw accuracy by class over training images: (CSS class, chart) for large and for small screens."""
    by_source = _by_source(found)
    if not by_source:
        return []
    order = sorted(range(len(found.counts)), key=lambda c: -found.counts[c])
    series = [
        ClassSeries(
            TITLES[key],
            COLOURS[key],
            [statistics.mean(run[c] for run in of) for c in order],
            [statistics.stdev(run[c] for run in of) for c in order] if len(of) > 1 else None,
        )
        for key, of in by_source.items()
    ]
    thirds = head_medium_tail(found.counts)["by_thirds"]
    bands = [(name, len(thirds[name])) for name in ("head", "medium", "tail")]
    names, counts = [found.class_names[c] for c in order], [found.counts[c] for c in order]
    return [
        (css, charts.class_chart("Accuracy by class over training images", names, counts, series, bands, width))
        for css, width in (("wide", WIDE), ("narrow", NARROW))
    ]


ClassRow = tuple[str, str, str, list[str]]  # class, training images, group, accuracy by source


def class_table(found: Contents) -> dict[str, Any] | None:
    """Return the figures by class, largest class first; of many classes the best and the worst, and all to search in.

    ``parts``: (title, rows) of each table; ``searched``: the rows as JSON, empty where the table has them all.
    """
    by_source = _by_source(found)
    if not by_source:
        return None
    group_of = {c: name for name, of in head_medium_tail(found.counts)["by_thirds"].items() for c in of}
    order = sorted(range(len(found.counts)), key=lambda c: -found.counts[c])
    rows: list[ClassRow] = [
        (
            found.class_names[c],
            f"{found.counts[c]:,}",
            group_of[c],
            [tables.spread([run[c] for run in of]) for of in by_source.values()],
        )
        for c in order
    ]
    parts, searched = [("", rows)], Markup("")
    if len(rows) > ROWS_UP_TO:
        source, of = next(iter(by_source.items()))
        total = [sum(run[c] for run in of) for c in order]
        best = sorted(range(len(rows)), key=lambda i: -total[i])  # of equal ones the class with more training images
        parts = [
            (f"{EXTREMES} classes of {word} accuracy, {TITLES[source]}", [rows[i] for i in chosen])
            for word, chosen in (("highest", best[:EXTREMES]), ("lowest", best[-EXTREMES:]))
        ]
        plain = json.dumps([[name, count, group, *values] for name, count, group, values in rows], ensure_ascii=False)
        # Safe: without "<" nothing can end the element that holds it.
        searched = Markup(plain.replace("<", "\\u003c"))  # noqa: S704
    return {"sources": [TITLES[key] for key in by_source], "parts": parts, "searched": searched}


@dataclass(frozen=True)
class Figure:
    """A chart with its title and one sentence of explanation."""

    title: str
    chart: Markup
    note: str


@dataclass(frozen=True)
class IterationFigure:
    """A figure of the iterations, recorded as ``name_PHASE`` for each of ``phases``."""

    name: str
    title: str
    y_title: str
    note: str
    phases: tuple[str, ...] = ("representation", "classifier")
    options: Mapping[str, Any] = field(default_factory=dict)


ITERATION_FIGURES = (
    IterationFigure(
        "loss",
        "Matching loss",
        "relative squared distance",
        "Squared distance from student to expert, relative to how far the expert moved: 1 is a student that has "
        "not moved, 0 one that reached the target. Each iteration draws a new window, hence the scatter; thick: "
        "running mean.",
        options={"reference": (1.0, "no progress")},
    ),
    IterationFigure(
        "loss",
        "Regression loss",
        "squared error",
        "Of real images' labels predicted by a linear classifier fitted in closed form to the features of the set: the mean "
        "over images of the squared distance to the target probabilities.",
        ("regression",),
    ),
    IterationFigure(
        "accuracy",
        "Regression accuracy",
        "accuracy (%)",
        "Of the same classifier on its real batch, which holds every class equally often: training images, augmented.",
        ("regression",),
        {"scale": 100.0},
    ),
    IterationFigure(
        "loss",
        "Statistics loss",
        "loss",
        "Cross-entropy of the set under a teacher, plus the weighted distance of its layer statistics from those of the "
        "class-balanced training set.",
        ("statistics",),
    ),
    IterationFigure(
        "cosine",
        "Direction of the student",
        "cosine",
        "Cosine between the displacements of student and expert: 1 is the expert's direction.",
    ),
    IterationFigure(
        "norm_ratio",
        "Length of the student's displacement",
        "norm ratio",
        "Norm of the student's displacement over the expert's, over the weights that the phase compares.",
        options={"reference": (1.0, "as far as the expert")},
    ),
    IterationFigure(
        "student_loss",
        "Loss of the student",
        "soft cross-entropy",
        "On the synthetic images, mean over the student's steps; weighted by class where the phase weights it.",
    ),
)
"""What the pages of one run and of several show of the iterations, besides alpha and gradients."""


def distill_charts(found: Contents) -> list[Figure]:
    joint = found.recipe.distill.matching == "joint"
    colours = {"representation": "s1", "classifier": "s2", "regression": "s4", "statistics": "s4"}
    history = found.history

    def named(phase: str) -> str:
        return "all weights (joint)" if joint and phase == "representation" else phase

    def chart(title: str, lines: list[Line], y_title: str, note: str, **options: Any) -> Figure:
        return Figure(title, charts.line_chart(title, lines, "iteration", y_title, **options), note)

    figures = [
        _accuracy_on_the_way(history),
        *(
            chart(
                f.title,
                [Line(named(phase), colours[phase], history.curve(f"{f.name}_{phase}")) for phase in f.phases],
                f.y_title,
                f.note,
                **f.options,
            )
            for f in ITERATION_FIGURES
        ),
        chart(
            "Learning rate of the student, alpha",
            [Line("alpha", "s1", history.curve("alpha"), smooth=False)],
            "alpha",
            "Learned with the images; networks train on the distilled set with it unless evaluate.lr is set.",
        ),
        chart(
            "Gradient of the pixels",
            _pixel_gradients(found),
            "norm, mean over classes",
            "Gradient norm of the images of head, medium and tail classes.",
        ),
    ]
    return [f for f in figures if f.chart]


def _accuracy_on_the_way(history: History) -> Figure:
    lines = [Line(label, colour, history.early_curve(part), smooth=False) for part, label, colour in PARTS]
    return Figure(
        "Accuracy during distillation",
        charts.line_chart("Accuracy during distillation", lines, "iteration", "accuracy (%)", scale=100.0),
        "One network per point, trained for a tenth of the epochs and measured on 2,000 images at most, so below the "
        f"table's figures; not used for selection. {_gain_on_the_way(history)}".strip(),
    )


def _gain_on_the_way(history: History) -> str:
    """Describe the gain of the last quick measurement over the starting set, if that was measured."""
    start, last = history.early.get(0, {}), history.early.get(max(history.early, default=0), {})
    if start.get("overall") is None or last.get("gain") is None:
        return ""
    return (
        f"Iteration 0 is the starting set ({100 * start['overall']:.1f} % overall); at iteration {last['iteration']:,} "
        f"{100 * last['gain']:+.1f} points since then."
    )


def _pixel_gradients(found: Contents) -> list[Line]:
    thirds = head_medium_tail(found.counts)["by_thirds"] if found.counts else {}
    return [
        Line(label, colour, found.history.group_curve("pixel_gradient_norm", part, thirds[part]))
        for part, label, colour in PARTS
        if part in thirds
    ]


def alignment_charts(found: Contents) -> list[Figure]:
    """Draw how closely the student follows the expert in the last layer's head, medium and tail rows, by phase."""
    joint = found.recipe.distill.matching == "joint"
    backbone = ("backbone", "backbone", "s4")
    phases = (
        ("representation", "all weights" if joint else "representation", (*PARTS, backbone)),
        ("classifier", "classifier", PARTS),
    )
    out = []
    for figure, what, y_title, reference, meaning in ALIGNED:
        for phase, name, parts in phases:
            title = f"{what} by class group, {name} phase"
            lines = [
                Line(label, colour, found.history.alignment_curve(phase, f"{figure}_{part}"))
                for part, label, colour in parts
            ]
            chart = charts.line_chart(title, lines, "iteration", y_title, reference=reference)
            out.append(Figure(title, chart, meaning))
    return [f for f in out if f.chart]


def expert_charts(found: Contents) -> list[Figure]:
    offset, history = found.recipe.experts.epochs, found.history

    def lines(figure: str) -> list[Line]:
        out = []
        for stage, colour, shift in (("representation", "s1", 0), ("classifier", "s2", offset)):
            mean, band = history.expert_curve(stage, figure, shift)
            out.append(Line(f"{stage} stage", colour, mean, smooth=False, band=band))
        return out

    draw: Callable[..., Markup] = charts.line_chart
    figures = [
        Figure(
            "Training loss of the experts",
            draw("Training loss of the experts", lines("loss"), "epoch", "cross-entropy"),
            f"Mean over experts; shaded: smallest to largest. The classifier stage follows at epoch {offset} with "
            "frozen features and class-balanced draws, so its loss is not on the same images.",
        ),
        Figure(
            "Training accuracy of the experts",
            draw("Training accuracy of the experts", lines("accuracy"), "epoch", "accuracy (%)", scale=100.0),
            "On the augmented images as drawn: long-tailed in the representation stage, class-balanced in the "
            "classifier stage.",
        ),
    ]
    return [f for f in figures if f.chart]
