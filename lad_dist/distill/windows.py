"""Windows: the segment of an expert trajectory that an iteration matches, and the weights at its two ends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lad_dist.distill.replay import ReplayRecord
from lad_dist.models.layout import Layout
from lad_dist.recipe import SET_PHASES, PhaseName, Recipe
from lad_dist.seeds import rng
from lad_dist.trajectories.cache import CheckpointCache, Row
from lad_dist.trajectories.reader import Buffer
from lad_dist.trajectories.schema import Stage


def counters(number: int) -> tuple[int, ...]:
    """Return what tells a window's random numbers from those of others of its iteration; nothing for the first.

    So an iteration of one window draws what it drew before there could be several.
    """
    return (number,) if number else ()


@dataclass(frozen=True)
class Window:
    """From ``start_P`` (epoch t) to ``target_P`` (epoch t + M) of one expert; flat vectors of all P weights."""

    stage: Stage
    expert: int
    epoch: int
    start_P: Tensor
    target_P: Tensor


class Windows:
    """Draw windows and read them from the buffer, or use those of ``record``.

    ``experts`` are the experts to draw from: all of the recipe's, unless the caller sets others.
    """

    def __init__(
        self, buffer: Buffer, layout: Layout, recipe: Recipe, device: torch.device, record: ReplayRecord | None = None
    ) -> None:
        self._layout, self._recipe, self._device, self.record = layout, recipe, device, record
        self.checkpoints = CheckpointCache(buffer, recipe.buffer.cache_mb * 2**20)
        self.experts: Sequence[int] = range(recipe.experts.count)

    def start_bound(self, iteration: int) -> int:
        """Return the exclusive bound of representation start epochs: DATM's schedule, linear from first to last."""
        d = self._recipe.distill
        if d.start_epoch_max_first is None:
            return d.start_epoch_max
        grown = (d.start_epoch_max - d.start_epoch_max_first) * min(1.0, iteration / d.start_epoch_growth)
        return d.start_epoch_max_first + int(grown)

    def choose(self, phase: PhaseName, iteration: int, number: int = 0) -> tuple[int, int]:
        """Return (expert, start epoch) of one phase of one iteration: recorded, or both drawn uniformly.

        A function of (seed, iteration, number of the window) and of the experts to draw from.
        """
        if self.record is not None:
            return self.record.window(phase, iteration, number)
        d = self._recipe.distill
        generator = rng(self._recipe.seed, "distill", iteration, "window", phase, *counters(number))
        expert = self.experts[int(generator.integers(len(self.experts)))]
        low, high = {
            "representation": (d.start_epoch_min, self.start_bound(iteration)),
            "classifier": (0, d.classifier_start_epoch_max),
            "regression": (0, self._recipe.regression_epochs),
            "statistics": (self._recipe.experts.epochs, self._recipe.experts.epochs + 1),
        }[phase]
        return expert, int(generator.integers(low, high))

    def checkpoint(self, iteration: int) -> Window:
        """Return the checkpoint whose features an iteration's regression phase uses, as a window of length 0."""
        expert, epoch = self.choose("regression", iteration)
        theta_P = self.weights("representation", expert, epoch)
        return Window("representation", expert, epoch, theta_P, theta_P)

    def draw(self, stage: Stage, iteration: int, number: int = 0) -> Window:
        """Draw a window of one phase of one iteration and read it from the buffer. Raises as ``weights``."""
        expert, epoch = self.choose(stage, iteration, number)
        target = epoch + self._recipe.distill.window_epochs
        return Window(stage, expert, epoch, self.weights(stage, expert, epoch), self.weights(stage, expert, target))

    def read_ahead(self, phases: Sequence[PhaseName], iteration: int, numbers: Iterable[int] = (0,)) -> None:
        """Start reading an iteration's checkpoints. If new experts complete first, the read is wasted, nothing else."""
        if iteration >= self._recipe.distill.iterations:
            return
        length, rows = self._recipe.distill.window_epochs, list[Row]()
        for phase, number in ((p, n) for n in numbers for p in phases):
            expert, epoch = self.choose(phase, iteration, 0 if phase in SET_PHASES else number)
            if phase == "regression":
                rows += self._rows("representation", expert, epoch)
            elif phase == "statistics":
                rows += self._rows(*self._last(expert))
            else:
                rows += [row for at in (epoch, epoch + length) for row in self._rows(phase, expert, at)]
        self.checkpoints.prefetch(rows)

    def weights(self, stage: Stage, expert: int, epoch: int) -> Tensor:
        """Return all weights (P,) of a checkpoint on the device.

        A classifier expert's backbone is its last representation epoch. The caller may modify the result. Raises
        TrajectoryError if a checkpoint is missing or damaged; names it and its file.
        """
        whole, *classifier = (self.checkpoints.read(*row) for row in self._rows(stage, expert, epoch))
        whole_P = torch.tensor(whole)
        if classifier:
            whole_P[self._layout.span("classifier")] = torch.tensor(classifier[0])
        if self._device.type == "cuda":  # from pinned memory, without waiting for running kernels
            return whole_P.pin_memory().to(self._device, non_blocking=True)
        return whole_P.to(self._device)

    def teacher(self, expert: int) -> Tensor:
        """Return the final weights (P,) of the stage that labels images."""
        return self.weights(*self._last(expert))

    def _last(self, expert: int) -> Row:
        stage, epoch = self._recipe.labelling
        return stage, expert, epoch

    def close(self) -> None:
        """Stop reading ahead."""
        self.checkpoints.close()

    def _rows(self, stage: Stage, expert: int, epoch: int) -> list[Row]:
        """Return the buffer rows of a checkpoint's weights: the whole network, then those that replace a part of it."""
        if stage == "representation":
            return [(stage, expert, epoch)]
        return [("representation", expert, self._recipe.experts.epochs), (stage, expert, epoch)]
