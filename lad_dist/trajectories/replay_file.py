"""Format, safe loading and checks of one ``replay_buffer_N.pt``.

A file is a ``torch.save`` of a list of experts, each a list of checkpoints (epoch 0 to the last), each a list of
float32 tensors in the order of the network's ``parameters()``. Both stages hold whole networks: the official second
stage saves all parameters, with the frozen backbone in every checkpoint, and the distillation that reads it takes the
last two tensors (``[:-2]``) for the classifier.

Sources: ``buffer.py`` of GeorgeCazenavette/mtt-distillation; ``buffer/buffer_FTD.py`` of NUS-HPC-AI-Lab/DATM;
``buffer/buffer_FTD.py``, ``utils/utils_two_stage.py`` and ``distill/DAM-ED_tesla.py`` of ichbill/LTDD.

Shapes: P weights of the whole network.
"""

from __future__ import annotations

import hashlib
import math
import re
import zipfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lad_dist.errors import TrajectoryError
from lad_dist.torch_file import check_records, refused
from lad_dist.trajectories.schema import BufferMeta, Stage

Vector = npt.NDArray[np.float32]
Checkpoints = Sequence[Sequence[Tensor]]  # one expert: epochs, then parameters

NAME = re.compile(r"replay_buffer_(0|[1-9][0-9]{0,8})\.pt")
EPOCHS_FIELD: dict[Stage, str] = {"representation": "epochs", "classifier": "classifier_epochs"}  # of recipe.experts
_FORM = "a list of experts, each a list of checkpoints, each a list of tensors, as torch.save writes it"


def pt_files(folder: Path) -> list[Path]:
    """Return the ``replay_buffer_N.pt`` directly in a folder, in the order of N.

    Raises ``TrajectoryError`` if there are none, or a number is missing, which would shift the experts' numbers.
    """
    if not folder.is_dir():
        raise TrajectoryError(f"{folder}: is not a folder; valid: one with replay_buffer_0.pt, replay_buffer_1.pt, ...")
    found = {int(match[1]): file for file in folder.iterdir() if (match := NAME.fullmatch(file.name))}
    if not found:
        raise TrajectoryError(
            f"{folder}: holds no replay_buffer_N.pt; valid: a folder with replay_buffer_0.pt, replay_buffer_1.pt, ..."
        )
    missing = sorted(set(range(max(found))) - set(found))
    if missing:
        raise TrajectoryError(
            f"{folder}/replay_buffer_{missing[0]}.pt: is missing, and experts are counted over the files in their order; "
            "to leave it out, name the others one by one, in both stages"
        )
    return [found[number] for number in sorted(found)]


def load(path: Path) -> list[Any]:
    """Load the experts of an untrusted file; only tensors and lists are unpickled.

    Tensors are memory-mapped, except those of the format before torch 1.6. The list's content is not checked; see
    ``check_expert``. Raises ``TrajectoryError``.
    """
    with _refused(path):
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if not isinstance(content, list | tuple) or not content:
        raise TrajectoryError(f"{path}: is not a replay buffer: it holds {_kind(content)}; valid: {_FORM}")
    return list(content)


def checked_sum(path: Path) -> str:
    """Check a file's own checksums, which torch ignores; return its SHA-256. Raises ``TrajectoryError``."""
    with _refused(path):
        check_records(path, stored=True)
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def _refused(path: Path) -> AbstractContextManager[None]:
    return refused(path, TrajectoryError, "a replay buffer needs nothing but lists and tensors", _FORM)


def check_expert(where: str, checkpoints: Any, stage: Stage, last: int, meta: BufferMeta) -> None:
    """Check types, counts and shapes of one expert against the recipe's network, without reading weights.

    ``last``: the last epoch needed. Raises ``TrajectoryError``.
    """
    if not isinstance(checkpoints, list | tuple):
        raise TrajectoryError(f"{where}: is {_kind(checkpoints)}; valid: {_FORM}")
    if len(checkpoints) <= last:
        there = len(checkpoints) - 1
        advice = f"--set experts.{EPOCHS_FIELD[stage]}={there}, or " if there > 0 else ""
        raise TrajectoryError(
            f"{where}: has {len(checkpoints)} checkpoints where the recipe's {stage} stage has {last + 1}, the initialisation "
            f"and {last} epochs; valid: {advice}files with as many"
        )
    for epoch, tensors in enumerate(checkpoints):
        _check_checkpoint(f"{where}, epoch {epoch}", tensors, meta)


