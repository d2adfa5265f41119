"""Which epochs a buffer keeps: all, or only those that some recipes can reach (``kept.json`` in its folder).

    {"format_version": 1, "representation": [[0, 21], [100, 100]], "classifier": [[0, 2], [10, 10]]}

Spans include both ends. Without the file a buffer keeps everything. With it, epochs outside of the spans are absent on
purpose: they are not missing, not trained again, and not part of the digest. ``PartWriter`` does not keep them either,
except the last one of an expert in training, to resume from. The file is written before the first part
(``buffer.keep: windows``) or by ``lad-dist buffer prune``, and its spans never grow.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO

from pyarrow import fs

from lad_dist.errors import TrajectoryError, first_line
from lad_dist.recipe import Recipe
from lad_dist.trajectories import files
from lad_dist.trajectories.schema import STAGES, Stage

NAME = "kept.json"
FORMAT_VERSION = 1
_LONGEST = 2**20  # bytes read of the file

Span = tuple[int, int]


@dataclass(frozen=True)
class Kept:
    """Spans of epochs by stage, ascending, disjoint, both ends included; a stage without an entry keeps all."""

    spans: Mapping[Stage, tuple[Span, ...]] = field(default_factory=dict)

    @property
    def all(self) -> bool:
        """Whether every epoch of both stages is kept."""
        return not self.spans

    def has(self, stage: Stage, epoch: int) -> bool:
        """Whether one epoch is kept."""
        return self.any(stage, epoch, epoch)

    def any(self, stage: Stage, first: int, last: int) -> bool:
        """Whether any epoch from ``first`` to ``last``, both included, is kept."""
        if first > last:
            return False
        spans = self.spans.get(stage)
        return spans is None or any(begin <= last and first <= end for begin, end in spans)

    def last(self, stage: Stage) -> int | None:
        """Return the last kept epoch; None if all are kept."""
        spans = self.spans.get(stage)
        return None if spans is None else spans[-1][1]

    def lacking(self, needed: Kept) -> dict[Stage, tuple[Span, ...]]:
        """Return by stage the spans of ``needed`` that are not kept whole; empty if all are."""
        found: dict[Stage, tuple[Span, ...]] = {}
        for stage, spans in self.spans.items():
            wanted = needed.spans.get(stage, ((0, 10**9),))
            short = tuple(w for w in wanted if not any(a <= w[0] and w[1] <= b for a, b in spans))
            if short:
                found[stage] = short
        return found

    def together(self, other: Kept) -> Kept:
        """Return what either keeps."""
        stages = self.spans.keys() & other.spans.keys()
        return Kept({s: _merged((*self.spans[s], *other.spans[s])) for s in STAGES if s in stages})

    def __str__(self) -> str:
        return "; ".join(f"{stage} epochs {shown(spans)}" for stage, spans in self.spans.items()) or "all epochs"


ALL = Kept()


def shown(spans: Iterable[Span]) -> str:
    """Return ``0 to 21, 100``."""
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in spans)


def needed(recipe: Recipe) -> Kept:
    """Return the epochs that a recipe can read: its windows, the regression's features, the experts' last epochs.

    The last epochs make the initial set, label images as teachers, and are the classifier experts' backbone.
    """
    d, e, length = recipe.distill, recipe.experts, recipe.distill.window_epochs
    first: list[Span] = [(e.epochs, e.epochs)]
    second: list[Span] = [(e.classifier_epochs, e.classifier_epochs)]
    if "representation" in recipe.phases:
        low, high = d.start_epoch_min, d.start_epoch_max - 1
        first += [(low, high), (low + length, high + length)]
    if "regression" in recipe.phases:
        first.append((0, recipe.regression_epochs - 1))
    if "classifier" in recipe.phases:
        high = d.classifier_start_epoch_max - 1
        second += [(0, high), (length, high + length)]
    return Kept({"representation": _merged(first), "classifier": _merged(second)})


def _merged(spans: Iterable[Span]) -> tuple[Span, ...]:
    merged: list[Span] = []
    for first, last in sorted(spans):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return tuple(merged)


def read(filesystem: fs.FileSystem, root: str) -> Kept:
    """Read a buffer's ``kept.json``; ``ALL`` without one. Raises ``TrajectoryError`` if it cannot be used."""
    path = f"{root}/{NAME}"
    try:
        with files.open_for_reading(filesystem, path) as file:
            text = file.read(_LONGEST)
    except FileNotFoundError:
        return ALL
    except OSError as cause:
        reason = first_line(cause)
        raise TrajectoryError(f"{path}: cannot be read: {reason}; valid: a readable file, or none") from cause
    return _parsed(text, path)


def _parsed(text: bytes, path: str) -> Kept:
    try:
        document = json.loads(text)
        assert document["format_version"] == FORMAT_VERSION
        spans = {stage: tuple((int(a), int(b)) for a, b in document[stage]) for stage in STAGES}
        assert all(spans.values()) and all(0 <= a <= b for each in spans.values() for a, b in each)
    except (ValueError, TypeError, KeyError, AssertionError, RecursionError) as cause:
        raise TrajectoryError(
            f"{path}: says which epochs the buffer keeps, and cannot be understood; restore it, or write it again with "
            "`lad-dist buffer prune`"
        ) from cause
    return Kept({stage: _merged(each) for stage, each in spans.items()})


def write(filesystem: fs.FileSystem, root: str, kept: Kept) -> None:
    """Publish a buffer's ``kept.json``. Raises ``StorageError``."""
    document: dict[str, object] = {"format_version": FORMAT_VERSION}
    document |= {stage: list(spans) for stage, spans in kept.spans.items()}
    text = json.dumps(document).encode()

    def written(file: BinaryIO) -> None:
        file.write(text)

    files.publish(filesystem, f"{root}/{NAME}", written)
