"""Formatting of figures and tables, shared by terminal and page. Imports nothing heavy."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lad_dist import methods
from lad_dist.results import (
    DISTILLED,
    TEACHERS,
    TITLES,
    WHOLE,
    base_source,
    by_way,
    labelled_by_experts,
    labelled_online,
    labels_adjusted,
    labels_stored,
    of_one_way,
)
from lad_dist.results.paired import gains, not_compared, points

if TYPE_CHECKING:
    from lad_dist.report.published import PublishedFigure

Row = Mapping[str, Any]

MISSING = "–"
FIGURES = ("overall", "head", "medium", "tail")
COUNT_GROUPS = ("many", "medium", "few")
MAIN_SOURCES = (  # sources in the page's first tables
    "distilled",
    "initial",
    "random-soft",
    "random",
    "distilled-teacher",
    "initial-teacher",
    "random-teacher",
    "full",
)
CHARTED = ("distilled", "initial", "random", "full")
CALIBRATION = ("balanced", "ECE", "standard error")
DATASETS = {
    "digits": "Digits-LT",
    "fashion-mnist": "Fashion-MNIST-LT",
    "cifar10": "CIFAR-10-LT",
    "cifar100": "CIFAR-100-LT",
    "tiny-imagenet": "Tiny-ImageNet-LT",
    "image-folder": "Image folder",
    "list": "Image list",
    "parquet": "Images in Parquet",
    "custom": "Own data set",
}
SELECTION = {
    "last": "The set of the last iteration is reported: no accuracy was looked at to choose it.",
    "validation": "The iteration was chosen by accuracy on images held out of the training data, not on test images.",
    "test-as-published": "The iteration was chosen by accuracy on the test set, as the published protocol does. "
    "The figures of the distilled set are therefore optimistic.",
    "imported": "The distilled set was imported, not made by this run: how its iteration was chosen is not known here. Published "
    "code chooses by accuracy on the test set, which makes the figures optimistic.",
}


@dataclass(frozen=True)
class ResultLine:
    """One line of a result table, all cells as text; accuracies in percent, mean ± deviation over seeds."""

    key: str  # distilled, random or full
    source: str
    architecture: str
    seeds: str
    figures: tuple[str, ...]
    trained: str = ""  # epochs and learning rate

    def cells(self) -> tuple[str, ...]:
        """Return the cells in the order of the table's headings."""
        return (self.source, self.architecture, self.seeds, *self.figures)


def headings(figures: Sequence[str] = FIGURES) -> tuple[str, ...]:
    """Return the headings for ``ResultLine.cells``."""
    return ("source", "architecture", "seeds", *figures)


def result_lines(summaries: Iterable[Row]) -> list[ResultLine]:
    """Return the result table of ``results.summary``: one line per (source, architecture)."""
    return [
        ResultLine(
            row["source"],
            source_title(row),
            str(row["architecture"]),
            str(row["seeds"]),
            tuple(plus_minus(row.get(f), row.get(f"{f}_std")) for f in FIGURES),
            trained(row),
        )
        for row in summaries
    ]


def trained(row: Row) -> str:
    """Format epochs and learning rate of a row's settings or of a summary: ``300, 0.0103``; nothing if untrained."""
    if row["source"] == TEACHERS:
        return ""
    of = row if "epochs" in row else row.get("settings") or {}
    known = [str(of["epochs"])] if of.get("epochs") is not None else []
    return ", ".join([*known, *([f"{of['lr']:.3g}"] if of.get("lr") is not None else [])])


def trained_unlike(rows: Iterable[Row]) -> bool:
    """Return whether small sets differ in training epochs or learning rates, which a table must then show."""
    return len({trained(row) for row in rows if row["source"] not in (*WHOLE, TEACHERS)}) > 1


def protocol_notes(rows: Iterable[Row]) -> list[str]:
    """Describe how the networks were trained.

    States the origin of the learning rates, and every setting in which a source differs from the first one, except
    those that define the source (augmentation of ...-plain, all of the whole set).
    """
    notes, rules = [], dict[str, list[tuple[str, str]]]()
    schedules: dict[str, set[str]] = {"small": set(), "whole": set()}
    first: Row | None = None
    for row in (members[0] for members in by_way(rows).values()):  # type: ignore[arg-type]
        if row["source"] == TEACHERS:  # trains nothing
            continue
        title = source_title(row) if row["architecture"] == "convnet" else f"{source_title(row)}, {row['architecture']}"
        if row.get("lr_rule"):
            rules.setdefault(str(row["lr_rule"]), []).append((source_title(row), title))
        whole = row["source"] in WHOLE
        schedules["whole" if whole else "small"] |= {trained(row)} - {""}
        if whole:
            continue
        first = first or row
        own, reference = (_comparable_settings(r) for r in (row, first))
        changed = [k for k in own if k in reference and own[k] != reference[k]]
        if str(row["source"]).endswith("-plain"):
            changed = [k for k in changed if k not in ("augmentation", "cutmix")]
        if changed:
            told = ", ".join(f"{k} {own[k]} (there {reference[k]})" for k in changed)
            notes.append(f"Protocol differs from {source_title(first)}: {title}: {told}.")
    said = [f"{rule}: {', '.join(_by_source(rule, rules))}" for rule in rules]
    if len(schedules["small"]) < 2:
        known = {kind: sorted(filter(None, of)) for kind, of in schedules.items()}  # rows may lack them
        spans = [f"{', '.join(of)}{' (whole set)' * (kind == 'whole')}" for kind, of in known.items() if of]
        said[:0] = [f"epochs, rate {'; '.join(spans)}"] if spans else []
    return [*([f"Schedules. {'; '.join(said)}."] if said else []), *notes]


