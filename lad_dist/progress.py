"""What happens, recorded and shown: events as JSON lines for machines, a live view or plain lines for people."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

PLAIN_SECONDS = 10.0  # between two plain lines of one task


class Events:
    """Appends to ``events.jsonl``: one object a line with ``time`` (Unix seconds), ``kind`` and the fields given.

    A line cut short by a kill is closed before the next one, so at most that line is lost; ``read`` skips it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a+b")
        if self._file.seek(0, os.SEEK_END):
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")

    def emit(self, kind: str, **fields: Any) -> None:
        """Record one event. Numbers that JSON cannot hold (NaN, infinity) become null."""
        record = {"time": round(time.time(), 3), "kind": kind, **{k: _plain(v) for k, v in fields.items()}}
        self._file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a run, oldest first; a line that a kill cut short is skipped."""
    if not path.exists():
        return
    with path.open("rb") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and "kind" in record:
                yield record


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


class Task(Protocol):
    """A piece of work with a known length."""

    def advance(self, steps: int = 1, **shown: Any) -> None:
        """``steps`` more are done; ``shown`` are the figures to show beside (loss, accuracy, ...)."""


class Screen:
    """Shows progress: a rich live view when a person watches, else plain lines with rate and time left."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=False, highlight=False)

    def say(self, text: str) -> None:
        """One line for the reader, above any progress bars."""
        self.console.print(text, soft_wrap=True, markup=False, emoji=False)

    @contextmanager
    def task(self, title: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        """A task of ``total`` steps (``done`` of them before this process) shown until the block ends."""
        if self.console.is_terminal:
            columns = (
                SpinnerColumn(),
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(unit),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
            )
            with _Live(*columns, console=self.console) as live:
                yield _RichTask(live, title, total, done)
        else:
            plain = _PlainTask(self, title, total, unit, done)
            yield plain
            plain.finish()


class _Live(Progress):
    """Progress bars with each task's figures on a line below, where a narrow terminal cuts them and nothing else."""

    def get_renderables(self) -> Iterator[RenderableType]:
        for task in self.tasks:
            yield self.make_tasks_table([task])
            if task.fields["shown"]:
                yield Text(f"  {task.fields['shown']}", style="dim", no_wrap=True, overflow="ellipsis")


class _RichTask:
    def __init__(self, live: Progress, title: str, total: int, done: int) -> None:
        self._live, self._rate = live, _Rate(done)
        self._task = live.add_task(title, total=total, completed=done, shown="", rate="")

    def advance(self, steps: int = 1, **shown: Any) -> None:
        self._rate.count(steps)
        self._live.update(self._task, advance=steps, rate=self._rate.text(), shown=_figures(shown))


class _PlainTask:
    def __init__(self, screen: Screen, title: str, total: int, unit: str, done: int) -> None:
        self._screen, self._title, self._total, self._unit = screen, title, total, unit
        self._rate, self._last, self._shown = _Rate(done), time.monotonic(), ""

    def advance(self, steps: int = 1, **shown: Any) -> None:
        self._rate.count(steps)
        self._shown = _figures(shown)
        if time.monotonic() - self._last >= PLAIN_SECONDS and self._rate.done < self._total:
            self._last = time.monotonic()
            left = self._rate.seconds_left(self._total)
            self._screen.say(
                f"{self._title}: {self._rate.done}/{self._total} {self._unit}, {self._rate.text()}, "
                f"{_clock(left)} left  {self._shown}".rstrip()
            )

    def finish(self) -> None:
        self._screen.say(
            f"{self._title}: {self._rate.done}/{self._total} {self._unit} done in "
            f"{_clock(self._rate.elapsed())}  {self._shown}".rstrip()
        )


class _Rate:
    def __init__(self, done: int) -> None:
        self.done, self._here, self._start = done, 0, time.monotonic()

    def count(self, steps: int) -> None:
        self.done += steps
        self._here += steps

    def elapsed(self) -> float:
        return time.monotonic() - self._start

    def text(self) -> str:
        rate = self._here / max(self.elapsed(), 1e-9)
        return f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each" if rate else ""

    def seconds_left(self, total: int) -> float:
        return (total - self.done) * self.elapsed() / max(self._here, 1)


def _figures(shown: dict[str, Any]) -> str:
    return "  ".join(
        f"{k.replace('_', ' ')} {v:.4g}" if isinstance(v, float) else f"{k.replace('_', ' ')} {v}"
        for k, v in shown.items()
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def peak_memory_bytes() -> dict[str, int]:
    """The most memory this process has held so far: resident on the host, and allocated on the GPU where there is one."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, ru_maxrss begins with what the parent had when it started this process
        lines = (line.split() for line in status.read_text().splitlines())
        peak = next((int(line[1]) * 1024 for line in lines if line and line[0] == "VmHWM:"), peak)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return {"host": peak, "device": int(torch.cuda.max_memory_allocated())}
    return {"host": peak}
