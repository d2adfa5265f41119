"""What a run folder says about itself: which stages are done, running or stopped, and what has come out so far.

Reads files only (``events.jsonl``, ``results.json``, the names of the buffer's parts), so it works from any terminal
while the run goes on, and after it was killed. What is done is judged by the files that a stage leaves; events tell the
rest.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.table import Table
from rich.text import Text

from lad_dist import recipe_file, results
from lad_dist.errors import RunDirError
from lad_dist.progress import read_events
from lad_dist.recipe import Recipe
from lad_dist.report import tables
from lad_dist.rundir import RunDir

if TYPE_CHECKING:
    from lad_dist.trajectories.schema import Stage

Event = dict[str, Any]
State = Literal["done", "running", "stopped", "not finished", "not started"]
SILENT_SECONDS = 300.0  # a stage without an event for so long may have been killed; one epoch or iteration is shorter
_RECENT = 50  # events that the time left is estimated from
_STYLES: dict[State, str] = {
    "done": "green",
    "running": "cyan",
    "stopped": "red",
    "not finished": "yellow",
    "not started": "dim",
}


@dataclass(frozen=True)
class StageStatus:
    """One stage: ``state``, and in words how far it is."""

    name: str
    state: State
    detail: str = ""


@dataclass(frozen=True)
class RunStatus:
    """A run at one moment. ``error`` is the last stage's, where it stopped with one; ``rows`` are results.json's."""

    folder: Path
    recipe: Recipe
    stages: tuple[StageStatus, ...]
    error: str | None
    rows: tuple[results.Row, ...]


@dataclass
class _Log:
    """What the events say about one stage since it was last started."""

    started: float | None = None
    ended: Event | None = None
    steps: list[Event] = field(default_factory=list)


def read_status(folder: Path, now: float | None = None) -> RunStatus:
    """The status of the run in ``folder``; ``now`` is Unix time in seconds.

    Raises:
        RunDirError: it is not a run folder, or its results are damaged.
        RecipeError: its recipe.yaml cannot be read.
    """
    run = RunDir.existing(folder)
    recipe = recipe_file.load(run.recipe)
    now = time.time() if now is None else now
    logs, error, last = _read_logs(run.events)
    rows = results.read(run.results)
    stages = [_experts(recipe, run, logs, now, last), _distill(recipe, run, logs, now, last)]
    measured = [row["source"] for row in rows]
    for source in dict.fromkeys(["distilled", *recipe.evaluate.baselines, *measured]):
        done, name = measured.count(source), f"evaluate {source}"
        detail = f"{done} of {recipe.evaluate.seeds} networks"
        state = _state(logs.get(name), done >= recipe.evaluate.seeds, done > 0, now, last)
        stages.append(StageStatus(name, state, "" if state == "not started" else detail))
    written = (run.report / "index.html").exists()
    stages.append(
        StageStatus(
            "report",
            _state(logs.get("report"), written, False, now, last),
            str(run.report / "index.html") if written else "",
        )
    )
    return RunStatus(folder, recipe, tuple(stages), error, tuple(rows))


def _read_logs(path: Path) -> tuple[dict[str, _Log], str | None, float]:
    """Per stage what happened since its last start; what the last stage stopped with; the time of the last event."""
    logs: dict[str, _Log] = {}
    current, error, last = _Log(), None, 0.0
    for event in read_events(path):
        kind, last = event["kind"], max(last, float(event.get("time") or 0.0))
        if kind == "stage-started":
            current, error = _Log(started=event.get("time")), None
            logs[str(event.get("stage"))] = current
        elif kind in ("stage-finished", "stage-stopped"):
            name = str(event.get("stage"))
            logs.setdefault(name, _Log()).ended = event
            error = f"{name}: {event.get('error')}" if kind == "stage-stopped" else None
        elif kind in ("expert-epoch", "iteration"):
            current.steps.append(event)
    return logs, error, last


def _state(log: _Log | None, done: bool, begun: bool, now: float, last: float) -> State:
    """By the files first (``done``, ``begun``), then by the events."""
    if log is not None and log.ended is None:
        return "running" if now - last < SILENT_SECONDS else "stopped"
    if done:
        return "done"
    if log is not None and log.ended is not None and log.ended["kind"] == "stage-stopped":
        return "stopped"
    return "not finished" if begun or log is not None else "not started"


def _experts(recipe: Recipe, run: RunDir, logs: dict[str, _Log], now: float, last: float) -> StageStatus:
    from lad_dist.trajectories.reader import Buffer

    e, log = recipe.experts, logs.get("experts")
    buffer = Buffer(run.trajectories)
    wanted: tuple[tuple[Stage, int], ...] = (("representation", e.epochs), ("classifier", e.classifier_epochs))

    def epochs_of(expert: int) -> int:
        return sum(min(buffer.last_contiguous_epoch(stage, expert) or 0, most) for stage, most in wanted)

    trained = {i: epochs_of(i) for i in range(e.count)}
    each = e.epochs + e.classifier_epochs
    done = sum(epochs == each for epochs in trained.values())
    state = _state(log, done == e.count, any(trained.values()), now, last)
    parts = [f"{done} of {e.count} experts"]
    partly = [i for i, epochs in trained.items() if 0 < epochs < each]
    if log is not None and log.steps and state != "done":
        at = log.steps[-1]
        most = dict(wanted).get(at["stage"], 0)
        parts.append(f"expert {at['expert']}: {at['stage']} epoch {at['epoch']} of {most}")
        parts += [f"{name} {_number(at[name])}" for name in ("loss", "accuracy") if at.get(name) is not None]
    elif partly:
        parts.append(f"expert {partly[0]} has {trained[partly[0]]} of {each} epochs")
    if state == "running" and log is not None:
        parts += [*_time_left(log.steps, sum(each - epochs for epochs in trained.values())), _last_sign(now, last)]
    elif state == "stopped" and log is not None and log.ended is None:
        parts.append(_last_sign(now, last))
    return StageStatus("experts", state, "" if state == "not started" else ", ".join(parts))


def _distill(recipe: Recipe, run: RunDir, logs: dict[str, _Log], now: float, last: float) -> StageStatus:
    log, total = logs.get("distill"), recipe.distill.iterations
    done = run.distilled.exists()
    state = _state(log, done, run.distill_checkpoint.exists(), now, last)
    if log is None or not log.steps:
        return StageStatus("distill", state, str(run.distilled) if done else "")
    at = log.steps[-1]
    parts = [f"iteration {at.get('iteration')} of {total}"]
    parts += [f"{k.replace('_', ' ')} {_number(v)}" for k, v in at.items() if k.startswith("loss_") and v is not None]
    if at.get("alpha") is not None:
        parts.append(f"alpha {_number(at['alpha'])}")
    if state == "running":
        parts += _time_left(log.steps, total - int(at.get("iteration") or 0))
    if state in ("running", "stopped") and log.ended is None:
        parts.append(_last_sign(now, last))
    return StageStatus("distill", state, ", ".join(parts))


def _time_left(steps: Sequence[Event], left: int) -> list[str]:
    """From the median time between the latest steps, so that one pause does not spoil it."""
    times = [float(event["time"]) for event in steps[-_RECENT:]]
    between = [after - before for before, after in pairwise(times)]
    return [f"about {_clock(statistics.median(between) * left)} left"] if between else []


def _last_sign(now: float, last: float) -> str:
    ago = max(now - last, 0.0)
    return f"last event {_clock(ago)} ago" + ("; killed, or in a very long step" if ago >= SILENT_SECONDS else "")


def _number(value: float) -> str:
    return f"{value:.4g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def status_lines(status: RunStatus) -> Iterator[Text]:
    """The status in words, without the results."""
    r = status.recipe
    what = f"{r.name}, method {r.method}, {r.data.dataset}, {_imbalance(r)}, IPC {r.ipc}, seed {r.seed}"
    yield Text(f"{status.folder}: {what}")
    width = max(len(stage.name) for stage in status.stages)
    for stage in status.stages:
        yield Text.assemble(f"  {stage.name:{width}}  ", (f"{stage.state:14}", _STYLES[stage.state]), stage.detail)
    if status.error:
        yield Text.assemble(("last error: ", "bold red"), status.error)


def _imbalance(recipe: Recipe) -> str:
    return "natural" if recipe.data.imbalance == "natural" else f"factor {recipe.data.imbalance_factor:g}"


def results_table(rows: Sequence[results.Row]) -> Table:
    """Per source mean and standard deviation over seeds, in percent."""
    lines = tables.result_lines(results.summary(rows))
    many = len({line.architecture for line in lines}) > 1
    table = Table("source", *(["architecture"] if many else []))
    for figure in tables.FIGURES:
        table.add_column(f"{figure} %", justify="right")
    table.add_column("seeds", justify="right")
    for line in lines:
        table.add_row(line.source, *([line.architecture] if many else []), *line.figures, line.seeds)
    return table


def results_notes(rows: Sequence[results.Row]) -> Iterator[str]:
    """What a reader of the table must know: what it was measured on, and how the distilled set was chosen."""
    splits = " and ".join(sorted({row["split"] for row in rows}))
    yield f"top-1 accuracy on the {splits} split, mean and standard deviation over seeds"
    yield "head, medium, tail: thirds of the classes by their number of training images"
    for selection in sorted({row["selection"] for row in rows if row["source"] == "distilled"}):
        published = "selected on the test set, as published. " if selection == "test-as-published" else ""
        yield published + tables.SELECTION.get(selection, f"selection: {selection}")


def compare_table(runs: Sequence[Path]) -> Table:
    """The results of several runs in one table; a baseline that runs share (the same images, trained alike) is shown once.

    Raises:
        RunDirError: a folder is not a run, or holds no results yet.
    """
    table = Table("run", "set", box=box.SIMPLE, padding=(0, 1, 0, 0), title="accuracy in percent")
    for heading in (*tables.FIGURES, "IPC", "seeds"):
        table.add_column(heading, justify="right", no_wrap=True)
    shown: list[tuple[object, ...]] = []
    for folder in runs:
        rows = results.read(RunDir.existing(folder).results)
        if not rows:
            raise RunDirError(f"{folder}: holds no results yet; `lad-dist evaluate {folder}` makes them")
        for entry, line in zip(results.summary(rows), tables.result_lines(results.summary(rows)), strict=True):
            members = [r for r in rows if (r["source"], r["architecture"]) == (entry["source"], entry["architecture"])]
            what = (entry["source"], entry["architecture"], members[0]["set_id"], members[0]["settings"], len(members))
            if what in shown:
                continue
            shown.append(what)
            ipc = "" if members[0]["ipc"] is None else str(members[0]["ipc"])
            label = tables.METHODS.get(entry["method"], entry["source"])
            table.add_row(folder.name, label, *line.figures, ipc, line.seeds)
    return table
