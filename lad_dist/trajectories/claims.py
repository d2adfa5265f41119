"""Claims: so that two drivers of one buffer do not train the same expert at the same time, nor two runs distil in one folder.

    <buffer>/claims/expert-0007.json      who is at work on it; refreshed every few seconds, removed at the end
    <run>/claims/run.json, distill.json   the same of a whole run and of a distillation

Claims are advice. A work unit gives the same rows whoever does it, so what goes wrong here costs time and nothing else, and
nothing waits for a claim longer than ``STALE_SECONDS`` after its holder is gone.

On a local folder a claim is taken by an exclusive link and taken over by a rename, by one taker of this machine at a time (a
lock of the folder): one of any takers wins. Of takers on several machines two may, in a gap of microseconds, both take over
one stale claim, until the loser's next refresh. An object store offers neither through Arrow: there the last writer wins, a
moment after writing; two who are much slower than that moment may both believe that they hold it, until the loser's next
refresh.
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

from lad_dist.errors import StorageError
from lad_dist.rundir import host_name, process_lives
from lad_dist.trajectories import files

STALE_SECONDS = 30.0  # without a refresh, after which a claim counts for nothing
REFRESH_SECONDS = 5.0
SETTLE_SECONDS = 0.5  # between writing a claim to an object store and looking whether another came after it
_LEAVE_SECONDS = 2.0  # at the end of a hold, for a refresh under way
_LOCK_SECONDS = 1.0  # of waiting for others who take or release a claim of the same folder
_TRIES = 10
_LONGEST = 2**16  # bytes of a claim file; ours are 200
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK)  # of a file system without links
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Claim:
    """Who is at work on something: process ``pid`` of ``host``, since ``since`` (Unix seconds), on behalf of ``owner``."""

    host: str
    pid: int
    since: float
    owner: str

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}, since {since}"

    def lives_here(self) -> bool:
        """Whether its process is known to be alive: one of this host. Of others only the age of their claims tells."""
        return self.host == host_name() and process_lives(self.pid)


@dataclass(frozen=True)
class _Record(Claim):
    """What a claim file holds. ``space``: the process number's name space; ``token``: of this one hold."""

    space: str
    token: str

    @classmethod
    def mine(cls, owner: str) -> _Record:
        return cls(host_name(), os.getpid(), time.time(), owner, _process_space(), secrets.token_hex(8))

    @classmethod
    def read(cls, content: bytes) -> _Record | None:
        """None for a file that is damaged."""
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
        """Whether its process is known to have ended. Containers of one host may share its name, not its processes."""
        here = (self.host, self.space) == (host_name(), _process_space())
        return here and not process_lives(self.pid)


class _Seen(NamedTuple):
    """A claim file as it was: what it holds, and when it was last refreshed by the file system's clock."""

    content: bytes
    changed: float

    @property
    def record(self) -> _Record | None:
        return _Record.read(self.content)


def owner_id() -> str:
    """A name for this driver, which its actors may use wherever they run: host, process, and a random number."""
    return f"{host_name()}-{os.getpid()}-{secrets.token_hex(4)}"


