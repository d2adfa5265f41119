"""``replay_buffer_N.pt``, the exchange format of the MTT family (MTT, DATM, LAD): a buffer written to it and read from it.

    OUT/representation/replay_buffer_0.pt, replay_buffer_1.pt, ...
    OUT/classifier/replay_buffer_0.pt, ...

A file is ``torch.save`` of a list of experts; an expert is a list of checkpoints, epoch 0 first; a checkpoint is the list of
the network's parameter tensors in module order (Cazenavette et al. 2022, ``buffer.py`` of the published code). Files of both
stages hold whole networks; rows of our classifier stage hold the classifier only, so the frozen backbone, which is that of
the expert's last representation epoch, is put back on export and checked and taken off on import.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lad_dist.errors import LadDistError, TrajectoryError
from lad_dist.rundir import published
from lad_dist.trajectories import claims
from lad_dist.trajectories.reader import Buffer
from lad_dist.trajectories.schema import STAGES, BufferMeta, Stage
from lad_dist.trajectories.writer import PartWriter

Vector = npt.NDArray[np.float32]

_NAME = re.compile(r"replay_buffer_(0|[1-9][0-9]{0,8})\.pt")
_FORM = "a list of experts, each a list of checkpoints, each a list of parameter tensors in module order"
_EPOCHS_FIELD: dict[Stage, str] = {"representation": "epochs", "classifier": "classifier_epochs"}  # of recipe.experts


def pt_files(folder: Path) -> list[Path]:
    """The ``replay_buffer_N.pt`` of a folder in the order of N.

    Raises ``TrajectoryError`` if there are none, or if one in between is missing, so that experts would get wrong numbers.
    """
    found = sorted((int(match[1]), path) for path in folder.glob("*.pt") if (match := _NAME.fullmatch(path.name)))
    if not found:
        raise TrajectoryError(
            f"{folder}: holds no replay_buffer_N.pt; valid: a folder with replay_buffer_0.pt, _1.pt, ..."
        )
    for expected, (number, _) in enumerate(found):
        if number != expected:
            raise TrajectoryError(
                f"{folder}: replay_buffer_{expected}.pt is missing, and there is a replay_buffer_{found[-1][0]}.pt; valid: "
                "all numbers from 0 on, or name the files one by one"
            )
    return [path for _, path in found]


def complete_experts(buffer: Buffer, stage: Stage) -> tuple[int, ...]:
    """The experts whose trajectory can be exported, ascending: all epochs of ``stage``, and for the classifier stage all of
    the representation stage too, which gives the backbone. As of the buffer's last ``refresh``.

    Raises ``TrajectoryError`` where the buffer is empty or its metadata cannot be read.
    """
    needed: tuple[Stage, ...] = ("representation",) if stage == "representation" else STAGES
    lasts = {each: _last_epoch(buffer, buffer.meta, each) for each in needed}
    return tuple(
        expert
        for expert in buffer.experts(stage)
        if all((buffer.last_contiguous_epoch(each, expert) or 0) >= last for each, last in lasts.items())
        and all(buffer.has(each, expert, 0) for each in needed)
    )


def _last_epoch(buffer: Buffer, meta: BufferMeta, stage: Stage) -> int:
    """The epoch with which a trajectory ends: as the recipe says, or that of the longest where no recipe is told."""
    told = meta.recipe.get("experts", {}).get(_EPOCHS_FIELD[stage])
    if isinstance(told, int):
        return told
    return max((buffer.last_contiguous_epoch(stage, expert) or 0 for expert in buffer.experts(stage)), default=0)


# --- export -----------------------------------------------------------------------------------------------------------


def export_pt(
    buffer: Buffer,
    out: Path,
    stages: Sequence[Stage] = STAGES,
    experts_per_file: int = 10,
    on_file: Callable[[Path], None] | None = None,
) -> list[Path]:
    """Write the buffer's complete trajectories as ``out/<stage>/replay_buffer_N.pt``; return the files, in order.

    Experts keep their order and lose their numbers: the file format has none. Experts that are not complete
    (``complete_experts``) are left out. Holds the experts of one file in memory; ``on_file`` hears of each file.
    Raises ``TrajectoryError`` if nothing is complete, if such files are there already (nothing is written then), or if a
    checkpoint cannot be read; ``StorageError`` if a file cannot be written.
    """
    if experts_per_file < 1:
        raise TrajectoryError(f"experts per file: {experts_per_file}; valid: 1 or more")
    plan = {stage: complete_experts(buffer, stage) for stage in stages}
    for stage, experts in plan.items():
        if not experts:
            raise TrajectoryError(
                f"{buffer.folder}: no expert's {stage} stage is complete, so there is nothing to export; valid: a buffer "
                "with finished experts, see `lad-dist buffer inspect`, or another --stage"
            )
        present = [p for p in (out / stage).glob("*.pt") if _NAME.fullmatch(p.name)]
        if present:
            raise TrajectoryError(
                f"{min(present)}: is there already, and export replaces nothing; choose another folder, or remove the old files"
            )
    written = []
    for stage, experts in plan.items():
        for number, first in enumerate(range(0, len(experts), experts_per_file)):
            file = out / stage / f"replay_buffer_{number}.pt"
            chosen = experts[first : first + experts_per_file]
            content = [_trajectory(buffer, stage, expert) for expert in chosen]
            # Through a file of ours: by itself torch reports a full disk as an internal RuntimeError.
            with published(file) as temporary, temporary.open("wb") as target:
                torch.save(content, target)
            written.append(file)
            if on_file is not None:
                on_file(file)
    return written


def _trajectory(buffer: Buffer, stage: Stage, expert: int) -> list[list[Tensor]]:
    """All checkpoints of one expert as whole networks. A checkpoint's tensors are views of one vector."""
    meta = buffer.meta
    epochs = range(_last_epoch(buffer, meta, stage) + 1)
    if stage == "representation":
        return [list(_views(meta, stage, buffer.read(stage, expert, epoch)).values()) for epoch in epochs]
    last = _last_epoch(buffer, meta, "representation")
    backbone = _views(meta, "representation", buffer.read("representation", expert, last))
    return [list((backbone | _views(meta, stage, buffer.read(stage, expert, epoch))).values()) for epoch in epochs]


