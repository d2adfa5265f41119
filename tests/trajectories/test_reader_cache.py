"""The cache of decoded checkpoints: bounded, read ahead, shared by threads, and never another number than without it."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from lad_dist.errors import Interrupted, TrajectoryError
from lad_dist.trajectories import Buffer
from lad_dist.trajectories.cache import CheckpointCache

ROW = 223 * 4  # bytes of a representation row of the layout in conftest.py
STAGE = "representation"


@pytest.fixture
def folder(write):
    write(9, expert=0)
    write(5, "classifier", expert=0)
    return write(9, expert=1)


@pytest.fixture
def cache(folder):
    made = []

    def make(limit: int = 2**20) -> CheckpointCache:
        made.append(CheckpointCache(Buffer(folder), limit))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def reads(monkeypatch):
    """Every read of the buffer, in order."""
    found = []

    def read(self, *row, original=Buffer.read):
        found.append(row)
        return original(self, *row)

    monkeypatch.setattr(Buffer, "read", read)
    return found


def settled(cache: CheckpointCache) -> None:
    """Wait until nothing is left to be read ahead."""
    until = time.monotonic() + 20
    while (cache._wanted or cache._reading) and time.monotonic() < until:
        time.sleep(0.002)
    time.sleep(0.02)
    assert not cache._wanted and not cache._reading


def test_each_row_is_read_once(cache, reads, weights):
    c = cache()
    for _ in range(3):
        np.testing.assert_array_equal(c.read(STAGE, 1, 4), weights(STAGE, 1, 4))
    assert reads == [(STAGE, 1, 4)] and c.bytes == ROW


def test_what_is_shared_cannot_be_changed(cache):
    row = cache().read(STAGE, 1, 4)
    with pytest.raises(ValueError, match="read-only"):
        row[0] = 1.0


def test_the_least_recently_used_goes_and_the_limit_holds(cache, reads):
    c = cache(2 * ROW + 1)
    for epoch in (2, 1, 2, 3, 2, 1):  # 2 is used again before 3 comes, so 1 has to go
        c.read(STAGE, 0, epoch)
        assert c.bytes == sum(v.nbytes for v in c._rows.values()) <= c.limit_bytes
    assert [epoch for _, _, epoch in reads] == [2, 1, 3, 1]


def test_a_row_larger_than_the_limit_is_read_and_not_kept(cache, reads, weights):
    c = cache(ROW - 1)
    for _ in range(2):
        np.testing.assert_array_equal(c.read(STAGE, 0, 3), weights(STAGE, 0, 3))
    assert len(reads) == 2 and c.bytes == 0


def test_the_limit_holds_while_many_rows_are_read_ahead(cache, reads):
    c = cache(6 * ROW)
    c.prefetch((STAGE, 0, epoch) for epoch in range(10))
    settled(c)
    assert reads == [(STAGE, 0, epoch) for epoch in range(3)]  # half of it: the other half is for what is in use
    assert c.bytes == 3 * ROW


def test_reading_ahead_saves_the_reader_the_file(cache, reads, weights):
    c = cache()
    wanted = [(STAGE, 0, 3), ("classifier", 0, 2), (STAGE, 0, 3), (STAGE, 1, 9)]
    c.prefetch(wanted)
    settled(c)
    assert reads == list(dict.fromkeys(wanted))
    for row in wanted:
        np.testing.assert_array_equal(c.read(*row), weights(*row))
    assert len(reads) == 3


def test_the_next_call_replaces_what_was_not_begun(cache, reads, monkeypatch):
    c, gate = cache(), threading.Event()
    slow = Buffer.read
    monkeypatch.setattr(Buffer, "read", lambda self, *row: (gate.wait(10), slow(self, *row))[1])
    c.prefetch((STAGE, 0, epoch) for epoch in range(5))
    until = time.monotonic() + 10
    while not c._reading and time.monotonic() < until:
        time.sleep(0.002)
    c.prefetch([(STAGE, 1, 7)])
    gate.set()
    settled(c)
    assert reads == [(STAGE, 0, 0), (STAGE, 1, 7)]


def test_a_reader_waits_for_the_read_in_progress_instead_of_reading_again(cache, reads, monkeypatch, weights):
    c, gate = cache(), threading.Event()
    slow = Buffer.read
    monkeypatch.setattr(Buffer, "read", lambda self, *row: (gate.wait(10), slow(self, *row))[1])
    c.prefetch([(STAGE, 0, 3)])
    threading.Timer(0.2, gate.set).start()
    np.testing.assert_array_equal(c.read(STAGE, 0, 3), weights(STAGE, 0, 3))
    assert reads == [(STAGE, 0, 3)]


def test_who_waited_for_a_read_that_failed_reads_for_itself(cache, monkeypatch, weights):
    c, gate, calls, original = cache(), threading.Event(), [], Buffer.read

    def read(self, *row):
        calls.append(threading.current_thread().name)
        if len(calls) > 1:
            return original(self, *row)
        gate.wait(10)
        raise Interrupted("the other was stopped")

    monkeypatch.setattr(Buffer, "read", read)
    c.prefetch([(STAGE, 0, 3)])
    threading.Timer(0.2, gate.set).start()
    np.testing.assert_array_equal(c.read(STAGE, 0, 3), weights(STAGE, 0, 3))
    assert calls == ["checkpoint-prefetch", "MainThread"]


def test_an_error_of_reading_ahead_is_met_by_whoever_needs_the_row_and_by_nobody_else(cache, folder):
    part = folder / "representation" / "expert-0001" / "epochs-0004-0007.parquet"
    raw = bytearray(part.read_bytes())
    raw[len(raw) // 4] ^= 0xFF
    part.write_bytes(raw)
    c = cache()
    c.prefetch([(STAGE, 1, epoch) for epoch in range(8)] + [(STAGE, 0, 0), (STAGE, 5, 0)])
    settled(c)
    assert (STAGE, 0, 0) in c._rows  # the rows after the damaged ones were read all the same
    broken = []
    for epoch in range(8):
        try:
            c.read(STAGE, 1, epoch)
        except TrajectoryError as error:
            broken.append(epoch)
            assert "epochs-0004-0007.parquet" in str(error) and "damaged" in str(error)
    assert broken and set(broken) <= {4, 5, 6, 7}
    with pytest.raises(TrajectoryError, match="representation expert 5 epoch 0 is missing"):
        c.read(STAGE, 5, 0)


def test_an_error_that_passes_is_not_met_at_all(cache, monkeypatch, weights):
    c, calls, original = cache(), [], Buffer.read

    def once(self, *row):
        calls.append(row)
        if len(calls) == 1:
            raise TrajectoryError("the store did not answer")
        return original(self, *row)

    monkeypatch.setattr(Buffer, "read", once)
    c.prefetch([(STAGE, 0, 3)])
    settled(c)
    np.testing.assert_array_equal(c.read(STAGE, 0, 3), weights(STAGE, 0, 3))
    assert len(calls) == 2


def test_a_bug_in_the_thread_does_not_stay_there(cache, monkeypatch):
    c = cache()
    with monkeypatch.context() as patch:
        patch.setattr(Buffer, "read", lambda self, *row: 1 / 0)
        c.prefetch([(STAGE, 0, 3)])
        c._thread.join(10)
    with pytest.raises(ZeroDivisionError):
        c.read(STAGE, 0, 4)
    with pytest.raises(ZeroDivisionError):
        c.prefetch([(STAGE, 0, 4)])


def test_an_interruption_while_waiting_for_the_thread_gets_through(cache, monkeypatch):
    from lad_dist.interrupts import as_exceptions

    c, gate, original = cache(), threading.Event(), Buffer.read
    monkeypatch.setattr(Buffer, "read", lambda self, *row: (gate.wait(10), original(self, *row))[1])
    c.prefetch([(STAGE, 0, 3)])
    timer = threading.Timer(0.3, os.kill, (os.getpid(), 2))
    with as_exceptions(), pytest.raises(Interrupted, match="SIGINT"):
        timer.start()
        c.read(STAGE, 0, 3)
    gate.set()


def test_threads_share_it(cache, reads, weights):
    c, faults = cache(4 * ROW), []

    def work(number: int) -> None:
        draws = np.random.default_rng(number)
        try:
            for _ in range(60):
                row = (STAGE, int(draws.integers(2)), int(draws.integers(10)))
                if draws.integers(4) == 0:
                    c.prefetch([(STAGE, int(draws.integers(2)), int(draws.integers(10))) for _ in range(3)])
                np.testing.assert_array_equal(c.read(*row), weights(*row))
                assert c.bytes <= c.limit_bytes
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    settled(c)
    assert faults == [] and not c._reading
    assert c.bytes == sum(v.nbytes for v in c._rows.values()) <= c.limit_bytes


def test_it_leaves_neither_threads_nor_files_open(folder):
    def open_files() -> set[str]:
        links = []
        for entry in Path("/proc/self/fd").iterdir():
            try:
                links.append(os.readlink(entry))
            except OSError:  # the listing's own
                continue
        return {link for link in links if str(folder) in link}

    before = threading.active_count()
    for _ in range(3):
        c = CheckpointCache(Buffer(folder), 2**20)
        c.prefetch((STAGE, 0, epoch) for epoch in range(10))
        c.read(STAGE, 1, 1)
        c.close()
        c.close()
        c.prefetch([(STAGE, 0, 9)])  # after the end: nothing
        assert c.bytes == 0
    assert threading.active_count() == before and open_files() == set()
