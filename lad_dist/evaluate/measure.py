"""Evaluation stage: plan the networks to train on a source, find those already measured, and measure the rest.

The unit of work is a row: one network of one architecture and seed, a pure function of the recipe and its training set.
Any process may measure any row; several processes may work concurrently.
"""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lad_dist import __version__, results
from lad_dist.data.prepare import PreparedData
from lad_dist.data.prepared import PreparedSet
from lad_dist.errors import NumericalError
from lad_dist.evaluate import tune
from lad_dist.evaluate.accuracy import accuracy
from lad_dist.evaluate.sources import (
    adjusted_by,
    description,
    drawn_as,
    labeller,
    of_everything,
    settings_of,
    training_set,
)
from lad_dist.evaluate.train import Counters, Settings, TrainingSet, same_together, train, train_together
from lad_dist.models.convnet import ConvNet, feature_side
from lad_dist.models.zoo import network
from lad_dist.progress import Events, Screen, Task
from lad_dist.recipe import NETWORKS, AugmentConfig, ModelConfig, Recipe
from lad_dist.results import Source
from lad_dist.rundir import RunDir

TOGETHER_VALUES = 2**18
"""Upper bound on the first block's values of one network and batch for training seeds together on a CPU.

Applies where ``evaluate.together`` is auto: above it, convolutions saturate the processor anyway
(benchmarks/results/evaluation.md).
"""

_LOOK_SECONDS = 1.0  # between checks whether another process has published a row


def evaluate(
    recipe: Recipe,
    data: PreparedData,
    run: RunDir,
    source: Source,
    events: Events,
    screen: Screen,
    rows: Sequence[results.Row] | None = None,
) -> None:
    """Measure the planned networks ``rows`` (default: all of the source's) that are not measured yet.

    Raises:
        DistilledError: the distilled set is missing, damaged or of other data.
        NumericalError: a network's training produced NaN or Inf.
        StorageError: the results cannot be written.
    """
    planned = planned_rows(recipe, data, run, source) if rows is None else rows
    todo = not_done(run, planned)
    if todo:
        work = _Work.of(recipe, data, run, source, events, todo)
        with screen.task(f"{_verb(todo)} {source}", _epochs(todo), "epochs") as task:
            for group in work.groups(todo):
                work.measure(not_done(run, group), task)
    results.merge(table_of(run, planned))


def take_over(
    recipe: Recipe,
    data: PreparedData,
    run: RunDir,
    source: Source,
    events: Events,
    screen: Screen,
    rows: Sequence[results.Row],
) -> None:
    """Measure those of ``rows`` that other processes have not finished, last first, until every row is published.

    If another process publishes a row meanwhile, its training here stops at the next epoch. No process waits for
    another, and a dead process blocks nothing; the only cost is epochs trained twice. Raises as ``evaluate``.
    """
    left = not_done(run, rows)
    if left:
        work = _Work.of(recipe, data, run, source, events, left)
        with screen.task(f"{_verb(left)} {source}, with the others", _epochs(left), "epochs") as task:
            while left:
                with contextlib.suppress(_Published):
                    work.measure(left[-1:], task, unless_published=True)
                left = not_done(run, left[:-1])
    results.merge(table_of(run, rows))


def table_of(run: RunDir, rows: Sequence[results.Row]) -> Path:
    """Return the merged table of the rows: the results, or the candidates of learning rate and epochs."""
    return run.tuning if rows and _is_candidate(rows[0]) else run.results


def _is_candidate(row: results.Row) -> bool:
    return row.get("draws") == tune.DRAWS


def _verb(rows: Sequence[results.Row]) -> str:
    return "tune" if _is_candidate(rows[0]) else "evaluate"


def _epochs(rows: Sequence[results.Row]) -> int:
    return sum(row["settings"]["epochs"] for row in rows)


class _Published(Exception):
    """Another process has published the row being measured."""


def not_done(run: RunDir, planned: Sequence[results.Row]) -> list[results.Row]:
    """Return the planned rows that are not measured yet, or were measured on other data or with other settings."""
    measured = results.read(table_of(run, planned))
    return [row for row in planned if not any(results.same_measurement(m, row) for m in measured)]