def _views(meta: BufferMeta, stage: Stage, vector: Vector) -> dict[str, Tensor]:
    """A row's vector as named tensors in module order that share its memory."""
    shapes = _shapes(meta, stage)
    pieces = torch.from_numpy(vector).split([math.prod(shape) for shape in shapes.values()])
    return {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}


def _shapes(meta: BufferMeta, stage: Stage) -> dict[str, tuple[int, ...]]:
    """The parameters that make up a row of ``stage``, in module order."""
    return {n: s for n, s in meta.parameters if stage == "representation" or n in meta.classifier_parameters}


# --- import -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Target:
    """Where imported trajectories of one stage go, and what they must look like: epochs 0 to ``epochs``."""

    location: Path | str
    meta: BufferMeta
    stage: Stage
    epochs: int
    epochs_per_part: int

    def buffer(self) -> Buffer:
        """The buffer as it is now. Raises TrajectoryError where it belongs to another recipe, network or data set."""
        buffer = Buffer(self.location, expected_hash=self.meta.experts_hash)
        changed = self.meta.differences(buffer.meta) if buffer.parts else []
        if changed:
            raise TrajectoryError(
                f"{buffer.folder}: its trajectories are of other training images or another network "
                f"({', '.join(changed)} differ); choose another run or buffer folder"
            )
        return buffer


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
    """Read ``replay_buffer_N.pt`` files of one stage into the buffer at ``location``; return how many experts they hold.

    The experts are numbered from ``first_expert`` on, in the order of the files. Epochs 0 to ``epochs`` of each are taken.
    Classifier experts must follow on their representation experts, which are imported first. An expert is checked whole
    before any of its rows is written. Rows that are there already must be equal, so an import that was interrupted
    continues, and the rows have no metrics. Files are mapped, not loaded: holds a few checkpoints in memory.

    Raises:
        TrajectoryError: a file is damaged, holds code or something else, or does not fit ``meta``; the buffer has other
            experts, or another process is at work on one.
        StorageError: a part cannot be written; what was published before is kept.
    """
    target = _Target(location, meta, stage, epochs, epochs_per_part)
    target.buffer()
    owner, expert = claims.owner_id(), first_expert
    for file in files:
        content = _load(file)
        for index, checkpoints in enumerate(content):
            _check_structure(checkpoints, f"{file}: expert {index}", target)
        for index, checkpoints in enumerate(content):
            with claims.hold(location, f"expert-{expert:04d}", owner) as held:
                if not held:
                    raise TrajectoryError(
                        f"{target.buffer().folder}: expert {expert} is being trained or imported by another process; wait "
                        "until it has ended, and the same command continues"
                    )
                _import_expert(checkpoints, f"{file}: expert {index}", target, expert)
            expert += 1
            if on_expert is not None:
                on_expert(expert - 1)
    return expert - first_expert


