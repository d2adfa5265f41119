"""images_best.pt, labels_best.pt, lr_best.pt: the best iteration as saved by the MTT, DATM and LAD code.

    images_best.pt   float32 (S, C, H, H), whitened, class after class
    labels_best.pt   float32 (S, K), logits; the loss applies the softmax (DATM, LAD); int64 (S,), classes (MTT)
    lr_best.pt       float32 (), the learned learning rate; a Python float in some versions; MTT saves none

Sources: ``distill.py`` of GeorgeCazenavette/mtt-distillation; ``distill/DATM.py`` and ``distill/evaluation.py`` of
NUS-HPC-AI-Lab/DATM, which reads the three files with ``torch.load``; ``distill/DAM-ED_tesla.py`` of ichbill/LTDD, which
writes them into a folder ``Normal``.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lad_dist.distilled import DistilledSet
from lad_dist.errors import DistilledError
from lad_dist.exchange.incoming import Incoming, Labels, kind_of
from lad_dist.torch_file import check_records, refused

IMAGES, LABELS, LR = "images_best.pt", "labels_best.pt", "lr_best.pt"
_FORM = "a tensor as torch.save writes it"


def write(distilled: DistilledSet, folder: Path) -> None:
    """Write the three files: hard labels in MTT's form, others as logits."""
    labels = distilled.labels.long() if distilled.is_hard else distilled.label_logits.float()
    tensors = {IMAGES: distilled.images.float(), LABELS: labels, LR: torch.tensor(distilled.lr, dtype=torch.float32)}
    for name, tensor in tensors.items():
        with (folder / name).open("wb") as file:
            try:
                torch.save(tensor.detach().cpu().contiguous().clone(), file)
            except RuntimeError as error:  # on a full disk, torch reports a wrong file position
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise


def read(folder: Path, lr: float | None = None, labels: Labels | None = None) -> Incoming:
    """Read the untrusted files of a folder; only tensors and numbers are unpickled.

    ``lr`` replaces lr_best.pt; ``labels`` gives the kind of labels_best.pt where it is ambiguous.

    Raises:
        DistilledError: a file is missing, damaged, holds code or other content, or the three are inconsistent.
    """
    if not folder.is_dir():
        raise DistilledError(f"{folder}: is not a folder; valid: one with {IMAGES}, {LABELS} and {LR}")
    images = _tensor(folder / IMAGES)
    if images.ndim != 4 or not images.is_floating_point() or len(images) == 0:
        raise DistilledError(
            f"{folder / IMAGES}: holds {_kind(images)}; valid: floating-point images of shape (images, channels, side, side)"
        )
    given = _tensor(folder / LABELS)
    for name, tensor in ((IMAGES, images), (LABELS, given)):
        wrong = int((~tensor.isfinite()).sum())
        if wrong:
            raise DistilledError(f"{folder / name}: {wrong} values are NaN or infinite; valid: finite numbers")
    kind = kind_of(given, labels, str(folder / LABELS))
    if len(given) != len(images):
        raise DistilledError(
            f"{folder / LABELS}: has {len(given)} labels where {IMAGES} has {len(images)} images; valid: one for each"
        )
    names = [IMAGES, LABELS]
    if lr is None:
        lr = _rate(folder / LR)
        names.append(LR)
    return Incoming(
        folder,
        images.float().contiguous(),
        given.long() if kind == "indices" else given.float().contiguous(),
        kind,
        str(folder / LABELS),
        lr,
        "; ".join(f"{name} sha256:{hashlib.sha256((folder / name).read_bytes()).hexdigest()}" for name in names),
    )


def check_rate(lr: float, where: str) -> float:
    """Return ``lr`` if it is finite and above 0. Raises DistilledError."""
    if not (math.isfinite(lr) and lr > 0):
        raise DistilledError(f"{where}: the learning rate is {lr:g}; valid: a finite number above 0")
    return lr


def _rate(path: Path) -> float:
    if not path.exists():
        raise DistilledError(
            f"{path}: is missing, so the learning rate is not known; MTT's code saves none; valid: the file, or --lr RATE"
        )
    content = _load(path)
    if isinstance(content, Tensor) and content.numel() == 1 and not content.is_complex():
        content = content.item()
    if isinstance(content, bool) or not isinstance(content, int | float):
        raise DistilledError(f"{path}: holds {_kind(content)}; valid: one number, or say it with --lr RATE")
    return check_rate(float(content), str(path))


def _tensor(path: Path) -> Tensor:
    """Load a dense real tensor, on the CPU and detached. Raises DistilledError."""
    if not path.exists():
        raise DistilledError(f"{path}: is missing; valid: a folder with {IMAGES}, {LABELS} and {LR}")
    content = _load(path)
    if (
        not isinstance(content, Tensor)
        or content.layout != torch.strided
        or content.is_complex()
        or content.is_quantized
    ):
        raise DistilledError(f"{path}: holds {_kind(content)}; valid: one dense tensor, as torch.save writes it")
    return content.detach()


def _load(path: Path) -> Any:
    """Load a torch.save file that holds only tensors and plain values. Raises DistilledError."""
    with refused(path, DistilledError, "a distilled set needs nothing but tensors", _FORM):
        check_records(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(content, Tensor) and content.is_meta:
            raise ValueError("its tensor is of torch's device meta and has no values")
        return content


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        layout = str(value.layout).removeprefix("torch.")
        return f"a {layout} tensor of {str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
