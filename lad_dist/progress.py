"""Progress of a run: an event log as JSON lines, and a live view or plain lines for users."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import rich.progress
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn
from rich.text import Text

from lad_dist.callbacks import Event, Listener
from lad_dist.errors import RunDirError

PLAIN_SECONDS = 10.0  # interval between plain lines of one task
ESTIMATE_STEPS, ESTIMATE_SECONDS = 3, 2.0  # what a rate and a time left rest on at least, after the first step
MOST_ROWS = 20  # most worker lines shown at a time
_TITLE, _COUNT, _UNIT = (
    20,
    11,
    10,
)  # characters kept for them, so that the bars of a run's stages stand below each other
_SPARE_LINES = 3  # of a terminal's height: the bar, and the prompt or a last line
_LOOKED_AT_AGAIN = 256  # bytes read again to detect a replaced file
_FOLLOW_SECONDS = 0.2  # interval between reads of other processes' events

T = TypeVar("T")


class Events:
    """Event log ``events.jsonl``: one object per line with ``time`` (Unix seconds), ``kind`` and the given fields.

    A line truncated by a kill is terminated before the next one, so at most that line is lost; ``read_events`` skips
    it. Lines of several processes of a host never mix: each is appended by one unbuffered write, whatever its length.
    """

    def __init__(self, path: Path, listener: Listener | None = None) -> None:
        """Call ``listener`` with every event after it is written (see ``callbacks``)."""
        self.path, self._listener = path, listener
        self._file = path.open("a+b", buffering=0)
        if self._file.seek(0, os.SEEK_END):
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")

    @classmethod
    def nowhere(cls) -> Events:
        """Return a log that discards events, for ranks that do not report."""
        return cls(Path(os.devnull))

    def emit(self, kind: str, **fields: Any) -> None:
        """Record one event. Numbers that JSON lacks (NaN, infinity) become null."""
        record = {"time": round(time.time(), 3), "kind": kind, **{k: _plain(v) for k, v in fields.items()}}
        left = memoryview(json.dumps(record, separators=(",", ":")).encode() + b"\n")
        while left:  # a signal or a full disk may cut a write short; the next write raises the error
            try:
                left = left[self._file.write(left) :]
            except OSError as error:
                error.filename = str(self.path)  # a write does not know it, and the message is to name the file
                raise
        if self._listener is not None:
            self._listener(record)

    def tell(self, listener: Listener) -> None:
        """Add a listener."""
        before = self._listener

        def both(event: Event) -> None:
            if before is not None:
                before(event)
            listener(event)

        self._listener = both

    @contextmanager
    def from_others(self) -> Iterator[None]:
        """Inside the block, call the listener from a separate thread with events appended by other processes.

        After an error, the listener is not called again; the error is raised at the end of the block.
        """
        if self._listener is None:
            yield
            return
        tail, ended, raised = EventTail(self.path), threading.Event(), []
        for _ in tail.read()[1]:
            pass

        def follow(listener: Listener) -> None:
            last = False
            while not last:
                last = ended.wait(_FOLLOW_SECONDS)
                try:
                    for event in tail.read()[1]:
                        listener(event)
                except Exception as error:  # any error of the listener
                    raised.append(error)
                    return

        thread = threading.Thread(target=follow, args=(self._listener,), name="events of other processes", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
        if raised:
            raise raised[0]

    def close(self) -> None:
        self._file.close()


def read_events(path: Path) -> Iterator[Event]:
    """Yield the events of a run, oldest first, skipping truncated lines. Raises RunDirError where it is not a file."""
    with _events_read(path):
        try:
            lines = _opened(path)
        except FileNotFoundError:
            return
        with lines:
            for line in lines:
                record = _event(line)
                if record is not None:
                    yield record


@contextmanager
def _events_read(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunDirError(
            f"{path}: cannot be read: {error.strerror or error}; valid: the file that a run appends its events to, or none"
        ) from error


def _opened(path: Path) -> BinaryIO:
    """Open ``events.jsonl`` without blocking on a FIFO in its place. Raises OSError."""
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: SIM115 - the caller's
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "is not a regular file")
    return file


class EventTail:
    """Incremental reader of ``events.jsonl``; each call reads only what was appended since the last.

    An incomplete last line is left for the next call. A file that was truncated, replaced or removed is read from its
    start: the last bytes read are compared first, which also detects a replacement of equal or greater length.

    ``skim``: of many unread lines, leave out epochs of experts that have had two later ones in the same stage, without
    decoding them: a log of 1,000 experts has 100,000 such lines. The last ``_NOT_SKIMMED`` bytes are all there.
    """

    def __init__(self, path: Path, skim: bool = False) -> None:
        self.path, self.skim = path, skim
        self._offset, self._before = 0, b""  # number of bytes read, and the last ones

    def read(self) -> tuple[bool, Iterator[Event]]:
        """Return (whether the file was replaced, its new events) since the last call. Exhaust them before the next.

        Raises RunDirError where it is not a file, or cannot be read.
        """
        with _events_read(self.path):
            try:
                file = _opened(self.path)
            except FileNotFoundError:
                other, self._offset, self._before = self._offset > 0, 0, b""
                return other, iter(())
        file.seek(self._offset - len(self._before))
        other = file.read(len(self._before)) != self._before
        if other:
            self._offset, self._before = 0, b""
            file.seek(0)
        return other, self._new(file)

    def _new(self, file: BinaryIO) -> Iterator[Event]:
        with file:
            left_out = iter(_outdated(file) if self.skim else ())
            skipped = next(left_out, math.inf)  # a position in the next line to leave out
            for line in file:
                if not line.endswith(b"\n"):
                    return
                while skipped < self._offset:  # the last line had two
                    skipped = next(left_out, math.inf)
                if skipped < self._offset + len(line):
                    self._offset += len(line)  # never the last line, which ``_before`` must end with
                    continue
                self._offset += len(line)
                self._before = (self._before + line)[-_LOOKED_AT_AGAIN:]
                record = _event(line)
                if record is not None:
                    yield record


_SKIM_FROM = 2**20  # unread bytes; fewer are decoded at once
_NOT_SKIMMED = 2**18  # bytes at the end
_READ_AT_ONCE = 2**24
_EPOCH = re.compile(rb'"kind": ?"expert-epoch", ?"expert": ?([0-9]+), ?"stage": ?"(\w+)"')


def _outdated(file: BinaryIO) -> list[int]:
    """Return a position in each unread line that ``EventTail.skim`` leaves out, ascending; the file's own stays."""
    begin, size = file.tell(), os.fstat(file.fileno()).st_size
    if size - begin < _SKIM_FROM:
        return []
    by_expert: dict[tuple[bytes, ...], list[int]] = {}
    at = begin
    while part := file.read(_READ_AT_ONCE):  # a line that two parts share is not left out
        for found in _EPOCH.finditer(part):
            by_expert.setdefault(found.groups(), []).append(at + found.start())
        at += len(part)
    file.seek(begin)
    return sorted(at for places in by_expert.values() for at in places[:-2] if at < size - _NOT_SKIMMED)