def _check_checkpoint(where: str, tensors: Any, meta: BufferMeta) -> None:
    if not isinstance(tensors, list | tuple) or not all(isinstance(t, Tensor) for t in tensors):
        raise TrajectoryError(f"{where}: is {_kind(tensors)}; valid: {_FORM}")
    if len(tensors) != len(meta.parameters):
        names = ", ".join(name for name, _ in meta.parameters)
        raise TrajectoryError(
            f"{where}: has {len(tensors)} tensors where the recipe's network has {len(meta.parameters)} parameters ({names}); "
            "valid: whole networks with the recipe's model.depth"
        )
    named = list(zip(tensors, meta.parameters, strict=True))
    wrong = [
        f"{name} is {_shape(tensor.shape)} where the recipe's is {_shape(shape)}"
        for tensor, (name, shape) in named
        if tuple(tensor.shape) != shape
    ]
    if wrong:
        raise TrajectoryError(
            f"{where}: is another network: {'; '.join(wrong[:4])}; valid: networks with the recipe's model.network, "
            "model.width, image size, channels and classes"
        )
    for tensor, (name, _) in named:
        if tensor.dtype != torch.float32 or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise TrajectoryError(f"{where}: {name} is {_kind(tensor)}; valid: dense torch.float32")


def check_values(where: str, checkpoints: Checkpoints, meta: BufferMeta, backbone: Vector | None) -> None:
    """Raise ``TrajectoryError`` for weights that are not finite, never change, or differ from the frozen ``backbone``.

    ``backbone``: shape (P,) without the classifier's weights, required bit for bit in every checkpoint; None: it is
    trained.
    """
    frozen = ~classifier_mask(meta)
    for epoch, tensors in enumerate(checkpoints):
        for tensor, (name, _) in zip(tensors, meta.parameters, strict=True):
            wrong = int((~tensor.detach().isfinite()).sum())
            if wrong:
                raise TrajectoryError(
                    f"{where}, epoch {epoch}: {wrong} values of {name} are NaN or infinite; valid: finite weights"
                )
        if backbone is not None and vector(tensors)[frozen].tobytes() != backbone.tobytes():
            raise TrajectoryError(
                f"{where}, epoch {epoch}: its backbone is not that of the last representation checkpoint of the same expert, "
                "where the classifier stage is frozen; valid: second-stage files made from these first-stage experts, in the "
                "same order"
            )
    first_P = vector(checkpoints[0]).tobytes()
    for epoch in {1, len(checkpoints) - 1} - {0}:
        if vector(checkpoints[epoch]).tobytes() == first_P:
            raise TrajectoryError(
                f"{where}: epoch {epoch} equals epoch 0, so there is no trajectory; code that keeps `p.detach().cpu()` of a "
                "network on a CPU saves its last weights for every epoch; valid: checkpoints that were copied (`.clone()`)"
            )


def vector(tensors: Sequence[Tensor]) -> Vector:
    """Return a copy of all weights of one checkpoint in module order, shape (P,)."""
    whole_P: Vector = torch.cat([t.detach().reshape(-1) for t in tensors]).numpy()
    return whole_P


def tensors_of(meta: BufferMeta, whole_P: Vector) -> list[Tensor]:
    """Return the parameters in module order, each a tensor with its own storage on the memory of ``whole_P``."""
    result, begin = [], 0
    for _, shape in meta.parameters:
        end = begin + math.prod(shape)
        result.append(torch.from_numpy(whole_P[begin:end].reshape(shape)))
        begin = end
    return result


def classifier_mask(meta: BufferMeta) -> npt.NDArray[np.bool_]:
    """Return the boolean mask of the classifier's weights in the whole network, shape (P,)."""
    chosen = set(meta.classifier_parameters)
    return np.concatenate([np.full(math.prod(shape), name in chosen) for name, shape in meta.parameters])


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.layout).removeprefix('torch.')} tensor of {value.dtype} on {value.device}"
    if isinstance(value, list | tuple):
        kinds = sorted({type(each).__name__ for each in value})
        return f"a {type(value).__name__} of {len(value)}" + (f" ({', '.join(kinds[:3])})" if kinds else "")
    return f"a {type(value).__name__}"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a single number"