def unpaired_notes(rows: Sequence[Row]) -> list[str]:
    """Say of which references the distilled set's gain is not shown, because networks were trained differently."""
    return [
        f"{source_name(source)} and {source_name(reference)} are not compared in pairs: their {', '.join(changed)} differ."
        for source, reference, changed in not_compared(rows)
    ]


def _by_source(rule: str, rules: Mapping[str, Sequence[tuple[str, str]]]) -> list[str]:
    """Return the sources under a rule, with the architecture only where a source's architectures have several rules."""
    others = {source for other, members in rules.items() if other != rule for source, _ in members}
    return list(dict.fromkeys(title if source in others else source for source, title in rules[rule]))


def _comparable_settings(row: Row) -> dict[str, str]:
    """Return the settings shared by all sources of one protocol; epochs and rate are in the tables themselves."""
    s = row.get("settings") or {}
    found = {name: s[name] for name in ("batch", "momentum", "weight_decay", "decay") if name in s}
    found |= {n: s.get(n, "as LAD's") for n in ("optimizer", "schedule", "cutmix", "label_loss", "ema")}
    if "augment" in s:
        found["augmentation"] = s.get("augmentation") or "/".join(s["augment"].get("operations") or ["none"])
    if row["architecture"] == "convnet" and (s.get("network") or {}).get("norm"):
        found["norm"] = s["network"]["norm"]
    return {name: str(value) for name, value in {**found, "split": row.get("split")}.items()}


