"""Ctrl-C and SIGTERM as an exception or as a flag, and short sections that they must not interrupt."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lad_dist.errors import Interrupted, LadDistError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def in_main_thread() -> bool:
    """Return whether this is the main thread, which alone receives and handles signals."""
    return threading.current_thread() is threading.main_thread()


@contextmanager
def as_exceptions() -> Iterator[None]:
    """Raise ``Interrupted`` in the main thread on Ctrl-C and SIGTERM inside the block, so that ``finally`` blocks run.

    If the signal arrives while a library's C code calls Python, the library may report its own error instead (torch,
    reading the length of a sequence: ``ValueError``). Any such error after a signal becomes ``Interrupted``, also where
    it was passed on as an error of ours; our other errors and those of the system (``OSError``) are raised unchanged.
    Where Python must drop the exception (in a finaliser, or in C code that cannot return one), the signal is sent again a
    moment later. Has no effect in other threads, which receive no signals.
    """
    if not in_main_thread():
        yield
        return
    arrived: list[Interrupted] = []
    received: list[int] = []
    postponed: set[int] = set()

    def stop(number: int, frame: FrameType | None) -> None:
        if _starts_a_thread(frame):
            postponed.add(number)
            # Not threading.Thread: this frame may hold its lock.
            _thread.start_new_thread(_send_again, (number, postponed))
            return
        for s in _SIGNALS:  # a second Ctrl-C must not interrupt the saving that the first one started
            # Not SIG_IGN: a signal already received would print "ignored due to race condition", with a traceback.
            signal.signal(s, lambda number, frame: None)
        postponed.discard(number)
        received.append(number)
        arrived.append(
            Interrupted(
                f"interrupted by {signal.Signals(number).name}; finished work is kept, and the same command continues"
            )
        )
        raise arrived[0]

    def dropped(unraisable: sys.UnraisableHookArgs) -> None:
        if not any(unraisable.exc_value is one for one in arrived):
            return hook(unraisable)
        arrived.clear()
        for s in _SIGNALS:
            signal.signal(s, stop)
        postponed.add(received[-1])
        _thread.start_new_thread(_send_again, (received[-1], postponed))

    previous = {s: signal.signal(s, stop) for s in _SIGNALS}
    hook, sys.unraisablehook = sys.unraisablehook, dropped
    try:
        yield
        if postponed and not arrived:
            stop(postponed.pop(), None)
    except OSError:
        raise
    except LadDistError as error:
        if arrived and error.__cause__ is not None and arrived[0] not in _chain(error):
            raise arrived[0] from error
        raise
    except Exception as error:
        if arrived:
            raise arrived[0] from error
        raise
    finally:
        postponed.clear()
        sys.unraisablehook = hook
        for s, handler in previous.items():
            signal.signal(s, handler)


def _chain(error: BaseException | None) -> list[BaseException]:
    """Return an error, its causes and the errors that it was raised while handling."""
    found: list[BaseException] = []
    left = [error]
    while left:
        one = left.pop()
        if one is not None and one not in found:
            found.append(one)
            left += [one.__cause__, one.__context__]
    return found


def _starts_a_thread(frame: FrameType | None) -> bool:
    """Return whether the main thread is in ``Thread.start``: an exception there breaks the thread, with a traceback."""
    while frame is not None:
        if frame.f_code is threading.Thread.start.__code__:
            return True
        frame = frame.f_back
    return False


def _send_again(number: int, postponed: set[int]) -> None:
    """Send this process the signal again a moment later, if it is still pending."""
    time.sleep(0.02)
    if number in postponed:
        os.kill(os.getpid(), number)


class StopFlag:
    """Records a request to stop by a signal. ``name`` is the signal's, or None."""

    name: str | None = None


@contextmanager
def as_flag() -> Iterator[StopFlag]:
    """Only record Ctrl-C and SIGTERM inside the block: for processes that must stop together, at a point they agree on.

    In other threads than the main one no signal is ever recorded.
    """
    flag = StopFlag()
    if not in_main_thread():
        yield flag
        return

    def note(number: int, frame: FrameType | None) -> None:
        flag.name = signal.Signals(number).name

    previous = {s: signal.signal(s, note) for s in _SIGNALS}
    try:
        yield flag
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


@contextmanager
def deferred() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the block ends: for in-place updates that must be complete or not occur."""
    if not in_main_thread():
        yield  # signals are only ever delivered to the main thread
        return
    arrived: list[tuple[int, FrameType | None]] = []
    previous = {s: signal.signal(s, lambda number, frame: arrived.append((number, frame))) for s in _SIGNALS}
    try:
        yield
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)
        for number, frame in arrived[:1]:
            handler = previous[signal.Signals(number)]
            if callable(handler):
                handler(number, frame)
