"""The run folder: composes all paths inside a run and publishes files by rename.

recipe.yaml                the resolved recipe
events.jsonl               event log, one JSON object per line
trajectories/              the trajectory buffer (a link when several runs share one), and the experts' whitening
trajectories.uri           instead: the buffer's URI in an object store; whitening.safetensors is then beside this file
candidates/                candidate sets, where distill.select is not last
checkpoints/distill/iteration-N/   one shard per rank, to resume from
distilled/                 the distilled set (see distilled.py)
evaluation/rows/           one file per (source, architecture, seed); see results.py
evaluation/results.json    the table merged from them
evaluation/tuning/         the candidates of evaluate.tune_lr and tune_epochs, also as rows and a table
evaluation/chosen/         the real images selected by baselines
report/                    index.html, synthetic.png, initial.png
tensorboard/               what `lad-dist tensorboard` wrote
threads.json               number of CPU threads, and the timings that decided it
claims/                    processes running or distilling here now (trajectories/claims.py)
slurm/jobs.json            jobs submitted to SLURM; logs/SUBMISSION/ beside it
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lad_dist import location
from lad_dist.errors import LadDistError, RunDirError, StorageError
from lad_dist.recipe import Recipe, affects, differences

STAGES = ("experts", "distill", "evaluate", "report")
_SUM, _NO_SUM = "sha256", "0" * 64  # a file's checksum is computed with zeros in its place
ABANDONED_AFTER = 6 * 3600.0  # age in seconds after which another host's temporary file counts as abandoned


class RunDir:
    """Folder of one run. ``open`` creates it or checks that it belongs to the same recipe."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def trajectories(self) -> Path | str:
        """Location of the trajectory buffer: a folder of the run (or a link to one), or a URI in an object store.

        Raises RunDirError where trajectories.uri is damaged.
        """
        try:
            uri = self._buffer_uri.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return self._buffer_folder
        except (OSError, UnicodeDecodeError) as error:
            raise RunDirError(f"{self._buffer_uri}: cannot be read ({error}); valid: one line with a URI") from error
        if not location.is_remote(uri) or len(uri.split()) != 1:
            raise RunDirError(
                f"{self._buffer_uri}: is damaged; valid: one line with the URI of this run's trajectory buffer"
            )
        return uri

    @property
    def _buffer_folder(self) -> Path:
        return self.root / "trajectories"

    @property
    def _buffer_uri(self) -> Path:
        return self.root / "trajectories.uri"

    @property
    def threads(self) -> Path:
        """File with the run's number of CPU threads and the reason for it."""
        return self.root / "threads.json"

    @property
    def whitening(self) -> Path:
        buffer = self.trajectories
        return (self.root if isinstance(buffer, str) else buffer) / "whitening.safetensors"

    def candidate(self, iteration: int) -> Path:
        return self.root / "candidates" / f"iteration-{iteration:06d}"

    @property
    def distill_checkpoint(self) -> Path:
        return self.root / "checkpoints" / "distill"

    @property
    def distilled(self) -> Path:
        return self.root / "distilled"

    @property
    def results(self) -> Path:
        return self.root / "evaluation" / "results.json"

    @property
    def tuning(self) -> Path:
        """Table of candidates for tuning learning rates and epochs."""
        return self.root / "evaluation" / "tuning" / "results.json"

    @property
    def report(self) -> Path:
        return self.root / "report"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def slurm_jobs(self) -> Path:
        return self.root / "slurm" / "jobs.json"

    @property
    def slurm_logs(self) -> Path:
        return self.root / "slurm" / "logs"

    @classmethod
    def open(cls, root: Path, recipe: Recipe, buffers: Path | str | None = None, keep_recipe: bool = False) -> RunDir:
        """Open the folder of ``recipe``'s run, creating it if needed.

        With ``buffers``, a store or a run folder, the run uses its buffer for this recipe's experts: ``trajectories``
        becomes a link to it, or its URI is recorded. Without, a run keeps its buffer. Changed fields that may differ
        are written into the run's recipe, unless ``keep_recipe``: evaluating a run differently does not change the run.
        Raises RunDirError where the folder cannot be written, or holds another recipe's run (naming the differing
        fields).
        """
        from lad_dist import recipe_file

        run = cls(root)
        with _storage(root, RunDirError, "choose another folder with --out"):
            root.mkdir(parents=True, exist_ok=True)
            for leftover in (*root.glob(".tmp-*"), *root.glob("[a-z]*/.tmp-*"), *root.glob("[a-z]*/[a-z]*/.tmp-*")):
                if _abandoned(leftover):
                    remove(leftover)
            # Checked before the recipe, so that files another process of this run creates meanwhile do not count as
            # foreign.
            strange = _holds_strange_files(root)
            if run.recipe.exists():
                run.check_recipe(recipe)
            elif strange:
                raise _not_a_run(root)
            text = recipe_file.dump(recipe, header="The resolved recipe of this run, every field spelled out.")
            if not run.recipe.exists() or (not keep_recipe and run.recipe.read_text(encoding="utf-8") != text):
                with published(run.recipe) as temporary:
                    temporary.write_text(text, encoding="utf-8")
            run._place_buffer(recipe, buffers)
        return run

    @classmethod
    def existing(cls, root: Path) -> RunDir:
        """Return the run folder at ``root``. Raises RunDirError where there is none."""
        if not (root / "recipe.yaml").is_file():
            raise RunDirError(
                f"{root}: is not a run folder (no recipe.yaml in it); `lad-dist run JOB --out {root}` makes one"
            )
        return cls(root)

    @classmethod
    def check_free(cls, root: Path) -> None:
        """Raise RunDirError where ``open`` would for a folder without recipe.yaml: it is unreadable or in use."""
        with _storage(root, RunDirError, "choose another folder with --out"):
            if root.exists() and _holds_strange_files(root) and not (root / "recipe.yaml").exists():
                raise _not_a_run(root)

    def check_recipe(self, recipe: Recipe) -> None:
        """Raise RunDirError where ``recipe`` contradicts this run's results, naming the fields.

        Evaluation may always change. Distillation and the number of experts may change until something is distilled or
        evaluated; after that only ``distill.iterations``, if the finished iterations do not depend on it
        (``Recipe.can_grow``).
        """
        from lad_dist import recipe_file

        saved = recipe_file.load(self.recipe)
        begun = self._has_results()
        changed = [
            d
            for d in differences(saved, recipe)
            if affects(d.field) == "experts" or (begun and affects(d.field) == "distill")
        ]
        if [d.field for d in changed] == ["distill.iterations"]:
            return self._check_iterations(saved, recipe)
        if changed:
            advice = "choose another folder with --out, or remove this one"
            if saved.experts_hash() == recipe.experts_hash():
                advice = f"choose another folder with --out, and --buffers {self.root} to use its experts there"
            raise RunDirError(
                f"{self.root}: belongs to a run of another recipe ({'; '.join(map(str, changed))}); {advice}"
            )

    def _check_iterations(self, saved: Recipe, recipe: Recipe) -> None:
        """Raise RunDirError where the finished iterations are not the first ones of ``recipe``."""
        there, here = saved.distill.iterations, recipe.distill.iterations
        if not recipe.can_grow:
            raise RunDirError(
                f"{self.root}: distill.iterations is {there} there, {here} here, and with distill.schedule "
                f"{recipe.distill.schedule} every step depends on it; choose another folder with --out, and --buffers {self.root} "
                "to use its experts there"
            )
        done = self.iterations_done()
        if here < done:
            raise RunDirError(
                f"{self.root}: distill.iterations is {here} here, and {done} are done there; valid: {done} or more, or another "
                "folder with --out"
            )

    def _has_results(self) -> bool:
        """Whether anything was distilled, imported or evaluated here."""
        folders = (self.distill_checkpoint, self.candidate(0).parent, self.results.parent)
        return self.distilled.exists() or any(f.is_dir() and next(f.iterdir(), None) is not None for f in folders)

    def iterations_done(self) -> int:
        """Return the iterations up to the newest checkpoint; 0 without one."""
        folder = self.distill_checkpoint
        found = [int(p.name[len("iteration-") :]) for p in folder.glob("iteration-*")] if folder.is_dir() else []
        return max(found, default=0)

    @classmethod
    def buffer_to_come(cls, root: Path, recipe: Recipe, buffers: Path | str | None) -> Path | str:
        """Return the future location of the trajectory buffer of a run not yet opened."""
        shared = root / "trajectories" if buffers is None else _buffer_in(buffers, recipe)
        return shared if location.is_remote(shared) else location.local_folder(shared)

    @classmethod
    def whitening_to_come(cls, root: Path, recipe: Recipe, buffers: Path | str | None) -> Path:
        """Return the future path of the whitening of a run not yet opened."""
        buffer = cls.buffer_to_come(root, recipe, buffers)
        return (root if isinstance(buffer, str) else buffer) / "whitening.safetensors"

    def _place_buffer(self, recipe: Recipe, buffers: Path | str | None) -> None:
        present = self.trajectories
        if buffers is None:
            if isinstance(present, Path):
                present.mkdir(exist_ok=True)
            return
        if location.has_credentials(buffers):
            raise RunDirError(
                f"{location.shown(buffers)}: the URI holds credentials, which a run folder must not keep; "
                "leave them out of it and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        shared = _buffer_in(buffers, recipe)
        if location.is_remote(shared):
            self._point_to(str(shared), present)
        elif location.local_folder(shared).resolve() != self._buffer_folder.resolve():
            self._link_to(location.local_folder(shared).resolve(), present)

    def _point_to(self, shared: str, present: Path | str) -> None:
        """Record the URI ``shared`` as this run's buffer."""
        if present == shared:
            return
        self._make_way(shared, present)
        with published(self._buffer_uri) as temporary:
            temporary.write_text(shared + "\n", encoding="utf-8")

    def _link_to(self, shared: Path, present: Path | str) -> None:
        """Make ``trajectories`` a link to the folder ``shared``."""
        shared.mkdir(parents=True, exist_ok=True)
        folder = self._buffer_folder
        if present == folder and folder.is_symlink() and folder.resolve() == shared:
            return
        self._make_way(shared, present)
        relative = os.path.relpath(shared, self.root.resolve())  # a folder of runs and buffers can be moved as a whole
        folder.symlink_to(relative, target_is_directory=True)

    def _make_way(self, shared: Path | str, present: Path | str) -> None:
        """Remove the run's own buffer folder if it is empty. Raises RunDirError where the run has a buffer."""
        folder = self._buffer_folder
        if isinstance(present, str) or folder.is_symlink() or (folder.exists() and any(folder.iterdir())):
            has = f"{self._buffer_uri}: names the buffer {present}"
            has = has if isinstance(present, str) else f"{folder}: already holds a buffer"
            raise RunDirError(
                f"{has}, so the run cannot use {shared}; keep the run's own buffer (no --buffers), or choose another --out"
            )
        if folder.exists():
            folder.rmdir()

    @contextmanager
    def publish_folder(self, final: Path) -> Iterator[Path]:
        """``published`` for a whole folder; replaces an older folder of that name."""
        with _storage(final, StorageError):
            temporary = _temporary_in(self.root)
            temporary.mkdir()
            try:
                yield temporary
                for file in temporary.rglob("*"):
                    if file.is_file():
                        _sync(file)
                final.parent.mkdir(parents=True, exist_ok=True)
                if final.exists():
                    aside = _temporary_in(self.root)
                    aside.mkdir()
                    os.rename(final, aside / "old")
                    try:
                        os.rename(temporary, final)
                    except OSError:
                        os.rename(aside / "old", final)
                        raise
                    finally:
                        remove(aside)
                else:
                    os.rename(temporary, final)
                _sync(self.root)
            finally:
                remove(temporary)


@contextmanager
def published(final: Path) -> Iterator[Path]:
    """Publish a file: ``with published(path) as temporary``; on success it is synced and renamed to ``path``.

    Nothing appears under the final name unless the block ends normally. Raises StorageError where the file system
    refuses (disk full, no permission), and removes the temporary file.
    """
    with _storage(final, StorageError):
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary_in(final.parent, final.suffix)
        temporary.touch(exist_ok=False)
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, final)
            _sync(final.parent)
        finally:
            remove(temporary)


