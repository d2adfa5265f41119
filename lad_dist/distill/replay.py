"""The record of a distillation in its run's ``events.jsonl``, from which it can be repeated bit for bit.

Which experts are complete when a window is drawn does not follow from the recipe (``buffer.start_after``), so it is
recorded: ``initial-set`` lists the experts that made the initial set, each ``iteration`` its windows as [stage, expert,
start epoch] and its gradient path, which depends on the available memory. All other draws are counter-based. Bit for
bit holds on a CPU with the same number of threads and ranks.

A killed run continues from its last checkpoint and repeats the iterations after it, possibly with other experts. So the
last record of an iteration is the valid one, and records of iterations beyond the checkpoint that a run continued from
are discarded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from lad_dist import recipe_file
from lad_dist.callbacks import Event
from lad_dist.distill.student import GradientPath
from lad_dist.errors import RunDirError, TrajectoryError
from lad_dist.progress import read_events
from lad_dist.recipe import PhaseName, Recipe, affects, differences
from lad_dist.rundir import RunDir
from lad_dist.trajectories.reader import Buffer
from lad_dist.trajectories.schema import Stage

Chosen = tuple[tuple[PhaseName, int, int], ...]  # draws of one iteration's phases: phase, expert, start epoch

# Expert and distillation fields in which a replay's recipe may differ from the recorded run's: they only affect which
# experts are drawn, which is recorded, and the number of iterations.
_FREE = ("experts.count", "buffer.start_after", "distill.iterations")


@dataclass
class _Course:
    """The course of the distillation according to the events read so far."""

    experts: tuple[int, ...] | None = None
    start: str | None = None  # checksum of the set it started from, if that was another run's
    windows: dict[int, Chosen] = field(default_factory=dict)  # by number of previous iterations
    paths: dict[int, GradientPath] = field(default_factory=dict)
    replayed_from: str | None = None


@dataclass(frozen=True)
class ReplayRecord:
    """Draws of a run's distillation from its first iteration on. Plain values, which can be sent to other processes."""

    run: str
    experts: tuple[int, ...]  # of the initial set
    windows: tuple[Chosen, ...]
    paths: tuple[GradientPath, ...]
    start: str | None = None  # checksum of the other run's set that it started from

    @classmethod
    def read(cls, folder: Path, recipe: Recipe, into: RunDir) -> ReplayRecord:
        """Read the record of the run in ``folder``, to distill ``recipe`` with it in the run folder ``into``.

        Raises:
            RunDirError: ``folder`` is not a run folder, or is ``into`` itself; its recipe differs in a relevant field;
                the record of an iteration is missing.
        """
        run = RunDir.existing(folder)
        if folder.resolve() == into.root.resolve():
            raise RunDirError(f"{folder}: cannot be replayed into itself; choose another folder with --out")
        changed = _changes(recipe_file.load(run.recipe), recipe)
        if changed:
            raise RunDirError(
                f"{folder}: was made by a recipe that differs from this one ({'; '.join(changed)}), so its windows do not "
                f"reproduce its set; replay with its own recipe: `lad-dist distill {run.recipe} --replay {folder} --out ...`"
            )
        course = _course(read_events(run.events))
        total = recipe.distill.iterations
        if course.experts is None:
            raise _missing(run, "which experts made the initial set", course, total)
        for i in range(total):
            if tuple(phase for phase, _, _ in course.windows.get(i, ())) != recipe.drawn_phases:
                raise _missing(run, f"iteration {i + 1} of {total}", course, total)
        return cls(
            str(folder),
            course.experts,
            tuple(course.windows[i] for i in range(total)),
            tuple(course.paths[i] for i in range(total)),
            course.start,
        )

    def window(self, phase: PhaseName, iteration: int, number: int = 0) -> tuple[int, int]:
        """Return the (expert, start epoch) that the run drew for a phase of iteration ``iteration`` + 1."""
        return [(expert, epoch) for at, expert, epoch in self.windows[iteration] if at == phase][number]

    def check(self, buffer: Buffer, recipe: Recipe) -> None:
        """Raise TrajectoryError if ``buffer`` lacks a checkpoint; names it and the first iteration that needs it."""
        e, length = recipe.experts, recipe.distill.window_epochs
        last = recipe.labelling
        backbone: tuple[Stage, int] = ("representation", e.epochs)
        for expert in self.experts:
            self._check_all(buffer, "the initial set", expert, (backbone, last))
        for i, windows in enumerate(self.windows):
            for phase, expert, epoch in windows:
                rows: list[tuple[Stage, int]] = [("representation", epoch)]
                if phase == "statistics":
                    rows = [backbone, last]
                elif phase != "regression":
                    rows = [(phase, epoch), (phase, epoch + length)]
                if phase == "classifier":
                    rows.append(backbone)
                self._check_all(buffer, f"iteration {i + 1}", expert, rows)

    def _check_all(self, buffer: Buffer, used_by: str, expert: int, rows: Iterable[tuple[Stage, int]]) -> None:
        for stage, epoch in rows:
            if not buffer.has(stage, expert, epoch):
                raise TrajectoryError(
                    f"{buffer.folder}: {stage} expert {expert} epoch {epoch} is missing, which {used_by} of {self.run} used; "
                    f"valid: that run's buffer, or one with the same experts (`lad-dist experts` trains them)"
                )

    def check_continues(self, into: RunDir, done: int) -> None:
        """Raise RunDirError if the ``done`` iterations in ``into`` were not distilled according to this record."""
        own = _course(read_events(into.events))
        started = None in (own.start, self.start) or own.start == self.start
        same = [own.experts == self.experts and started, *(own.windows.get(i) == self.windows[i] for i in range(done))]
        if not all(same):
            other = same.index(False)
            what = f"iteration {other} used other experts or windows" if other else "its initial set is another"
            raise RunDirError(
                f"{into.distill_checkpoint}: was not distilled as {self.run} was: {what}; "
                "remove it to replay from the start, or choose another --out"
            )


