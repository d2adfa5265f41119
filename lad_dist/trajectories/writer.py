"""Write the trajectory of one expert in one stage, part by part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from lad_dist.errors import NumericalError, StorageError, TrajectoryError
from lad_dist.trajectories import files, kept
from lad_dist.trajectories.part import write_part
from lad_dist.trajectories.schema import (
    STAGES,
    BufferMeta,
    Checkpoint,
    Stage,
    expert_folder,
    parse_part_path,
    part_path,
)


class PartWriter:
    """Writer that collects the checkpoints of one expert in one stage and publishes parts of ``epochs_per_part`` rows.

    Any number of writers in any number of processes may write the same expert: each part appears whole under its final
    name, and work units are deterministic, so parts with the same checkpoints are equal. Use a writer in one thread
    only.

    As a context manager it publishes pending rows however the block ends: each is a whole checkpoint, checked when it
    was appended, so a resumed expert need not recompute it. The exception is a ``StorageError`` from the block: the
    same write would fail again.

    In a buffer that does not keep all epochs (``kept.py``), only rows that it keeps are published, and the last of each
    part to resume from, which is removed when a later part is there.

    ``folder``: a local folder or a URI (``files.resolve``).
    Raises ``TrajectoryError`` if an argument is out of bounds, or the location cannot be used.
    """

    def __init__(
        self, folder: Path | str, meta: BufferMeta, stage: Stage, expert: int, epochs_per_part: int = 10
    ) -> None:
        if stage not in STAGES:
            raise TrajectoryError(f"trajectory stage {stage!r} is unknown; valid: {', '.join(STAGES)}")
        if not 0 <= expert < 10**9:
            raise TrajectoryError(f"trajectory expert {expert} is out of bounds; valid: 0 to 999,999,999")
        if epochs_per_part < 1:
            raise TrajectoryError(f"epochs_per_part is {epochs_per_part}; valid: 1 or more")
        self.meta = meta
        self.stage = stage
        self.expert = expert
        self.epochs_per_part = epochs_per_part
        self._filesystem, self._root = files.resolve(folder)
        self._length = meta.vector_length(stage)
        meta.to_metadata()  # raises now rather than after the first epochs
        self._pending: list[Checkpoint] = []
        self._next_epoch: int | None = None
        files.clean_temporary_files(self._filesystem, f"{self._root}/{expert_folder(stage, expert)}")
        self._kept = kept.read(self._filesystem, self._root)

    def append(
        self,
        epoch: int,
        weights: npt.NDArray[np.float32],
        loss: float | None = None,
        accuracy: float | None = None,
        seconds: float | None = None,
    ) -> bool:
        """Add the checkpoint after ``epoch`` epochs (0: initialisation); return True if this published a part.

        ``weights``: float32, shape (vector_length(stage),); copied. ``loss``: mean over the epoch; ``accuracy``:
        fraction; ``seconds``: duration; each None if not available, as at epoch 0. Raises ``TrajectoryError`` for an
        epoch out of order or a vector of wrong type or shape, ``NumericalError`` for NaN or infinity, ``StorageError``
        if a part could not be published (its rows stay pending; ``flush`` can be retried).
        """
        row = Checkpoint(self.stage, self.expert, int(epoch), np.array(weights, copy=True), loss, accuracy, seconds)
        self._check(row)
        self._pending.append(row)
        self._next_epoch = row.epoch + 1
        return len(self._pending) >= self.epochs_per_part and self.flush()

    def flush(self) -> bool:
        """Publish the pending rows as a part; return False if there are none. Raises ``StorageError``."""
        if not self._pending:
            return False
        for rows in self._published_rows():
            name = part_path(self.stage, self.expert, rows[0].epoch, rows[-1].epoch)
            files.publish(self._filesystem, f"{self._root}/{name}", partial(write_part, meta=self.meta, rows=rows))
        if not self._kept.all:
            self._remove_before(self._pending[-1].epoch)
        self._pending.clear()
        return True

    def _published_rows(self) -> list[list[Checkpoint]]:
        """Split the pending rows into parts: kept epochs, and the last one, to resume from."""
        parts: list[list[Checkpoint]] = []
        for row in self._pending:
            keep = self._kept.has(self.stage, row.epoch)
            if keep and parts and parts[-1][-1].epoch == row.epoch - 1:
                parts[-1].append(row)
            elif keep or row is self._pending[-1]:
                parts.append([row])
        return parts

    def _remove_before(self, epoch: int) -> None:
        """Remove this expert's parts before ``epoch`` without an epoch that the buffer keeps."""
        folder = expert_folder(self.stage, self.expert)
        found = (f"{folder}/{e.path}" for e in files.list_files(self._filesystem, f"{self._root}/{folder}"))
        names = [name for name in map(parse_part_path, found) if name is not None]
        passed = [n for n in names if n.last < epoch and not self._kept.any(self.stage, n.first, n.last)]
        files.remove(self._filesystem, [f"{self._root}/{name}" for name in passed])

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, StorageError):
            return
        try:
            self.flush()
        except StorageError as refused:
            if error is None:
                raise
            error.add_note(str(refused))  # report the first error, which explains the second

    def _check(self, row: Checkpoint) -> None:
        where = f"{row.stage} expert {row.expert} epoch {row.epoch}"
        if row.epoch < 0 or row.epoch >= 10**9 or (self._next_epoch is not None and row.epoch != self._next_epoch):
            valid = "0 or more" if self._next_epoch is None else f"{self._next_epoch}, as epochs are appended in order"
            raise TrajectoryError(f"{where}: the epoch is out of order; valid: {valid}")
        if row.weights.dtype != np.float32 or row.weights.shape != (self._length,):
            raise TrajectoryError(
                f"{where}: the weights are {row.weights.dtype} of shape {row.weights.shape}; "
                f"valid: float32 of shape ({self._length},)"
            )
        finite = np.isfinite(row.weights)
        if not finite.all():
            name = self.meta.parameter_at(row.stage, int(np.argmin(finite)))
            raise NumericalError(
                f"{where}: {int((~finite).sum())} of {self._length} weights are NaN or infinite, first in {name}; "
                "try a smaller learning rate"
            )
        metrics: Mapping[str, float | None] = {"loss": row.loss, "accuracy": row.accuracy, "seconds": row.seconds}
        for metric, value in metrics.items():
            if value is not None and not math.isfinite(value):
                raise NumericalError(f"{where}: {metric} is {value}; valid: a finite number, or None")
