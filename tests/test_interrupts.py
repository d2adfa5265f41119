"""Ctrl-C and SIGTERM as one exception."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from lad_dist.errors import Interrupted
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