def planned_rows(recipe: Recipe, data: PreparedData, run: RunDir, source: Source) -> list[results.Row]:
    """Return one row per architecture and seed, complete except for the measured values.

    If learning rate and epochs are tuned, the source's ``candidate_rows`` must have been measured.
    """
    common, planned, candidates = _common(recipe, data, run, source), [], candidate_rows(recipe, data, run, source)
    fixed = settings_of(recipe, data, run, source)
    tuned = tune.asked(recipe, source)
    networks = results.networks(recipe, source)
    own, model = dict[str, Any](), recipe.model
    if source == results.TEACHERS:  # they may be of another run
        model = labeller(recipe, data, run, source).model
        own = {"model": model.model_dump()}
    for architecture in dict.fromkeys(name for name, _ in networks):
        settings = {**common["settings"], "network": _network_settings(recipe, architecture, model)}
        if source == results.TEACHERS:
            named = {} if model.network == architecture else {"network": model.network}
            of = _network_settings(recipe, model.network, model)
            settings["network"] = named | {name: value for name, value in of.items() if name != "norm"}
        rule = {"lr_rule": common["lr_rule"]}
        mine = [row for row in candidates if row["architecture"] == architecture]
        if tuned:
            pairs = [[row["settings"]["lr"], row["settings"]["epochs"]] for row in mine]
            pairs = pairs or [list(pair) for pair in tune.candidates(recipe, data, run, source, fixed)]  # the only one
            best = tune.chosen(run, mine, fixed) if mine else replace(fixed, lr=pairs[0][0], epochs=pairs[0][1])
            settings |= {"lr": best.lr, "epochs": best.epochs, "chosen": "on validation images"}
            rule = {"lr_rule": "chosen on validation images", "chosen_from": pairs}
        planned += [
            {**common, **rule, "architecture": architecture, "seed": seed, "settings": settings, **own}
            for name, seed in networks
            if name == architecture
        ]
    return planned


def candidate_rows(recipe: Recipe, data: PreparedData, run: RunDir, source: Source) -> list[results.Row]:
    """Return the rows of tune.py's candidates, numbered by ``seed``; empty if there is nothing to choose."""
    if not tune.asked(recipe, source):
        return []
    fixed = settings_of(recipe, data, run, source)
    pairs = tune.candidates(recipe, data, run, source, fixed)
    if len(pairs) == 1:
        return []
    measured_on = {"split": "validation", "fingerprints": data.splits.fingerprints("validation"), "draws": tune.DRAWS}
    common = _common(recipe, data, run, source) | measured_on
    return [
        {
            **common,
            "architecture": architecture,
            "seed": number,
            "settings": {
                **common["settings"],
                "network": _network_settings(recipe, architecture, recipe.model),
                "lr": lr,
                "epochs": epochs,
            },
        }
        for architecture in dict.fromkeys(recipe.evaluate.architectures)
        for number, (lr, epochs) in enumerate(pairs)
    ]


def _common(recipe: Recipe, data: PreparedData, run: RunDir, source: Source) -> results.Row:
    return {
        **description(recipe, data, run, source),
        "model": recipe.model.model_dump(),
        "fingerprints": data.splits.fingerprints(recipe.evaluate.split),
        "dataset": data.splits.train.name,
        "counts": list(data.counts),
        "imbalance_factor": recipe.data.imbalance_factor if recipe.data.imbalance == "exponential" else None,
        "recipe_hash": recipe.recipe_hash(),
        "recipe_seed": recipe.seed,
    }


def _network_settings(recipe: Recipe, architecture: str, model: ModelConfig) -> dict[str, Any]:
    """Return the settings that distinguish networks of this architecture; ``model``: of a ConvNet."""
    own = {"width": model.width, "depth": model.depth} if architecture == "convnet" else {}
    with_norm = architecture in NETWORKS and architecture not in ("mlp", "vit")
    return own | ({"norm": recipe.evaluate.norm} if with_norm else {})


def _drawn(row: results.Row) -> int | str:
    """Return the draw key of a row's network: its seed, or for candidates a key that no reported network has."""
    drawn: int | str = row["draws"] if "draws" in row else row["seed"]
    return drawn


def settings_in(row: results.Row) -> Settings:
    """Return the training settings stored in a row."""
    said = row["settings"]
    names = [field.name for field in fields(Settings) if field.name != "augment" and field.name in said]
    return Settings(**{name: said[name] for name in names}, augment=AugmentConfig.model_validate(said["augment"]))


