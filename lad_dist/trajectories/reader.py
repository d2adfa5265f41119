"""Find and read the checkpoints of a trajectory buffer."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lad_dist.errors import TrajectoryError
from lad_dist.location import shown
from lad_dist.trajectories import files, part
from lad_dist.trajectories import kept as kept_epochs
from lad_dist.trajectories.kept import Kept
from lad_dist.trajectories.schema import (
    STAGES,
    VECTOR_COLUMN,
    BufferMeta,
    Checkpoint,
    PartName,
    Stage,
    parse_part_path,
)

_Result = TypeVar("_Result")

# A footer of ten epochs takes about 80 KiB of memory and half a millisecond to read: a rank caches at most 40 MiB of
# them.
KEPT_FOOTERS = 512
ROWS_PER_FOOTER = 10  # on average; larger parts count as several
_BATCH = 256  # parts per progress report of a digest
_READ_AT_ONCE = 16  # footers read concurrently: an object store takes tens of ms per request, a local file 0.1


class Buffer:
    """The checkpoints in a folder or under a URI. ``kept``: the epochs that it keeps (``kept.py``).

    Opening lists names only; a part's footer is read on first use and cached. The index comes from the parts' names at
    the last ``refresh``; files with other names are ignored. A checkpoint in several parts is equal in all of them by
    design, and is read from the first in order. Reads hold one checkpoint in memory, not a file.

    Threads may share a buffer: every read opens its own file, footers are immutable, and ``refresh`` replaces the index
    in one assignment. A part that is replaced by an equal one during a read is read again.

    ``expected_hash``: refuse parts with another ``experts_hash``; by default the first opened part sets it.
    """

    def __init__(self, folder: Path | str, expected_hash: str | None = None) -> None:
        self.folder, self.location = shown(folder), folder
        self.expected_hash = expected_hash
        self.filesystem, self.root = files.resolve(folder)
        self.kept = kept_epochs.ALL
        self._kept_stamp: files.Stamp | None = None
        self._entries: dict[PartName, files.Stamp] = {}
        self._index: dict[tuple[Stage, int], tuple[PartName, ...]] = {}
        self._footers: dict[PartName, part.Footer] = {}
        self._footer_rows = 0
        self._footers_lock = threading.Lock()
        self._reference: tuple[str, BufferMeta] | None = None  # path and metadata of the first opened part
        self.refresh()

    def refresh(self) -> int:
        """List the folder again; return the number of new parts. Raises ``TrajectoryError`` if it cannot be listed."""
        entries: dict[PartName, files.Stamp] = {}
        kept_stamp: files.Stamp | None = None
        for entry in files.list_files(self.filesystem, self.root):
            name = parse_part_path(entry.path)
            if name is not None:
                entries[name] = entry.stamp
            elif entry.path == kept_epochs.NAME:
                kept_stamp = entry.stamp
        index: dict[tuple[Stage, int], list[PartName]] = {}
        for name in sorted(entries):
            index.setdefault((name.stage, name.expert), []).append(name)
        new = len(entries.keys() - self._entries.keys())
        if kept_stamp != self._kept_stamp:
            self.kept = kept_epochs.read(self.filesystem, self.root)
            self._kept_stamp = kept_stamp
        self._entries, self._index = entries, {key: tuple(names) for key, names in index.items()}
        return new

    @property
    def parts(self) -> tuple[PartName, ...]:
        """The parts at the last ``refresh``, in order of preference."""
        return tuple(sorted(self._entries))

    @property
    def keys(self) -> tuple[tuple[Stage, int], ...]:
        """(stage, expert) of all experts with at least one checkpoint, in order."""
        return tuple((stage, expert) for stage in STAGES for expert in self.experts(stage))

    def parts_of(self, stage: Stage, expert: int) -> tuple[PartName, ...]:
        """Return the parts of one expert and stage."""
        return self._index.get((stage, expert), ())

    def size_of(self, name: PartName) -> int:
        """Return a part's bytes at the last ``refresh``."""
        return self._entries[name].size

    @property
    def meta(self) -> BufferMeta:
        """The metadata of the first part. Raises ``TrajectoryError`` if there is none, or it cannot be used."""
        parts = self.parts
        if not parts:
            raise TrajectoryError(f"{self.folder}: holds no trajectory parts; make them with `lad-dist experts JOB`")
        return self.footer(parts[0]).meta

    def experts(self, stage: Stage) -> tuple[int, ...]:
        """Return the experts with at least one checkpoint of ``stage``, ascending."""
        return tuple(sorted(expert for each, expert in self._index if each == stage))

    def epochs(self, stage: Stage, expert: int) -> tuple[int, ...]:
        """Return the epochs present, ascending."""
        names = self._index.get((stage, expert), ())
        return tuple(sorted({epoch for name in names for epoch in range(name.first, name.last + 1)}))

    def has(self, stage: Stage, expert: int, epoch: int) -> bool:
        """Whether a part lists this checkpoint."""
        return self._find(stage, expert, epoch) is not None

    def last_contiguous_epoch(self, stage: Stage, expert: int) -> int | None:
        """Return the largest present E before which no epoch that the buffer keeps is missing; None without one.

        It is the epoch to resume from. In a buffer that keeps all epochs, 0..E are present.
        """
        last = -1
        for name in self._index.get((stage, expert), ()):
            if self.kept.any(stage, last + 1, name.first - 1):
                break
            last = max(last, name.last)
        return last if last >= 0 else None

    def complete(self, last_epochs: Mapping[Stage, int], experts: Iterable[int]) -> tuple[int, ...]:
        """Return those of ``experts`` that have all epochs of each stage, up to its last, at the last ``refresh``."""

        def whole(expert: int) -> bool:
            at = [(self.last_contiguous_epoch(stage, expert), last) for stage, last in last_epochs.items()]
            return all(done is not None and done >= last for done, last in at)

        return tuple(expert for expert in experts if whole(expert))

    def check_keeps(self, needed: Kept) -> None:
        """Raise ``TrajectoryError`` if the buffer does not keep all that ``needed`` has."""
        lacking = self.kept.lacking(needed)
        if lacking:
            spans = "; ".join(f"{stage} epochs {kept_epochs.shown(each)}" for stage, each in lacking.items())
            raise TrajectoryError(
                f"{self.folder}: keeps only {self.kept} (buffer.keep, or `lad-dist buffer prune`), and this recipe needs {spans}; "
                "valid: windows and epochs within what is kept, or experts of another buffer or run folder"
            )

    def read(self, stage: Stage, expert: int, epoch: int) -> npt.NDArray[np.float32]:
        """Read the weights of one checkpoint: a new float32 array of shape (vector_length(stage),).

        Raises ``TrajectoryError`` if the checkpoint is missing, or its part is damaged or was made by another recipe.
        """
        return self._read(
            stage, expert, epoch, lambda footer: part.vector(footer, self._row(footer, epoch, [VECTOR_COLUMN]))
        )

    def read_checkpoint(self, stage: Stage, expert: int, epoch: int) -> Checkpoint:
        """Read one checkpoint with its metrics. Raises as ``read`` does."""
        return self._read(stage, expert, epoch, lambda footer: part.checkpoint(self.filesystem, footer, epoch))

    def digest(self, report: Callable[[int], None] | None = None) -> str:
        """Compute the SHA-256 over (stage, expert, epoch, SHA-256 of little-endian float32 weights) of the checkpoints.

        Checkpoints are in key order, and those that the buffer keeps. The digest does not depend on how epochs are split
        into parts, on duplicates, or on metrics. Reads the parts' footers, which hold row checksums, and the rows of
        parts of earlier versions, which lack them. ``report`` is called with the number of parts read since its last
        call. Raises ``TrajectoryError``.
        """
        total, known = hashlib.sha256(), set[bytes]()
        shares = [share for stage in STAGES for expert in self.experts(stage) for share in self._shares(stage, expert)]
        with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
            read = map if files.is_local(self.filesystem) else pool.map  # a thread would only wait for this one
            for begin in range(0, len(shares), _BATCH):
                batch = shares[begin : begin + _BATCH]
                sums = read(self._row_sums, (name for name, _ in batch))
                for (name, epochs), found in zip(batch, sums, strict=True):
                    if found.meta not in known:
                        path = f"{self.root}/{name}"
                        self._check_origin(path, part.parsed_meta(found.meta, path))
                        known.add(found.meta)
                    for epoch in epochs if self.kept.all else (e for e in epochs if self.kept.has(name.stage, e)):
                        total.update(f"{name.stage}/{name.expert}/{epoch}\n".encode())
                        total.update(found.sums[epoch - name.first] if found.sums else self._computed_sum(name, epoch))
                if report:
                    report(len(batch))
        return total.hexdigest()

    def _shares(self, stage: Stage, expert: int) -> Iterator[tuple[PartName, range]]:
        """Yield the parts of one expert in order, each with its epochs that no earlier part holds."""
        reached = -1
        for name in self._index[stage, expert]:
            yield name, range(max(name.first, reached + 1), name.last + 1)
            reached = max(reached, name.last)

    def _row_sums(self, name: PartName) -> part.RowSums:
        return part.read_row_sums(self.filesystem, f"{self.root}/{name}", name)

    def _computed_sum(self, name: PartName, epoch: int) -> bytes:
        return part.weights_sum(self.read(name.stage, name.expert, epoch))

    def inspect(self, digest: bool = True, report: Callable[[int], None] | None = None) -> dict[str, Any]:
        """Summarize the buffer as JSON values.

        ``digest=False`` skips the digest, the only entry that opens all parts; ``report`` as for ``digest``.
        """
        stages: dict[str, dict[str, Any]] = {stage: {} for stage in STAGES}
        for (stage, expert), names in sorted(self._index.items()):
            stages[stage][str(expert)] = {
                "epochs": list(self.epochs(stage, expert)),
                "parts": [str(name) for name in names],
                "bytes": sum(self._entries[name].size for name in names),
            }
        meta = asdict(self.meta)
        meta["parameters"] = [[name, list(shape)] for name, shape in self.meta.parameters]
        meta["class_counts"] = list(self.meta.class_counts)
        meta["classifier_parameters"] = list(self.meta.classifier_parameters)
        meta["vector_lengths"] = {stage: self.meta.vector_length(stage) for stage in STAGES}
        found = {
            "folder": self.folder,
            "parts": len(self._entries),
            "bytes": sum(stamp.size for stamp in self._entries.values()),
            "rows": sum(name.last - name.first + 1 for name in self._entries),
            "checkpoints": sum(len(self.epochs(*key)) for key in self._index),
            "kept": {stage: [list(span) for span in spans] for stage, spans in self.kept.spans.items()} or "all",
            "stages": stages,
            "meta": meta,
        }
        return found | {"digest": self.digest(report)} if digest else found

    def verify(self, report: Callable[[str], None] | None = None) -> list[str]:
        """Read everything and return the problems found; see ``lad_dist.trajectories.verify``."""
        from lad_dist.trajectories.verify import verify  # verify needs Buffer

        return verify(self, report)

    def footer(self, name: PartName, fresh: bool = False) -> part.Footer:
        """Return a part's checked footer, cached unless ``fresh`` or the file changed. Raises ``TrajectoryError``."""
        path = f"{self.root}/{name}"
        known = self._footers.get(name)
        with part.damage_named(path):
            if known is not None and not fresh and known.stamp == files.stamp(self.filesystem, path):
                return known
        loaded = part.load_footer(self.filesystem, path, name)
        self._check_origin(loaded.path, loaded.meta)
        with self._footers_lock:
            self._drop_footer(name)
            self._footers[name] = loaded
            self._footer_rows += name.last - name.first + 1
            while len(self._footers) > 1 and (
                len(self._footers) > KEPT_FOOTERS or self._footer_rows > ROWS_PER_FOOTER * KEPT_FOOTERS
            ):
                self._drop_footer(next(iter(self._footers)))  # the oldest
        return loaded

    def _drop_footer(self, name: PartName) -> None:
        if self._footers.pop(name, None) is not None:
            self._footer_rows -= name.last - name.first + 1

    def meta_of(self, stage: Stage, expert: int, epoch: int) -> BufferMeta:
        """Return the metadata of the part that holds a checkpoint. Raises as ``read``."""
        return self.footer(self._require(stage, expert, epoch)).meta

    def _check_origin(self, path: str, meta: BufferMeta) -> None:
        """Raise ``TrajectoryError`` for a part of another recipe than the expected one or the first opened part's."""
        if self._reference is None:
            first, reference = path, meta
        else:
            first, reference = self._reference
        expected = self.expected_hash or reference.experts_hash
        if meta.experts_hash != expected:
            source = "is expected here" if self.expected_hash or first == path else f"is in {first}"
            raise TrajectoryError(
                f"{path}: made by another recipe: its experts_hash is {meta.experts_hash}, "
                f"and {expected} {source}; move it to a separate folder, or use another buffer folder"
            )
        different = reference.differences(meta)
        if different:
            raise TrajectoryError(
                f"{path}: has the same experts_hash as {first} but another {', '.join(different)}; "
                "delete the wrong one and run `lad-dist experts` again"
            )
        self._reference = first, reference

    def _find(self, stage: Stage, expert: int, epoch: int) -> PartName | None:
        return next((n for n in self._index.get((stage, expert), ()) if n.first <= epoch <= n.last), None)

    def _require(self, stage: Stage, expert: int, epoch: int) -> PartName:
        name = self._find(stage, expert, epoch)
        if name is None:
            if not self.kept.has(stage, epoch) and self.parts:
                raise TrajectoryError(
                    f"{self.folder}: {stage} expert {expert} epoch {epoch} is not kept: this buffer keeps only {self.kept}; "
                    "valid: windows and epochs within these, or experts of another buffer or run folder"
                )
            present = self.epochs(stage, expert)
            have = f"epochs {present[0]} to {present[-1]} of it" if present else f"experts {self._known(stage)}"
            raise TrajectoryError(
                f"{self.folder}: {stage} expert {expert} epoch {epoch} is missing; the buffer holds {have} of that stage; "
                "make the rest with `lad-dist experts JOB`"
            )
        return name

    def _known(self, stage: Stage) -> str:
        experts = self.experts(stage)
        return f"{experts[0]} to {experts[-1]} ({len(experts)} of them)" if experts else "none"

    def _row(self, footer: part.Footer, epoch: int, columns: Sequence[str]) -> pa.Table:
        return part.read_row(self.filesystem, footer, epoch, columns)

    def _read(self, stage: Stage, expert: int, epoch: int, read: Callable[[part.Footer], _Result]) -> _Result:
        """Read a checkpoint; where its part is gone, list again once: another part may hold it now (``upkeep``)."""
        name = self._require(stage, expert, epoch)
        try:
            return self._retried(name, read)
        except TrajectoryError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            self.refresh()
            other = self._find(stage, expert, epoch)
            if other is None or other == name:
                raise
        return self._retried(other, read)

    def _retried(self, name: PartName, read: Callable[[part.Footer], _Result]) -> _Result:
        """Read with the part's footer; retry once with a fresh one if the part was replaced meanwhile."""
        footer = self.footer(name)
        try:
            return read(footer)
        except TrajectoryError:
            fresh = self.footer(name, fresh=True)
            if fresh.stamp == footer.stamp:
                raise
            return read(fresh)
