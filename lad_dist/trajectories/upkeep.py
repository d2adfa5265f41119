"""Rewriting a buffer: fewer, larger parts (``compact``), and only the epochs that recipes reach (``prune``).

Both publish the new parts first and remove the old ones afterwards, one expert at a time, so a reader finds every
checkpoint at any moment (it lists again where a part is gone), and a killed call goes on where it was. Weights and
metrics are copied bit by bit; the new parts' checksums are compared with the old ones' before anything is removed.
Both refuse while a process trains or imports experts here, and each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from lad_dist.errors import TrajectoryError
from lad_dist.trajectories import claims, files, part
from lad_dist.trajectories import kept as kept_epochs
from lad_dist.trajectories.kept import Kept
from lad_dist.trajectories.reader import Buffer
from lad_dist.trajectories.schema import PartName, Stage

EPOCHS_PER_PART = 25  # a footer of so many rows is still read at once
_CLAIM = "upkeep"

Report = Callable[[int], None]


@dataclass(frozen=True)
class Pruning:
    """What ``prune`` would do: parts to remove, parts of which some rows stay, and the bytes that become free."""

    removed: tuple[PartName, ...]
    rewritten: tuple[PartName, ...]
    bytes: int


def compact(buffer: Buffer, epochs_per_part: int = EPOCHS_PER_PART, report: Report | None = None) -> tuple[int, int]:
    """Rewrite complete experts' parts as parts of ``epochs_per_part``; return the number of parts before and after.

    ``report`` is called with 1 after each expert and stage. Raises
    ``TrajectoryError`` if the buffer is in use or damaged, ``StorageError`` if it cannot be written.
    """
    if epochs_per_part < 1:
        raise TrajectoryError(f"epochs per part: {epochs_per_part}; valid: 1 or more")
    with _alone(buffer):
        buffer.refresh()
        before, lasts = len(buffer.parts), _last_epochs(buffer)
        for stage, expert in buffer.keys:
            if (buffer.last_contiguous_epoch(stage, expert) or 0) >= lasts[stage]:
                epochs = [e for e in buffer.epochs(stage, expert) if buffer.kept.has(stage, e)]
                wanted = tuple(_names(stage, expert, epochs, epochs_per_part))
                _replace(buffer, buffer.parts_of(stage, expert), wanted)
            if report:
                report(1)
        buffer.refresh()
        return before, len(buffer.parts)


def plan_prune(buffer: Buffer, needed: Kept) -> Pruning:
    """Return what ``prune`` would do. Raises ``TrajectoryError`` if ``needed`` was pruned before."""
    buffer.check_keeps(needed)
    removed: list[PartName] = []
    rewritten: list[PartName] = []
    freed = 0
    for name in buffer.parts:
        stays = sum(needed.has(name.stage, epoch) for epoch in range(name.first, name.last + 1))
        rows, size = name.last - name.first + 1, buffer.size_of(name)
        if stays == rows or _resumes(buffer, name, needed):
            continue
        (rewritten if stays else removed).append(name)
        freed += size * (rows - stays) // rows
    return Pruning(tuple(removed), tuple(rewritten), freed)


def prune(buffer: Buffer, needed: Kept, report: Report | None = None) -> Pruning:
    """Keep only the epochs ``needed`` from now on; return what was done. ``report`` gets 1 for each part.

    The part that an unfinished expert resumes from stays. Raises as ``compact``.
    """
    with _alone(buffer):
        buffer.refresh()
        plan = plan_prune(buffer, needed)
        kept_epochs.write(buffer.filesystem, buffer.root, needed)  # from here on, gaps are on purpose
        for name in (*plan.removed, *plan.rewritten):
            epochs = [e for e in range(name.first, name.last + 1) if needed.has(name.stage, e)]
            _replace(buffer, (name,), tuple(_names(name.stage, name.expert, epochs, len(epochs) or 1)))
            if report:
                report(1)
        buffer.refresh()
        return plan


def _resumes(buffer: Buffer, name: PartName, needed: Kept) -> bool:
    """Whether an unfinished expert goes on from this part."""
    at, last = buffer.last_contiguous_epoch(name.stage, name.expert), needed.last(name.stage)
    return at is not None and last is not None and at < last and name.first <= at <= name.last


def _last_epochs(buffer: Buffer) -> dict[Stage, int]:
    """Return the experts' last epoch by stage, from the metadata. Raises ``TrajectoryError``."""
    try:
        experts = buffer.meta.recipe["experts"]
        return {"representation": int(experts["epochs"]), "classifier": int(experts["classifier_epochs"])}
    except (KeyError, TypeError, ValueError) as cause:
        raise TrajectoryError(
            f"{buffer.folder}: its metadata lack the experts' numbers of epochs, so complete experts are not known"
        ) from cause


def _names(stage: Stage, expert: int, epochs: Sequence[int], most: int) -> Iterator[PartName]:
    """Yield the parts of at most ``most`` consecutive epochs that hold ``epochs``, ascending."""
    first = 0
    for i in range(1, len(epochs) + 1):
        if i == len(epochs) or epochs[i] != epochs[i - 1] + 1 or i - first == most:
            yield PartName(stage, expert, epochs[first], epochs[i - 1])
            first = i


def _replace(buffer: Buffer, old: Iterable[PartName], new: tuple[PartName, ...]) -> None:
    """Publish the parts ``new`` from the rows of ``old``, check them, then remove those of ``old`` not in ``new``."""
    gone = [name for name in old if name not in new]
    for name in new:
        if name in buffer.parts_of(name.stage, name.expert):
            continue
        rows = [buffer.read_checkpoint(name.stage, name.expert, e) for e in range(name.first, name.last + 1)]
        meta = buffer.meta_of(name.stage, name.expert, name.first)
        path = f"{buffer.root}/{name}"
        files.publish(buffer.filesystem, path, partial(part.write_part, meta=meta, rows=rows))
        written = part.read_row_sums(buffer.filesystem, path, name).sums
        if written != tuple(part.weights_sum(row.weights) for row in rows):
            raise part.damaged(path, "its weights are not those that were just written")
    if gone:
        files.remove(buffer.filesystem, [f"{buffer.root}/{name}" for name in gone])


@contextmanager
def _alone(buffer: Buffer) -> Iterator[None]:
    """Hold the claim of upkeep. Raises ``TrajectoryError`` while another process works on the buffer's experts."""
    owner, location = claims.owner_id(), buffer.location
    with claims.hold(location, _CLAIM, owner) as held:
        others = {_CLAIM: claims.foreign(location, _CLAIM, owner)} if not held else claims.others(location, owner)
        for name, claim in others.items():
            what = "another compact or prune works here" if name == _CLAIM else f"{name} is being trained or imported"
            raise TrajectoryError(
                f"{buffer.folder}: {what} ({claim}); wait until it has ended, and run the same command again"
            )
        yield
