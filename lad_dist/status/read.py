"""State of every stage, from the files that stages leave and the event log."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lad_dist import recipe_file, results
from lad_dist.errors import LadDistError
from lad_dist.progress import EventTail, clock
from lad_dist.recipe import Recipe
from lad_dist.rundir import RunDir
from lad_dist.slurm_jobs import SlurmQueue
from lad_dist.status.log import ExpertState, RunLog, StageLog

if TYPE_CHECKING:
    from lad_dist.trajectories.reader import Buffer
    from lad_dist.trajectories.schema import Stage

State = Literal["done", "running", "stopped", "not finished", "not started"]
SILENT_SECONDS = 300.0  # a stage without an event for this long may have been killed; an epoch or iteration is shorter
_FIRST = ("failed", "waiting", "active")  # the order in which experts are shown
_SHARE_FOR_LISTING = 0.05  # maximum fraction of time spent listing the buffer


@dataclass(frozen=True)
class StageStatus:
    """One stage: ``state``, and its progress as text."""

    name: str
    state: State
    detail: str = ""


@dataclass(frozen=True)
class RunStatus:
    """Status of a run at one moment.

    ``experts`` are lines about the experts that a fleet is training, and those that failed; ``notes`` is further
    information (such as the dashboard's address); ``error`` is the last stage's, if it stopped with one; ``rows`` are
    results.json's. ``version`` differs from the previous one's exactly if something happened in between. ``over``: all
    submitted SLURM jobs are over, and no stage is running.
    """

    folder: Path
    recipe: Recipe
    stages: tuple[StageStatus, ...]
    error: str | None
    rows: tuple[results.Row, ...]
    experts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    version: tuple[object, ...] = ()
    over: bool = False

    def document(self) -> dict[str, Any]:
        """Return the status as plain values for JSON; accuracies are fractions, averaged over seeds."""
        return {
            "folder": str(self.folder),
            "name": self.recipe.name,
            "method": self.recipe.method,
            "recipe_hash": self.recipe.recipe_hash(),
            "finished": self.finished,
            "ended": self.ended,
            "error": self.error,
            "stages": [asdict(stage) for stage in self.stages],
            "experts": list(self.experts),
            "notes": list(self.notes),
            "results": results.summary(self.rows),
        }

    @property
    def finished(self) -> bool:
        """Whether every stage is done."""
        return all(stage.state == "done" for stage in self.stages)

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen: every stage is done, or all submitted SLURM jobs are over."""
        return self.finished or self.over


def read_status(folder: Path, now: float | None = None) -> RunStatus:
    """Return the status of the run in ``folder``; ``now`` is Unix time in seconds.

    Raises:
        RunDirError: it is not a run folder, or its results are damaged.
        RecipeError: its recipe.yaml cannot be read.
    """
    return Follower(folder).read(now)


class Follower:
    """Reads a run's status repeatedly, and only what is new in ``events.jsonl``. Raises as ``read_status`` does."""

    def __init__(self, folder: Path) -> None:
        self.run = RunDir.existing(folder)
        self._tail, self._log = EventTail(self.run.events, skim=True), RunLog()
        self._recipe: tuple[object, Recipe] | None = None
        self._shelf = _Shelf(self.run)
        self._queue = SlurmQueue(self.run)

    def read(self, now: float | None = None) -> RunStatus:
        """Return the current status (``now``: Unix time in seconds)."""
        run = RunDir.existing(self.run.root)
        now = time.time() if now is None else now
        other, events = self._tail.read()
        if other:
            self._log = RunLog()
        log = self._log
        log.add(events)
        recipe = self._read_recipe()
        rows = results.read(run.results)
        experts, lines = _experts(recipe, log, self._shelf, now)
        stages = [experts, _distill(recipe, run, log, now)]
        measured = [row["source"] for row in rows]
        for source in dict.fromkeys([*results.wanted(recipe, run), *measured]):
            tuning = log.stages.get(f"tune {source}")
            if tuning is not None:
                state = _state(tuning, tuning.ended is not None, True, now, log.last)
                what = "learning rate and epochs, chosen on validation images"
                stages.append(StageStatus(f"tune {source}", state, what))
            wanted = len(results.networks(recipe, source))
            done, name = results.planned_among(rows, source, recipe), f"evaluate {source}"
            more = measured.count(source) - done
            detail = f"{done} of {wanted} networks" + (f", and {more} more" if more else "")
            state = _state(log.stages.get(name), done >= wanted, done + more > 0, now, log.last)
            stages.append(StageStatus(name, state, "" if state == "not started" else detail))
        page = run.report / "index.html"
        written = page.exists()
        state = _state(log.stages.get("report"), written, False, now, log.last)
        stages.append(StageStatus("report", state, str(page) if written else ""))
        slurm = self._queue.lines(_done(stages))
        notes = [*slurm, *([self._shelf.fault] if self._shelf.fault else [])]
        if experts.state == "running" and log.ray is not None:
            notes.append(_ray(log.ray.get("dashboard"), log.ray.get("address"), log.ray.get("namespace")))
        version = (
            *self._queue.version,
            log.count,
            tuple(stage.state for stage in stages),
            len(rows),
            self._shelf.fault,
        )
        over = self._queue.over and not any(stage.state == "running" for stage in stages)
        return RunStatus(
            run.root, recipe, tuple(stages), log.error, tuple(rows), tuple(lines), tuple(notes), version, over
        )

    def _read_recipe(self) -> Recipe:
        status = self.run.recipe.stat()
        stamp = (status.st_mtime_ns, status.st_size)
        if self._recipe is None or self._recipe[0] != stamp:
            self._recipe = stamp, recipe_file.load(self.run.recipe)
        return self._recipe[1]


def _done(stages: Sequence[StageStatus]) -> set[str]:
    """Return the completed stages, named as SLURM's jobs, where evaluations and their tuning are one."""
    by_verb: dict[str, list[bool]] = {}
    for stage in stages:
        verb = "evaluate" if stage.name.startswith("tune ") else stage.name.split()[0]
        by_verb.setdefault(verb, []).append(stage.state == "done")
    return {verb for verb, done in by_verb.items() if all(done)}


class _Shelf:
    """Contents of the buffer, relisted periodically; ``fault`` is the error if listing failed."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._buffer: Buffer | None = None
        self._again, self._seen = -math.inf, False
        self.fault: str | None = None

    def refresh(self, ended: bool) -> None:
        """List the buffer, if enough time has passed since the last time, or the stage has ``ended`` since."""
        began = time.monotonic()
        if began < self._again and ended == self._seen:
            return
        try:
            if self._buffer is None:
                from lad_dist.trajectories.reader import Buffer

                began = time.monotonic()
                self._buffer = Buffer(self._run.trajectories)
            else:
                self._buffer.refresh()
            self.fault = None
        except LadDistError as error:  # an unreachable object store must not hide the rest
            self.fault = f"buffer: {error}"
        now = time.monotonic()
        self._seen, self._again = ended, now + (now - began) / _SHARE_FOR_LISTING

    def epochs(self, stage: Stage, expert: int) -> int:
        """Return the number of published epochs of an expert's stage, up to the first gap."""
        return (self._buffer.last_contiguous_epoch(stage, expert) or 0) if self._buffer is not None else 0


def _state(log: StageLog | None, done: bool, begun: bool, now: float, last: float) -> State:
    """Derive the state from the files first (``done``, ``begun``), then from the events."""
    if log is not None and log.ended is None:
        return "running" if now - last < SILENT_SECONDS else "stopped"
    if done:
        return "done"
    if log is not None and log.ended is not None and log.ended["kind"] == "stage-stopped":
        return "stopped"
    return "not finished" if begun or log is not None else "not started"


def _experts(recipe: Recipe, log: RunLog, shelf: _Shelf, now: float) -> tuple[StageStatus, list[str]]:
    e, stage_log = recipe.experts, log.stages.get("experts")
    wanted = e.last_epochs
    shelf.refresh(ended=stage_log is not None and stage_log.ended is not None)
    published = {i: {s: min(shelf.epochs(s, i), most) for s, most in wanted.items()} for i in range(e.count)}
    total = sum(wanted.values())
    whole = [i for i, by_stage in published.items() if sum(by_stage.values()) == total]
    state = _state(stage_log, len(whole) == e.count, any(sum(p.values()) for p in published.values()), now, log.last)
    parts = [f"{len(whole)} of {e.count} experts"]
    partly = [i for i, by_stage in published.items() if 0 < sum(by_stage.values()) < total]
    active = [x for x in log.experts.values() if x.state == "active"] if state == "running" else []
    fleet = len(active) > 1 or (state == "running" and log.ray is not None)
    step = stage_log.step if stage_log is not None else None
    if fleet:
        parts.append(f"{len(active)} in training")
    elif step is not None and state != "done":
        most = _most(wanted, step.get("stage"))
        parts.append(f"expert {step.get('expert')}: {step.get('stage')} epoch {step.get('epoch')} of {most}")
        parts += [f"{name} {_number(step[name])}" for name in ("loss", "accuracy") if _known(step.get(name))]
    elif partly:
        parts.append(f"expert {partly[0]} has {sum(published[partly[0]].values())} of {total} epochs")
    if state == "running":
        left = _epochs_left(log, wanted, published)
        parts.append(f"{total * e.count - sum(left.values())} of {total * e.count} epochs")
        parts += [*_pace(log, wanted, left, len(active)), _last_sign(now, log.last)]
    elif state == "stopped" and stage_log is not None and stage_log.ended is None:
        parts.append(_last_sign(now, log.last))
    shown = [
        *(active if fleet else []),
        *(x for x in log.experts.values() if _to_tell(x, state) and x.expert not in whole),
    ]
    width = len(str(e.count - 1))
    lines = [
        _expert_line(x, wanted, width, now) for x in sorted(shown, key=lambda x: (_FIRST.index(x.state), x.expert))
    ]
    return StageStatus("experts", state, "" if state == "not started" else ", ".join(parts)), lines


def _epochs_left(log: RunLog, wanted: dict[Stage, int], published: dict[int, dict[Stage, int]]) -> dict[Stage, int]:
    """Return the epochs left per stage, over all experts.

    Epochs whose part is not published yet count as trained while their process lives.
    """
    left = dict.fromkeys(wanted, 0)
    for i, by_stage in published.items():
        told = log.experts[i].epochs if i in log.experts else {}
        for stage, most in wanted.items():
            left[stage] += most - min(max(by_stage[stage], told.get(stage, 0)), most)
    return left


def _pace(log: RunLog, wanted: dict[Stage, int], left: dict[Stage, int], active: int) -> list[str]:
    """Return experts per hour and the time left, extrapolated from the experts in training."""
    seconds = {stage: log.seconds_per_epoch(stage) for stage in wanted}
    one = sum((seconds[stage] or 0.0) * epochs for stage, epochs in wanted.items())
    if one <= 0.0:
        return []
    remaining = sum((seconds[stage] or 0.0) * epochs for stage, epochs in left.items())
    at_a_time = max(active, 1)
    return [f"{_number(3600 * at_a_time / one)} experts per hour", f"about {clock(remaining / at_a_time)} left"]


def _to_tell(x: ExpertState, stage: State) -> bool:
    """Return whether an expert not in training must be shown: it failed, or waits for a retry."""
    return stage != "done" and (x.state == "failed" or (x.state == "waiting" and stage == "running"))


def _expert_line(x: ExpertState, wanted: dict[Stage, int], width: int, now: float) -> str:
    last = x.last
    name = f"expert {x.expert:{width}}  "
    where = "/".join(str(last[k]) for k in ("host", "pid") if last.get(k) is not None)
    ago = f"{clock(max(now - x.time, 0.0))} ago"
    again = [f"restarted {x.restarts} time{'s' * (x.restarts > 1)}"] if x.restarts else []
    if x.state in ("failed", "waiting"):
        what = f"failed {ago}" if x.state == "failed" else f"stopped {ago}, will be retried"
        why = " ".join(str(last.get("error") or "no reason was given").split())
        return name + ", ".join([what, *again, *([where] if where else []), why])
    stage, epoch = last.get("stage"), last.get("epoch")
    most = _most(wanted, stage)
    parts = [f"{stage} epoch {epoch} of {most}" if stage is not None and epoch is not None else "starts"]
    parts += [f"{name} {_number(last[name])}" for name in ("loss", "accuracy") if _known(last.get(name))]
    if _known(last.get("images_per_second")):
        parts.append(f"{_number(last['images_per_second'])} images/s")
    return name + ", ".join([*parts, *([where] if where else []), *again, ago])


def _most(wanted: dict[Stage, int], stage: object) -> int:
    """Return the number of epochs of ``stage``, which may be any text found in the events."""
    return next((most for name, most in wanted.items() if name == stage), 0)


def _ray(dashboard: object, address: object, namespace: object) -> str:
    at = f"{'' if '://' in str(dashboard) else 'http://'}{dashboard}"  # Ray gives host:port
    words = [f"dashboard {at}" if dashboard else "no dashboard"]
    words += [f"{name} {value}" for name, value in (("address", address), ("namespace", namespace)) if value]
    return f"Ray: {', '.join(words)}"


def _distill(recipe: Recipe, run: RunDir, log: RunLog, now: float) -> StageStatus:
    stage_log, total = log.stages.get("distill"), recipe.distill.iterations
    reached = (stage_log.step or {}).get("iteration") if stage_log is not None else None
    done = run.distilled.exists() and not (isinstance(reached, int) and reached < total)  # else to be extended
    state = _state(stage_log, done, run.distill_checkpoint.exists(), now, log.last)
    if stage_log is None or stage_log.step is None:
        return StageStatus("distill", state, str(run.distilled) if done else "")
    at = stage_log.step
    parts = [f"iteration {at.get('iteration')} of {total}"]
    parts += [f"{k.replace('_', ' ')} {_number(v)}" for k, v in at.items() if k.startswith("loss_") and _known(v)]
    if _known(at.get("alpha")):
        parts.append(f"alpha {_number(at['alpha'])}")
    early = stage_log.early or {}
    if _known(early.get("overall")):
        gain = f", {100 * early['gain']:+.1f} points since the start" if _known(early.get("gain")) else ""
        parts.append(f"quick measurement at iteration {early.get('iteration')} {early['overall']:.1%}{gain}")
    each = stage_log.seconds_each()
    if state == "running" and each is not None and isinstance(at.get("iteration"), int):
        parts.append(f"about {clock(each * max(total - at['iteration'], 0))} left")
    if state in ("running", "stopped") and stage_log.ended is None:
        parts.append(_last_sign(now, log.last))
    return StageStatus("distill", state, ", ".join(parts))


def _last_sign(now: float, last: float) -> str:
    ago = max(now - last, 0.0)
    return f"last event {clock(ago)} ago" + ("; killed, or in a very long step" if ago >= SILENT_SECONDS else "")


def _known(value: object) -> bool:
    return isinstance(value, int | float)


def _number(value: float) -> str:
    return f"{value:.4g}"
