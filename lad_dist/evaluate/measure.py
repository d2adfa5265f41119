"""The evaluation stage: networks trained on the distilled set, on random real images, and on the whole long-tailed set."""

from __future__ import annotations

import platform
import time
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lad_dist import __version__, results
from lad_dist.data.prepare import PreparedData
from lad_dist.data.prepared import PreparedSet
from lad_dist.distilled import DistilledSet
from lad_dist.errors import DistilledError
from lad_dist.evaluate.accuracy import accuracy
from lad_dist.evaluate.train import BatchOf, Settings, rows_of, train
from lad_dist.models.convnet import build
from lad_dist.progress import Events, Screen, Task
from lad_dist.recipe import Recipe
from lad_dist.rundir import RunDir
from lad_dist.seeds import rng

Source = Literal["distilled", "random", "full"]
ARCHITECTURE = "convnet"


def evaluate(recipe: Recipe, data: PreparedData, run: RunDir, source: Source, events: Events, screen: Screen) -> None:
    """Measure one source with ``evaluate.seeds`` networks; rows that are there already are kept, not measured again.

    Raises:
        DistilledError: there is no distilled set, or it is damaged or of other data.
        NumericalError: a network's training left the finite numbers.
        StorageError: the results cannot be written.
    """
    todo = [row for row in planned_rows(recipe, data, run, source) if not done(run, row)]
    if not todo:
        return
    test = data.evaluation_set(recipe.evaluate.split)
    epochs = settings_of(recipe, data, run, source).epochs
    with screen.task(f"evaluate {source}", len(todo) * epochs, "epochs") as task:
        for row in todo:
            measured = {**row, **_measure(recipe, data, run, source, row["seed"], test, task)}
            results.write(run.results, results.replace(results.read(run.results), measured))
            events.emit("evaluated", **{k: measured[k] for k in ("source", "architecture", "seed", *results.FIGURES)})


def remaining(recipe: Recipe, data: PreparedData, run: RunDir, source: Source) -> int:
    """How many networks of a source are still to be trained."""
    return sum(not done(run, row) for row in planned_rows(recipe, data, run, source))


def done(run: RunDir, planned: results.Row) -> bool:
    return any(results.same_measurement(row, planned) for row in results.read(run.results))


def planned_rows(recipe: Recipe, data: PreparedData, run: RunDir, source: Source) -> list[results.Row]:
    """One row per seed, complete but for what is measured."""
    settings = settings_of(recipe, data, run, source)
    common = {
        "source": source,
        "architecture": ARCHITECTURE,
        "split": recipe.evaluate.split,
        "selection": load_distilled(recipe, data, run).meta.selection if source == "distilled" else "none",
        "method": recipe.method if source == "distilled" else source,
        "ipc": None if source == "full" else recipe.ipc,
        "set_id": _set_id(recipe, run, source),
        "settings": asdict(settings) | {"augment": settings.augment.model_dump(mode="json")},
        "model": recipe.model.model_dump(),
        "dataset": data.splits.train.name,
        "counts": list(data.counts),
        "imbalance_factor": recipe.data.imbalance_factor if recipe.data.imbalance == "exponential" else None,
        "recipe_hash": recipe.recipe_hash(),
        "recipe_seed": recipe.seed,
    }
    return [{**common, "seed": seed} for seed in range(recipe.evaluate.seeds)]


def settings_of(recipe: Recipe, data: PreparedData, run: RunDir, source: Source) -> Settings:
    """How networks are trained on a source. Random real images have no learned rate: ``evaluate.lr`` or ``distill.alpha``."""
    e = recipe.evaluate
    common: dict[str, Any] = {
        "momentum": e.momentum,
        "weight_decay": e.weight_decay,
        "decay": e.decay,
        "augment": recipe.augment,
    }
    if source == "full":
        return Settings(epochs=e.full_epochs, batch=e.full_batch, lr=e.full_lr, **common)
    learned = load_distilled(recipe, data, run).lr if source == "distilled" else recipe.distill.alpha
    return Settings(epochs=e.epochs, batch=e.batch, lr=learned if e.lr is None else e.lr, **common)


def load_distilled(recipe: Recipe, data: PreparedData, run: RunDir) -> DistilledSet:
    """The run's distilled set, checked to be one of the recipe's data."""
    distilled = DistilledSet.load(run.distilled)
    if distilled.meta.data_fingerprint != data.splits.train.fingerprint():
        raise DistilledError(
            f"{run.distilled}: was made from other training images than this recipe's; distill again with --out"
        )
    return distilled


def _set_id(recipe: Recipe, run: RunDir, source: Source) -> str:
    """What the networks are trained on: a distilled set's checksum, or the name of the real set."""
    if source == "distilled":
        import json

        return str(json.loads((run.distilled / "meta.json").read_text())["sha256"]["tensors.safetensors"])
    return f"{source}, seed {recipe.seed}, {recipe.experts_hash()[:16]}"


def _measure(
    recipe: Recipe, data: PreparedData, run: RunDir, source: Source, seed: int, test: PreparedSet, task: Task
) -> results.Row:
    began, settings = time.perf_counter(), settings_of(recipe, data, run, source)
    images, counters = data.splits.train, (source, ARCHITECTURE, seed)
    network = build(
        images.channels,
        images.size,
        images.num_classes,
        recipe.model.width,
        recipe.model.depth,
        seed=recipe.seed,
        purpose=("evaluate", *counters),
    ).to(data.device)
    batch_of, count = _training_set(recipe, data, run, source, seed)
    loss = train(network, batch_of, count, settings, recipe.seed, counters, lambda: task.advance(1, seed=seed))
    measured = accuracy(network, test, data.counts)
    return {
        **asdict(measured),
        "per_class": list(measured.per_class),
        "train_loss": loss,
        "train_images": count,
        "seconds": round(time.perf_counter() - began, 3),
        "device": str(data.device),
        "host": platform.node(),
        "versions": {"lad_dist": __version__, "torch": torch.__version__},
    }


def _training_set(recipe: Recipe, data: PreparedData, run: RunDir, source: Source, seed: int) -> tuple[BatchOf, int]:
    if source == "distilled":
        distilled = load_distilled(recipe, data, run)
        images_SCHH, p_SK = distilled.images.to(data.device), distilled.soft_labels.to(data.device)
        return rows_of(images_SCHH, p_SK), len(images_SCHH)
    if source == "random":
        chosen = torch.from_numpy(random_real(recipe, data, seed))
        return (lambda rows: _with_hard_labels(data, chosen[rows])), len(chosen)
    return (lambda rows: _with_hard_labels(data, rows)), len(data.train)


def random_real(recipe: Recipe, data: PreparedData, seed: int) -> np.ndarray:
    """IPC random training images of every class, class-major; a class with fewer gives its images repeatedly."""
    labels_N = data.splits.train.labels_N.numpy()
    chosen = []
    for c in range(data.classes):
        members = rng(recipe.seed, "evaluate", "random", seed, c).permutation(np.flatnonzero(labels_N == c))
        chosen.append(np.resize(members, recipe.ipc))
    return np.concatenate(chosen)


def _with_hard_labels(data: PreparedData, rows_B: Tensor) -> tuple[Tensor, Tensor]:
    images_BCHH, labels_B = data.train.batch(rows_B)
    return images_BCHH, F.one_hot(labels_B, data.classes).to(images_BCHH.dtype)
