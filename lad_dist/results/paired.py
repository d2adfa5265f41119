"""Paired comparison of two runs, or two sources of one run: networks of the same architecture and seed are a pair.

Rows are paired only if both were measured on the same images. Imports nothing heavy.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lad_dist.results import images_of, of_one_way

BOOTSTRAPS = 10_000
LEVEL = 0.95

STARTING_SET = "initial"
REFERENCES = {
    STARTING_SET: "distilled",
    "random": "distilled",
    "random-soft": "distilled",
    "initial-hard": "distilled-hard",
    "initial-adsa": "distilled-adsa",
    "random-soft-adsa": "distilled-adsa",
    "initial-stored": "distilled-stored",
    "random-stored": "distilled-stored",
    "initial-teacher": "distilled-teacher",
    "random-teacher": "distilled-teacher",
}
"""References for the distilled set within a run, each with the source of the same kind of labels: its starting set, and
random real images. Only one of ``random`` and ``random-soft`` has the labels of ``distilled``, which may be hard."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Paired:
    """Paired differences, first run minus second.

    ``differences`` are by seed; then their mean and standard error, Student's t of the mean with ``degrees`` of
    freedom, and the percentile bootstrap interval of the mean at level 0.95.

    A single pair has no error, t or interval; equal differences have no t (their error is 0). With three to five seeds
    the bootstrap interval is too narrow; rely on t with its few degrees of freedom.
    """

    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    mean: float
    error: float | None
    t: float | None
    degrees: int
    interval: tuple[float, float] | None


def paired(
    first: Sequence[Row],
    second: Sequence[Row],
    figure: str = "overall",
    source: str = "distilled",
    architecture: str = "convnet",
    other: str | None = None,
) -> Paired | None:
    """Compare a figure of two runs' rows over their common seeds; None if they have none.

    ``figure`` names a number of a row (overall, head, balanced, ece, ...); ``other`` is the second's source (default:
    ``source``).
    """
    a = _by_seed(first, figure, source, architecture)
    b = _by_seed(second, figure, other or source, architecture)
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return None
    differences = [a[s] - b[s] for s in seeds]
    mean, degrees = statistics.fmean(differences), len(seeds) - 1
    if degrees == 0:
        return Paired(tuple(seeds), tuple(differences), mean, None, None, 0, None)
    error = statistics.stdev(differences) / len(seeds) ** 0.5
    t = mean / error if error > 0 else None
    return Paired(tuple(seeds), tuple(differences), mean, error, t, degrees, _bootstrap(differences))


def differences(
    first: Sequence[Row], second: Sequence[Row], figures: Sequence[str] = ("overall", "tail")
) -> Iterator[tuple[str, str, Paired, list[str]]]:
    """Yield (architecture, figure, difference, settings that differ) of two runs' distilled sets.

    Architectures are those of both; settings are those of training, see ``unlike``.
    """
    ours, theirs = of_one_way(first), of_one_way(second)  # type: ignore[arg-type]
    for architecture in dict.fromkeys(row["architecture"] for row in ours):
        changed = unlike(
            [r for r in (*ours, *theirs) if (r["source"], r["architecture"]) == ("distilled", architecture)]
        )
        for figure in figures:
            found = paired(ours, theirs, figure, architecture=architecture)
            if found is not None:
                yield architecture, figure, found, changed


@dataclass(frozen=True)
class Gain:
    """Gain of the distilled set over ``reference``, with labels of one kind, on one architecture, by figure (overall, tail)."""

    reference: str
    architecture: str
    figures: dict[str, Paired]


def gains(rows: Sequence[Row]) -> list[Gain]:
    """Return a run's paired gains of the distilled set, by architecture and reference, where both were measured."""
    found = []
    for architecture, source, reference, pair in _with_references(rows):
        if unlike(pair):
            continue
        of = {f: paired(pair, pair, f, source, architecture, reference) for f in ("overall", "tail")}
        figures = {name: one for name, one in of.items() if one is not None}
        if "overall" in figures:
            found.append(Gain(reference, architecture, figures))
    return found


