"""Access control of a private Ray cluster: a folder and a token that only the user can read. Does not import Ray.

Ray executes any code for the holder of its token, as the user who started it. Its own token file and temporary folder
are open to every user of the machine, so a private cluster gets both from here.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lad_dist.errors import ExpertError

_PREFIX, _LOCK = "ladist-ray-", "lock"
_LOCK_SECONDS, _NO_LOCK_SECONDS = 2.0, 60.0  # within which a new folder's lock is taken, and its file exists
_LONGEST = 40  # bytes of a socket folder's path: a socket's path may have 107, and Ray appends about 65


@contextmanager
def private_folder() -> Iterator[Path]:
    """Create a temporary folder with mode 0700, removed at the end; also remove those left by killed processes.

    A lock on a file inside marks its process as alive. Ray makes its own temporary folder accessible to everybody (mode
    0777), so that folder must be inside this one.
    """
    base = Path(tempfile.gettempdir())
    if len(os.fsencode(base)) + len(_PREFIX) + 8 > _LONGEST:
        base = Path("/tmp")  # noqa: S108 - short, and the folder is made by mkdtemp
    for left in base.glob(f"{_PREFIX}*"):
        _remove_if_left(left)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
    with (folder / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_if_left(folder: Path) -> None:
    """Remove ``folder`` if it is this user's and its process is gone: its lock is free, or no longer exists."""
    age = 0.0
    try:
        there = folder.lstat()
        age = time.time() - there.st_mtime
        if there.st_uid != os.getuid() or age < _LOCK_SECONDS:
            return
        with (folder / _LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    except FileNotFoundError:  # a Ray process wrote to it while it was being removed, or it is being created
        if age > _NO_LOCK_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:  # in use, or not ours
        return


def write_token(file: Path) -> None:
    """Write a new random token to ``file``, which is readable only by its owner from its creation on (mode 0600)."""
    file.unlink(missing_ok=True)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as token:
        token.write(secrets.token_hex(32))


def access(token: Path) -> dict[str, str | None]:
    """Return the environment of processes that require and present the token in a file, and no other."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_AUTH_TOKEN": None}


def token_file(environment: Mapping[str, str]) -> Path | None:
    """Return the file from which Ray reads a running cluster's token.

    None if there is no file, or the environment holds the token.
    """
    if environment.get("RAY_AUTH_TOKEN"):
        return None
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    file = Path(named) if named else Path(os.path.expanduser("~")) / ".ray" / "auth_token"
    return file if file.is_file() else None


def exposure(file: Path) -> str | None:
    """Return how others can read a token file: ``mode 0644, others can read it``; None if only its owner can."""
    mode = stat.S_IMODE(file.stat().st_mode)
    if not mode & 0o077:
        return None
    return f"mode {mode:04o}, other users can access it"


def renewed(file: Path) -> str:
    """Return instructions for replacing an exposed token."""
    return (
        f"anyone who has read it can run code as you: make a new one (rm {file}; (umask 077; ray get-auth-token --generate)) "
        f"and restart the cluster, or, if nobody else can have read it, chmod 600 {file}"
    )


def check_token(environment: Mapping[str, str]) -> None:
    """Raise ExpertError if others can read the file with the token of a running cluster."""
    file = token_file(environment)
    if file is not None and (how := exposure(file)):
        raise ExpertError(f"{file}: a Ray cluster's token, {how}; {renewed(file)}")
