"""Which piece of which expert's trajectory an iteration matches, and the weights at its two ends."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from lad_dist.models.layout import Layout
from lad_dist.recipe import Recipe
from lad_dist.seeds import rng
from lad_dist.trajectories.reader import Buffer
from lad_dist.trajectories.schema import Stage

CACHE_BYTES = 512 * 2**20  # decoded checkpoints kept in host memory


@dataclass(frozen=True)
class Window:
    """From ``start_P`` (epoch t) to ``target_P`` (epoch t + M) of one expert; flat vectors of all P weights."""

    stage: Stage
    expert: int
    epoch: int
    start_P: Tensor
    target_P: Tensor


class Windows:
    """Draws windows and reads them from the buffer, keeping recently used checkpoints."""

    def __init__(self, buffer: Buffer, layout: Layout, recipe: Recipe, device: torch.device) -> None:
        self._buffer, self._layout, self._recipe, self._device = buffer, layout, recipe, device
        self._cache: OrderedDict[tuple[str, int, int], Tensor] = OrderedDict()

    def start_bound(self, iteration: int) -> int:
        """Start epochs of representation windows lie below this: DATM's schedule, linear from first to last value."""
        d = self._recipe.distill
        if d.start_epoch_max_first is None or d.start_epoch_growth == 0:
            return d.start_epoch_max
        grown = (d.start_epoch_max - d.start_epoch_max_first) * min(1.0, iteration / d.start_epoch_growth)
        return d.start_epoch_max_first + int(grown)

    def draw(self, stage: Stage, iteration: int) -> Window:
        """The window of one phase of one iteration: expert and start epoch uniform, a function of (seed, iteration)."""
        d, generator = self._recipe.distill, rng(self._recipe.seed, "distill", iteration, "window", stage)
        expert = int(generator.integers(self._recipe.experts.count))
        low, high = (
            (d.start_epoch_min, self.start_bound(iteration))
            if stage == "representation"
            else (0, d.classifier_start_epoch_max)
        )
        epoch = int(generator.integers(low, high))
        return Window(
            stage,
            expert,
            epoch,
            self.weights(stage, expert, epoch),
            self.weights(stage, expert, epoch + d.window_epochs),
        )

    def weights(self, stage: Stage, expert: int, epoch: int) -> Tensor:
        """All weights (P,) of a checkpoint on the device; a classifier expert's backbone is its last representation epoch.

        Raises:
            TrajectoryError: a checkpoint is missing or damaged; names it and its file.
        """
        if stage == "representation":
            return self._row(stage, expert, epoch).to(self._device)
        whole_P = self._row("representation", expert, self._recipe.experts.epochs).clone()
        whole_P[self._layout.span("classifier")] = self._row(stage, expert, epoch)
        return whole_P.to(self._device)

    def last(self, stage: Stage, expert: int) -> Tensor:
        """The weights (P,) an expert ends with."""
        e = self._recipe.experts
        return self.weights(stage, expert, e.epochs if stage == "representation" else e.classifier_epochs)

    def _row(self, stage: Stage, expert: int, epoch: int) -> Tensor:
        name = (stage, expert, epoch)
        if name in self._cache:
            self._cache.move_to_end(name)
            return self._cache[name]
        row = torch.from_numpy(self._buffer.read(stage, expert, epoch))
        self._cache[name] = row
        while sum(t.nbytes for t in self._cache.values()) > CACHE_BYTES and len(self._cache) > 1:
            self._cache.popitem(last=False)
        return row
