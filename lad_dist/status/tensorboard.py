"""A run's events as TensorBoard's scalars, from what the run has written down: any run, also one that is at work elsewhere."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lad_dist.errors import RunDirError
from lad_dist.progress import Event, EventTail
from lad_dist.rundir import RunDir
from lad_dist.status.read import Follower

_PHASES = ("representation", "classifier", "joint")
_OF_PHASE = ("loss", "student_loss", "cosine", "norm_ratio")
_ACCURACIES = ("overall", "head", "medium", "tail", "balanced", "ece")


def write(folder: Path, every: float | None, say: Callable[[str], None]) -> Path:
    """Write the run's events so far into its folder ``tensorboard``, afresh; returns that folder.

    ``every``: go on until the run is done, looking for new events every so many seconds; None: what is there now.

    Raises:
        RunDirError: ``folder`` is no run folder, or the package tensorboard is not installed.
    """
    run = RunDir.existing(folder)
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RunDirError(
            f"tensorboard: cannot be imported ({error}); pip install tensorboard, or look at `lad-dist status {folder}`"
        ) from error
    tail, follower, writer, count = EventTail(run.events), Follower(folder), None, 0
    try:
        while True:
            done = follower.read().finished  # before the events: the last ones are then among them
            other, events = tail.read()
            if writer is None or other:
                if writer is not None:
                    writer.close()
                shutil.rmtree(run.tensorboard, ignore_errors=True)
                writer, count = SummaryWriter(str(run.tensorboard)), 0
                say(f"tensorboard --logdir {run.tensorboard}")
            for event in events:
                for tag, value, step in scalars(event):
                    writer.add_scalar(tag, value, step, walltime=event["time"])
                    count += 1
            writer.flush()
            if every is None or done:
                say(f"{count} scalars written")
                return run.tensorboard
            time.sleep(every)
    finally:
        if writer is not None:
            writer.close()


def scalars(event: Event) -> Iterator[tuple[str, float, int]]:
    """(tag, value, step) of one event: epochs of experts, iterations, first looks at the set, measured networks.

    Numbers that are null are left out.
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
        found |= {f"distill/{name}/regression": event.get(f"{name}_regression") for name in ("loss", "accuracy")}
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
