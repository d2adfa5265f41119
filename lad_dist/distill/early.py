"""Early evaluation: measure the synthetic set during distillation, within a share of the running time.

The first measurement also covers the initial set, as iteration 0; later ones report the gain over it. Both train the
same network with the same draws, so a difference comes from the set.

The measurement itself belongs to another stage and is passed in (``Measure``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from lad_dist.distill.state import State
from lad_dist.errors import NumericalError
from lad_dist.progress import Events, Screen
from lad_dist.recipe import Recipe


class Figures(Protocol):
    """Accuracies in [0, 1]; None for a group without classes."""

    @property
    def overall(self) -> float: ...
    @property
    def head(self) -> float | None: ...
    @property
    def medium(self) -> float | None: ...
    @property
    def tail(self) -> float | None: ...


class Measure(Protocol):
    """Train a network on (images (S, C, H, H), label probabilities (S, K), alpha) and measure it on ``split``."""

    @property
    def split(self) -> str: ...
    @property
    def epochs(self) -> int: ...
    @property
    def batches(self) -> int: ...
    def __call__(self, images_SCHH: Tensor, p_SK: Tensor, alpha: float, /) -> Figures: ...


class Budget:
    """Limit work to ``share`` of the time since construction, and each piece of work to ``longest`` seconds.

    The duration of the first piece is unknown; ``guess`` seconds are assumed for it.
    """

    def __init__(self, share: float, longest: float = math.inf, clock: Callable[[], float] = time.perf_counter) -> None:
        self.share, self.longest, self.spent, self._clock, self._began = share, longest, 0.0, clock, clock()
        self._last: float | None = None

    def allows(self, guess: float) -> bool:
        """Return whether another piece of work, as long as the last, stays within the limits."""
        expected = guess if self._last is None else self._last
        in_time = self.spent + expected <= self.share * (self._clock() - self._began)
        return self.share > 0 and expected <= self.longest and in_time

    def spend(self, seconds: float) -> None:
        """Record a piece of work that took ``seconds``."""
        self._last = seconds
        self.spent += seconds


class Early:
    """Measure the set when the budget allows it. On rank 0 only: other ranks wait, at most ``longest`` seconds."""

    def __init__(
        self, recipe: Recipe, measure: Measure, events: Events, screen: Screen, longest: float = math.inf
    ) -> None:
        self._recipe, self._measure, self._events, self._screen = recipe, measure, events, screen
        self.budget = Budget(recipe.distill.early_evaluation, longest)
        self._start: float | None = None  # overall accuracy of the starting set
        self._start_tried = False

    def wanted(self, seconds_per_iteration: float) -> bool:
        """Return whether there is time for a measurement, given the seconds per iteration on one rank.

        Assumes that a batch of the measurement takes no longer than a mean student step, which computes second
        derivatives.
        """
        d = self._recipe.distill
        of = {
            "representation": d.student_steps,
            "classifier": d.student_steps_classifier,
            "regression": 1,
            "statistics": 1,
        }
        steps = sum(of[phase] for phase in self._recipe.drawn_phases)
        sets = 1 if self._start_tried else 2
        return self.budget.allows(sets * seconds_per_iteration * self._measure.batches / steps)

    def look(self, state: State) -> None:
        """Measure a whole set and record the result; the first call measures the initial set first.

        A set that cannot be trained on is recorded as well.
        """
        o = state.optimizers
        if not self._start_tried and state.initial_logits_SK is not None:
            self._start = self._look(0, state.initial_SCHH, state.initial_logits_SK, self._recipe.distill.alpha)
        self._start_tried = True
        self._look(state.iteration, o.images_SCHH, o.logits_SK, float(o.alpha))

    def _look(self, iteration: int, images_SCHH: Tensor, logits_SK: Tensor, alpha: float) -> float | None:
        """Return the overall accuracy; None if the set cannot be trained on."""
        began, overall = time.perf_counter(), None
        figures: dict[str, float | str | None]
        try:
            found = self._measure(images_SCHH, torch.softmax(logits_SK, dim=1), alpha)
        except NumericalError as error:
            figures, said = {"error": str(error)}, f"no accuracy: {error}"
        else:
            figures = {name: getattr(found, name) for name in ("overall", "head", "medium", "tail")}
            said = f"{found.overall:.1%} overall" + ("" if found.tail is None else f", {found.tail:.1%} tail")
            overall = found.overall
            if iteration and self._start is not None:
                figures["gain"] = overall - self._start
                said += f", {100 * (overall - self._start):+.1f} points since the start ({self._start:.1%})"
        seconds = time.perf_counter() - began
        self.budget.spend(seconds)
        self._events.emit(
            "early-evaluation",
            iteration=iteration,
            split=self._measure.split,
            epochs=self._measure.epochs,
            seconds=round(seconds, 3),
            **figures,
        )
        of = f"iteration {iteration}" if iteration else "the starting set"
        self._screen.say(f"distill: {of}, quick measurement ({self._measure.epochs} epochs): {said}")
        return overall
