"""Contents of a run folder, read once for the page."""

from __future__ import annotations

from dataclasses import dataclass

from lad_dist import methods, results
from lad_dist.distilled import DistilledSet
from lad_dist.progress import read_events
from lad_dist.recipe import Recipe
from lad_dist.report import tables
from lad_dist.report.history import History, read_history
from lad_dist.rundir import RunDir


@dataclass(frozen=True)
class Contents:
    """Contents of a run folder."""

    recipe: Recipe
    distilled: DistilledSet | None
    rows: list[results.Row]
    history: History
    wanted: list[str]  # sources that the run has to measure

    @property
    def main_rows(self) -> list[results.Row]:
        """Rows of one way of measuring per source and architecture, for charts of means."""
        return results.of_one_way(self.rows)

    @property
    def counts(self) -> tuple[int, ...]:
        """Training images by class; empty if not recorded yet."""
        if self.distilled is not None:
            return self.distilled.meta.counts
        if self.rows:
            return tuple(self.rows[0]["counts"])
        return tuple(self.history.data["counts"]) if self.history.data else ()

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names by label; the labels themselves if no distilled set provides names."""
        return self.distilled.meta.class_names if self.distilled else tuple(str(c) for c in range(len(self.counts)))

    @property
    def title(self) -> str:
        """Data set, imbalance, images per class, method and seed."""
        r = self.recipe
        tail = (
            f", imbalance factor {r.data.imbalance_factor:g}"
            if r.data.imbalance == "exponential"
            else ", natural imbalance"
        )
        images = f"{r.ipc} image{'s' if r.ipc > 1 else ''} per class"
        method = self.distilled.meta.method if self.distilled else r.method  # imported sets: not the recipe's
        return f"{tables.DATASETS[r.data.dataset]}{tail}: {images}, {methods.title(method)}, seed {r.seed}"


def read(recipe: Recipe, run: RunDir) -> Contents:
    """Read a run folder. Raises DistilledError or RunDirError if the set or the results file is damaged."""
    distilled = DistilledSet.load(run.distilled) if run.distilled.exists() else None
    history = read_history(read_events(run.events))
    return Contents(recipe, distilled, results.read(run.results), history, results.wanted(recipe, run))
