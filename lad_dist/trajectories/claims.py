"""Advisory claims that keep two drivers from training the same expert, and two runs from distilling in one folder.

    <buffer>/claims/expert-0007.json      the process training it; refreshed every few seconds, removed at the end
    <run>/claims/run.json, distill.json   the same for a whole run and for a distillation

Work units are deterministic, so a failed claim costs time only. Nothing waits for a claim longer than ``STALE_SECONDS``
after its holder is gone.

On a local folder, a claim is taken by an exclusive link and taken over by a rename, one process of this machine at a
time (folder lock): exactly one wins. Two processes on different machines may, within microseconds, both take over a
stale claim, until the loser's next refresh. Arrow offers neither operation on object stores: there the last writer
wins, checked ``SETTLE_SECONDS`` after writing; two processes whose writes take much longer than that may both believe
that they hold the claim, until the loser's next refresh.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

from pyarrow import fs

from lad_dist.errors import StorageError, first_line
from lad_dist.rundir import host_name, process_lives
from lad_dist.trajectories import files

STALE_SECONDS = 30.0  # age without a refresh after which a claim is void
REFRESH_SECONDS = 5.0
SETTLE_SECONDS = 0.5  # between writing a claim to an object store and checking that no other replaced it
_LEAVE_SECONDS = 2.0  # longest wait for a refresh in progress at the end of a hold
_LOCK_SECONDS = 1.0  # longest wait for other processes taking or releasing a claim in the folder
_TRIES = 10
_LONGEST = 2**16  # bytes read of a claim file; ours have 200
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK)  # on file systems without links
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Claim:
    """Holder of a claim: process ``pid`` on ``host``, since ``since`` (Unix seconds), on behalf of ``owner``."""

    host: str
    pid: int
    since: float
    owner: str

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}, since {since}"

    def lives_here(self) -> bool:
        """Whether its process is alive on this host. For other hosts, only the age of a claim is known."""
        return self.host == host_name() and process_lives(self.pid)


@dataclass(frozen=True)
class _Record(Claim):
    """Content of a claim file. ``space``: PID namespace; ``token``: identifies this one hold."""

    space: str
    token: str

    @classmethod
    def mine(cls, owner: str) -> _Record:
        return cls(host_name(), os.getpid(), time.time(), owner, _process_space(), secrets.token_hex(8))

    @classmethod
    def read(cls, content: bytes) -> _Record | None:
        """Parse a claim file; None if it is damaged."""
        try:
            document = json.loads(content)
            record = cls(**document)
        except (ValueError, TypeError, RecursionError):
            return None
        kinds = {"pid": int, "since": int | float}
        whole = all(isinstance(getattr(record, f.name), kinds.get(f.name, str)) for f in fields(record))
        return record if whole and 0 < record.pid < 2**31 and 0 <= record.since < 2**33 else None

    def content(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    def died(self) -> bool:
        """Whether its process is known to have ended. Containers may share the host's name but not its processes."""
        here = (self.host, self.space) == (host_name(), _process_space())
        return here and not process_lives(self.pid)


class _Seen(NamedTuple):
    """Snapshot of a claim file: its content, and its last refresh by the file system's clock (Unix seconds)."""

    content: bytes
    changed: float

    @property
    def record(self) -> _Record | None:
        return _Record.read(self.content)


def owner_id() -> str:
    """Return an owner name for this driver and its actors, wherever they run: host, process and a random number."""
    return f"{host_name()}-{os.getpid()}-{secrets.token_hex(4)}"


@contextmanager
def hold(location: Path | str, name: str, owner: str) -> Iterator[bool]:
    """Hold a claim while the block runs: ``with claims.hold(buffer, "expert-0007", owner) as held:``.

    Yields True if the claim is ours: a thread refreshes it, and it is removed however the block ends. Yields False if
    another owner has a live claim; nothing is changed then. A claim of the same ``owner``, a stale or a damaged one is
    taken over at once. ``location``: the buffer, as for ``files.resolve``. Raises ``StorageError`` if the claim cannot
    be written, ``TrajectoryError`` if the location cannot be used.
    """
    place = _place(location, name)
    files.clean_temporary_files(place.filesystem, os.path.dirname(place.path))
    with _refusals(place.label):
        mine = place.take(owner)
    if mine is None:
        yield False
        return
    ended = threading.Event()
    refresher = threading.Thread(target=_refresh, args=(place, mine, ended), name=f"claim {name}", daemon=True)
    refresher.start()
    try:
        yield True
    finally:
        ended.set()
        refresher.join(_LEAVE_SECONDS)
        with suppress(OSError):  # the claim goes stale by itself; the block's own error must not be hidden
            place.release(mine)


