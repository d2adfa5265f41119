"""The events of a run, folded one by one into what is known now. Memory does not grow with the number of events.

Fields are taken as they come: an event that lacks one, or holds another type, says less and harms nothing.
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
    "expert-restarted": "waiting",  # for a worker: it is tried again
    "expert-failed": "failed",
    "expert-finished": "finished",
}
_RECENT = 50  # events that rates are estimated from


@dataclass
class StageLog:
    """One stage since it was last started: the event that ended it, its last step, when its latest steps were, and what
    the last quick measurement of the set found."""

    ended: Event | None = None
    step: Event | None = None
    early: Event | None = None
    times: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))

    def add(self, event: Event) -> None:
        """One more step."""
        self.step = event
        self.times.append(_time(event))

    def seconds_each(self) -> float | None:
        """The median time between the latest steps, so that one pause does not spoil it; None before the second."""
        between = [after - before for before, after in pairwise(self.times)]
        return statistics.median(between) if between else None


@dataclass
class ExpertLog:
    """One expert since its stage was last started. ``last`` holds the newest value of every field that was told."""

    expert: int
    state: State = "active"
    time: float = 0.0
    restarts: int = 0
    epochs: dict[str, int] = field(default_factory=dict)  # trained, by stage
    last: Event = field(default_factory=dict)


class RunLog:
    """What the events say so far.

    ``stages`` by name; ``experts`` of the experts' stage since it was last started; ``ray`` is the last ``ray-started``
    event of it; ``error`` is what the last stage stopped with; ``last`` is the time of the last event in Unix seconds;
    ``count`` is how many events there were.
    """

    def __init__(self) -> None:
        self.stages: dict[str, StageLog] = {}
        self.experts: dict[int, ExpertLog] = {}
        self.epoch_seconds: dict[str, deque[float]] = {}  # of the latest epochs, by stage
        self.ray: Event | None = None
        self.error: str | None = None
        self.last = 0.0
        self.count = 0

    def add(self, events: Iterable[Event]) -> None:
        """The next events, oldest first."""
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
        expert = self.experts.setdefault(event["expert"], ExpertLog(event["expert"]))
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
        """The median duration of the latest epochs of a stage, else of the other one; None before the second epoch."""
        known = self.epoch_seconds.get(stage) or next(iter(self.epoch_seconds.values()), None)
        return statistics.median(known) if known else None


def _time(event: Event) -> float:
    time = event.get("time")
    return float(time) if isinstance(time, int | float) else 0.0
