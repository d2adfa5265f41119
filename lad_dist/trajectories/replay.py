"""Import and export of ``replay_buffer_N.pt``, the trajectory files of the MTT, DATM and LAD code.

    OUT/representation/replay_buffer_0.pt, ...    LAD's ``first_stage_expert_dir``; the only stage of MTT and DATM
    OUT/classifier/replay_buffer_0.pt, ...        LAD's ``second_stage_expert_dir``
    OUT/<stage>/lad_dist.json                     sources of the files, to continue an interrupted export

Readers count N from 0 and stop at the first missing number. ``replay_file.py`` describes a file's content. Our
classifier rows hold the classifier only, so export adds the frozen backbone of the last representation checkpoint to
every network, and import checks that it is there and drops it.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lad_dist.errors import TrajectoryError
from lad_dist.rundir import host_name, process_lives, published
from lad_dist.trajectories import claims
from lad_dist.trajectories.reader import Buffer
from lad_dist.trajectories.replay_file import (
    EPOCHS_FIELD,
    NAME,
    Checkpoints,
    Vector,
    check_expert,
    check_values,
    checked_sum,
    classifier_mask,
    load,
    tensors_of,
    vector,
)
from lad_dist.trajectories.schema import STAGES, BufferMeta, Stage
from lad_dist.trajectories.writer import PartWriter

EXPERTS_PER_FILE = 10  # as in the published code (``save_interval``)
IMPORTED_FROM = "imported_from"  # key in ``BufferMeta.versions`` of imported parts
MANIFEST = "lad_dist.json"
_TEMPORARY = re.compile(r"\.tmp-(\w+)-([0-9]+)-\w+\.pt")


def complete_experts(buffer: Buffer, *stages: Stage) -> tuple[int, ...]:
    """Return the experts that can be exported, ascending, at the buffer's last ``refresh``.

    They have all epochs of each of ``stages``; the classifier stage also needs all of the representation stage, which
    gives the backbone. Raises ``TrajectoryError`` where the buffer is empty or its metadata cannot be read.
    """
    if not buffer.kept.all:
        raise TrajectoryError(
            f"{buffer.folder}: keeps only {buffer.kept}, and replay_buffer_N.pt files hold every epoch; valid: a buffer that "
            "keeps all of them"
        )
    meta, wanted = buffer.meta, {"representation", *stages}
    needed = {stage: _last_epoch(meta, stage) for stage in STAGES if stage in wanted}
    return buffer.complete(needed, buffer.experts("representation"))


def _last_epoch(meta: BufferMeta, stage: Stage) -> int:
    """Return the last epoch of a trajectory according to the recipe in the metadata."""
    try:
        return int(meta.recipe["experts"][EPOCHS_FIELD[stage]])
    except (KeyError, TypeError, ValueError) as cause:
        raise TrajectoryError(
            f"trajectory metadata: recipe.experts.{EPOCHS_FIELD[stage]}: is missing, so the length of the {stage} stage is not "
            "known"
        ) from cause


# --- export ---------------------------------------------------------------------------------------------------------


def export_pt(
    buffer: Buffer,
    out: Path,
    stages: Sequence[Stage] = STAGES,
    experts_per_file: int = EXPERTS_PER_FILE,
    on_file: Callable[[Path], None] | None = None,
    force: bool = False,
) -> list[Path]:
    """Write the experts complete in all ``stages`` as ``out/<stage>/replay_buffer_N.pt``; return the files in order.

    Experts keep their order but not their numbers, which the format lacks. Files appear whole; a repeated call
    continues an interrupted export and keeps the files already written. ``force``: remove the ``replay_buffer_N.pt`` of
    another export or of other code, and nothing else, instead of refusing. ``on_file`` is called with each file.

    Memory: two checkpoints, whatever the buffer's size. A file is assembled in an unnamed, memory-mapped temporary file
    beside it, so the disk briefly holds it twice. Code that reads the file needs all of it in memory.

    Raises ``TrajectoryError`` if no expert is complete, other files are in the way (nothing is written then), or a
    checkpoint cannot be read; ``StorageError`` if a file cannot be written.
    """
    if experts_per_file < 1:
        raise TrajectoryError(f"experts per file: {experts_per_file}; valid: 1 or more")
    experts = complete_experts(buffer, *stages)
    if not experts:
        raise TrajectoryError(
            f"{buffer.folder}: no expert is complete in {' and '.join(stages)}, so there is nothing to export; valid: a buffer "
            "with finished experts, see `lad-dist buffer inspect`, or another --stage"
        )
    plans = {stage: _plan(buffer, stage, experts, experts_per_file) for stage in stages}
    for stage in stages:
        _refuse_others(out / stage, plans[stage], force)
    written = []
    for stage in stages:
        _make_way(out / stage, plans[stage])
        for number, first in enumerate(range(0, len(experts), experts_per_file)):
            path = out / stage / f"replay_buffer_{number}.pt"
            if not path.exists():
                _write_file(path, buffer, stage, experts[first : first + experts_per_file])
            written.append(path)
            if on_file is not None:
                on_file(path)
    return written


def _plan(buffer: Buffer, stage: Stage, experts: Sequence[int], per_file: int) -> dict[str, Any]:
    """Return everything that determines the files of a stage; ``content`` hashes the checksums of the source parts."""
    content = hashlib.sha256()
    for name in buffer.parts:
        if name.expert in experts and name.stage in ("representation", stage):
            content.update(f"{name} {buffer.footer(name).data_sum}\n".encode())
    return {
        "stage": stage,
        "experts": list(experts),
        "experts_per_file": per_file,
        "experts_hash": buffer.meta.experts_hash,
        "parameters": [[name, list(shape)] for name, shape in buffer.meta.parameters],
        "content": content.hexdigest(),
    }


def _is_ours(folder: Path, plan: dict[str, Any]) -> bool:
    try:
        return bool(json.loads((folder / MANIFEST).read_text(encoding="utf-8")) == plan)
    except (OSError, ValueError):
        return False


def _replay_buffers(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if NAME.fullmatch(file.name)] if folder.is_dir() else []


def _refuse_others(folder: Path, plan: dict[str, Any], force: bool) -> None:
    there = _replay_buffers(folder)
    if there and not force and not _is_ours(folder, plan):
        raise TrajectoryError(
            f"{min(there)}: already exists, from another export or other code, and is not replaced; choose another folder, "
            f"or remove the {len(there)} replay_buffer_N.pt files in {folder}"
        )


def _make_way(folder: Path, plan: dict[str, Any]) -> None:
    """Remove files that a reader would take for a part of this export. Raises ``StorageError``."""
    if not _is_ours(folder, plan):
        with published(folder / MANIFEST) as temporary:
            for file in _replay_buffers(folder):
                file.unlink()
            temporary.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
    for file in folder.glob(".tmp-*.pt"):
        match = _TEMPORARY.fullmatch(file.name)
        if match and match[1] == host_name() and not process_lives(int(match[2])):
            file.unlink(missing_ok=True)


def _write_file(path: Path, buffer: Buffer, stage: Stage, experts: Sequence[int]) -> None:
    meta, epochs = buffer.meta, _last_epoch(buffer.meta, stage) + 1
    with published(path) as temporary, tempfile.TemporaryFile(dir=path.parent) as scratch:
        for expert in experts:
            for whole_P in _whole_networks(buffer, stage, expert):
                scratch.write(whole_P.data)  # not through the mapping: on a full disk, that kills the process
        scratch.flush()
        size = (len(experts), epochs, meta.vector_length("representation"))
        mapped = np.memmap(scratch, np.float32, mode="c", shape=size)
        content = [[tensors_of(meta, mapped[i, epoch]) for epoch in range(epochs)] for i in range(len(experts))]
        with temporary.open("wb") as file:
            try:
                torch.save(content, file)
            except RuntimeError as error:  # on a full disk, torch reports a wrong file position
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise


def _whole_networks(buffer: Buffer, stage: Stage, expert: int) -> Iterator[Vector]:
    """Yield all weights (P,) of one expert, epoch by epoch; in the classifier stage with the frozen backbone."""
    if stage == "representation":
        for epoch in range(_last_epoch(buffer.meta, stage) + 1):
            yield buffer.read(stage, expert, epoch)
        return
    whole_P = buffer.read("representation", expert, _last_epoch(buffer.meta, "representation"))
    in_classifier = classifier_mask(buffer.meta)
    for epoch in range(_last_epoch(buffer.meta, stage) + 1):
        whole_P[in_classifier] = buffer.read(stage, expert, epoch)
        yield whole_P


# --- import ---------------------------------------------------------------------------------------------------------


class _File(NamedTuple):
    path: Path
    experts: range  # numbers assigned to its experts


def import_pt(
    files: Sequence[Path],
    location: Path | str,
    meta: BufferMeta,
    stage: Stage,
    epochs: int,
    first_expert: int = 0,
    epochs_per_part: int = 5,
    on_expert: Callable[[int], None] | None = None,
) -> int:
    """Import ``replay_buffer_N.pt`` files of one stage into the buffer at ``location``; return the number of experts.

    Experts are numbered from ``first_expert`` in the order of the files. Epochs 0 to ``epochs`` of each are imported;
    all experts must have equally many. Import representation experts first, then the classifier experts made from them,
    in the same order. ``meta`` belongs to the recipe that will use the experts; the files do not show whether they were
    trained on its images with its whitening. Every part records its file's name and SHA-256 (``meta.versions``,
    ``imported_from``); rows have no metrics.

    Before anything is written, all files are checked for kind and layout and against the existing rows; then each
    file's checksums and all values of each expert are checked. Existing rows must be equal, so an interrupted import
    can continue. ``on_expert`` is called with each expert's number. Memory: a few checkpoints, plus ``epochs_per_part``
    before they are published; files of the format before torch 1.6 cannot be mapped and are loaded whole, one at a
    time.

    Raises:
        TrajectoryError: a file is damaged, holds code or other content, or does not fit ``meta``; the buffer has other
            experts or experts trained here; another process is training one.
        StorageError: a part cannot be written; parts published before are kept.
    """
    target = _Target(location, meta, stage, epochs, epochs_per_part)
    surveyed = _survey(files, target, first_expert)
    total = sum(len(file.experts) for file in surveyed)
    target.refuse_trained_here(range(first_expert, first_expert + total))
    stored = target.stored()
    for file in surveyed:
        _each(file, stored, target.compare)
    for file in surveyed:
        versions = {**meta.versions, IMPORTED_FROM: f"{file.path.name} sha256:{checked_sum(file.path)}"}
        marked = replace(target, meta=replace(meta, versions=versions))
        _each(file, file.experts, marked.take, on_expert)
    return total


def _survey(files: Sequence[Path], target: _Target, first: int) -> list[_File]:
    """Check all files for kind and layout, and number their experts."""
    if not files:
        raise TrajectoryError("no replay_buffer_N.pt was named; valid: one or more")
    surveyed: list[_File] = []
    length: tuple[int, str] | None = None
    for path in files:
        if any(path.resolve() == other.path.resolve() for other in surveyed):
            raise TrajectoryError(f"{path}: is named twice, and its experts would count twice; valid: every file once")
        content = load(path)
        for index, checkpoints in enumerate(content):
            where = f"{path}: expert {index}"
            check_expert(where, checkpoints, target.stage, target.epochs, target.meta)
            length = length or (len(checkpoints), where)
            if len(checkpoints) != length[0]:
                raise TrajectoryError(
                    f"{where}: has {len(checkpoints)} checkpoints and {length[1]} has {length[0]}; valid: experts with "
                    "equally many, as one run of the other code makes them"
                )
        surveyed.append(_File(path, range(first, first + len(content))))
        first += len(content)
    return surveyed


def _each(
    file: _File,
    wanted: Sequence[int],
    step: Callable[[int, Checkpoints, str], None],
    done: Callable[[int], None] | None = None,
) -> None:
    """Call ``step`` for each ``wanted`` expert of a file."""
    chosen = [expert for expert in file.experts if expert in wanted]
    content = load(file.path) if chosen else []
    for expert in chosen:
        index = expert - file.experts.start
        step(expert, content[index], f"{file.path}: expert {index}")
        if done is not None:
            done(expert)


@dataclass(frozen=True)
class _Target:
    """Destination and required form of imported trajectories of one stage: epochs 0 to ``epochs``."""

    location: Path | str
    meta: BufferMeta
    stage: Stage
    epochs: int
    epochs_per_part: int
    owner: str = field(default_factory=claims.owner_id)

    def buffer(self) -> Buffer:
        """Open the buffer. Raises ``TrajectoryError`` where it belongs to another recipe, network or data set."""
        buffer = Buffer(self.location, expected_hash=self.meta.experts_hash)
        changed = self.meta.differences(buffer.meta) if buffer.parts else []
        if changed:
            raise TrajectoryError(
                f"{buffer.folder}: its trajectories are from other training images or another network "
                f"({', '.join(changed)} differ); choose another run or buffer folder"
            )
        return buffer

    def stored(self) -> tuple[int, ...]:
        """Return the experts with checkpoints in the buffer."""
        return self.buffer().experts(self.stage)

    def refuse_trained_here(self, experts: range) -> None:
        """Raise ``TrajectoryError`` if the buffer has experts of this stage that were not imported from files.

        ``experts`` are exempt: they are compared with the files' experts.
        """
        buffer = self.buffer()
        for name in buffer.parts:
            foreign = name.stage == self.stage and name.expert not in experts
            if foreign and IMPORTED_FROM not in buffer.footer(name).meta.versions:
                raise TrajectoryError(
                    f"{buffer.folder}: its {self.stage} expert {name.expert} was trained here, and imported experts cannot "
                    "be mixed with it; choose another run or buffer folder"
                )

    def compare(self, expert: int, checkpoints: Checkpoints, where: str) -> None:
        """Raise ``TrajectoryError`` if a checkpoint of the expert in the buffer differs from the file's."""
        buffer = self.buffer()
        for epoch in buffer.epochs(self.stage, expert):
            if epoch > self.epochs or self._row(checkpoints[epoch]).tobytes() != (
                buffer.read(self.stage, expert, epoch).tobytes()
            ):
                raise TrajectoryError(
                    f"{where}, epoch {epoch}: differs from {self.stage} expert {expert} in {buffer.folder}, which was trained "
                    "here or imported from other files, and the two cannot be mixed; choose another run or buffer folder"
                )

    def take(self, expert: int, checkpoints: Checkpoints, where: str) -> None:
        """Check one expert completely and write its checkpoints missing in the buffer."""
        with claims.hold(self.location, f"expert-{expert:04d}", self.owner) as held:
            buffer = self.buffer()
            if not held:
                raise TrajectoryError(
                    f"{buffer.folder}: expert {expert} is being trained or imported by another process; wait until it has "
                    "ended, and the same command continues"
                )
            done = buffer.last_contiguous_epoch(self.stage, expert)
            if done is not None and done >= self.epochs:
                return
            chosen = checkpoints[: self.epochs + 1]
            check_values(where, chosen, self.meta, self._backbone(buffer, expert, where))
            with PartWriter(self.location, self.meta, self.stage, expert, self.epochs_per_part) as writer:
                for epoch in range(0 if done is None else done + 1, self.epochs + 1):
                    writer.append(epoch, self._row(chosen[epoch]))

    def _backbone(self, buffer: Buffer, expert: int, where: str) -> Vector | None:
        """Return the weights that classifier experts must share with their representation expert's last checkpoint."""
        if self.stage == "representation":
            return None
        last = _last_epoch(self.meta, "representation")
        if not buffer.has("representation", expert, last):
            raise TrajectoryError(
                f"{where}: the representation stage of expert {expert}, whose backbone it shares, is not complete in "
                f"{buffer.folder} (epoch {last} is missing); import that stage first"
            )
        return buffer.read("representation", expert, last)[~classifier_mask(self.meta)]

    def _row(self, tensors: Sequence[torch.Tensor]) -> Vector:
        """Return the weights stored in a row of this stage."""
        whole_P = vector(tensors)
        return whole_P if self.stage == "representation" else whole_P[classifier_mask(self.meta)]