def foreign(location: Path | str, name: str, owner: str) -> Claim | None:
    """Return the live claim of an owner other than ``owner``, or None. Leaves no file behind.

    Raises ``StorageError`` if the claim cannot be read, ``TrajectoryError`` if the location cannot be used.
    """
    place = _place(location, name)
    with _refusals(place.label):
        seen = place.look()
        record = seen and seen.record
        if seen is None or record is None or record.owner == owner or not place.live(seen, record):
            return None
    return Claim(record.host, record.pid, record.since, record.owner)


def others(location: Path | str, owner: str, prefix: str = "expert-") -> dict[str, Claim]:
    """Return the live claims of other owners whose names begin with ``prefix``. Raises as ``foreign``."""
    filesystem, root = files.resolve(location)
    names = [entry.path for entry in files.list_files(filesystem, f"{root}/claims")]
    found = {}
    for name in (n.removesuffix(".json") for n in names if n.startswith(prefix) and n.endswith(".json")):
        claim = foreign(location, name, owner)
        if claim is not None:
            found[name] = claim
    return found


def _refresh(place: _Place, mine: _Record, ended: threading.Event) -> None:
    while not ended.wait(REFRESH_SECONDS):
        try:
            if not place.refresh(mine):
                return  # this process was stopped or suspended and another took over; it keeps the claim
        except OSError:
            continue  # retried in the next round; if the file system stays away, others may take the claim


def _place(location: Path | str, name: str) -> _Place:
    assert _NAME.fullmatch(name), f"{name!r} cannot be the name of a claim"
    filesystem, root = files.resolve(location)
    kind = _Folder if files.is_local(filesystem) else _Store
    return kind(filesystem, f"{root}/claims/{name}.json")


@contextmanager
def _refusals(label: str) -> Iterator[None]:
    try:
        yield
    except OSError as cause:
        reason = os.strerror(cause.errno) if cause.errno else first_line(cause)
        raise StorageError(
            f"{label}: the claim cannot be written: {reason}; valid: a folder or bucket that you may write to"
        ) from cause


class _Place(ABC):
    """One claim file. All methods raise OSError."""

    def __init__(self, filesystem: fs.FileSystem, path: str) -> None:
        self.filesystem, self.path = filesystem, path
        self.label = files.name_of(filesystem, path)

    @abstractmethod
    def look(self) -> _Seen | None:
        """Read the claim file; None if there is none."""

    @abstractmethod
    def take(self, owner: str) -> _Record | None:
        """Take the claim and return it; None if another owner's claim is live."""

    @abstractmethod
    def refresh(self, mine: _Record) -> bool:
        """Refresh our claim; return False if it is no longer ours."""

    @abstractmethod
    def release(self, mine: _Record) -> None:
        """Remove the claim if it is still ours."""

    @abstractmethod
    def now(self) -> float:
        """Return Unix seconds of the clock that stamps the claim files."""

    def live(self, seen: _Seen, record: _Record) -> bool:
        """Whether a claim is valid. A time far in the future means damage or a clock that was set back."""
        return not record.died() and abs(self.now() - seen.changed) <= STALE_SECONDS

    def in_the_way(self, seen: _Seen, owner: str) -> bool:
        record = seen.record
        return record is not None and record.owner != owner and self.live(seen, record)


