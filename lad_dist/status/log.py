"""Events of a run, reduced one by one to its current state. Memory does not grow with the number of events.

Fields are not validated: an event with a missing or mistyped field yields less information but causes no error.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

Event = dict[str, Any]
State = Literal["active", "waiting", "failed", "finished"]
_STATES: dict[str, State] = {
    "expert-restarted": "waiting",  # for a worker: a retry follows
    "expert-failed": "failed",
    "expert-finished": "finished",
}
_RECENT = 50  # events used to estimate rates


@dataclass
class StageLog:
    """One stage since its last start.

    Holds the event that ended it, its last step, the times of its latest steps, and the set's last quick measurement.
    """

    ended: Event | None = None
    step: Event | None = None
    early: Event | None = None
    times: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))

    def add(self, event: Event) -> None:
        """Record one more step."""
        self.step = event
        self.times.append(_time(event))

    def seconds_each(self) -> float | None:
        """Return the median time between the latest steps, robust to a single pause; None before the second."""
        between = [after - before for before, after in pairwise(self.times)]
        return statistics.median(between) if between else None


@dataclass
class ExpertState:
    """One expert since its stage's last start. ``last`` holds the newest value of every reported field."""

    expert: int
    state: State = "active"
    time: float = 0.0
    restarts: int = 0
    epochs: dict[str, int] = field(default_factory=dict)  # epochs trained, by stage
    last: Event = field(default_factory=dict)


class RunLog:
    """Current state of a run, from its events.

    ``stages`` by name; ``experts`` since the experts' stage last started; ``ray`` is that stage's last ``ray-started``
    event; ``error`` is the error that stopped the last stage; ``last`` is the time of the last event in Unix seconds;
    ``count`` is the number of events.
    """

    def __init__(self) -> None:
        self.stages: dict[str, StageLog] = {}
        self.experts: dict[int, ExpertState] = {}
        self.epoch_seconds: dict[str, deque[float]] = {}  # of the latest epochs, by stage
        self.ray: Event | None = None
        self.error: str | None = None
        self.last = 0.0
        self.count = 0

    def add(self, events: Iterable[Event]) -> None:
        """Process the next events, oldest first."""
        for event in events:
            self.count += 1
            self.last = max(self.last, _time(event))
            self._add(event["kind"], event)

    def _add(self, kind: str, event: Event) -> None:
        if kind == "stage-started":
            self._start(str(event.get("stage")))
        elif kind in ("stage-finished", "stage-stopped"):
            name = str(event.get("stage"))
            self.stages.setdefault(name, StageLog()).ended = event
            self.error = f"{name}: {event.get('error')}" if kind == "stage-stopped" else None
        elif kind == "iteration":
            self.stages.setdefault("distill", StageLog()).add(event)
        elif kind == "early-evaluation":
            self.stages.setdefault("distill", StageLog()).early = event
        elif kind == "ray-started":
            self.ray = event
        elif kind.startswith("expert-") and isinstance(event.get("expert"), int):
            self._add_expert(kind, event)

    def _start(self, stage: str) -> None:
        self.stages[stage], self.error = StageLog(), None
        if stage == "experts":
            self.experts, self.epoch_seconds, self.ray = {}, {}, None

    def _add_expert(self, kind: str, event: Event) -> None:
        expert = self.experts.setdefault(event["expert"], ExpertState(event["expert"]))
        if kind == "expert-epoch":
            self.stages.setdefault("experts", StageLog()).add(event)
            stage, epoch = str(event.get("stage")), event.get("epoch")
            if isinstance(epoch, int):
                if expert.epochs.get(stage) == epoch - 1 and expert.last.get("kind") == kind:
                    seconds = self.epoch_seconds.setdefault(stage, deque(maxlen=_RECENT))
                    seconds.append(_time(event) - expert.time)
                expert.epochs[stage] = max(expert.epochs.get(stage, 0), epoch)
        expert.restarts += kind == "expert-restarted"
        expert.state = _STATES.get(kind, "active")
        expert.time = _time(event)
        expert.last = {**expert.last, **event}

    def seconds_per_epoch(self, stage: str) -> float | None:
        """Return the median duration of a stage's latest epochs, else the other stage's; None before the second."""
        known = self.epoch_seconds.get(stage) or next(iter(self.epoch_seconds.values()), None)
        return statistics.median(known) if known else None


def _time(event: Event) -> float:
    time = event.get("time")
    return float(time) if isinstance(time, int | float) else 0.0
