"""Every access of the trajectory buffer to a file system.

Paths are strings inside a ``pyarrow.fs.FileSystem``. Reading and listing work on any of them. Publishing is written
for local (and network-mounted) folders, where a file becomes visible by a rename; an object store, which shows an
object only once it is complete, needs its own branch in ``publish`` and nothing else.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow as pa
from pyarrow import fs

from lad_dist.errors import StorageError, TrajectoryError
from lad_dist.rundir import host_name, process_lives

# `.epochs-0000-0009.parquet.<host>.<process>.<random>.tmp`: hidden, and never matched by `*.parquet`.
_TEMPORARY = re.compile(r"\..+\.parquet\.(?P<host>[A-Za-z0-9_-]+)\.(?P<pid>[0-9]+)\.[0-9a-f]+\.tmp")
# The temporary file of a process that cannot be asked (it is on another host) counts as abandoned after this many
# seconds; writing a part takes seconds.
ABANDONED_AFTER = 3600.0

_ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on the size of a file (`ulimit -f`)",
    errno.EACCES: "make the folder writable for you",
    errno.EPERM: "make the folder writable for you",
    errno.EROFS: "choose a folder on a file system that is mounted for writing",
}


class Stamp(NamedTuple):
    """Tells one version of a file from another: its size in bytes and its time of change in nanoseconds."""

    size: int
    changed_ns: int


class Entry(NamedTuple):
    """A file in a listing; ``path`` is relative to the folder that was listed, with forward slashes."""

    path: str
    stamp: Stamp


def local(folder: Path) -> tuple[fs.FileSystem, str]:
    """The file system and the path inside it that stand for a local folder."""
    return fs.LocalFileSystem(), folder.absolute().as_posix()


def _stamp(info: fs.FileInfo) -> Stamp:
    return Stamp(int(info.size or 0), int(info.mtime_ns or 0))


def list_files(filesystem: fs.FileSystem, folder: str) -> list[Entry]:
    """All files below ``folder``, sorted by path; none if it does not exist. Raises ``TrajectoryError``."""
    try:
        found = filesystem.get_file_info(fs.FileSelector(folder, recursive=True, allow_not_found=True))
    except (OSError, pa.ArrowException) as cause:
        raise TrajectoryError(f"{folder}: cannot be listed ({cause}); valid: a folder that you may read") from cause
    prefix = folder.rstrip("/") + "/"
    return sorted(Entry(f.path.removeprefix(prefix), _stamp(f)) for f in found if f.type == fs.FileType.File)


def stamp(filesystem: fs.FileSystem, path: str) -> Stamp | None:
    """Size and time of change of a file, or None if it does not exist. Raises OSError."""
    info = filesystem.get_file_info(path)
    return _stamp(info) if info.type == fs.FileType.File else None


def open_for_reading(filesystem: fs.FileSystem, path: str) -> pa.NativeFile:
    """Open a file for random access. Raises OSError."""
    return filesystem.open_input_file(path)


@contextmanager
def _storage_errors(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as cause:
        reason = os.strerror(cause.errno) if cause.errno else str(cause)
        advice = _ADVICE.get(cause.errno or 0, "make sure that the folder exists and accepts files")
        raise StorageError(
            f"{path}: could not be published: {reason}; {advice} and run the same command again. "
            "Parts published before are intact; only the epochs of this one will be redone"
        ) from cause


def publish(filesystem: fs.FileSystem, path: str, write: Callable[[BinaryIO], None]) -> None:
    """Create or replace ``path`` in one step by what ``write`` puts into the file that it is given.

    Readers see the old file or the whole new one, even after a crash: the bytes go to a temporary file of the same
    folder and are synced before the rename, the folder is synced after it. Any number of processes may publish the
    same path: the last wins.
    Raises ``StorageError``, after removing the temporary file, if the file system refuses.
    """
    if not isinstance(filesystem, fs.LocalFileSystem):
        raise StorageError(f"{path}: parts can be written to local folders only, not to {filesystem.type_name}")
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{host_name()}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    with _storage_errors(path):
        os.makedirs(folder, exist_ok=True)
        try:
            with open(temporary, "x+b") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            _remove(temporary)
            raise
        _sync_folder(folder)


def _remove(path: str) -> None:
    """Remove a temporary file on the way out of an error, which must stay the one that is reported."""
    try:
        os.unlink(path)
    except OSError:
        return  # never created, or not ours to remove: readers ignore it and clean_temporary comes past


def _sync_folder(folder: str) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as cause:
        if cause.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(handle)


def clean_temporary_files(filesystem: fs.FileSystem, folder: str) -> list[str]:
    """Remove what killed writers left in ``folder``; return the paths removed.

    A temporary file is left alone while its writer may be at work: its process lives on this host, or it belongs to
    another host and is younger than an hour. Raises ``StorageError`` if the file system refuses.
    """
    removed = []
    for entry in list_files(filesystem, folder):
        path = f"{folder}/{entry.path}"
        match = _TEMPORARY.fullmatch(entry.path)
        if match is None:
            continue
        old = time.time() - entry.stamp.changed_ns / 1e9 > ABANDONED_AFTER
        if old or (match["host"] == host_name() and not process_lives(int(match["pid"]))):
            with _storage_errors(path):
                try:
                    filesystem.delete_file(path)
                except FileNotFoundError:
                    continue  # another writer of the same expert cleaned at the same time
            removed.append(path)
    return removed
