"""Two runs compared network by network: networks of the same source, architecture and seed are a pair. Imports nothing heavy."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BOOTSTRAPS = 10_000
LEVEL = 0.95

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Paired:
    """What the first run has more than the second: ``differences`` by seed, their mean and standard error, Student's t of the
    mean with ``degrees`` of freedom, and the percentile bootstrap interval of the mean at level 0.95.

    One pair has neither error nor t nor interval; equal differences have no t (their error is 0). With three to five
    seeds the bootstrap interval is too narrow; t with its few degrees of freedom is the one to trust.
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
) -> Paired | None:
    """Compare a figure of two runs' rows over the seeds that both have; None where they share no seed.

    ``figure`` names a number of a row (overall, head, balanced, ece, ...).
    """
    a, b = (_by_seed(rows, figure, source, architecture) for rows in (first, second))
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