def publish_shared_folder(
    final: Path,
    write: Callable[[Path], Sequence[Path]],
    rank: int,
    share: Callable[[Any], Any],
    gather: Callable[[Any], list[Any]],
) -> None:
    """Publish a folder that several ranks write into.

    Rank 0 creates and renames it; ``write(temporary)`` adds a rank's files and returns them. ``share`` broadcasts rank
    0's value, ``gather`` collects every rank's (``ranks.Ranks``). Nothing appears under the final name unless every
    rank has written and synced its files. Raises StorageError on every rank if one of them failed.
    """
    temporary: Path | None = None

    def attempt(step: Callable[[], None]) -> str | None:
        try:
            with _storage(final, StorageError):
                step()
        except StorageError as error:
            return str(error)
        return None

    def begin() -> None:
        nonlocal temporary
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary_in(final.parent)
        temporary.mkdir()

    def add(folder: Path) -> None:
        for file in write(folder):
            _sync(file)

    def finish() -> None:
        assert temporary is not None
        os.rename(temporary, final)
        _sync(final.parent)

    try:
        fault = attempt(begin) if rank == 0 else None
        fault, folder = share((fault, temporary))
        faults = gather(fault or attempt(lambda: add(folder)))
        if not any(faults) and rank == 0:
            faults = [attempt(finish)]
        faults = share(faults)
    finally:
        if temporary is not None:
            remove(temporary)
    first = next((f for f in faults if f is not None), None)
    if first is not None:
        raise StorageError(first)