@contextmanager
def hold(location: Path | str, name: str, owner: str) -> Iterator[bool]:
    """``with claims.hold(buffer, "expert-0007", owner) as held:`` claims it while the block runs.

    True: it is ours. A thread refreshes the claim, and it is removed at the end, however the block ends. False: another
    owner's live claim is in the way, and nothing was changed. A claim of the same ``owner``, a stale or a damaged one is
    taken over at once. ``location``: the buffer, as for ``files.resolve``.
    Raises ``StorageError`` if the claim cannot be written, ``TrajectoryError`` if the location cannot be used.
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
        with suppress(OSError):  # it goes stale by itself, and must not hide how the block ended
            place.release(mine)


def foreign(location: Path | str, name: str, owner: str) -> Claim | None:
    """The live claim of another owner than ``owner``, if there is one. Writes nothing that lasts.

    Raises ``StorageError`` if it cannot be looked up, ``TrajectoryError`` if the location cannot be used.
    """
    place = _place(location, name)
    with _refusals(place.label):
        seen = place.look()
        record = seen and seen.record
        if seen is None or record is None or record.owner == owner or not place.live(seen, record):
            return None
    return Claim(record.host, record.pid, record.since, record.owner)


def _refresh(place: _Place, mine: _Record, ended: threading.Event) -> None:
    while not ended.wait(REFRESH_SECONDS):
        try:
            if not place.refresh(mine):
                return  # we seemed dead (stopped, suspended) and another took over: let it have it
        except OSError:
            continue  # the next round may reach the file system again; if not, others may take the claim


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
        reason = os.strerror(cause.errno) if cause.errno else (str(cause).splitlines() or [repr(cause)])[0]
        raise StorageError(
            f"{label}: the claim cannot be kept there: {reason}; valid: a folder or bucket that you may write to"
        ) from cause


class _Place(ABC):
    """One claim file. All methods raise OSError."""

    def __init__(self, filesystem: fs.FileSystem, path: str) -> None:
        self.filesystem, self.path = filesystem, path
        self.label = files.name_of(filesystem, path)

    @abstractmethod
    def look(self) -> _Seen | None:
        """The claim file, or None if there is none."""

    @abstractmethod
    def take(self, owner: str) -> _Record | None:
        """Our new claim, or None where another owner's is live."""

    @abstractmethod
    def refresh(self, mine: _Record) -> bool:
        """False if the claim is not ours any more."""

    @abstractmethod
    def release(self, mine: _Record) -> None:
        """Remove the claim if it is still ours."""

    @abstractmethod
    def now(self) -> float:
        """Unix seconds by the clock that stamps the claim files."""

    def live(self, seen: _Seen, record: _Record) -> bool:
        """Whether a claim is to be respected. A time far in the future is a damaged one, or a clock set back."""
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
            return None  # others come and go so fast that they must be at work on it
        finally:
            with suppress(OSError):
                os.unlink(temporary)

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """Hold the folder's lock, where the file system has one, and if no holder of it was stopped in the middle."""
        try:
            folder = os.open(os.path.dirname(self.path), os.O_RDONLY | os.O_DIRECTORY)
        except OSError:  # it may be listed by others only
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
                except OSError:  # file systems without such locks
                    break
            yield
        finally:
            os.close(folder)

    def _placed(self, temporary: str, mine: _Record) -> bool:
        """Give the temporary file its final name, if no other has it. The file that appears is whole."""
        try:
            os.link(temporary, self.path)
        except FileExistsError:
            return False
        except OSError as cause:
            if cause.errno not in _NO_LINKS:
                raise
            return self._created(mine)
        with suppress(FileNotFoundError):  # another is looking at it (see _clear)
            os.utime(self.path)
        return True

    def _created(self, mine: _Record) -> bool:
        """As ``_placed``, where files cannot be linked; who looks before it is written takes it for a damaged one."""
        try:
            with open(self.path, "xb") as file:
                file.write(mine.content())
        except FileExistsError:
            return False
        return True

    def _clear(self, seen: _Seen) -> bool:
        """Remove the claim that was ``seen`` and no other; False if another was there already.

        Of several who saw the same stale claim, one gets it by the rename. Who gets a fresh one instead puts it back.
        """
        aside = files.temporary_name(self.path)
        try:
            if self.look() not in (seen, None):
                return False
            os.rename(self.path, aside)
        except FileNotFoundError:
            return True  # another cleared it, or it was released: the link decides
        try:
            with open(aside, "rb") as file:
                if _Seen(file.read(_LONGEST), os.fstat(file.fileno()).st_mtime) == seen:
                    return True
            with suppress(OSError):  # if it cannot be put back, its holder makes way at its next refresh
                os.link(aside, self.path)
            return False
        except FileNotFoundError:
            return True  # it was hours old, and another taker removed it as a temporary file
        finally:
            with suppress(OSError):
                os.unlink(aside)

    def refresh(self, mine: _Record) -> bool:
        seen = self.look()
        if seen is None:
            return True  # another is looking at it (see _clear), or the folder was emptied
        if seen.content != mine.content():
            return False
        with suppress(FileNotFoundError):
            os.utime(self.path)  # no times given: the file system's clock
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
            return time.time()  # one who may only look has no better clock than this host's
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
            return time.time()  # as in a folder that cannot be written to
        finally:
            with suppress(OSError):
                self.filesystem.delete_file(probe)

    def _put(self, path: str, content: bytes) -> None:
        """An interruption inside leaves an empty object at worst, which counts for nothing."""
        with self.filesystem.open_output_stream(path) as stream:
            stream.write(content)


def _process_space() -> str:
    """Which processes the process numbers here are of; empty where the system does not say."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
