"""Ctrl-C and SIGTERM as one exception."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress

import pytest

from lad_dist.errors import Interrupted, StorageError
from lad_dist.interrupts import as_exceptions


def test_two_signals_at_once_are_one_interruption_and_nothing_is_printed(monkeypatch):
    """As when a terminal's Ctrl-C reaches a process whose parent tells it to end as well, within one long operation."""
    both, complaints = {signal.SIGINT, signal.SIGTERM}, []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    before = [signal.getsignal(number) for number in both]
    with pytest.raises(Interrupted, match="interrupted by SIGINT"), as_exceptions():
        signal.pthread_sigmask(signal.SIG_BLOCK, both)
        try:
            for number in both:
                os.kill(os.getpid(), number)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
        pytest.fail("nothing was raised")
    assert complaints == [] and [signal.getsignal(number) for number in both] == before


def test_a_second_signal_does_not_tear_apart_what_the_first_one_saves():
    saved = []
    with pytest.raises(Interrupted), as_exceptions():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            saved.append("whole")
    assert saved == ["whole"]


@pytest.mark.parametrize("then", [0.0, 5.0])
def test_a_signal_while_a_thread_starts(monkeypatch, then):
    """An exception inside ``Thread.start`` would leave a thread that dies of a KeyError, with a traceback."""
    begin, complaints, ran = threading._start_new_thread, [], []

    def signalled(*args):
        found = begin(*args)
        os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(threading, "_start_new_thread", signalled)
    monkeypatch.setattr(threading, "excepthook", complaints.append)
    began = time.monotonic()
    with pytest.raises(Interrupted, match="interrupted by SIGTERM"), as_exceptions():
        thread = threading.Thread(target=ran.append, args=(1,))
        thread.start()
        monkeypatch.undo()
        thread.join()
        time.sleep(then)  # with 0 the block may end before the signal comes again
    assert ran == [1] and complaints == []
    assert time.monotonic() - began < 4


class Finalised:
    """Gets a signal where Python must drop the exception that the handler raises."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):
            pass


@pytest.mark.parametrize("then", [0.0, 5.0])
def test_a_signal_whose_exception_is_dropped_comes_again(monkeypatch, then):
    complaints, before = [], sys.unraisablehook
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    ours, began = sys.unraisablehook, time.monotonic()
    with pytest.raises(Interrupted, match="interrupted by SIGTERM"), as_exceptions():
        Finalised()
        time.sleep(then)  # with 0 the block may end before the signal comes again
    assert complaints == [] and time.monotonic() - began < 4 and sys.unraisablehook is ours
    monkeypatch.undo()
    assert sys.unraisablehook is before


def test_other_exceptions_that_are_dropped_are_told(monkeypatch):
    class Broken:
        def __del__(self):
            raise ValueError("mine")

    complaints = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    with as_exceptions():
        Broken()
    assert [str(c.exc_value) for c in complaints] == ["mine"]


def test_a_signal_within_a_library_that_reports_an_error_of_its_own():
    """As torch does where it reads the shape of a sequence: its C code forgets the exception and raises another."""
    with pytest.raises(Interrupted, match="interrupted by SIGTERM") as raised, as_exceptions():
        with suppress(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)
        raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'")
    assert isinstance(raised.value.__cause__, ValueError)


def test_a_signal_within_a_library_whose_error_is_passed_on_as_one_of_ours():
    with pytest.raises(Interrupted, match="interrupted by SIGTERM") as raised, as_exceptions():
        with suppress(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)
        try:
            raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'")
        except ValueError as error:
            raise StorageError("teachers.safetensors: is not a whole file") from error
    assert isinstance(raised.value.__cause__, StorageError)


def test_an_error_of_the_system_while_the_interrupted_work_is_saved_is_told():
    with pytest.raises(StorageError), as_exceptions():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            try:
                raise OSError(28, "No space left on device")
            except OSError as error:
                raise StorageError("the disk is full") from error


@pytest.mark.parametrize("error", [StorageError("the disk is full"), OSError(28, "No space left on device")])
def test_an_error_while_the_interrupted_work_is_saved_is_told(error):
    with pytest.raises(type(error)), as_exceptions():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            raise error


def test_an_error_without_a_signal_stays_what_it_is():
    with pytest.raises(ZeroDivisionError), as_exceptions():
        _ = 1 / 0