def save_tensors(tensors: dict[str, Any], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with deterministic bytes; ``metadata``, if given, gets the file's own checksum.

    safetensors itself writes metadata in random order, and holds copies of all tensors; here one is held at a time.
    Failures are OSErrors, so that a full disk is reported as one.
    """
    from safetensors.torch import save

    names, header, end = _safetensors_order(tensors, save), {}, 0
    for name, kind in names.items():
        begin, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": kind, "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    if metadata is not None:
        header = {"__metadata__": dict(sorted({**metadata, _SUM: _NO_SUM}.items())), **header}
    text = json.dumps(header, separators=(",", ":")).encode()
    head = (len(text) + -len(text) % 8).to_bytes(8, "little") + text + b" " * (-len(text) % 8)
    if metadata is not None:
        digest = hashlib.sha256(head)
        for name in names:
            digest.update(_raw(tensors[name]))
        head = head.replace(_NO_SUM.encode(), digest.hexdigest().encode(), 1)
    with path.open("wb") as file:
        file.write(head)
        for name in names:
            file.write(_raw(tensors[name]))


def _safetensors_order(tensors: dict[str, Any], save: Callable[[dict[str, Any]], bytes]) -> dict[str, str]:
    """Return the type of each tensor by name, in the order of a safetensors file: those of ``save`` for empty tensors."""
    raw = save({name: tensor.new_empty(0, device="cpu") for name, tensor in tensors.items()})
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return {name: entry["dtype"] for name, entry in header.items()}


def _raw(tensor: Any) -> memoryview:
    """Return a tensor's bytes; without a copy if it is contiguous and on the CPU."""
    import torch

    flat = tensor.detach().cpu().contiguous().flatten()
    return memoryview(flat.view(torch.uint8).numpy())


def load_tensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Load (tensors, metadata) of a safetensors file; ``sha256`` in the metadata, if present, was verified.

    Each tensor is read into memory of its own, and nothing else is held. Raises OSError, and ValueError where the file
    is damaged.
    """
    import torch

    with path.open("rb") as file, _checked(path) as checked:
        metadata: dict[str, str] = checked.metadata() or {}
        size = file.read(8)
        head = size + file.read(int.from_bytes(size, "little"))
        digest = hashlib.sha256(head.replace(metadata.get(_SUM, _NO_SUM).encode(), _NO_SUM.encode(), 1))
        header = json.loads(head[8:])
        tensors: dict[str, Any] = {}
        for name in sorted(checked.keys(), key=lambda name: header[name]["data_offsets"]):
            tensors[name] = torch.empty_like(checked.get_tensor(name))
            into = _raw(tensors[name])
            if file.readinto(into) != len(into):
                raise ValueError("it is not a whole safetensors file (it became shorter while it was read)")
            digest.update(into)
    if metadata.get(_SUM, digest.hexdigest()) != digest.hexdigest():
        raise ValueError("it does not match its own checksum")
    return tensors, metadata


def rows_of(path: Path, name: str) -> int:
    """Return the length of a tensor in a safetensors file without reading it. Raises as ``load_tensors``."""
    with _checked(path) as checked:
        shape = checked.get_slice(name).get_shape()
    if not shape:
        raise ValueError(f"its {name} are a single number")
    return int(shape[0])


@contextmanager
def _checked(path: Path) -> Iterator[Any]:
    """Open a safetensors file whose header fits its size. Raises ValueError where it, or what the block reads, does not."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as opened:
            yield opened
    except (SafetensorError, KeyError, TypeError, AttributeError) as error:  # KeyError: a type unknown to torch
        raise ValueError(f"it is not a whole safetensors file ({error})") from error


@contextmanager
def _storage(
    where: Path,
    kind: type[LadDistError],
    advice: str = "free some space or choose another folder; finished work is kept, and the same command continues",
) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some space; finished work is kept, and the same command continues" if full else advice
        raise kind(f"{error.filename or where}: cannot be written: {reason}; {advice}") from error


def host_name() -> str:
    """Return this host's name in characters allowed in file names."""
    return re.sub(r"[^A-Za-z0-9_]", "_", socket.gethostname()) or "unknown"


def process_lives(pid: int) -> bool:
    """Whether a process with this PID exists on this host."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it exists and belongs to another user
        return True
    return True


def _temporary_in(folder: Path, suffix: str = "") -> Path:
    """Return a new name in ``folder``. Files created there by ordinary calls follow the umask, unlike tempfile's."""
    return folder / f".tmp-{host_name()}-{os.getpid()}-{secrets.token_hex(4)}{suffix}"


def _holds_strange_files(root: Path) -> bool:
    return any(p.name != "events.jsonl" and not p.name.startswith(".tmp-") for p in root.iterdir())


def _buffer_in(buffers: Path | str, recipe: Recipe) -> Path | str:
    """Return the buffer for ``recipe``'s experts in a store or run folder. Raises RunDirError if the run has others."""
    from lad_dist import recipe_file

    if not location.is_remote(buffers) and (location.local_folder(buffers) / "recipe.yaml").is_file():
        run = RunDir(location.local_folder(buffers))
        other = recipe_file.load(run.recipe)
        if other.experts_hash() != recipe.experts_hash():
            changed = [str(d) for d in differences(other, recipe) if affects(d.field) == "experts"]
            raise RunDirError(
                f"{run.root}: its experts are of another recipe ({'; '.join(changed)}), so this run cannot use them; "
                "leave --buffers out to train some"
            )
        return run.trajectories
    return location.joined(buffers, recipe.experts_hash()[:16])


def _not_a_run(root: Path) -> RunDirError:
    return RunDirError(f"{root}: is not empty and not a run folder (no recipe.yaml); choose another with --out")


def _abandoned(temporary: Path) -> bool:
    """Whether a temporary file's writer is gone: its process on this host has ended, or the file is hours old."""
    match = re.match(r"\.tmp-(\w+)-(\d+)-", temporary.name)
    if match and match[1] == host_name():
        return not process_lives(int(match[2]))
    try:
        return time.time() - temporary.lstat().st_mtime > ABANDONED_AFTER
    except FileNotFoundError:
        return False


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file, link or folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