def not_compared(rows: Sequence[Row]) -> list[tuple[str, str, list[str]]]:
    """Return (source, reference, settings that differ) of the distilled set and references that make no pair."""
    pairs = ((source, reference, unlike(pair)) for _, source, reference, pair in _with_references(rows))
    return [(source, reference, changed) for source, reference, changed in pairs if changed]


def _with_references(rows: Sequence[Row]) -> Iterator[tuple[str, str, str, list[Row]]]:
    """Yield (architecture, source, reference, rows of both) where both were measured.

    Both have the same kind of labels, split and images.
    """
    same: list[Row] = of_one_way(rows)  # type: ignore[arg-type, assignment]
    for architecture in dict.fromkeys(row["architecture"] for row in same):
        for reference, source in REFERENCES.items():
            pair = [r for r in same if r["source"] in (source, reference) and r["architecture"] == architecture]
            both = {r["source"] for r in pair} == {source, reference}
            kinds = {(r.get("settings") or {}).get("labels") for r in pair}
            if len(kinds) > 1 or (reference == "random" and kinds != {"hard"}):  # old rows do not say which
                continue
            if both and len({(r.get("split"), images_of(r)) for r in pair}) == 1:
                yield architecture, source, reference, pair


_OF_THE_SOURCE = frozenset({"lr", "chosen", "chosen_by", "labelled_by"})


def unlike(rows: Sequence[Row]) -> list[str]:
    """Return the settings in which networks of two sources differ though no source asks for it; empty: they are a pair.

    Learning rates may differ, as learned or chosen ones do, and epochs where both were chosen by the same rule; teachers
    that label views may not.
    """
    documents, chosen = list[dict[str, Any]](), True
    for row in (row for row in rows if row.get("settings")):  # those of old versions may have none
        said = dict(row["settings"])
        if said.get("augmentation") == "randaugment":  # of the recipe's operations it has the flips alone
            flips = "flip" in said["augment"]["operations"]
            said["augment"] = said["augment"]["flip"] if flips else 0
        own = _OF_THE_SOURCE - ({"labelled_by"} if said.get("labels") in ("teacher", "stored") else set())
        documents.append({k: v for k, v in said.items() if k not in own})
        chosen = chosen and "chosen" in said
    if chosen:
        documents = [{k: v for k, v in document.items() if k != "epochs"} for document in documents]
    names = dict.fromkeys(name for document in documents for name in document)
    return [name for name in names if any(document.get(name) != documents[0].get(name) for document in documents)]


def points(found: Paired) -> str:
    """Format mean and standard error in percentage points: ``+2.3 ± 0.4``; only the mean for a single pair."""
    mean = f"{100 * found.mean:+.1f}".replace("-0.0", "+0.0")
    return mean if found.error is None else f"{mean} ± {100 * found.error:.1f}"


def added(rows: Sequence[Row]) -> list[str]:
    """Describe the distilled set's gain over its starting set, a sentence per architecture where both were measured."""
    lines = []
    for gain in gains(rows):
        if gain.reference != STARTING_SET:
            continue
        overall = gain.figures["overall"]
        on = "" if gain.architecture == "convnet" else f" ({gain.architecture})"
        if round(100 * overall.mean, 1) <= 0:
            lines.append(
                f"distilled added nothing{on}: {points(overall)} points against its starting set, which has the "
                "same kind of labels"
            )
            continue
        unsure = overall.error is not None and overall.mean < 2 * overall.error
        note = ", less than two standard errors" if unsure else ", one network each" if overall.error is None else ""
        lines.append(f"distilled added {points(overall)} points over its starting set{on}{note}")
    return lines


def _by_seed(rows: Sequence[Row], figure: str, source: str, architecture: str) -> dict[int, float]:
    members = (r for r in rows if (r["source"], r["architecture"]) == (source, architecture))
    return {r["seed"]: r[figure] for r in members if r.get(figure) is not None}


def _bootstrap(differences: Sequence[float]) -> tuple[float, float]:
    import numpy as np

    from lad_dist.seeds import rng

    values = np.asarray(differences)
    picks = rng(0, "bootstrap").integers(len(values), size=(BOOTSTRAPS, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
