"""File-system access of the trajectory buffer.

A buffer is in a local (or network-mounted) folder or in an object store; ``resolve`` turns its location into a
``pyarrow.fs.FileSystem`` and a path inside it, which everything else uses. Publishing is atomic on both: a file becomes
visible by a rename, an object by a server-side copy of a complete, hidden one.
"""

from __future__ import annotations

import errno
import io
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import pyarrow as pa
from pyarrow import fs

from lad_dist.errors import StorageError, TrajectoryError, first_line
from lad_dist.location import is_remote, local_folder, shown
from lad_dist.rundir import host_name, process_lives

# `.epochs-0000-0009.parquet.<host>.<process>.<random>.tmp`: hidden, and never matched by `*.parquet`.
_TEMPORARY = re.compile(r"\..+\.(?:parquet|json)\.(?P<host>[A-Za-z0-9_-]+)\.(?P<pid>[0-9]+)\.[0-9a-f]+\.tmp")
# Age in seconds after which the temporary file of a process on another host, whose state is unknown, counts as
# abandoned; writing a part takes seconds.
ABANDONED_AFTER = 3600.0

# A request to a store that accepts connections but does not respond fails after this many seconds, times _S3_ATTEMPTS.
# (Arrow's documentation says that Linux ignores the limit; in fact libcurl uses it there as the longest time without a
# received byte. With Arrow's default settings, such a request took 99 s.)
REQUEST_SECONDS = 10.0
CONNECT_SECONDS = 5.0
_S3_ATTEMPTS = 3
_GCS_RETRY_SECONDS = 30.0
_PUBLISH_ATTEMPTS = 4
_PUBLISH_SECONDS = 30.0  # after which a failed upload is not retried
_S3_FIELDS = ("region", "scheme", "endpoint_override", "tls_ca_file_path", "force_virtual_addressing")
_URI_FORMS = "a folder, s3://bucket/prefix, gs://bucket/prefix, or file:///folder"
_REMOTE_NAMES = {"s3": "s3://", "gcs": "gs://"}
# Markers in errors of the store clients, as opposed to Arrow's errors about a file's content.
_INCOMPLETE = "incomplete upload"
_STORE_ERROR = re.compile(r"AWS Error|google::cloud::Status|curlCode|CURL error|incomplete upload")
# Permanent errors of a store.
_LASTING = re.compile(
    "NO_SUCH_BUCKET|ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|INVALID_SIGNATURE|INVALID_CLIENT_TOKEN_ID|"
    "UNRECOGNIZED_CLIENT|MISSING_AUTHENTICATION_TOKEN|NOT_IMPLEMENTED|PERMISSION_DENIED|UNAUTHENTICATED|NOT_FOUND|"
    "HTTP status 40[0134]"
)
_UNREACHABLE = re.compile("NETWORK_CONNECTION|curlCode|CURL error")

_ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on the size of a file (`ulimit -f`)",
    errno.EACCES: "make the folder writable for you",
    errno.EPERM: "make the folder writable for you",
    errno.EROFS: "choose a folder on a file system that is mounted for writing",
}
# Permanent errors of a folder, from any process.
_LASTING_ERRNO = frozenset({*_ADVICE, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG})


class Stamp(NamedTuple):
    """Version of a file: its size in bytes and modification time in nanoseconds."""

    size: int
    changed_ns: int


class Entry(NamedTuple):
    """A file in a listing; ``path`` is relative to the listed folder, with forward slashes."""

    path: str
    stamp: Stamp


def local(folder: Path) -> tuple[fs.FileSystem, str]:
    """Return the file system of a local folder and the path inside it."""
    return fs.LocalFileSystem(), folder.absolute().as_posix()


