"""Export a run's events as TensorBoard scalars, from its files alone; works for runs active elsewhere too."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lad_dist.callbacks import Event
from lad_dist.errors import RunDirError, StorageError
from lad_dist.progress import EventTail
from lad_dist.rundir import RunDir, host_name
from lad_dist.status.read import Follower

_PHASES = ("representation", "classifier")
_OF_PHASE = ("loss", "student_loss", "cosine", "norm_ratio")
_ACCURACIES = ("overall", "head", "medium", "tail", "balanced", "ece")


def write(folder: Path, every: float | None, say: Callable[[str], None]) -> Path:
    """Write the run's events so far into its folder ``tensorboard``, from scratch; return that folder.

    ``every``: continue until the run is done, polling for new events at this interval in seconds; None: only current
    events.

    Raises:
        RunDirError: ``folder`` is not a run folder, or the package tensorboard is not installed.
        StorageError: the file system refuses a write.
    """
    run = RunDir.existing(folder)
    try:
        import tensorboard.summary.writer.record_writer  # noqa: F401 - as _Writer does, before anything is removed
    except ImportError as error:
        raise RunDirError(
            f"tensorboard: cannot be imported ({error}); pip install tensorboard, or look at `lad-dist status {folder}`"
        ) from error
    tail, follower = EventTail(run.events), Follower(folder)
    writer: _Writer | None = None
    count = 0
    try:
        while True:
            done = follower.read().ended  # before the events, so that the last ones are included
            other, events = tail.read()
            if writer is None or other:
                if writer is not None:
                    writer.close()
                shutil.rmtree(run.tensorboard, ignore_errors=True)
                writer, count = _Writer(run.tensorboard), 0
                say(f"tensorboard --logdir {run.tensorboard}")
            for event in events:
                for tag, value, step in scalars(event):
                    writer.add(tag, value, step, event.get("time", 0.0))
                    count += 1
            writer.flush()
            if every is None or done:
                say(f"{count} scalars written")
                return run.tensorboard
            time.sleep(every)
    except OSError as error:
        raise StorageError(
            f"{error.filename or run.tensorboard}: cannot be written: {error.strerror or error}; free some space, or look at "
            f"`lad-dist status {folder}`"
        ) from error
    finally:
        if writer is not None:
            with contextlib.suppress(OSError):  # already reported; buffered data are lost when the disk is full
                writer.close()


class _Writer:
    """Writes a TensorBoard file from this thread, so that file system errors are raised here (OSError).

    ``SummaryWriter`` loses them in its own thread and then waits for that thread forever.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        self._file = (folder / f"events.out.tfevents.{now:.0f}.{host_name()}.{os.getpid()}.0").open("wb")
        self._records = RecordWriter(self._file)
        self._records.write(self._event(wall_time=now, file_version="brain.Event:2").SerializeToString())

    def add(self, tag: str, value: float, step: int, when: float) -> None:
        """Append one scalar."""
        summary = self._summary(value=[self._summary.Value(tag=tag, simple_value=value)])
        self._records.write(self._event(wall_time=when, step=step, summary=summary).SerializeToString())

    def flush(self) -> None:
        """Make written data visible to readers."""
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def scalars(event: Event) -> Iterator[tuple[str, float, int]]:
    """Yield (tag, value, step) of one event: expert epochs, iterations, quick measurements, evaluated networks.

    Null values are omitted.
    """
    kind = event["kind"]
    found: dict[str, Any] = {}
    step = 0
    if kind == "expert-epoch":
        step = event["epoch"]
        names = ("loss", "accuracy", "images_per_second")
        found = {f"experts/{event['stage']}/expert-{event['expert']:04d}/{name}": event.get(name) for name in names}
    elif kind == "iteration":
        step = event["iteration"]
        found = {"distill/alpha": event.get("alpha"), "distill/seconds": event.get("seconds")}
        for phase in ("regression", "statistics"):
            found |= {f"distill/{name}/{phase}": event.get(f"{name}_{phase}") for name in ("loss", "accuracy")}
        found |= {f"distill/{name}/{phase}": event.get(f"{name}_{phase}") for name in _OF_PHASE for phase in _PHASES}
        aligned = event.get("alignment") or {}
        found |= {f"alignment/{phase}/{name}": value for phase, of in aligned.items() for name, value in of.items()}
    elif kind == "early-evaluation":
        step = event["iteration"]
        found = {f"distill/accuracy/{name}": event.get(name) for name in (*_ACCURACIES[:4], "gain")}
    elif kind == "evaluated":
        step = event["seed"]
        source = f"evaluate/{event['source']}/{event['architecture']}"
        found = {f"{source}/{name}": event.get(name) for name in _ACCURACIES}
    yield from ((tag, float(value), step) for tag, value in found.items() if value is not None)