class _Folder(_Place):
    """A claim in a local or network-mounted folder."""

    def look(self) -> _Seen | None:
        try:
            with open(self.path, "rb") as file:
                return _Seen(file.read(_LONGEST), os.fstat(file.fileno()).st_mtime)
        except FileNotFoundError:
            return None

    def take(self, owner: str) -> _Record | None:
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        mine = _Record.mine(owner)
        temporary = files.temporary_name(self.path)
        try:
            with open(temporary, "xb") as file:
                file.write(mine.content())
            with self._one_at_a_time():
                for _ in range(_TRIES):
                    if self._placed(temporary, mine):
                        return mine
                    seen = self.look()
                    if seen is not None and (self.in_the_way(seen, owner) or not self._clear(seen)):
                        return None
            return None  # the claim changes so often that others must be using it
        finally:
            with suppress(OSError):
                os.unlink(temporary)

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """Hold the folder's lock; go on without it if the file system has none or after ``_LOCK_SECONDS``."""
        try:
            folder = os.open(os.path.dirname(self.path), os.O_RDONLY | os.O_DIRECTORY)
        except OSError:  # the folder is not readable for this process
            yield
            return
        try:
            deadline = time.monotonic() + _LOCK_SECONDS
            while time.monotonic() < deadline:
                try:
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.001)
                except OSError:  # the file system has no such locks
                    break
            yield
        finally:
            os.close(folder)

    def _placed(self, temporary: str, mine: _Record) -> bool:
        """Link the complete temporary file to its final name; return False if that name is taken."""
        try:
            os.link(temporary, self.path)
        except FileExistsError:
            return False
        except OSError as cause:
            if cause.errno not in _NO_LINKS:
                raise
            return self._created(mine)
        with suppress(FileNotFoundError):  # another process moved it for a moment (see _clear)
            os.utime(self.path)
        return True

    def _created(self, mine: _Record) -> bool:
        """``_placed`` for file systems without links; readers take a file not yet written for damaged."""
        try:
            with open(self.path, "xb") as file:
                file.write(mine.content())
        except FileExistsError:
            return False
        return True

    def _clear(self, seen: _Seen) -> bool:
        """Remove the claim ``seen`` and no other; return False if another one is already there.

        Of several processes that saw the same stale claim, one wins the rename. A fresh claim moved by mistake is put
        back.
        """
        aside = files.temporary_name(self.path)
        try:
            if self.look() not in (seen, None):
                return False
            os.rename(self.path, aside)
        except FileNotFoundError:
            return True  # another process cleared it, or it was released: the link decides
        try:
            with open(aside, "rb") as file:
                if _Seen(file.read(_LONGEST), os.fstat(file.fileno()).st_mtime) == seen:
                    return True
            with suppress(OSError):  # if it cannot be put back, its holder gives up at its next refresh
                os.link(aside, self.path)
            return False
        except FileNotFoundError:
            return True  # hours old, so another process removed it as a temporary file
        finally:
            with suppress(OSError):
                os.unlink(aside)

    def refresh(self, mine: _Record) -> bool:
        seen = self.look()
        if seen is None:
            return True  # another process moved it for a moment (see _clear), or the folder was emptied
        if seen.content != mine.content():
            return False
        with suppress(FileNotFoundError):
            os.utime(self.path)  # without times: uses the file system's clock
        return True

    def release(self, mine: _Record) -> None:
        seen = self.look()
        if seen is not None and seen.content == mine.content():
            with self._one_at_a_time():
                self._clear(seen)

    def now(self) -> float:
        probe = files.temporary_name(self.path)
        try:
            with open(probe, "xb") as file:
                return os.fstat(file.fileno()).st_mtime
        except OSError as cause:
            if cause.errno not in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOSPC, errno.EDQUOT):
                raise
            return time.time()  # without write access, this host's clock is the best available
        finally:
            with suppress(OSError):
                os.unlink(probe)


class _Store(_Place):
    """A claim in an object store."""

    def look(self) -> _Seen | None:
        info = self.filesystem.get_file_info(self.path)
        if info.type != fs.FileType.File:
            return None
        try:
            with self.filesystem.open_input_file(self.path) as stream:
                return _Seen(stream.read(_LONGEST), (info.mtime_ns or 0) / 1e9)
        except FileNotFoundError:
            return None

    def take(self, owner: str) -> _Record | None:
        seen = self.look()
        if seen is not None and self.in_the_way(seen, owner):
            return None
        mine = _Record.mine(owner)
        self._put(self.path, mine.content())
        time.sleep(SETTLE_SECONDS)
        seen = self.look()
        return mine if seen is not None and seen.content == mine.content() else None

    def refresh(self, mine: _Record) -> bool:
        seen = self.look()
        if seen is not None and seen.content != mine.content():
            return False
        self._put(self.path, mine.content())
        return True

    def release(self, mine: _Record) -> None:
        seen = self.look()
        if seen is not None and seen.content == mine.content():
            self.filesystem.delete_file(self.path)

    def now(self) -> float:
        probe = files.temporary_name(self.path)
        try:
            self._put(probe, b"")
            return (self.filesystem.get_file_info(probe).mtime_ns or 0) / 1e9
        except OSError as cause:
            if not files.of_the_store(cause):
                raise
            return time.time()  # as in a read-only folder
        finally:
            with suppress(OSError):
                self.filesystem.delete_file(probe)

    def _put(self, path: str, content: bytes) -> None:
        """Write an object. An interruption leaves an empty object at worst, which no reader accepts as a claim."""
        with self.filesystem.open_output_stream(path) as stream:
            stream.write(content)


def _process_space() -> str:
    """Return the PID namespace of this process; empty where the system does not report it."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