def resolve(location: Path | str) -> tuple[fs.FileSystem, str]:
    """Return the file system of a buffer's location and the path inside it.

    ``location``: a ``Path``, a ``str`` without ``://`` (both a local folder), ``file:///folder``, or
    ``s3://bucket/prefix`` and ``gs://bucket/prefix``. An S3 store other than Amazon's is given in the query, as in
    Arrow: ``s3://bucket/prefix?endpoint_override=127.0.0.1:5000&scheme=http``; the fields are ``region``, ``scheme``,
    ``endpoint_override``, ``tls_ca_file_path`` and ``force_virtual_addressing``. Credentials come from the standard
    sources of the store's own tools (``AWS_*`` variables, ``~/.aws``, ``GOOGLE_APPLICATION_CREDENTIALS``). Raises
    ``TrajectoryError``, never showing credentials.
    """
    if not is_remote(location):
        return local(local_folder(location))
    uri, name = str(location), shown(location)
    opener = {"s3": _open_s3, "gs": _open_gcs, "gcs": _open_gcs}.get(uri.partition("://")[0].lower())
    if opener is None:
        raise TrajectoryError(f"{name}: the kind of storage is unknown; valid: {_URI_FORMS}")
    if not urlsplit(uri).netloc.rpartition("@")[2]:
        raise TrajectoryError(f"{name}: names no bucket; valid: {_URI_FORMS}")
    try:
        return opener(uri)
    except (OSError, ValueError, ImportError) as cause:  # ArrowInvalid is a ValueError
        # Arrow quotes the URI: neither the message nor the exception chain may show its credentials.
        reason = first_line(cause).replace(uri, name)
        error = TrajectoryError(f"{name}: cannot be opened: {reason}; valid: {_URI_FORMS}")
        raise error from (cause if name == uri else None)


def _open_s3(uri: str) -> tuple[fs.FileSystem, str]:
    """``pyarrow.fs.FileSystem.from_uri`` with timeouts, which it lacks. Raises OSError, ValueError, ImportError."""
    parts = urlsplit(uri)
    user, _, bucket = parts.netloc.rpartition("@")
    key, _, secret = user.partition(":")
    options: dict[str, Any] = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    unknown = sorted(set(options) - set(_S3_FIELDS))
    if unknown:
        raise ValueError(f"the query fields {', '.join(unknown)} are unknown, known are {', '.join(_S3_FIELDS)}")
    if "force_virtual_addressing" in options:
        options["force_virtual_addressing"] = options["force_virtual_addressing"].lower() in ("true", "1")
    elsewhere = "endpoint_override" in options or _set("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
    if "region" not in options and not _set("AWS_REGION", "AWS_DEFAULT_REGION"):
        options["region"] = "us-east-1" if elsewhere else _region_of(bucket)
    if user:
        options |= {"access_key": unquote(key), "secret_key": unquote(secret) or None}
    filesystem = fs.S3FileSystem(
        request_timeout=REQUEST_SECONDS,
        connect_timeout=CONNECT_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_S3_ATTEMPTS),
        **options,
    )
    return filesystem, f"{bucket}{unquote(parts.path)}".rstrip("/")


@cache
def _region_of(bucket: str) -> str:
    """Ask Amazon for a bucket's region, once per process. Raises OSError."""
    region: str = fs.resolve_s3_region(bucket)
    return region


def _set(*variables: str) -> bool:
    return any(os.environ.get(variable) for variable in variables)


def _open_gcs(uri: str) -> tuple[fs.FileSystem, str]:
    """Open a ``gs://`` URI with a retry limit. Raises OSError, ValueError, ImportError."""
    if "retry_limit_seconds=" not in uri:  # the client's own limit is 15 minutes
        uri += f"{'&' if '?' in uri else '?'}retry_limit_seconds={_GCS_RETRY_SECONDS:g}"
    filesystem, path = fs.FileSystem.from_uri(uri)
    return filesystem, path.rstrip("/")


def name_of(filesystem: fs.FileSystem, path: str) -> str:
    """Return a path for messages, with the store's scheme as a prefix unless it is local."""
    return _REMOTE_NAMES.get(filesystem.type_name, "") + path


