"""Choosing learning rate and epochs by accuracy on held-out training images, by one rule for every source.

The candidates are all pairs of ``evaluate.tune_lr`` and ``evaluate.tune_epochs``; for what lies in the distilled set's folder (the
distilled images and the set they started from) also the learned alpha with each number of epochs. The whole set keeps
``evaluate.full_epochs``. For every pair one network is trained with draws that no reported network has (of random images:
on images of their own) and measured on the validation split; the best pair is taken, of equals the first.

Candidates are rows like any other, in evaluation/tuning/, so that they are measured once, by any number of processes.
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
"""Stands in the place of a seed in the draws of a candidate's network, batches and images."""


def candidates(
    recipe: Recipe, data: PreparedData, run: RunDir, source: Source, fixed: Settings
) -> list[tuple[float, int]]:
    """(learning rate, epochs) of every candidate; only those of ``fixed`` where nothing is to be chosen."""
    e = recipe.evaluate
    rates = e.tune_lr or (fixed.lr,)
    if e.tune_lr and of_distilled(source):
        rates = (load_distilled(recipe, data, run).lr, *rates)
    epochs = (fixed.epochs,) if of_everything(source) else e.tune_epochs or (fixed.epochs,)
    return list(dict.fromkeys((lr, n) for n in epochs for lr in rates))


def chosen(run: RunDir, planned: list[results.Row], fixed: Settings) -> Settings:
    """``fixed`` with the best measured learning rate and epochs of the candidates ``planned``, which must all be there."""
    measured = results.read(run.tuning)
    found = [next(m for m in measured if results.same_measurement(m, row)) for row in planned]
    best = max(found, key=lambda row: row["overall"])  # of equals the first
    return replace(fixed, lr=best["settings"]["lr"], epochs=best["settings"]["epochs"])
