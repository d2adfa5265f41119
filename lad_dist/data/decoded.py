"""Decoded images, kept on disk so that a data set of image files is decoded once.

    FOLDER/KEY.json          facts: a stamp of the files, checksum, shape; names the data file
    FOLDER/KEY-TOKEN.npy     uint8 (N, C, S, S), read through a memory map

FOLDER is ``decoded`` in $LAD_DIST_CACHE, else in $XDG_CACHE_HOME/lad-dist, else in ~/.cache/lad-dist;
LAD_DIST_CACHE=off keeps nothing. KEY is a hash of the selected images' paths in order, of their format and of the
decoder's version. The stamp is a hash of size, modification and change time of every file. An entry is used only if
its stamp is the files' and its pixels match their checksum; otherwise the images are decoded again and replace it.

Any number of processes may read and write: a data file gets a name of its own and is never changed, and the facts,
which name it, are published by one rename. Processes that decode at the same time make equal entries. A replaced data
file stays for a week, as a process on another host may have mapped it. What cannot be written is not kept: the images
then stay in memory, and a note says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import features

from lad_dist.data.decoding import PixelFormat, decode
from lad_dist.data.parquet import ParquetSource
from lad_dist.data.sources import FileSource, Indices, Source
from lad_dist.errors import StorageError
from lad_dist.rundir import published, remove

VARIABLE, OFF = "LAD_DIST_CACHE", "off"
LEAST_IMAGES = 5000  # fewer decode in a second or two
FORGOTTEN_SECONDS = 90 * 86400.0  # an entry that nobody has used for so long goes when another is written
REPLACED_SECONDS = 7 * 86400.0  # and a data file that no entry names after this
_FROM_FILES = ("tiny-imagenet", "image-folder", "list", "parquet")  # kinds of data sets, as the recipe names them
_FORMAT = 1
_CHUNK_BYTES = 64 * 2**20  # pixels decoded at a time on their way to the disk
_SPARE_BYTES = 2**30  # disk space that an entry leaves free
_STAT_THREADS, _STAT_FILES = 16, 2048  # network file systems answer many requests at once
_FACTS_FILE = re.compile(r"[0-9a-f]{32}\.json")
_DATA_FILE = re.compile(r"[0-9a-f]{32}-[0-9a-f]{16}\.npy")


@dataclass(frozen=True)
class Decoded:
    """Images uint8 (N, C, S, S), memory-mapped or in memory.

    ``digest``: SHA-256 state over ``pixel_digest``'s input, if it was computed. ``note``: where they come from, or why
    they are not kept; empty for sources that are not kept.
    """

    images_NCHW: torch.Tensor
    digest: hashlib._Hash | None = None
    note: str = ""


def folder() -> Path | None:
    """Return the folder of the entries, which may not exist yet; None if nothing is kept."""
    given = os.environ.get(VARIABLE, "")
    if given.lower() == OFF:
        return None
    if given:
        return Path(given).expanduser().absolute() / "decoded"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "lad-dist" / "decoded"


def is_kept(source: Source, count: int) -> bool:
    """Return whether ``count`` images of a source are worth an entry: read from files, and not few."""
    return count >= LEAST_IMAGES and isinstance(source, FileSource | ParquetSource) and folder() is not None


def planned_bytes(dataset: str, counts: Sequence[int], values: int) -> int:
    """Return the bytes that splits of ``counts`` images of ``values`` bytes will take here; 0 if nothing is kept."""
    if dataset not in _FROM_FILES or folder() is None:
        return 0
    return sum(count * values for count in counts if count >= LEAST_IMAGES)


def pixel_digest(images_NCHW: torch.Tensor) -> hashlib._Hash:
    """Return the SHA-256 state over shape and pixels, the first part of ``ImageSet.fingerprint``."""
    digest = _started(tuple(images_NCHW.shape))
    digest.update(images_NCHW.contiguous().numpy().data)
    return digest


def load(source: Source, indices: Indices, pixel_format: PixelFormat, on_decoded: Callable[[int], None]) -> Decoded:
    """Return the images ``indices`` of ``source``, from their entry if it is good, else decoded (and kept).

    Raises DataError as ``decode``.
    """
    if not is_kept(source, len(indices)):
        return Decoded(decode(source, indices, pixel_format, on_decoded))
    entry = Entry.of(source, indices, pixel_format)
    if entry is None:  # a file is missing: decoding names it
        return Decoded(decode(source, indices, pixel_format, on_decoded))
    found, why = entry.read()
    if found is not None:
        on_decoded(len(indices))
        return found
    try:
        return entry.write(source, indices, pixel_format, on_decoded, why)
    except StorageError as error:
        note = f"the decoded images are not kept: {error} ({VARIABLE} names another folder, or {OFF})"
        return Decoded(decode(source, indices, pixel_format), note=note)


def check(source: Source, indices: Indices, pixel_format: PixelFormat) -> None:
    """Decode the images to see whether all can be, unless an entry shows it; keep them where ``load`` would.

    Holds a part of them at a time. Raises DataError as ``decode``.
    """
    entry = Entry.of(source, indices, pixel_format) if is_kept(source, len(indices)) else None
    if entry is not None:
        if entry.is_current():
            return
        with contextlib.suppress(StorageError):
            entry.write(source, indices, pixel_format, lambda _: None)
            return
    for _ in _chunks(source, indices, pixel_format):
        pass


@dataclass(frozen=True)
class Entry:
    """The entry of one selection of images: where it lies, and the stamp of the files as they are now."""

    folder: Path
    key: str
    stamp: str
    shape: tuple[int, ...]
    where: str

    @classmethod
    def of(cls, source: Source, indices: Indices, pixel_format: PixelFormat) -> Entry | None:
        """Return the entry of a selection; None if nothing is kept, or a file of it cannot be looked at."""
        at = folder()
        if at is None or not isinstance(source, FileSource | ParquetSource):
            return None
        # ``-`` for none: Pillow without libjpeg, which then decodes no JPEG
        decoder = f"Pillow {PIL.__version__}, libjpeg {features.version('jpg') or '-'}"
        key = hashlib.sha256(repr((_FORMAT, decoder, pixel_format)).encode())
        if isinstance(source, ParquetSource):
            files: Sequence[Path] = source.files
            key.update(repr((source.image_column, source.starts)).encode() + indices.astype("<i8").tobytes())
        else:
            files = [source.files[i] for i in indices]
        here = os.getcwd()
        key.update("\0".join(os.path.join(here, file) for file in files).encode("utf-8", "surrogateescape"))
        try:
            stamp = _stamp(files)
        except OSError:
            return None
        shape = (len(indices), pixel_format.channels, pixel_format.size, pixel_format.size)
        return cls(at, key.hexdigest()[:32], stamp, shape, source.where)

    @property
    def facts_file(self) -> Path:
        """The file that makes the entry: it names the data file."""
        return self.folder / f"{self.key}.json"

    def is_current(self) -> bool:
        """Return whether the entry is there, by its stamp and size. Its checksum is left to ``read``."""
        facts = _facts(self.facts_file)
        return facts is not None and self._fault(facts) == ""

    def read(self) -> tuple[Decoded | None, str]:
        """Return (the images, ""), or (None, why an existing entry cannot be used)."""
        facts = _facts(self.facts_file)
        if facts is None:
            return None, "it was damaged" if self.facts_file.exists() else ""
        fault = self._fault(facts)
        if fault:
            return None, fault
        data = self.folder / facts["file"]
        try:
            images_NCHW = _mapped(data)
        except (OSError, ValueError):
            return None, "it was damaged"
        digest = pixel_digest(images_NCHW)
        if tuple(images_NCHW.shape) != self.shape or digest.hexdigest() != facts["sha256"]:
            return None, "it was damaged"
        with contextlib.suppress(OSError):  # the cache of another user
            os.utime(self.facts_file)
        return Decoded(images_NCHW, digest, f"decoded images of {self.where} are read from {data}"), ""

    def write(
        self,
        source: Source,
        indices: Indices,
        pixel_format: PixelFormat,
        on_decoded: Callable[[int], None],
        why: str = "",
    ) -> Decoded:
        """Decode the images to a new data file, publish the entry, and return them mapped.

        ``why``: what was wrong with the entry before. Raises StorageError if they cannot be kept; DataError as
        ``decode``.
        """
        self._make_folder()
        data, digest = self.folder / f"{self.key}-{secrets.token_hex(8)}.npy", _started(self.shape)
        header = {"descr": "|u1", "fortran_order": False, "shape": self.shape}
        with published(data) as temporary, temporary.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for chunk_NCSS in _chunks(source, indices, pixel_format):
                pixels = chunk_NCSS.numpy().data
                file.write(pixels)
                digest.update(pixels)
                on_decoded(len(chunk_NCSS))
        after = Entry.of(source, indices, pixel_format)
        if after is None or after.stamp != self.stamp:
            remove(data)
            raise StorageError(f"{self.where}: its files changed while they were decoded")
        other, _ = self.read()
        if other is not None:  # another process was faster
            remove(data)
            return other
        images_NCHW = _mapped(data)  # before others can know of the file, and replace it
        facts = {
            "format": _FORMAT,
            "file": data.name,
            "stamp": self.stamp,
            "shape": list(self.shape),
            "sha256": digest.hexdigest(),
            "where": self.where,
        }
        with published(self.facts_file) as temporary:
            temporary.write_text(json.dumps({**facts, "sum": _sum(facts)}, indent=1) + "\n", encoding="utf-8")
        _tidy(self.folder)
        again = f" again, as {why}" if why else ""
        return Decoded(images_NCHW, digest, f"images of {self.where} are decoded{again}, and kept in {data}")

    def _fault(self, facts: dict[str, Any]) -> str:
        """Return why the entry does not hold these images; empty if it does, as far as sizes tell."""
        if facts["stamp"] != self.stamp:
            return "files have changed"
        try:
            size = (self.folder / facts["file"]).stat().st_size
        except OSError:
            return "it was damaged"
        pixels = int(np.prod(self.shape))
        return "" if tuple(facts["shape"]) == self.shape and pixels < size < pixels + 4096 else "it was damaged"

    def _make_folder(self) -> None:
        needed = int(np.prod(self.shape)) + _SPARE_BYTES
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise StorageError(f"{self.folder}: {error.strerror or error}") from error
        if free < needed:
            raise StorageError(f"{self.folder}: {free / 1e9:.2f} GB are free, where {needed / 1e9:.2f} GB are needed")


@dataclass(frozen=True)
class Kept:
    """One entry as listed: the images' origin and shape, bytes on disk, Unix time of the last use."""

    where: str
    shape: tuple[int, ...]
    bytes: int
    used: float