def is_local(filesystem: fs.FileSystem) -> bool:
    """Whether this is a folder, where files are published by rename, and not an object store."""
    return isinstance(filesystem, fs.LocalFileSystem)


def of_the_store(cause: BaseException) -> bool:
    """Whether an error comes from an object store or the network, not from a file's content."""
    return isinstance(cause, OSError) and cause.errno is None and _STORE_ERROR.search(str(cause)) is not None


def _stamp(info: fs.FileInfo) -> Stamp:
    return Stamp(int(info.size or 0), int(info.mtime_ns or 0))


def list_files(filesystem: fs.FileSystem, folder: str) -> list[Entry]:
    """List all files below ``folder``, sorted by path; empty if it does not exist.

    Raises ``TrajectoryError`` if it cannot be listed, if the bucket does not exist, or if a folder has the name of a
    part.
    """
    where = name_of(filesystem, folder)
    try:
        found = filesystem.get_file_info(fs.FileSelector(folder, recursive=True, allow_not_found=True))
        bucket = folder.partition("/")[0]
        if not (found or is_local(filesystem)) and filesystem.get_file_info(bucket).type == fs.FileType.NotFound:
            raise TrajectoryError(f"{where}: bucket {bucket} does not exist; create it, or choose another")
    except (OSError, pa.ArrowException) as cause:
        valid = (
            "folder that you may read" if is_local(filesystem) else "bucket that you may list, with your credentials"
        )
        raise TrajectoryError(f"{where}: cannot be listed ({first_line(cause)}); valid: a {valid}") from cause
    for each in found:
        if each.size is None and each.path.endswith(".parquet") and each.type == fs.FileType.Directory:
            raise TrajectoryError(
                f"{name_of(filesystem, each.path)}: is a folder where a trajectory part is valid; remove it and run "
                "`lad-dist experts` again, which redoes the epochs of a part"
            )
    prefix = folder.rstrip("/") + "/"
    # Only files have sizes; asking 20,000 entries for their types takes as long as the rest.
    return sorted(Entry(f.path.removeprefix(prefix), _stamp(f)) for f in found if f.size is not None)


def stamp(filesystem: fs.FileSystem, path: str) -> Stamp | None:
    """Return the size and modification time of a file, or None if it does not exist. Raises OSError."""
    info = filesystem.get_file_info(path)
    return _stamp(info) if info.type == fs.FileType.File else None


def open_for_reading(filesystem: fs.FileSystem, path: str) -> pa.NativeFile:
    """Open a file for random access. Raises OSError."""
    return filesystem.open_input_file(path)


def is_lasting(cause: BaseException | None) -> bool:
    """Whether a failed write keeps failing until a user acts: full or read-only disk, no write permission."""
    return isinstance(cause, OSError) and (cause.errno in _LASTING_ERRNO or _LASTING.search(str(cause)) is not None)


@contextmanager
def _storage_errors(path: str, what: str = "published") -> Iterator[None]:
    try:
        yield
    except OSError as cause:
        reason = os.strerror(cause.errno) if cause.errno else first_line(cause)
        kind = "bucket exists and accepts your writes" if of_the_store(cause) else "folder exists and accepts files"
        advice = _ADVICE.get(cause.errno or 0, f"make sure that the {kind}")
        raise StorageError(
            f"{path}: could not be {what}: {reason}; {advice} and run the same command again. Parts "
            "published before are intact; only the epochs of this one will be redone"
        ) from cause


def publish(filesystem: fs.FileSystem, path: str, write: Callable[[BinaryIO], None]) -> None:
    """Atomically create or replace ``path`` with what ``write`` writes into the file it is passed.

    Readers see the old file or the complete new one, even after a crash. Any number of processes may publish the same
    path: the last wins. Raises ``StorageError``, after removing the incomplete file, if the file system refuses.
    """
    with _storage_errors(name_of(filesystem, path)):
        if is_local(filesystem):
            _publish_file(path, write)
        else:
            _publish_object(filesystem, path, write)


