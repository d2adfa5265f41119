"""Callbacks: pass the events of a run to user code as they happen.

    class Losses(Callback):
        def on_iteration(self, iteration: Iteration) -> None:
            wandb.log(iteration.losses, step=iteration.number)

    Run.open("runs/x", recipe, callbacks=[Losses()]).distill()

``events.jsonl`` is the permanent record; a callback receives the same events, one at a time. An error raised by a
callback ends the stage like any other error: finished work is kept, and the same call continues.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

Event = dict[str, Any]
Listener = Callable[[Event], None]


@dataclass(frozen=True)
class ExpertEpoch:
    """An expert has trained one more epoch. ``stage``: representation or classifier; ``epoch`` starts at 1 in both."""

    stage: str
    expert: int
    epoch: int
    loss: float | None
    accuracy: float | None
    images_per_second: float | None


@dataclass(frozen=True)
class Iteration:
    """Distillation has completed iteration ``number``, counted from 1.

    ``losses``: by phase (representation, classifier, regression, statistics). ``alpha``: the student's learning rate.
    """

    number: int
    losses: dict[str, float]
    alpha: float
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """One network was trained on ``source`` and evaluated. Accuracies are top-1, in [0, 1]."""

    source: str
    architecture: str
    seed: int
    overall: float
    head: float
    medium: float
    tail: float


@dataclass(frozen=True)
class StageEnd:
    """A stage has ended. ``error``: the error that stopped it; None if it completed."""

    stage: str
    seconds: float
    error: str | None


class Callback:
    """Base class: override the methods of interest; by default each does nothing."""

    def on_stage_start(self, stage: str) -> None:
        """``experts``, ``distill``, ``evaluate SOURCE`` or ``report`` starts, or continues after a stop."""

    def on_epoch(self, epoch: ExpertEpoch) -> None:
        """An expert has trained one more epoch, in any process."""

    def on_iteration(self, iteration: Iteration) -> None:
        """One more iteration of distillation is complete."""

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """One more network was evaluated."""

    def on_stage_end(self, end: StageEnd) -> None:
        """A stage has completed or stopped."""

    def close(self) -> None:
        """The process has finished its work on the run; called only for named loggers (``loggers.py``)."""

    def on_event(self, event: Event) -> None:
        """Any event of ``events.jsonl``: its ``time`` (Unix seconds), its ``kind`` and the fields of that kind."""


def listener(callbacks: Iterable[Callback]) -> Listener:
    """Return a function that passes an event to the matching methods of all ``callbacks``."""
    every = tuple(callbacks)

    def listen(event: Event) -> None:
        for callback in every:
            callback.on_event(event)
            _dispatch(callback, event)

    return listen


def _dispatch(callback: Callback, event: Event) -> None:
    kind = event["kind"]
    if kind == "stage-started":
        callback.on_stage_start(event["stage"])
    elif kind == "expert-epoch":
        callback.on_epoch(ExpertEpoch(**{f.name: event.get(f.name) for f in fields(ExpertEpoch)}))  # type: ignore[arg-type]
    elif kind == "iteration":
        prefix = "loss_"
        losses = {name.removeprefix(prefix): value for name, value in event.items() if name.startswith(prefix)}
        callback.on_iteration(Iteration(event["iteration"], losses, event["alpha"], event["seconds"]))
    elif kind == "evaluated":
        callback.on_evaluation(Evaluation(**{f.name: event[f.name] for f in fields(Evaluation)}))
    elif kind in ("stage-finished", "stage-stopped"):
        callback.on_stage_end(StageEnd(event["stage"], event["seconds"], event.get("error")))