# Fields that readers rely on. A field of another type counts as absent; an event without its identifying fields is
# ignored.
_WHOLE = frozenset({"iteration", "epoch", "expert", "seed"})
_TEXT = frozenset({"stage", "source", "architecture", "name", "fingerprint", "gradient", "why"})
_NUMBERS = frozenset({"time", "loss", "accuracy", "images_per_second", "alpha", "seconds",
                      "overall", "head", "medium", "tail", "balanced", "ece"})  # fmt: skip
_NUMBERS_OF_A_PHASE = ("loss_", "student_loss_", "cosine_", "norm_ratio_")
_IDENTITY = {
    "iteration": ("iteration",), "early-evaluation": ("iteration",), "distill-started": ("iteration",),
    "expert-epoch": ("stage", "expert", "epoch"), "evaluated": ("source", "architecture", "seed"),
    "stage-started": ("stage",), "stage-finished": ("stage",), "stage-stopped": ("stage",),
}  # fmt: skip
_LATEST = 2.0**33  # Unix seconds; later times exceed calendar limits


def _event(line: bytes) -> Event | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    event = {name: value for name, value in record.items() if _fits(name, value)}
    return event if all(name in event for name in _IDENTITY.get(event["kind"], ())) else None


def _fits(name: str, value: Any) -> bool:
    if name in _WHOLE:
        return type(value) is int and 0 <= value < 2**53
    if name in _TEXT:
        return isinstance(value, str)
    if name == "time":
        return _is_number(value) and 0 <= value < _LATEST
    if name in _NUMBERS or name.startswith(_NUMBERS_OF_A_PHASE):
        return value is None or _is_number(value)
    if name in ("counts", "pixel_gradient_norm"):
        return isinstance(value, list) and all(x is None or _is_number(x) for x in value)
    if name in ("peak_memory_bytes", "pixel_gradient_norms"):
        return isinstance(value, dict) and all(x is None or _is_number(x) for x in value.values())
    if name == "alignment":
        return isinstance(value, dict) and all(
            isinstance(of, dict) and all(x is None or _is_number(x) for x in of.values()) for of in value.values()
        )
    return True