def initial_experts(run: RunDir) -> tuple[int, ...] | None:
    """Return the experts that made the initial set of the run's distillation; None if that is not recorded."""
    return _course(read_events(run.events)).experts


def check_not_replayed(into: RunDir) -> None:
    """Raise RunDirError if the distillation to continue in ``into`` is a replay, which must continue as one."""
    other = _course(read_events(into.events)).replayed_from
    if other is not None:
        raise RunDirError(
            f"{into.distill_checkpoint}: is a replay of {other}; continue it with `lad-dist distill {into.root} --replay "
            f"{other}`, or remove it to distill from the start"
        )


def _missing(run: RunDir, what: str, course: _Course, total: int) -> RunDirError:
    return RunDirError(
        f"{run.events}: the record of {what} is missing or damaged ({len(course.windows)} iterations are recorded), so the "
        "run cannot be replayed; valid: the record of a run that finished distill.iterations"
    )


def _course(events: Iterable[Event]) -> _Course:
    course = _Course()
    for event in events:
        kind, at = event["kind"], event.get("iteration")
        if kind == "initial-set":  # a new start: discard everything before
            course = _Course(experts=_experts(event.get("experts")), start=event.get("start"))
        elif kind == "distill-started" and isinstance(at, int):
            course.windows = {i: w for i, w in course.windows.items() if i < at}
            course.replayed_from = event.get("replayed_from")
        elif kind == "iteration" and isinstance(at, int):
            chosen, path = _windows(event.get("windows")), event.get("gradient", "")
            course.windows.pop(at - 1, None)
            if chosen is not None and path in get_args(GradientPath):
                course.windows[at - 1], course.paths[at - 1] = chosen, path
    return course


def _experts(value: Any) -> tuple[int, ...] | None:
    return tuple(value) if isinstance(value, list) and value and all(isinstance(x, int) for x in value) else None


def _windows(value: Any) -> Chosen | None:
    def whole(window: Any) -> bool:
        return (
            isinstance(window, list)
            and len(window) == 3
            and window[0] in get_args(PhaseName)
            and all(isinstance(x, int) and x >= 0 for x in window[1:])
        )

    return tuple(tuple(w) for w in value) if isinstance(value, list) and all(whole(w) for w in value) else None


def _changes(recorded: Recipe, asked: Recipe) -> list[str]:
    """Return ``field is X there, Y here`` for each relevant field."""
    stages = ["experts", "distill"]
    if asked.distill.select != "last":  # then the evaluation settings affect which set is kept
        stages.append("evaluate")
    return [str(d) for d in differences(recorded, asked) if affects(d.field) in stages and d.field not in _FREE]
