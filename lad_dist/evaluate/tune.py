"""Tuning of learning rate and epochs by accuracy on held-out training images, with one rule for every source.

The candidates are all pairs of ``evaluate.tune_lr`` and ``evaluate.tune_epochs``; for sources in the distilled set's
folder (the distilled images and their initialisation) also the learned alpha with each number of epochs. The whole set
keeps ``evaluate.full_epochs``. One network per pair is trained with draws that no reported network has (random images:
also on separate images) and measured on the validation split; the best pair is taken, ties going to the first.

Candidates are ordinary rows, in evaluation/tuning/, so each is measured once, by any number of processes.
"""

from __future__ import annotations

from dataclasses import replace

from lad_dist import results
from lad_dist.data.prepare import PreparedData
from lad_dist.evaluate.sources import load_distilled, of_distilled, of_everything
from lad_dist.evaluate.train import Settings
from lad_dist.recipe import Recipe
from lad_dist.results import Source
from lad_dist.rundir import RunDir

DRAWS = "tune"
"""Replaces the seed in the draws of a candidate's network, batches and images."""


def asked(recipe: Recipe, source: Source) -> bool:
    """Return whether the recipe has a source's learning rate or epochs chosen."""
    e = recipe.evaluate
    return source != results.TEACHERS and bool(e.tune_lr or (e.tune_epochs and not of_everything(source)))


def candidates(
    recipe: Recipe, data: PreparedData, run: RunDir, source: Source, fixed: Settings
) -> list[tuple[float, int]]:
    """Return (learning rate, epochs) of every candidate; a single one is taken without measuring."""
    e = recipe.evaluate
    rates = e.tune_lr or (fixed.lr,)
    if e.tune_lr and of_distilled(source):
        rates = (load_distilled(recipe, data, run).lr, *rates)
    epochs = (fixed.epochs,) if of_everything(source) else e.tune_epochs or (fixed.epochs,)
    return list(dict.fromkeys((lr, n) for n in epochs for lr in rates))


def chosen(run: RunDir, planned: list[results.Row], fixed: Settings) -> Settings:
    """Return ``fixed`` with the best learning rate and epochs among the candidates ``planned``, all measured."""
    measured = results.read(run.tuning)
    found = [next(m for m in measured if results.same_measurement(m, row)) for row in planned]
    best = max(found, key=lambda row: row["overall"])  # ties: the first
    return replace(fixed, lr=best["settings"]["lr"], epochs=best["settings"]["epochs"])