def _is_number(value: Any) -> bool:
    """Whether a value is a number in the range of floats."""
    return type(value) in (int, float) and abs(value) < 1e300  # not NaN either


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


class Task(Protocol):
    """A piece of work with a known length."""

    def advance(self, steps: int = 1, **shown: Any) -> None:
        """Add ``steps`` finished steps; ``shown`` are values to display (loss, accuracy, ...)."""


class Board(Protocol):
    """A piece of work with a known length shared by several workers, each with its own line."""

    def advance(self, steps: int = 1) -> None:
        """Add ``steps`` finished steps."""

    def row(self, key: str, text: str | None) -> None:
        """Set the line of the worker ``key``; None removes it. A new line goes below the others."""


class Screen:
    """Progress display: a rich live view on a terminal or in a notebook, else plain lines with rate and time left."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=False, highlight=False)

    @classmethod
    def silent(cls) -> Screen:
        """Return a screen that shows nothing."""
        return cls(Console(quiet=True))

    def say(self, text: str) -> None:
        """Print one line, above any progress bars."""
        self.console.print(text, soft_wrap=True, markup=False, emoji=False)

    @contextmanager
    def task(self, title: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        """Show a task of ``total`` steps (``done`` of them before this process) until the block ends."""
        if _is_watched(self.console):
            with _live(self.console, unit) as live:
                yield _RichTask(live, title, total, done)
        else:
            plain = _PlainTask(self, title, total, unit, done)
            yield plain
            plain.finish()

    @contextmanager
    def board(self, title: str, total: int, unit: str, done: int = 0) -> Iterator[Board]:
        """Show a ``task`` with a line per worker below; a plain log prints them after each line of the task.

        One thread advances a board; lines that others ``say`` meanwhile appear above it.
        """
        if _is_watched(self.console):
            with _live(self.console, unit) as live:
                yield _RichBoard(live, title, total, done)
        else:
            plain = _PlainBoard(self, title, total, unit, done)
            yield plain
            plain.finish()


def _is_watched(console: Console) -> bool:
    """Whether a live view is possible: in a terminal or a notebook."""
    return console.is_terminal or console.is_jupyter


def _live(console: Console, unit: str) -> _Live:
    columns = (
        SpinnerColumn(),
        TextColumn(f"[bold]{{task.description:<{_TITLE}}}"),
        BarColumn(bar_width=20),
        _CountColumn(),
        TextColumn(f"{unit:<{_UNIT}}"),
        _RateColumn(),
    )
    return _Live(*columns, console=console)


class _CountColumn(ProgressColumn):
    """Column with steps done and in all, ending at the unit."""

    def render(self, task: rich.progress.Task) -> Text:
        return Text(f"{int(task.completed)}/{int(task.total or 0)}".rjust(_COUNT), style="green", no_wrap=True)


class _RateColumn(ProgressColumn):
    """Column with rate and time left, formatted as in a plain log."""

    def render(self, task: rich.progress.Task) -> Text:
        rate: _Rate = task.fields["rate"]
        return Text(", ".join(rate.words(int(task.total or 0))), style="cyan", no_wrap=True)


class _Live(Progress):
    """Progress bars with each task's ``lines`` below; a narrow terminal truncates only these lines."""

    def get_renderables(self) -> Iterator[RenderableType]:
        for task in self.tasks:
            yield self.make_tasks_table([task])
            for line in shortened(task.fields["lines"], max(self.console.height - _SPARE_LINES, 1)):
                yield Text(f"  {line}", style="dim", no_wrap=True, overflow="ellipsis")


class _RichTask:
    def __init__(self, live: Progress, title: str, total: int, done: int) -> None:
        self._live, self._rate = live, _Rate(done)
        self._task = live.add_task(title, total=total, completed=done, lines=(), rate=self._rate)

    def advance(self, steps: int = 1, **shown: Any) -> None:
        self._rate.count(steps)
        self._live.update(self._task, advance=steps, lines=(_figures(shown),) if shown else ())


class _RichBoard:
    def __init__(self, live: Progress, title: str, total: int, done: int) -> None:
        self._live, self._rate, self._rows = live, _Rate(done), _Rows()
        self._task = live.add_task(title, total=total, completed=done, lines=(), rate=self._rate)

    def advance(self, steps: int = 1) -> None:
        self._rate.count(steps)
        self._live.update(self._task, advance=steps)

    def row(self, key: str, text: str | None) -> None:
        self._rows.put(key, text)
        self._live.update(self._task, lines=self._rows.lines())  # a tuple, immutable for the drawing thread


