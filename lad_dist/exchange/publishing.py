"""Atomic publishing of an export folder, which replaces nothing but another export."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lad_dist.errors import DistilledError, StorageError
from lad_dist.exchange.about import ABOUT, FORMAT
from lad_dist.rundir import RunDir, host_name, process_lives, remove

_TEMPORARY = re.compile(r"\.tmp-(\w+)-([0-9]+)-.*")


@contextmanager
def published_export(out: Path, force: bool) -> Iterator[Path]:
    """Publish a folder: ``with published_export(out, force) as temporary``; on success it is renamed to ``out``.

    Raises:
        DistilledError: ``out`` is not empty, and ``force`` is not given or ``out`` is not an export.
        StorageError: it cannot be written.
    """
    refuse_what_is_there(out, force)
    with published_folder(out) as temporary:
        yield temporary


@contextmanager
def published_folder(out: Path) -> Iterator[Path]:
    """Publish a folder by rename, replacing an older one. Raises StorageError where it cannot be written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for leftover in out.parent.glob(".tmp-*"):
            match = _TEMPORARY.fullmatch(leftover.name)
            if match and match[1] == host_name() and not process_lives(int(match[2])):
                remove(leftover)
    except OSError as error:
        raise StorageError(f"{out}: cannot be written: {error.strerror or error}; choose another folder") from error
    with RunDir(out.parent).publish_folder(out) as temporary:
        yield temporary


def refuse_what_is_there(out: Path, force: bool) -> None:
    """Raise DistilledError unless ``out`` is missing, empty, or an export and ``force`` is given.

    Raises StorageError where ``out`` cannot be read.
    """
    try:
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return
    except OSError as error:
        raise StorageError(
            f"{out}: cannot be read: {error.strerror or error}; choose another folder with --out"
        ) from error
    if not is_export(out):
        raise DistilledError(
            f"{out}: already exists and is not an export of lad-dist, so it is not replaced; choose another folder with --out"
        )
    if not force:
        raise DistilledError(f"{out}: already exists; --force replaces it, or choose another folder with --out")


def is_export(folder: Path) -> bool:
    """Whether the folder is an export."""
    try:
        said = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(said, dict) and said.get("format") == FORMAT
