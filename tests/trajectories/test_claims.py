"""Claims: one holder at a time, gone with its holder, taken over when it is stale, by real processes and signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from lad_dist.errors import StorageError
from lad_dist.trajectories import Buffer, claims
from lad_dist.trajectories.claims import Claim, foreign, hold, owner_id

ROOT = Path(__file__).resolve().parents[2]
NAME = "expert-0007"

# Holds the claim, says so, and waits for its stdin to be closed. ARGS: buffer, owner, refresh seconds.
HOLDER = """
import sys
from lad_dist.trajectories import claims
claims.REFRESH_SECONDS = float(sys.argv[3])
with claims.hold(sys.argv[1], "expert-0007", sys.argv[2]) as held:
    print(held, flush=True)
    sys.stdin.read()
"""

# Waits for a round's start and tries to take its claim; says from when to when it had it. ARGS: buffer, rounds, start, step.
RACER = """
import sys, time
from lad_dist.trajectories import claims
buffer, rounds, start, step = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
claims.REFRESH_SECONDS = 0.01
for number in range(rounds):
    while time.time() < start + number * step:
        pass
    with claims.hold(buffer, f"expert-{number:04d}", claims.owner_id()) as held:
        if held:
            began = time.monotonic()
            time.sleep(max(0.0, start + (number + 0.7) * step - time.time()))
            print(number, began, time.monotonic())
"""


def process(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.fixture
def holder() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started = []

    def start(folder: Path, owner: str = "other", refresh: float = 0.2) -> subprocess.Popen[str]:
        started.append(process(HOLDER, folder, owner, refresh))
        assert started[-1].stdout.readline() == "True\n"
        return started[-1]

    yield start
    for each in started:
        each.kill()
        each.wait()
        each.stdout.close()


@contextmanager
def settings(monkeypatch, **values: float) -> Iterator[None]:
    with monkeypatch.context() as patch:
        for name, value in values.items():
            patch.setattr(claims, name, value)
        yield


def file_of(folder: Path) -> Path:
    return folder / "claims" / f"{NAME}.json"


def plant(folder: Path, age: float = 0.0, **changes: object) -> None:
    """A claim of another host, last refreshed ``age`` seconds ago."""
    path = file_of(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"host": "elsewhere", "pid": 1, "since": 1e9, "owner": "other", "space": "", "token": "t"} | changes
    path.write_text(json.dumps(record))
    os.utime(path, (time.time() - age,) * 2)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "claims").iterdir())


def test_a_claim_stands_while_its_block_runs(tmp_path):
    before = time.time()
    with hold(tmp_path, NAME, "me") as held:
        assert held is True
        assert names(tmp_path) == [f"{NAME}.json"]
        claim = foreign(tmp_path, NAME, "you")
        assert isinstance(claim, Claim) and (claim.pid, claim.owner) == (os.getpid(), "me")
        assert before - 1 <= claim.since <= time.time() + 1
        assert str(claim).startswith(f"process {os.getpid()} on {claims.host_name()}, since 20")
        assert foreign(tmp_path, NAME, "me") is None
        with hold(tmp_path, NAME, "you") as second:
            assert second is False
        with hold(tmp_path, "expert-0008", "you") as other:
            assert other is True
        assert foreign(tmp_path, NAME, "you") == claim
    assert names(tmp_path) == []
    with hold(tmp_path, NAME, "you") as held:
        assert held is True


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_claim_is_removed_however_the_block_ends(tmp_path, error):
    with pytest.raises(error), hold(tmp_path, NAME, "me"):
        raise error
    assert names(tmp_path) == []


def test_owners_differ():
    assert owner_id() != owner_id() and str(os.getpid()) in owner_id()


def test_the_same_owner_holds_again_at_once_and_the_first_makes_way(tmp_path, monkeypatch):
    with settings(monkeypatch, REFRESH_SECONDS=0.05), hold(tmp_path, NAME, "me") as first:
        with hold(tmp_path, NAME, "me") as second:
            assert first and second
            content = file_of(tmp_path).read_bytes()
            time.sleep(0.2)
            assert file_of(tmp_path).read_bytes() == content
        assert names(tmp_path) == []
    with hold(tmp_path, NAME, "me"), hold(tmp_path, NAME, "me"):
        pass  # the inner one is left first here, the outer finds nothing of its own
    assert names(tmp_path) == []


def test_leaving_does_not_remove_what_another_took_over(tmp_path):
    with hold(tmp_path, NAME, "me"):
        plant(tmp_path)
    assert names(tmp_path) == [f"{NAME}.json"]
    assert foreign(tmp_path, NAME, "me").owner == "other"


def test_a_claim_is_refreshed(tmp_path, monkeypatch):
    with settings(monkeypatch, REFRESH_SECONDS=0.05), hold(tmp_path, NAME, "me"):
        os.utime(file_of(tmp_path), (0, 0))
        deadline = time.monotonic() + 10
        while time.time() - file_of(tmp_path).stat().st_mtime > 5 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert foreign(tmp_path, NAME, "you") is not None


def test_refreshing_stops_when_another_took_over(tmp_path, monkeypatch):
    with settings(monkeypatch, REFRESH_SECONDS=0.05), hold(tmp_path, NAME, "me"):
        plant(tmp_path)
        changed = file_of(tmp_path).stat().st_mtime_ns
        time.sleep(0.3)
        assert file_of(tmp_path).stat().st_mtime_ns == changed


@pytest.mark.parametrize(("age", "live"), [(0, True), (25, True), (35, False), (-3600, False)])
def test_a_claim_that_is_not_refreshed_goes_stale(tmp_path, age, live):
    plant(tmp_path, age)
    assert (foreign(tmp_path, NAME, "me") is not None) == live
    with hold(tmp_path, NAME, "me") as held:
        assert held is not live
    assert names(tmp_path) == ([f"{NAME}.json"] if live else [])


def test_the_file_systems_clock_decides(tmp_path, monkeypatch):
    """This host's clock may be an hour off."""
    plant(tmp_path)
    monkeypatch.setattr(claims.time, "time", lambda: 1.0)
    assert foreign(tmp_path, NAME, "me") is not None


