"""events.jsonl as curves and sums. A resumed run records some iterations twice; the last record counts.

A curve is a list of (x, y) in ascending x; y is None if a figure was not finite.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

Event = dict[str, Any]
Curve = list[tuple[float, float | None]]


@dataclass
class StageCost:
    """Cost of one stage, summed over its attempts."""

    stage: str
    attempts: int = 0
    seconds: float = 0.0
    host_bytes: int | None = None
    device_bytes: int | None = None
    last_error: str | None = None  # of the last attempt, if it did not finish


@dataclass
class History:
    """History of a run, from its events."""

    data: Event | None = None
    iterations: dict[int, Event] = field(default_factory=dict)
    early: dict[int, Event] = field(default_factory=dict)
    expert_epochs: dict[tuple[str, int, int], Event] = field(default_factory=dict)  # by stage, expert, epoch
    costs: dict[str, StageCost] = field(default_factory=dict)
    distill_started: Event | None = None
    began: float | None = None
    ended: float | None = None

    def curve(self, name: str) -> Curve:
        """Return a figure of the iterations, for example ``alpha``; empty if no iteration has it."""
        return [(i, self.iterations[i][name]) for i in sorted(self.iterations) if name in self.iterations[i]]

    def early_curve(self, name: str) -> Curve:
        """Return a group's accuracy in the quick measurements (``tail``); a gap if a network failed to train.

        Empty with fewer than two, which make no curve.
        """
        known = [i for i in sorted(self.early) if self.early[i].get(name) is not None]
        return [(i, self.early[i].get(name)) for i in sorted(self.early)] if len(known) > 1 else []

    def group_curve(self, name: str, group: str, classes: Sequence[int]) -> Curve:
        """Return a figure of a group of classes: ``name`` is recorded by class and averaged, ``names`` by group."""
        curve: Curve = []
        for i in sorted(self.iterations):
            by_group = self.iterations[i].get(f"{name}s")
            if by_group is not None:
                if by_group.get(group) is not None:
                    curve.append((i, by_group[group]))
                continue
            per_class = self.iterations[i].get(name) or []
            values = [per_class[c] for c in classes if c < len(per_class) and per_class[c] is not None]
            if values:
                curve.append((i, statistics.mean(values)))
        return curve

    def alignment_curve(self, phase: str, name: str) -> Curve:
        """Return a figure of a phase's gradient alignment (``cosine_tail``); iterations without it are omitted."""
        curve: Curve = []
        for i in sorted(self.iterations):
            figures = (self.iterations[i].get("alignment") or {}).get(phase) or {}
            if figures.get(name) is not None:
                curve.append((i, figures[name]))
        return curve

    def expert_curve(self, stage: str, name: str, offset: int = 0) -> tuple[Curve, list[tuple[float, float, float]]]:
        """Return per epoch of a stage (plus ``offset``): the mean over experts, and (epoch, smallest, largest)."""
        by_epoch: dict[int, list[float]] = {}
        for (of_stage, _, epoch), event in self.expert_epochs.items():
            if of_stage == stage and event.get(name) is not None:
                by_epoch.setdefault(epoch, []).append(event[name])
        epochs = sorted(by_epoch)
        mean: Curve = [(e + offset, statistics.mean(by_epoch[e])) for e in epochs]
        return mean, [(e + offset, min(by_epoch[e]), max(by_epoch[e])) for e in epochs]

    @property
    def experts_seen(self) -> int:
        """Number of experts this run trained, at least in part."""
        return len({expert for _, expert, _ in self.expert_epochs})

    def median_rate(self) -> dict[str, float]:
        """Return median seconds per distillation iteration and images per second of expert epochs, where known."""
        rates = {}
        seconds = [e["seconds"] for e in self.iterations.values() if e.get("seconds") is not None]
        if seconds:
            rates["seconds per iteration"] = statistics.median(seconds)
        for stage in ("representation", "classifier"):
            speeds = [
                e["images_per_second"]
                for (s, _, _), e in self.expert_epochs.items()
                if s == stage and e.get("images_per_second") is not None
            ]
            if speeds:
                rates[f"images per second, {stage} experts"] = statistics.median(speeds)
        return rates


def read_history(events: Iterable[Event]) -> History:
    """Build the history from a run's events."""
    h = History()
    for event in events:
        kind, when = event["kind"], event.get("time")
        if when is not None:
            h.began, h.ended = h.began if h.began is not None else when, when
        if kind == "data" and "counts" in event and None not in event["counts"]:
            h.data = event
        elif kind == "iteration":
            h.iterations[event["iteration"]] = event
        elif kind == "early-evaluation":
            h.early[event["iteration"]] = event
        elif kind == "distill-started":
            h.distill_started = event
            h.iterations = {i: e for i, e in h.iterations.items() if i <= event["iteration"]}
            h.early = {i: e for i, e in h.early.items() if i <= event["iteration"]}
        elif kind == "expert-epoch":
            h.expert_epochs[event["stage"], event["expert"], event["epoch"]] = event
        elif kind in ("stage-finished", "stage-stopped"):
            _add_cost(h.costs, event)
    h.costs.pop("report", None)  # generating the page is not part of the experiment
    return h


def _add_cost(costs: dict[str, StageCost], event: Event) -> None:
    cost = costs.setdefault(event["stage"], StageCost(event["stage"]))
    cost.attempts += 1
    cost.seconds += event.get("seconds") or 0.0
    peak = event.get("peak_memory_bytes") or {}
    cost.host_bytes = _larger(cost.host_bytes, peak.get("host"))
    cost.device_bytes = _larger(cost.device_bytes, peak.get("device"))
    cost.last_error = event.get("error", "stopped") if event["kind"] == "stage-stopped" else None


def _larger(a: int | None, b: int | None) -> int | None:
    return max((x for x in (a, b) if x is not None), default=None)


def smoothed(curve: Curve) -> Curve:
    """Return a centred running mean over about a twentieth of the curve (shorter at its ends); gaps are omitted."""
    known = [(x, y) for x, y in curve if y is not None]
    half = len(known) // 40
    sums = [0.0]
    for _, y in known:
        sums.append(sums[-1] + y)
    out: Curve = []
    for i, (x, _) in enumerate(known):
        reach = min(half, i, len(known) - 1 - i)
        out.append((x, (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)))
    return out


def thinned(curve: Curve, most: int) -> Curve:
    """Reduce to about ``most`` points: each segment's smallest and largest, so that spikes stay visible."""
    if len(curve) <= most:
        return curve
    out: Curve = []
    step = 2 * len(curve) / most
    start = 0.0
    while round(start) < len(curve):
        stretch = curve[round(start) : round(start + step)]
        known = [point for point in stretch if point[1] is not None]
        if known:
            out += sorted({min(known, key=_value), max(known, key=_value)}, key=lambda point: point[0])
        elif stretch:
            out.append(stretch[0])
        start += step
    return out


def _value(point: tuple[float, float | None]) -> float:
    assert point[1] is not None
    return point[1]