def remove(filesystem: fs.FileSystem, paths: Iterable[str]) -> None:
    """Remove files; one that is already gone is no error. Raises ``StorageError`` if the file system refuses."""
    for path in paths:
        with _storage_errors(name_of(filesystem, path), "removed"), suppress(FileNotFoundError):
            filesystem.delete_file(path)


def temporary_name(path: str) -> str:
    """Return a hidden name beside ``path`` that readers ignore and that contains the writer's host and process."""
    folder, name = os.path.split(path)
    return f"{folder}/.{name}.{host_name()}.{os.getpid()}.{secrets.token_hex(4)}.tmp"


def _publish_file(path: str, write: Callable[[BinaryIO], None]) -> None:
    """Write to a temporary file in the same folder, sync it, rename it, then sync the folder."""
    folder, temporary = os.path.dirname(path), temporary_name(path)
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


def _publish_object(filesystem: fs.FileSystem, path: str, write: Callable[[BinaryIO], None]) -> None:
    """Build the object in memory (the size of the pending rows), upload it under a hidden name, then copy it.

    Arrow's output streams cannot be aborted: closing one, leaving its ``with`` block by an error, and even dropping it
    all *finish* the upload with the bytes so far. Only the server-side copy, visible when complete, has the final name,
    and it is made after the upload's length was checked.
    """
    whole, temporary = io.BytesIO(), temporary_name(path)
    write(whole)
    try:
        _retried(lambda: _upload(filesystem, temporary, path, whole.getbuffer()))
    except OSError as cause:
        if not _UNREACHABLE.search(str(cause)):  # an unreachable store would only time out again
            _remove_object(filesystem, temporary)
        raise
    except BaseException:
        _remove_object(filesystem, temporary)
        raise
    _remove_object(filesystem, temporary)


def _upload(filesystem: fs.FileSystem, temporary: str, path: str, content: memoryview) -> None:
    with filesystem.open_output_stream(temporary) as stream:
        stream.write(content)
    arrived = filesystem.get_file_info(temporary).size
    if arrived != len(content):
        raise OSError(f"{_INCOMPLETE}: {arrived} of {len(content)} bytes")
    filesystem.copy_file(temporary, path)


def _retried(step: Callable[[], None]) -> None:
    """Run ``step``, retrying transient store errors with exponential backoff for half a minute at most."""
    began = time.monotonic()
    for attempt in range(1, _PUBLISH_ATTEMPTS + 1):
        try:
            return step()
        except OSError as cause:
            late = attempt == _PUBLISH_ATTEMPTS or time.monotonic() - began > _PUBLISH_SECONDS
            if late or not of_the_store(cause) or is_lasting(cause):
                raise
        time.sleep(0.25 * 2**attempt)


def _remove_object(filesystem: fs.FileSystem, path: str) -> None:
    """Remove a temporary object. On failure it stays, hidden, until ``clean_temporary_files`` runs an hour later."""
    with suppress(OSError):
        filesystem.delete_file(path)


def _remove(path: str) -> None:
    """Remove a temporary file after an error, without hiding that error."""
    try:
        os.unlink(path)
    except OSError:
        return  # never created, or not removable: readers ignore it, clean_temporary_files removes it later


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
    """Remove temporary files of killed writers in ``folder``; return the removed paths.

    A file is kept while its writer may be running: its process is alive on this host, or it belongs to another host and
    is younger than an hour. Raises ``StorageError`` if the file system refuses.
    """
    removed = []
    for entry in list_files(filesystem, folder):
        path = f"{folder}/{entry.path}"
        match = _TEMPORARY.fullmatch(entry.path)
        if match is None:
            continue
        old = time.time() - entry.stamp.changed_ns / 1e9 > ABANDONED_AFTER
        if old or (match["host"] == host_name() and not process_lives(int(match["pid"]))):
            with _storage_errors(name_of(filesystem, path)):
                try:
                    filesystem.delete_file(path)
                except FileNotFoundError:
                    continue  # removed at the same time by another writer of the same expert
            removed.append(path)
    return removed
