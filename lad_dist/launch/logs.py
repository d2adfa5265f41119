"""Logs of a run's SLURM jobs: printed once, or followed until the jobs are over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from lad_dist.errors import ClusterError
from lad_dist.rundir import STAGES, RunDir
from lad_dist.slurm_jobs import SlurmQueue, TaskState

LOOK_SECONDS = 1.0


def show(run: RunDir, stage: str | None, follow: bool, write: Callable[[str], None]) -> None:
    """Write the logs of the newest jobs of ``stage`` (default: of every stage), of all their ranks.

    A line ``==> FILE <==`` precedes text of another file than before. ``follow``: continue until all jobs are over.

    Raises:
        ClusterError: no job of the stage was submitted; names the stages that have jobs.
        RunDirError: the record of submitted jobs is damaged.
    """
    if stage is not None and stage not in STAGES:
        raise ClusterError(f"logs: stage {stage!r} is not known; valid: {', '.join(STAGES)}")
    queue, printer = SlurmQueue(run), _Printer(write)
    while True:
        every = queue.states()
        states = [state for state in every if stage in (None, state.stage)]
        if not states:
            raise ClusterError(_nothing(run, stage, every))
        over = all(state.over for state in states)  # before reading, so that nothing written before is missed
        printer.print(file for state in states for file in files_of(state))
        if not follow or over:
            return
        time.sleep(LOOK_SECONDS)


def files_of(state: TaskState) -> list[Path]:
    """Return the files that a job's ranks have written to so far, by rank: standard output, then errors."""
    found = state.log.parent.glob(f"{state.id}_*_log.*")
    return sorted(
        (file for file in found if file.suffix in (".out", ".err")), key=lambda f: (_rank(f), f.suffix != ".out")
    )


def _rank(file: Path) -> int:
    number = file.name.split("_")[-2]
    return int(number) if number.isdigit() else 0


def _nothing(run: RunDir, stage: str | None, every: tuple[TaskState, ...]) -> str:
    if not every:
        return (
            f"{run.root}: no SLURM jobs were submitted for this run; valid: a run submitted with --on; `lad-dist status "
            "RUN` reads any run's record"
        )
    return f"{run.root}: no SLURM job of {stage}; valid: {', '.join(dict.fromkeys(state.stage for state in every))}"


class _Printer:
    """Prints what is new in files."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write, self._read = write, dict[Path, int]()
        self._last: Path | None = None

    def print(self, files: Iterable[Path]) -> None:
        """Print the new text of each file."""
        for file in files:
            new = self._new(file)
            if not new:
                continue
            if file != self._last:
                self._write(f"==> {file} <==\n")
                self._last = file
            self._write(new)

    def _new(self, file: Path) -> str:
        """Return the text appended since the last call, up to the last whole line; a truncated file is read anew."""
        try:
            with file.open("rb") as opened:
                at = self._read.get(file, 0)
                size = opened.seek(0, 2)
                opened.seek(at if at <= size else 0)
                data = opened.read()
                start = opened.tell() - len(data)
        except OSError:
            return ""
        whole = data.rfind(b"\n") + 1
        self._read[file] = start + whole
        return data[:whole].decode(errors="replace")
