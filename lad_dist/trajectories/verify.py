"""Check every byte and every row of a buffer and report problems."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator

import numpy as np

from lad_dist.errors import TrajectoryError
from lad_dist.trajectories import files, part
from lad_dist.trajectories.reader import Buffer
from lad_dist.trajectories.schema import PART_PATH_FORM, Checkpoint, PartName, expert_folder, parse_part_path

_Key = tuple[str, int, int]
_Seen = dict[_Key, tuple[str, str]]  # key -> (checksum of the content, path of the first part with that key)


def verify(buffer: Buffer, report: Callable[[str], None] | None = None) -> list[str]:
    """Return the problems of a buffer, each starting with the path of its file or expert folder; empty if it is sound.

    Lists the folder again, then checks for every part: both checksums (so any changed byte), metadata, key of every row
    against the name, vector lengths, finite values, page checksums; and across parts: same origin, equal duplicates, no
    gaps in an expert's epochs, no ``*.parquet`` with another kind of name. ``report`` is called with one line per
    finished part and per other problem. Holds one checkpoint in memory. Raises ``TrajectoryError`` only if the folder
    cannot be listed.
    """
    say = report or (lambda line: None)
    buffer.refresh()
    problems: list[str] = []
    seen: _Seen = {}
    names = buffer.parts
    for count, name in enumerate(names, start=1):
        found = list(_check_part(buffer, name, seen))
        rows = name.last - name.first + 1
        say(
            f"{count}/{len(names)} {name}: " + (f"{len(found)} problems" if found else f"{rows} checkpoints are intact")
        )
        problems += found
    others = [*_gaps(buffer), *_foreign(buffer)]
    for problem in others:
        say(problem)
    return problems + others


def _check_part(buffer: Buffer, name: PartName, seen: _Seen) -> Iterator[str]:
    path = f"{buffer.root}/{name}"
    try:
        footer = buffer.footer(name, fresh=True)
        if part.data_sum(buffer.filesystem, footer) != footer.data_sum:
            raise part.damaged(path, "its data do not match their checksum")
    except TrajectoryError as error:
        yield str(error)
        return
    for epoch in range(name.first, name.last + 1):
        try:
            row = part.checkpoint(buffer.filesystem, footer, epoch)
        except TrajectoryError as error:
            yield str(error)
            continue
        if footer.row_sums and part.weights_sum(row.weights) != footer.row_sums[footer.row_group(epoch)]:
            yield f"{path}: epoch {epoch}: its weights do not match their checksum; delete it and run `lad-dist experts` again"
        yield from _check_values(path, row)
        content = _content_sum(row)
        first_content, first_path = seen.setdefault((row.stage, row.expert, row.epoch), (content, path))
        if first_content != content:
            yield f"{path}: epoch {epoch}: differs from the same checkpoint in {first_path}; delete the wrong one"


def _check_values(path: str, row: Checkpoint) -> Iterator[str]:
    wrong = int(np.count_nonzero(~np.isfinite(row.weights)))
    if wrong:
        yield f"{path}: epoch {row.epoch}: {wrong} weights are NaN or infinite"
    for metric in ("loss", "accuracy", "seconds"):
        value = getattr(row, metric)
        if value is not None and not math.isfinite(value):
            yield f"{path}: epoch {row.epoch}: {metric} is {value}"


def _content_sum(row: Checkpoint) -> str:
    """Return a checksum of what a repeated work unit reproduces: weights and metrics, but not the duration."""
    total = hashlib.sha256(row.weights.tobytes())
    total.update(repr((row.loss, row.accuracy)).encode())
    return total.hexdigest()


def _gaps(buffer: Buffer) -> Iterator[str]:
    for stage, expert in sorted({(name.stage, name.expert) for name in buffer.parts}):
        present = buffer.epochs(stage, expert)
        missing = [e for e in sorted(set(range(present[-1])) - set(present)) if buffer.kept.has(stage, e)]
        if missing:
            shown = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
            yield (
                f"{buffer.root}/{expert_folder(stage, expert)}: {len(missing)} epochs before epoch {present[-1]} are "
                f"missing ({shown}); run `lad-dist experts` again, which fills them in"
            )


def _foreign(buffer: Buffer) -> Iterator[str]:
    for entry in files.list_files(buffer.filesystem, buffer.root):
        hidden = any(piece.startswith(".") for piece in entry.path.split("/"))
        if entry.path.endswith(".parquet") and not hidden and parse_part_path(entry.path) is None:
            yield f"{buffer.root}/{entry.path}: is not the name of a part and is not read; valid: {PART_PATH_FORM}"
