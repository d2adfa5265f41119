"""Shorten a recipe to a short trial: ``lad-dist run JOB --quick``.

Durations come from the table of devices for two CPU threads, not from this machine, so that the same recipe and data
are shortened in the same way everywhere and a stopped run continues with the same command.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lad_dist.plan.dataset_info import DatasetInfo
from lad_dist.plan.estimate import durations_of
from lad_dist.plan.resources import two_threads
from lad_dist.recipe import Recipe, differences

SECONDS = 120.0  # by the table; ten minutes allow for a machine a third as fast, small steps and other work
_SHRINK = 0.75  # factor of one reduction

# Stage -> fields in the order in which they are lowered, each down to its floor before the next.
_LOWERED: dict[str, tuple[tuple[str, int], ...]] = {
    "experts": (("count", 2), ("epochs", 15), ("classifier_epochs", 5), ("epochs", 4), ("classifier_epochs", 2)),
    "distill": (
        ("student_steps", 10),
        ("student_steps_classifier", 10),
        ("iterations", 100),
        ("student_steps", 3),
        ("student_steps_classifier", 3),
        ("iterations", 20),
    ),
    "evaluate": (("seeds", 3), ("epochs", 200), ("full_epochs", 30), ("seeds", 2), ("full_epochs", 3), ("epochs", 30)),
}
_NARROW, _NARROWEST = 32, 16  # widths: the first if ten times over budget, the last if nothing else is left


@dataclass(frozen=True)
class Quick:
    """The shortened recipe, (field, value before, value now) of each change, and its seconds by the table."""

    recipe: Recipe
    changes: tuple[tuple[str, Any, Any], ...]
    seconds: float


def quick(recipe: Recipe, info: DatasetInfo) -> Quick:
    """Keep only the baseline that the set must beat, and lower the budget of the longest stage until all fits.

    ZCA and a wide network go first if far over budget; the rest of the width goes last.
    """
    doc = recipe.model_dump(mode="json")
    resources, shortened = two_threads(), recipe
    stages = _seconds(shortened, info, resources)
    if sum(stages.values()) > SECONDS and "initial" in doc["evaluate"]["baselines"]:
        doc["evaluate"]["baselines"] = ["initial"]  # the baseline that the set must beat
    while sum(stages.values()) > SECONDS:
        far = sum(stages.values()) > 10 * SECONDS
        if stages.get("data", 0.0) > SECONDS / 3 and doc["data"]["whitening"] == "zca":
            doc["data"].update(whitening="standardize", normalize_before_zca="none")
        elif not (far and _narrower(doc, _NARROW)) and not _lower(doc, stages) and not _narrower(doc, _NARROWEST):
            break
        _fit_windows(doc)
        shortened = Recipe.model_validate(doc)
        stages = _seconds(shortened, info, resources)
    return Quick(
        shortened, tuple((d.field, d.there, d.here) for d in differences(recipe, shortened)), sum(stages.values())
    )


def _seconds(recipe: Recipe, info: DatasetInfo, resources: Any) -> dict[str, float]:
    found: dict[str, float] = {}
    for duration in durations_of(recipe, info, resources):
        found[duration.stage] = found.get(duration.stage, 0.0) + duration.seconds
    return found


def _lower(doc: dict[str, Any], stages: dict[str, float]) -> bool:
    """Lower one field of the longest stage that has one above its floor; return False if there is none."""
    for stage in sorted(_LOWERED, key=lambda name: -stages.get(name, 0.0)):
        section = doc[stage]
        for name, floor in _LOWERED[stage]:
            if section[name] > floor:
                section[name] = max(floor, int(section[name] * _SHRINK))
                return True
    return False


def _narrower(doc: dict[str, Any], floor: int) -> bool:
    if doc["model"]["network"] != "convnet" or doc["model"]["width"] <= floor:
        return False
    doc["model"]["width"] = max(floor, doc["model"]["width"] // 2)
    return True


def _fit_windows(doc: dict[str, Any]) -> None:
    """Limit windows to the epochs that are left, and candidates and live experts to what there is."""
    d, e = doc["distill"], doc["experts"]
    e["warmup_epochs"] = min(e["warmup_epochs"], e["epochs"])
    classifier_epochs = e["classifier_epochs"] or e["epochs"]
    d["window_epochs"] = min(d["window_epochs"], e["epochs"], classifier_epochs)
    d["start_epoch_max"] = min(d["start_epoch_max"], e["epochs"] - d["window_epochs"] + 1)
    d["start_epoch_min"] = min(d["start_epoch_min"], d["start_epoch_max"] - 1)
    if d["start_epoch_max_first"] is not None:
        d["start_epoch_max_first"] = max(
            d["start_epoch_min"] + 1, min(d["start_epoch_max_first"], d["start_epoch_max"])
        )
    d["start_epoch_growth"] = min(d["start_epoch_growth"], d["iterations"])
    d["classifier_start_epoch_max"] = min(d["classifier_start_epoch_max"], classifier_epochs - d["window_epochs"] + 1)
    if d["regression_epoch_max"] is not None:
        d["regression_epoch_max"] = min(d["regression_epoch_max"], e["epochs"] + 1)
    if d["select"] != "last":
        d["select_every"] = min(d["select_every"], d["iterations"])
    if doc["buffer"]["start_after"] is not None:
        doc["buffer"]["start_after"] = min(doc["buffer"]["start_after"], e["count"])
