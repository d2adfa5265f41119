from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lad_dist import recipe_file, results
from lad_dist.data.longtail import exponential_counts, head_medium_tail
from lad_dist.data.whitening import Whitening
from lad_dist.distilled import DistilledMeta, DistilledSet
from lad_dist.progress import Events
from lad_dist.recipe import Recipe
from lad_dist.rundir import RunDir

MakeRun = Callable[..., tuple[Recipe, RunDir]]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A run folder as the stages leave it, with any part left out: (recipe, run folder)."""

    def make(
        *,
        classes: int = 10,
        ipc: int = 2,
        size: int = 8,
        channels: int = 1,
        whitening: Any = "zca",
        iterations: int = 30,
        names: list[str] | None = None,
        distilled: bool = True,
        evaluated: bool = True,
        experts: bool = True,
        events: bool = True,
        architectures: tuple[str, ...] = ("convnet",),
        factor: float = 20.0,
        n_max: int = 120,
        confusion: bool = True,
        sets: tuple[str, ...] = (),
    ) -> tuple[Recipe, RunDir]:
        doc = {
            "name": "report-test",
            "ipc": ipc,
            "data": {"dataset": "digits", "imbalance_factor": factor},
            "experts": {"count": 2, "epochs": 6, "classifier_epochs": 3},
            "distill": {"iterations": iterations, "start_epoch_max": 3, "window_epochs": 2},
            "evaluate": {"seeds": 3, "lr": 0.05},
        }
        recipe = recipe_file.from_document(doc, sets)
        run = RunDir.open(tmp_path / "run", recipe)
        counts = exponential_counts(n_max, classes, factor)
        if events:
            _write_events(run, recipe, counts, experts=experts)
        if distilled:
            made = _distilled_set(
                recipe, names or [f"class {c}" for c in range(classes)], counts, size, channels, whitening
            )
            with run.publish_folder(run.distilled) as folder:
                made.write(folder)
        if evaluated:
            rows = [
                _row(recipe, counts, source, architecture, seed)
                for source in LEVELS
                for architecture in architectures
                for seed in range(3)
            ]
            results.write(run.results, rows)
            for row in rows if confusion else ():
                results.put(run.results, {**row, "confusion": _confusion(row["per_class"])})
        return recipe, run

    return make


LEVELS = {"distilled": 0.80, "initial": 0.75, "random-soft": 0.70, "random": 0.55, "full": 0.90}


def _distilled_set(
    recipe: Recipe, names: list[str], counts: tuple[int, ...], size: int, channels: int, kind: Any
) -> DistilledSet:
    classes, generator = len(names), torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (classes * recipe.ipc, channels, size, size), generator=generator, dtype=torch.uint8)
    whitening = Whitening.fit(pixels, kind)
    meta = DistilledMeta(
        method=recipe.method,
        dataset="digits/train",
        ipc=recipe.ipc,
        class_names=tuple(names),
        counts=counts,
        lr=0.0512,
        iteration=recipe.distill.iterations,
        selection=recipe.distill.select,
        recipe_hash=recipe.recipe_hash(),
        experts_hash=recipe.experts_hash(),
        data_fingerprint="f" * 64,
        recipe=recipe.model_dump(mode="json"),
        versions={"lad_dist": "0.1.0", "torch": torch.__version__},
        label_source={"images_repeated": 0},
    )
    initial_SCHH = whitening.apply(pixels)
    logits_SK = torch.randn(len(pixels), classes, generator=generator)
    labels_S = torch.arange(classes).repeat_interleave(recipe.ipc)
    return DistilledSet(initial_SCHH * 0.9, logits_SK, labels_S, meta, whitening, initial_SCHH)


def _row(recipe: Recipe, counts: tuple[int, ...], source: str, architecture: str, seed: int) -> results.Row:
    level = LEVELS[source] + 0.01 * seed + (0.02 * seed**2 if source == "initial" else 0.0)
    per_class = [level - 0.3 * c / len(counts) for c in range(len(counts))]
    groups = head_medium_tail(counts)

    def mean(of: tuple[int, ...]) -> float | None:
        return sum(per_class[c] for c in of) / len(of) if of else None

    return {
        "source": source,
        "architecture": architecture,
        "seed": seed,
        "split": "test",
        "method": recipe.method,
        "selection": recipe.distill.select if source == "distilled" else "none",
        "ipc": recipe.ipc,
        "set_id": source,
        "settings": {"epochs": 300, "lr": 0.05},
        "counts": list(counts),
        "overall": sum(per_class) / len(per_class),
        **{name: mean(of) for name, of in groups["by_thirds"].items()},
        "per_class": per_class,
        "by_count": {name: mean(of) for name, of in groups["by_count"].items()},
        "train_images": 20,
        "seconds": 1.5,
        "device": "cpu",
        "host": "testhost",
        "versions": {"torch": "2.8.0"},
    }


def _confusion(per_class: list[float]) -> list[list[int]]:
    """Of 100 images of each class: what is missed is taken for the class before (class 0: the last one)."""
    classes = len(per_class)
    matrix = [[0] * classes for _ in per_class]
    for c, accuracy in enumerate(per_class):
        right = round(100 * accuracy)
        matrix[c][c] += right
        matrix[c][c - 1] += 100 - right
    return matrix


def _write_events(run: RunDir, recipe: Recipe, counts: tuple[int, ...], experts: bool) -> None:
    e, events = recipe.experts, Events(run.events)
    events.emit("data", name="digits/train", fingerprint="f" * 64, counts=list(counts), test=540, seconds=0.1)
    if experts:
        for expert in range(e.count):
            for stage, epochs in (("representation", e.epochs), ("classifier", e.classifier_epochs)):
                for epoch in range(1, epochs + 1):
                    events.emit(
                        "expert-epoch",
                        expert=expert,
                        stage=stage,
                        epoch=epoch,
                        loss=2 / epoch + 0.1 * expert,
                        accuracy=1 - 1 / (epoch + 1),
                        images_per_second=5000.0,
                    )
        events.emit("stage-finished", stage="experts", seconds=14.8, peak_memory_bytes={"host": 430_000_000})
    events.emit("distill-started", iteration=0, gradient="keep", why="the graphs fit")
    for i in range(1, recipe.distill.iterations + 1):
        events.emit("iteration", **event_of_iteration(i, len(counts)))
    events.emit(
        "stage-finished",
        stage="distill",
        seconds=83.2,
        peak_memory_bytes={"host": 530_000_000, "device": 2_000_000_000},
    )
    events.close()


def event_of_iteration(i: int, classes: int) -> dict[str, Any]:
    wave = 0.1 * ((i * 7919) % 13) / 13
    return {
        "iteration": i,
        "alpha": 0.05 + 1e-5 * i,
        "seconds": 0.05,
        "loss_representation": 0.9 - 0.001 * i + wave,
        "loss_classifier": 0.8 - 0.001 * i + wave,
        "cosine_representation": 0.4 + wave,
        "cosine_classifier": 0.5 + wave,
        "norm_ratio_representation": 0.6 + wave,
        "norm_ratio_classifier": 0.3 + wave,
        "student_loss_representation": 1.2 - 0.001 * i + wave,
        "student_loss_classifier": 1.1 - 0.001 * i + wave,
        "alignment": {
            phase: {
                f"{figure}_{part}": level + wave
                for figure in ("cosine", "norm_ratio")
                for part, level in (("head", 0.6), ("medium", 0.4), ("tail", -0.1), ("backbone", 0.5))
                if (phase, part) != ("classifier", "backbone")
            }
            for phase in ("representation", "classifier")
        },
        "pixel_gradient_norm": [0.1 / (c + 1) for c in range(classes)],
    }


@pytest.fixture
def iteration_event() -> Callable[[int, int], dict[str, Any]]:
    """The fields of an ``iteration`` event: (iteration, classes)."""
    return event_of_iteration