def first_lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Return the report's first table, of MAIN_SOURCES.

    Lines are (source, trained on, architecture, overall, tail, distilled set's gain overall, tail); gains are in points
    with the standard error of the mean over paired networks.
    """
    gained = {(gain.reference, gain.architecture): gain.figures for gain in gains(rows)}
    lines = []
    for (source, architecture, _), members in by_way(of_one_way(rows)).items():  # type: ignore[arg-type]
        if source not in MAIN_SOURCES:
            continue
        accuracy = [spread([m[f] for m in members if m.get(f) is not None]) for f in ("overall", "tail")]
        more = gained.get((source, architecture), {})
        shown = [points(more[f]) if f in more else MISSING for f in ("overall", "tail")]
        lines.append((source, source_title(members[0]), architecture, *accuracy, *shown))
    return lines


def gain_lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Return the gains of distillation: (reference, architecture, overall, tail, pairs).

    Gains are in points with the standard error of the mean.
    """
    return [
        (
            TITLES[gain.reference],
            gain.architecture,
            points(gain.figures["overall"]),
            points(gain.figures["tail"]) if "tail" in gain.figures else MISSING,
            str(len(gain.figures["overall"].seeds)),
        )
        for gain in gains(rows)
    ]


def gain_notes(rows: Sequence[Row]) -> list[str]:
    """Return ``gain_lines`` as sentences, for a terminal."""
    return [
        f"distilled over {reference[0].lower()}{reference[1:]}"
        f"{'' if architecture == 'convnet' else f', {architecture}'}: {overall} overall, {tail} tail "
        f"(points, mean ± standard error of {pairs} paired network{'s' * (pairs != '1')})"
        for reference, architecture, overall, tail, pairs in gain_lines(rows)
    ]


def count_group_lines(rows: Iterable[Row]) -> tuple[tuple[str, ...], list[ResultLine]]:
    """Return the non-empty groups of many, medium and few, and a table of their accuracies, from results.json rows."""
    members = by_way(rows)  # type: ignore[arg-type]

    def values(group: str, of: Sequence[Row]) -> list[float]:
        return [row["by_count"][group] for row in of if (row.get("by_count") or {}).get(group) is not None]

    groups = tuple(g for g in COUNT_GROUPS if any(values(g, of) for of in members.values()))
    lines = [
        ResultLine(
            source, source_title(of[0]), architecture, str(len(of)), tuple(spread(values(g, of)) for g in groups)
        )
        for (source, architecture, _), of in members.items()
    ]
    return groups, lines


def calibration_lines(summaries: Iterable[Row]) -> list[ResultLine]:
    """Return the calibration table (CALIBRATION) of ``results.summary``, for the sources with these figures.

    Columns: balanced accuracy, expected calibration error (15 bins), standard error of the mean overall accuracy over
    seeds.
    """
    return [
        ResultLine(
            row["source"],
            source_title(row),
            str(row["architecture"]),
            str(row["seeds"]),
            (
                plus_minus(row["balanced"], row.get("balanced_std")),
                plus_minus(row["ece"], row.get("ece_std")),
                percent(row.get("overall_sem")),
            ),
        )
        for row in summaries
        if row.get("balanced") is not None and row.get("ece") is not None
    ]


def published_lines(published: Iterable[PublishedFigure], summaries: Iterable[Row]) -> list[ResultLine]:
    """Pair published figures with the run's own of the same source, method and architecture (a dash if it has none)."""
    own = dict[tuple[object, ...], str]()
    for row in summaries:
        if row.get("differs"):  # the first protocol represents the run
            continue
        method = row.get("method") if row["source"] == "distilled" else ""
        own[row["source"], method, row["architecture"]] = plus_minus(row.get("overall"), row.get("overall_std"))
    return [
        ResultLine(
            p.source,
            source_title({"source": p.source, "method": p.method}),
            p.architecture,
            "",
            (own.get((p.source, p.method, p.architecture), MISSING), f"{p.percent:.1f}"),
        )
        for p in published
    ]


def label_notes(rows: Iterable[Row]) -> list[str]:
    """Describe each adjustment of labels after distillation, one sentence each; may be empty."""
    rows = list(rows)
    taus = sorted({row["label_tau"] for row in rows if row.get("label_tau") is not None})
    found = ", ".join(f"{tau:g}" for tau in taus)
    adjusted = [
        "Labels adjusted (ADSA): the same images and networks, with soft labels adjusted for the long tail (arXiv 2511.17914"
        + (f"; tau {found})." if found else ").")
    ]
    any_adjusted = any(row.get("label_adjustment") == "adsa" for row in rows)
    return [*(adjusted if any_adjusted else []), *_teacher_notes(rows)]


def _teacher_notes(rows: Sequence[Row]) -> list[str]:
    """State who labels the augmented batches, and what that adds to the bytes a user keeps."""
    online = [
        row for row in rows if (labelled_online(row["source"]) or labels_stored(row["source"])) and row.get("keeps")
    ]
    if not online:
        return []
    by = ", ".join(dict.fromkeys(str(row["settings"]["labelled_by"]) for row in online))
    kept = dict.fromkeys(
        f"{source_name(row['source'])} {_megabytes(row['keeps']['images'])} and "
        f"{_megabytes(row['keeps']['teachers'] + row['keeps']['labels'])}"
        for row in online
    )
    stored = any(labels_stored(row["source"]) for row in online)
    views = " (stored labels: on some views of each image)" if stored else ""
    return [
        f"Teacher labels: {by}, on every augmented batch{views}; a user keeps images and teachers or stored labels: "
        f"{', '.join(kept)}. With other labels a user keeps the images and one label each."
    ]


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2g} MB"


def source_name(source: str) -> str:
    """Return a source's display name; ``birds:pick, soft labels`` for user-defined ones."""
    if source in TITLES:
        return TITLES[source]
    own = base_source(source)
    soft = ", soft labels" * labelled_by_experts(source) + ", teacher labels" * labelled_online(source)
    soft += ", stored labels" * labels_stored(source) + ", adjusted (ADSA)" * labels_adjusted(source)
    return f"{own}{soft}{', no augmentation' * source.endswith('-plain')}"


def source_title(row: Row) -> str:
    """Return the display name of a row's training set: ``Distilled (LAD)``, ``Random real``, ..."""
    title = source_name(row["source"])
    title += f", {row['differs']}" if row.get("differs") else ""  # from networks of the same source in the same table
    title += f", on images {row['images']}" if row.get("images") else ""
    method = row.get("method")
    if row["source"] not in DISTILLED or not method:
        return title
    name, comma, how = title.partition(",")
    return f"{name} ({methods.title(method)}){comma}{how}"


def spread(fractions: Sequence[float]) -> str:
    """Format mean and sample standard deviation of some accuracies with ``plus_minus``."""
    mean = statistics.mean(fractions) if fractions else None
    return plus_minus(mean, statistics.stdev(fractions) if len(fractions) > 1 else None)


def percent(fraction: float | None) -> str:
    """Format a fraction as percent: ``0.8438`` as ``84.4``; None as an en dash."""
    return MISSING if fraction is None else f"{100 * fraction:.1f}"


def plus_minus(mean: float | None, std: float | None) -> str:
    """Format as ``84.4 ± 1.7``; only the mean if there is a single seed."""
    return percent(mean) if mean is None or std is None else f"{percent(mean)} ± {percent(std)}"


def duration(seconds: float | None) -> str:
    """Format as ``47.2 s``, ``12 min 05 s``, ``8 h 43 min``."""
    if seconds is None:
        return MISSING
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min"


def gigabytes(count: int | None) -> str:
    """Format bytes as ``0.53 GB`` (10^9)."""
    return MISSING if count is None else f"{count / 1e9:.2f} GB"