@pytest.mark.parametrize("content", [
    b"", b"{", b"null", b"[1]", b"\xff\xfe", b'{"host": "x"}', b"[" * 100_000,
    b'{"host": "elsewhere", "pid": 1e99, "since": 1, "owner": "o", "space": "", "token": "t"}',
    b'{"host": "elsewhere", "pid": 1, "since": 1e99, "owner": "o", "space": "", "token": "t"}',
])  # fmt: skip
def test_a_damaged_claim_counts_for_nothing(tmp_path, content):
    file_of(tmp_path).parent.mkdir()
    file_of(tmp_path).write_bytes(content)
    assert foreign(tmp_path, NAME, "me") is None
    with hold(tmp_path, NAME, "me") as held:
        assert held is True
    assert names(tmp_path) == []


def test_a_dead_process_of_this_host_holds_nothing(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = {"host": claims.host_name(), "space": claims._process_space()}
    plant(tmp_path, **here, pid=dead.pid)
    assert foreign(tmp_path, NAME, "me") is None
    plant(tmp_path, **here, pid=os.getpid())
    assert foreign(tmp_path, NAME, "me") is not None
    plant(tmp_path, **here | {"space": "pid:[1]"}, pid=dead.pid)  # in a container of the same host name
    assert foreign(tmp_path, NAME, "me") is not None


def test_a_killed_holder_is_succeeded(tmp_path, holder):
    other = holder(tmp_path)
    assert foreign(tmp_path, NAME, "me").pid == other.pid
    with hold(tmp_path, NAME, "me") as held:
        assert held is False
    other.send_signal(signal.SIGKILL)
    other.wait()
    with hold(tmp_path, NAME, "me") as held:
        assert held is True
        assert json.loads(file_of(tmp_path).read_text())["pid"] == os.getpid()
    assert names(tmp_path) == []


def test_a_stopped_holder_is_succeeded_and_makes_way_when_it_wakes(tmp_path, holder, monkeypatch):
    with settings(monkeypatch, STALE_SECONDS=1.0):
        other = holder(tmp_path)
        time.sleep(1.5)
        assert foreign(tmp_path, NAME, "me") is not None  # refreshed meanwhile
        other.send_signal(signal.SIGSTOP)
        time.sleep(1.5)
        with hold(tmp_path, NAME, "me") as held:
            assert held is True
            other.send_signal(signal.SIGCONT)
            time.sleep(0.5)
            other.stdin.close()
            assert other.wait(10) == 0
            assert names(tmp_path) == [f"{NAME}.json"]
            assert foreign(tmp_path, NAME, "other").owner == "me"


@pytest.mark.parametrize("stale", [False, True])
def test_one_of_racing_takers_wins(tmp_path, stale):
    rounds, step = 25, 0.1
    if stale:
        for number in range(rounds):
            plant(tmp_path, age=100)
            file_of(tmp_path).rename(tmp_path / "claims" / f"expert-{number:04d}.json")
            os.utime(tmp_path / "claims" / f"expert-{number:04d}.json", (0, 0))
    racers = [process(RACER, tmp_path, rounds, time.time() + 2, step) for _ in range(4)]
    lines = [line.split() for racer in racers for line in racer.communicate(timeout=60)[0].splitlines()]
    assert [racer.returncode for racer in racers] == [0] * 4
    held = sorted((int(number), float(began), float(ended)) for number, began, ended in lines)
    assert {number for number, *_ in held} == set(range(rounds))
    # On a busy machine others may come when the first has left already, but never before.
    assert [(a, b) for a, b in pairwise(held) if a[0] == b[0] and b[1] < a[2]] == []
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [1, 95])  # EPERM, EOPNOTSUPP: what file systems without links say
def test_a_file_system_without_links(tmp_path, monkeypatch, number):
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(claims.os, "link", refuse)
    with hold(tmp_path, NAME, "me") as held, hold(tmp_path, NAME, "you") as second:
        assert (held, second) == (True, False)
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    plant(tmp_path)

    def refuse(path: object, mode: str = "r", *rest: object, original=open, **named: object) -> object:
        if mode == "xb":
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, mode, *rest, **named)

    monkeypatch.setattr(claims, "open", refuse, raising=False)
    assert foreign(tmp_path, NAME, "me").owner == "other"
    refused = pytest.raises(StorageError, match=rf"{NAME}\.json: the claim cannot be written: Permission denied; valid")
    with refused, hold(tmp_path, NAME, "me"):
        pytest.fail("not reached")


def test_the_end_of_a_block_survives_a_folder_that_is_gone(tmp_path):
    with hold(tmp_path / "buffer", NAME, "me"):
        for file in (tmp_path / "buffer" / "claims").iterdir():
            file.unlink()
        (tmp_path / "buffer" / "claims").rmdir()


def test_what_killed_takers_left_is_removed(tmp_path):
    plant(tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "claims" / f".{NAME}.json.{claims.host_name()}.{dead.pid}.aa.tmp").touch()
    with hold(tmp_path, NAME, "me") as held:
        assert held is False
    assert names(tmp_path) == [f"{NAME}.json"]


def test_claims_are_not_part_of_the_buffer(write):
    folder = write(3)
    before = Buffer(folder).inspect()
    with hold(folder, NAME, "me"):
        assert Buffer(folder).verify() == []
        assert Buffer(folder).inspect() == before