def listed() -> list[Kept]:
    """Return all entries, last used first."""
    found = []
    for file in _facts_files():
        facts = _facts(file)
        with contextlib.suppress(OSError):  # removed meanwhile
            if facts is not None:
                size = (file.parent / facts["file"]).stat().st_size
                found.append(Kept(facts["where"], tuple(facts["shape"]), size, file.stat().st_mtime))
    return sorted(found, key=lambda kept: -kept.used)


def clear() -> int:
    """Remove all entries, and data files without one; return the bytes that were freed. Raises StorageError."""
    at, freed = folder(), 0
    if at is None or not at.is_dir():
        return 0
    for file in (*_facts_files(), *(f for f in at.iterdir() if _DATA_FILE.fullmatch(f.name))):
        try:
            freed += file.stat().st_size
            file.unlink(missing_ok=True)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise StorageError(f"{file}: cannot be removed: {error.strerror or error}") from error
    return freed


def _started(shape: tuple[int, ...]) -> hashlib._Hash:
    return hashlib.sha256(repr(tuple(shape)).encode())


def _chunks(source: Source, indices: Indices, pixel_format: PixelFormat) -> Iterator[torch.Tensor]:
    step = max(1, _CHUNK_BYTES // (pixel_format.channels * pixel_format.size**2))
    for i in range(0, len(indices), step):
        yield decode(source, indices[i : i + step], pixel_format)


def _mapped(data: Path) -> torch.Tensor:
    """Map a data file; writing to the tensor would copy the page. Raises OSError, and ValueError if it is no array."""
    array = np.load(data, mmap_mode="c", allow_pickle=False)
    if array.dtype != np.uint8 or not array.flags.c_contiguous:
        raise ValueError("it holds no bytes")
    return torch.from_numpy(array)


def _stamp(files: Sequence[Path]) -> str:
    """Return a hash of size, modification and change time of every file. Raises OSError."""

    def look(start: int) -> bytes:
        each = (os.stat(file) for file in files[start : start + _STAT_FILES])
        return np.array([(s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in each], dtype="<i8").tobytes()

    digest = hashlib.sha256()
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        for part in pool.map(look, range(0, len(files), _STAT_FILES)):
            digest.update(part)
    return digest.hexdigest()


def _facts_files() -> list[Path]:
    at = folder()
    return sorted(f for f in at.iterdir() if _FACTS_FILE.fullmatch(f.name)) if at is not None and at.is_dir() else []


def _facts(file: Path) -> dict[str, Any] | None:
    """Return an entry's facts; None if they are missing, damaged or of another version."""
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        said = facts.pop("sum")
        good = said == _sum(facts) and facts["format"] == _FORMAT and _DATA_FILE.fullmatch(facts["file"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return facts if good else None


def _sum(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _tidy(at: Path) -> None:
    """Remove entries that nobody has used for long, and old data files that no entry names."""
    with contextlib.suppress(OSError):
        now = time.time()
        for file in _facts_files():
            if now - file.stat().st_mtime > FORGOTTEN_SECONDS:
                file.unlink(missing_ok=True)
        named = {facts["file"] for file in _facts_files() if (facts := _facts(file)) is not None}
        for file in at.iterdir():
            old = _DATA_FILE.fullmatch(file.name) and file.name not in named
            if old and now - file.stat().st_mtime > REPLACED_SECONDS:
                file.unlink(missing_ok=True)
        for file in at.glob(".tmp-*"):
            if now - file.stat().st_mtime > REPLACED_SECONDS:
                remove(file)
