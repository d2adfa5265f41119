"""Push, pull and load a shared set, whatever its address."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from lad_dist.distilled import DistilledSet
from lad_dist.errors import DistilledError, SharingError, StorageError
from lad_dist.exchange.publishing import published_folder
from lad_dist.sharing import contents, hub, web
from lad_dist.sharing.address import FORMS, HUB_FORM, FolderAddress, HubAddress, WebAddress, parse
from lad_dist.sharing.contents import CARD, NAMES, SUMS

_SHOWN = 5  # files named in a message


@dataclass(frozen=True)
class Transferred:
    """What a push or a pull has moved. ``place``: an address with its revision, or a folder; ``size`` in bytes."""

    distilled: DistilledSet
    place: str
    files: int
    size: int
    was_there: bool = False


def push(
    run: Path, address: str, license_name: str = "unknown", private: bool = False, force: bool = False
) -> Transferred:
    """Write the distilled set of ``run`` as a shared set to the hub or a folder; see ``contents.py`` for its files.

    ``license_name``: an identifier of the hub. ``private``: of a new repository of the hub. ``force`` replaces another
    shared set, and nothing else.

    Raises:
        SharingError: the address is wrong, cannot be reached or refuses; it holds something else.
        DistilledError: ``run`` has no whole distilled set.
        StorageError: a folder cannot be written.
    """
    to = parse(address)
    if isinstance(to, WebAddress):
        raise SharingError(f"{to}: files cannot be pushed to a web server; valid: {HUB_FORM}, or a folder")
    if isinstance(to, HubAddress):
        return _push_to_hub(run, to, license_name, private, force)
    if private:
        raise SharingError(f"{to}: --private is for the hub; valid: {HUB_FORM}, or no --private")
    refuse = partial(_refuse, str(to), force)
    _refuse_foreign(to)
    with published_folder(to.path) as temporary:
        made = contents.write(run, temporary, to.name, license_name)
        refuse(_names(to.path), (temporary / SUMS).read_text(), _text(to.path / SUMS))
        files, size = _measured(temporary)
    return Transferred(made, str(to), files, size)


def _push_to_hub(run: Path, to: HubAddress, license_name: str, private: bool, force: bool) -> Transferred:
    if to.revision is not None:
        raise SharingError(f"{to}: a push goes to the main branch; valid: {HUB_FORM}, without @{to.revision}")
    with TemporaryDirectory(prefix="lad-dist-") as name:
        folder = Path(name)
        made = contents.write(run, folder, str(to), license_name)
        ours = (folder / SUMS).read_text()

        def refuse(names: Collection[str], there: str | None) -> None:
            _refuse(str(to), force, names, ours, there)

        revision = hub.upload(to, folder, NAMES, SUMS, CARD, private, refuse)
        files, size = _measured(folder)
    return Transferred(made, f"{to}@{revision}", files, size)


def _refuse(where: str, force: bool, names: Collection[str], ours: str, there: str | None) -> None:
    """Raise SharingError unless nothing is there, the same set, or another one and ``force`` is given."""
    if names and there is None:
        raise SharingError(
            f"{where}: already holds other files ({_few(names)}), so nothing is pushed; valid: a new or empty place, or one with "
            "a shared set"
        )
    if there not in (None, ours) and not force:
        raise SharingError(f"{where}: already holds another set; --force replaces it, or choose another address")


def _refuse_foreign(to: FolderAddress) -> None:
    """Raise SharingError where a folder to be replaced holds what no shared set has."""
    if to.path.exists() and not to.path.is_dir():
        raise SharingError(f"{to}: is a file; valid: {FORMS}")
    _refuse(str(to), True, [name for name in _names(to.path) if name not in NAMES], "", None)


def pull(address: str, folder: Path | None = None) -> Transferred:
    """Copy a shared set into ``folder``, which appears whole or not at all; default: named after the address.

    Every checksum is verified. A folder that holds the same set already is left as it is.

    Raises:
        SharingError: the address is wrong or cannot be reached, a file is damaged, or the folder holds something else.
        DistilledError: the files are not of a whole distilled set.
        StorageError: the folder cannot be written.
    """
    out = folder if folder is not None else Path(parse(address).name)
    with _fetched(address) as source:
        made = _loaded(source, address)
        present = [name for name in NAMES if (source / name).is_file()]
        size = sum((source / name).stat().st_size for name in present)
        if _names(out) or out.is_file():
            _refuse_other(out, source, address)
            return Transferred(made, str(out), len(present), size, was_there=True)
        with published_folder(out) as temporary:
            for name in present:
                shutil.copyfile(source / name, temporary / name)
    return Transferred(made, str(out), len(present), size)


def _refuse_other(out: Path, source: Path, address: str) -> None:
    """Raise SharingError unless ``out`` holds the files of ``source``; the card may differ."""
    if not out.is_dir():
        raise SharingError(f"{out}: is a file; valid: a new folder, as in `lad-dist pull {address} FOLDER`")
    names = {name for name in NAMES if (source / name).is_file()} - {CARD}
    other = sorted(names.symmetric_difference(set(_names(out)) - {CARD}))
    other += [n for n in sorted(names) if n not in other and (out / n).read_bytes() != (source / n).read_bytes()]
    if other:
        raise SharingError(
            f"{out}: already holds other content than {address} ({_few(other)}); valid: a new folder, as in "
            f"`lad-dist pull {address} FOLDER`"
        )


def load(address: str) -> DistilledSet:
    """Return the distilled set at an address, verified. Raises SharingError, and DistilledError where it is not whole."""
    where = parse(address)
    if isinstance(where, FolderAddress):
        return DistilledSet.load(where.path)
    with _fetched(address) as folder:
        return _loaded(folder, address)


def _loaded(folder: Path, address: str) -> DistilledSet:
    try:
        return DistilledSet.load(folder)
    except DistilledError as error:
        raise DistilledError(f"{address}: is not a whole distilled set: {error}") from error


@contextmanager
def _fetched(address: str) -> Iterator[Path]:
    """Yield a local folder with the files of a shared set, their checksums verified. Raises SharingError."""
    where = parse(address)
    if isinstance(where, HubAddress):
        folder = hub.download(where, NAMES)
        try:
            contents.check(folder, address)
        except SharingError:  # perhaps damaged in the cache alone
            folder = hub.download(where, NAMES, again=True)
            contents.check(folder, address)
        yield folder
    elif isinstance(where, WebAddress):
        with TemporaryDirectory(prefix="lad-dist-") as name:
            web.download(where, Path(name))
            contents.check(Path(name), address)
            yield Path(name)
    else:
        if not where.path.is_dir():
            raise SharingError(f"{address}: is not a folder; valid: {FORMS}")
        contents.check(where.path, address)
        yield where.path


def _names(folder: Path) -> list[str]:
    """Return the names in a folder, sorted; empty where there is none. Raises StorageError where it cannot be read."""
    try:
        return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise StorageError(f"{folder}: cannot be read: {error.strerror or error}; choose another folder") from error


def _text(file: Path) -> str | None:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None


def _measured(folder: Path) -> tuple[int, int]:
    """Return the number of files in a folder, and their size in bytes."""
    sizes = [file.stat().st_size for file in folder.iterdir()]
    return len(sizes), sum(sizes)


def _few(names: Collection[str]) -> str:
    chosen = sorted(names)
    return ", ".join(chosen[:_SHOWN]) + (", ..." if len(chosen) > _SHOWN else "")