def _load(file: Path) -> list[Any]:
    """The experts in a file, their tensors mapped. Raises TrajectoryError for whatever is not a sound file of tensors."""
    try:
        with zipfile.ZipFile(file) as archive:  # torch checks no sums when it maps a file
            bad = archive.testzip()
        if bad is not None:
            raise TrajectoryError(
                f"{file}: is damaged: the checksum of {bad} in it is wrong; valid: the file as it was saved"
            )
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except LadDistError:  # ours, or an interruption
        raise
    except OSError as cause:
        raise TrajectoryError(
            f"{file}: cannot be read: {cause.strerror or cause}; valid: a replay_buffer_N.pt"
        ) from cause
    except Exception as cause:  # the bytes decide what zipfile, the unpickler and torch stumble over
        reason = (str(cause).splitlines() or [""])[0] or repr(cause)
        raise TrajectoryError(
            f"{file}: is damaged, of the format before torch 1.6, or holds more than tensors ({reason}); valid: a file that "
            "torch.save wrote, of lists of tensors only"
        ) from cause
    if not isinstance(content, list) or not content:
        raise TrajectoryError(f"{file}: is {_what(content)}; valid: {_FORM}")
    return content


def _check_structure(checkpoints: Any, where: str, target: _Target) -> None:
    """Whether this is an expert of the network that ``target`` describes, without looking at values."""
    field = f"experts.{_EPOCHS_FIELD[target.stage]}"
    if not isinstance(checkpoints, list | tuple) or not checkpoints:
        raise TrajectoryError(f"{where}: is {_what(checkpoints)}; valid: a list of checkpoints")
    if len(checkpoints) <= target.epochs:
        last = len(checkpoints) - 1
        advice = f"{field}={last} would fit" if last else "an expert has at least epochs 0 and 1"
        raise TrajectoryError(
            f"{where}: has {len(checkpoints)} checkpoints, epochs 0 to {last}, and the recipe asks for {field}={target.epochs}; "
            f"{advice}"
        )
    expected = target.meta.parameters
    for epoch, tensors in enumerate(checkpoints[: target.epochs + 1]):
        at = f"{where}, epoch {epoch}"
        if not isinstance(tensors, list | tuple):
            raise TrajectoryError(f"{at}: is {_what(tensors)}; valid: a list of {len(expected)} tensors")
        if len(tensors) != len(expected):
            raise TrajectoryError(
                f"{at}: has {len(tensors)} tensors and the recipe's network {len(expected)} parameters; valid: the same model "
                f"(model.depth, model.width), whose parameters are {', '.join(name for name, _ in expected)}"
            )
        for (name, shape), tensor in zip(expected, tensors, strict=True):
            _check_tensor(tensor, shape, f"{at}, layer {name}")
    # A tensor of a network on a CPU that is saved without a copy goes on changing: every epoch is then the last one.
    if target.epochs and checkpoints[0][-1].data_ptr() == checkpoints[1][-1].data_ptr():
        raise TrajectoryError(
            f"{where}: epochs 0 and 1 are one and the same tensors, as when checkpoints on a CPU are not copied; valid: "
            "checkpoints that were copied as they were taken (`p.detach().clone()`)"
        )