class _PlainTask:
    def __init__(self, screen: Screen, title: str, total: int, unit: str, done: int) -> None:
        self._screen, self._title, self._total, self._unit = screen, title, total, unit
        self._rate, self._last, self._shown = _Rate(done), time.monotonic(), ""

    def advance(self, steps: int = 1, **shown: Any) -> None:
        self._rate.count(steps)
        self._shown = _figures(shown)
        self._tell()

    def _tell(self) -> bool:
        """Print the progress if the interval has passed; return whether it was printed."""
        if time.monotonic() - self._last < PLAIN_SECONDS or self._rate.done >= self._total:
            return False
        self._last = time.monotonic()
        figures = f"{self._rate.done}/{self._total} {self._unit}", *self._rate.words(self._total)
        self._screen.say(f"{self._title}: {', '.join(figures)}  {self._shown}".rstrip())
        return True

    def finish(self) -> None:
        self._screen.say(
            f"{self._title}: {self._rate.done}/{self._total} {self._unit} done in "
            f"{clock(self._rate.elapsed())}  {self._shown}".rstrip()
        )


class _PlainBoard(_PlainTask):
    def __init__(self, screen: Screen, title: str, total: int, unit: str, done: int) -> None:
        super().__init__(screen, title, total, unit, done)
        self._rows = _Rows()

    def row(self, key: str, text: str | None) -> None:
        self._rows.put(key, text)
        self._tell()

    def _tell(self) -> bool:
        told = super()._tell()
        for line in shortened(self._rows.lines()) if told else ():
            self._screen.say(f"  {line}")
        return told


class _Rows:
    """Lines of a board's workers, in order of arrival."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}

    def put(self, key: str, text: str | None) -> None:
        if text is None:
            self._texts.pop(key, None)
        else:
            self._texts[key] = " ".join(text.split())  # an error message may have several lines

    def lines(self) -> tuple[str, ...]:
        return tuple(f"{key}  {text}".rstrip() for key, text in self._texts.items())


def shortened(lines: Sequence[T], most: int = MOST_ROWS) -> list[T | str]:
    """Return at most ``most`` lines (never above MOST_ROWS); if truncated, the last gives the number omitted."""
    most = min(most, MOST_ROWS)
    if len(lines) <= most:
        return list(lines)
    return [*lines[: most - 1], f"... and {len(lines) - most + 1} more"]


class _Rate:
    """Steps per second of this process, of which recent steps weigh more, and the time left.

    The clock starts at the end of the first step, whose time holds what is done once (starting workers, compiling).
    A step weighs as much as the time since then: the later half of the work has three quarters of the say.
    """

    def __init__(self, done: int) -> None:
        self.done = done
        self._start = self._last = time.monotonic()
        self._first: float | None = None
        self._steps, self._weighed = 0, 0.0  # since the first step, and their sum by weight

    def count(self, steps: int) -> None:
        self.done += steps
        now = time.monotonic()
        if self._first is None:
            self._first = now
        else:
            self._steps += steps
            self._weighed += steps * ((now + self._last) / 2 - self._first)
        self._last = now

    def elapsed(self) -> float:
        return time.monotonic() - self._start

    def words(self, total: int) -> list[str]:
        """Return rate and time left, at the end the time taken; empty before they rest on enough steps and seconds."""
        if self.done >= total:
            return [f"in {clock(self._last - self._start)}"]
        span = self._last - (self._last if self._first is None else self._first)
        if self._steps < ESTIMATE_STEPS or span < ESTIMATE_SECONDS:
            return []
        each = span**2 / 2 / self._weighed
        left = max((total - self.done) * each - (time.monotonic() - self._last), 0.0)
        return [f"{1 / each:.1f}/s" if each <= 1 else f"{each:.1f} s each", f"{clock(left)} left"]


def _figures(shown: dict[str, Any]) -> str:
    return "  ".join(
        f"{k.replace('_', ' ')} {v:.4g}" if isinstance(v, float) else f"{k.replace('_', ' ')} {v}"
        for k, v in shown.items()
    )


def clock(seconds: float) -> str:
    """Format a duration: ``0:05``, ``12:34``, ``1:02:03``."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def peak_memory_bytes() -> dict[str, int]:
    """Return the peak memory of this process so far: resident on the host, and allocated on the GPU if there is one."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, ru_maxrss starts at the parent's memory when it started this process
        lines = (line.split() for line in status.read_text().splitlines())
        peak = next((int(line[1]) * 1024 for line in lines if line and line[0] == "VmHWM:"), peak)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return {"host": peak, "device": int(torch.cuda.max_memory_allocated())}
    return {"host": peak}