@dataclass(frozen=True)
class _Work:
    """Measures the rows of one source."""

    recipe: Recipe
    data: PreparedData
    run: RunDir
    source: Source
    events: Events
    test: PreparedSet

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        data: PreparedData,
        run: RunDir,
        source: Source,
        events: Events,
        rows: Sequence[results.Row],
    ) -> _Work:
        return cls(recipe, data, run, source, events, data.evaluation_set(rows[0]["split"]))

    def groups(self, todo: Sequence[results.Row]) -> Iterator[list[results.Row]]:
        """Yield the rows to train together: one at a time, or all of an architecture."""
        for architecture in dict.fromkeys(row["architecture"] for row in todo):
            rows = [row for row in todo if row["architecture"] == architecture]
            alike = all(row["settings"] == rows[0]["settings"] for row in rows)
            if len(rows) > 1 and alike and self._together(architecture, rows):
                yield rows
            else:
                yield from ([row] for row in rows)

    def _together(self, architecture: str, rows: Sequence[results.Row]) -> bool:
        """Return whether to train the networks of ``rows`` together; in auto mode only if rows stay bit-identical."""
        e, m, images = self.recipe.evaluate, self.recipe.model, self.data.splits.train
        if architecture != "convnet" or e.norm != "instance" or e.together == "off":
            return False
        if settings_in(rows[0]).augmentation != "dsa" or settings_in(rows[0]).ema:
            return False  # the moving average is of one network, and torchvision augments image by image
        if e.together == "on":
            return True
        side, batch = feature_side(images.size, images.channels, 0), rows[0]["settings"]["batch"]
        everything = len(self.data.train) if of_everything(self.source) else self.recipe.ipc * self.data.classes
        first_block = min(batch, everything) * m.width * side * side
        if self.data.device.type != "cpu" or first_block > TOGETHER_VALUES:
            return False
        counters = [self._counters(row) for row in rows]

        def networks() -> list[ConvNet]:
            return [made for row in rows if isinstance(made := self._network(row), ConvNet)]

        return same_together(networks, self._sets(rows), settings_in(rows[0]), self.recipe.seed, counters)

    def _sets(self, rows: Sequence[results.Row]) -> list[TrainingSet]:
        return [training_set(self.recipe, self.data, self.run, self.source, _drawn(row)) for row in rows]

    def measure(self, rows: Sequence[results.Row], task: Task, unless_published: bool = False) -> None:
        """Train, measure and publish some rows together.

        Raises _Published if ``unless_published`` and another process has published them meanwhile.
        """
        if not rows:
            return
        if self.source == results.TEACHERS:
            label = labeller(self.recipe, self.data, self.run, self.source)
            return self._publish(
                rows[0] | self._found(rows[0], label.logits) | {"train_loss": None, "train_images": None}
            )
        began, checked = time.perf_counter(), time.monotonic()
        networks = [self._network(row) for row in rows]
        sets = self._sets(rows)
        counters = [self._counters(row) for row in rows]
        shown = {"architecture": rows[0]["architecture"], "seed": ", ".join(str(row["seed"]) for row in rows)}

        def on_epoch() -> None:
            nonlocal checked
            task.advance(len(rows), **shown)
            if unless_published and time.monotonic() - checked > _LOOK_SECONDS:
                checked = time.monotonic()
                if not not_done(self.run, rows):
                    raise _Published

        try:
            losses = self._trained(networks, sets, counters, settings_in(rows[0]), on_epoch)
        except NumericalError as error:
            if not _is_candidate(rows[0]):
                raise
            return self._publish({**rows[0], **dict.fromkeys(results.FIGURES), "overall": 0.0, "error": str(error)})
        for row, made, images, loss in zip(rows, networks, sets, losses, strict=True):
            measured: results.Row = {
                **self._found(row, made),
                **self._labels(),
                "train_loss": loss,
                "train_images": images.count,
                "seconds": round((time.perf_counter() - began) / len(rows), 3),
                "together": len(rows),
            }
            self._publish(measured)

    def _found(self, row: results.Row, logits_of: Callable[[Tensor], Tensor]) -> results.Row:
        """Return the row with what ``logits_of`` reaches on the split, and where it was measured."""
        found = asdict(accuracy(logits_of, self.test, self.data.counts))
        pairs = [list(pair) for pair in found.pop("confusion_pairs")]
        return {
            **row,
            **found,
            "per_class": list(found["per_class"]),
            "confusion": [list(line) for line in found["confusion"]],
            **({"confusion_pairs": pairs} if pairs else {}),
            "device": str(self.data.device),
            "host": platform.node(),
            "versions": {"lad_dist": __version__, "torch": torch.__version__},
        }

    def _publish(self, measured: results.Row) -> None:
        results.put(table_of(self.run, [measured]), measured)
        if _is_candidate(measured):
            pair = {name: measured["settings"][name] for name in ("lr", "epochs")}
            told = {name: measured[name] for name in ("source", "architecture", "split", "overall")}
            self.events.emit("tuning", **told, **pair)
            return
        names = ("source", "architecture", "seed", *results.FIGURES, *results.MORE_FIGURES)
        self.events.emit("evaluated", **{name: measured[name] for name in names})

    def _trained(
        self,
        networks: list[nn.Module],
        sets: list[TrainingSet],
        counters: list[Counters],
        settings: Settings,
        on_epoch: Callable[[], None],
    ) -> list[float]:
        if len(networks) == 1:
            return [train(networks[0], sets[0], settings, self.recipe.seed, counters[0], on_epoch)]
        convnets = [n for n in networks if isinstance(n, ConvNet)]
        return train_together(convnets, sets, settings, self.recipe.seed, counters, on_epoch)

    def _counters(self, row: results.Row) -> Counters:
        return (drawn_as(self.source), row["architecture"], _drawn(row))

    def _network(self, row: results.Row) -> nn.Module:
        e, m = self.recipe.evaluate, self.recipe.model
        return network(
            row["architecture"],
            *self.data.splits.train.shape,
            width=m.width,
            depth=m.depth,
            norm=e.norm,
            seed=self.recipe.seed,
            purpose=("evaluate", *self._counters(row)),
        ).to(self.data.device)

    def _labels(self) -> results.Row:
        """Return the label adjustment's tau, if the source has one."""
        tau = adjusted_by(self.recipe, self.data, self.run, self.source)
        return {} if tau is None else {"label_tau": tau}