def _check_tensor(tensor: Any, shape: tuple[int, ...], where: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TrajectoryError(f"{where}: is {_what(tensor)}; valid: a tensor")
    if tuple(tensor.shape) != shape:
        raise TrajectoryError(
            f"{where}: has shape {list(tensor.shape)}; valid: {list(shape)}, as in the recipe's network"
        )
    if tensor.dtype != torch.float32 or tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise TrajectoryError(
            f"{where}: is {tensor.dtype}, {tensor.layout}, on {tensor.device.type}; valid: plain torch.float32 with values"
        )


def _what(thing: Any) -> str:
    return f"an empty {type(thing).__name__}" if isinstance(thing, list | tuple) and not thing else type(thing).__name__


def _import_expert(checkpoints: Sequence[Sequence[Tensor]], where: str, target: _Target, expert: int) -> None:
    """Check every checkpoint of one expert, then write those that are not in the buffer."""
    buffer, stage = target.buffer(), target.stage
    backbone = _backbone(buffer, target.meta, expert, where) if stage == "classifier" else {}
    for epoch in range(target.epochs + 1):
        _check_values(checkpoints[epoch], f"{where}, epoch {epoch}", target.meta, backbone)
        if buffer.has(stage, expert, epoch):
            there, here = buffer.read(stage, expert, epoch), _row(checkpoints[epoch], target)
            if not np.array_equal(there, here):
                raise TrajectoryError(
                    f"{where}, epoch {epoch}: differs from {stage} expert {expert} in {buffer.folder}, which is another "
                    "expert's; choose another run or buffer folder, or another number for the first expert"
                )
    for missing in _runs([e for e in range(target.epochs + 1) if not buffer.has(stage, expert, e)]):
        with PartWriter(target.location, target.meta, stage, expert, target.epochs_per_part) as writer:
            for epoch in missing:
                writer.append(epoch, _row(checkpoints[epoch], target))


def _backbone(buffer: Buffer, meta: BufferMeta, expert: int, where: str) -> dict[str, Tensor]:
    """What the classifier experts must share with the last epoch of their representation expert."""
    last = _last_epoch(buffer, meta, "representation")
    if not buffer.has("representation", expert, last):
        raise TrajectoryError(
            f"{where}: the representation stage of expert {expert}, whose backbone it shares, is not complete in "
            f"{buffer.folder} (epoch {last} is missing); import that stage first"
        )
    views = _views(meta, "representation", buffer.read("representation", expert, last))
    return {name: views[name] for name in views if name not in meta.classifier_parameters}


def _check_values(tensors: Sequence[Tensor], where: str, meta: BufferMeta, backbone: dict[str, Tensor]) -> None:
    for (name, _), tensor in zip(meta.parameters, tensors, strict=True):
        if not bool(torch.isfinite(tensor).all()):
            raise TrajectoryError(f"{where}, layer {name}: holds NaN or infinite weights; valid: finite weights")
        if name in backbone and not torch.equal(tensor, backbone[name]):
            raise TrajectoryError(
                f"{where}, layer {name}: differs from the last representation epoch of the same expert; valid: classifier "
                "experts whose backbone is frozen there, in the order of the representation experts"
            )


def _row(tensors: Sequence[Tensor], target: _Target) -> Vector:
    """The weights that a row of the target's stage holds."""
    wanted = _shapes(target.meta, target.stage)
    chosen = [t for (name, _), t in zip(target.meta.parameters, tensors, strict=True) if name in wanted]
    row: Vector = torch.cat([t.detach().reshape(-1) for t in chosen]).numpy()
    return row


def _runs(epochs: Sequence[int]) -> Iterator[list[int]]:
    """Ascending epochs as runs without gaps: 1, 2, 5 as [1, 2] and [5]."""
    run: list[int] = []
    for epoch in epochs:
        if run and epoch != run[-1] + 1:
            yield run
            run = []
        run.append(epoch)
    if run:
        yield run
