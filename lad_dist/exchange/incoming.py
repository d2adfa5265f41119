"""A distilled set read for import, and the interpretation of its labels.

S images, K classes, C channels, H side.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lad_dist.distilled import DistilledSet, hard_logits
from lad_dist.errors import DistilledError
from lad_dist.exchange.about import about
from lad_dist.labeller import Labeller

Labels = Literal["logits", "probabilities", "indices"]
LABELS: tuple[Labels, ...] = ("logits", "probabilities", "indices")
_SMALLEST = 1e-30  # smaller probabilities are not recovered from their logarithm by a float32 softmax
_SUM_WITHIN = 1e-3  # tolerance on the sum 1 of a row of probabilities; half precision satisfies it


@dataclass(frozen=True)
class Incoming:
    """An imported set. ``labels``: by ``kind``, logits or probabilities float32 (S, K), or class indices int64 (S,)."""

    where: Path | str
    images_SCHH: Tensor
    labels: Tensor
    kind: Labels
    labels_from: str  # the file or column, for messages
    lr: float
    source: str  # name and checksum, kept in the imported set
    classes_S: Tensor | None = None  # class of each image, if the file has it
    about: dict[str, Any] | None = None  # metadata of our own exports
    teachers: Labeller | None = None

    def logits(self, classes: int) -> Tensor:
        """Return label logits, float32 (S, K), whose softmax is the label."""
        if self.kind == "logits":
            return self.labels
        if self.kind == "probabilities":
            return self.labels.clamp_min(_SMALLEST).log()
        return hard_logits(self.labels, classes)


def of_set(distilled: DistilledSet, where: str) -> Incoming:
    """Return a set of lad-dist's own, from the folder or address ``where``, bit for bit."""
    digest = hashlib.sha256(distilled.images.contiguous().numpy().data)
    digest.update(distilled.label_logits.contiguous().numpy().data)
    return Incoming(
        where,
        distilled.images,
        distilled.label_logits,
        "logits",
        f"{where}, label_logits",
        distilled.lr,
        f"{where} sha256:{digest.hexdigest()}",
        distilled.labels.long(),
        about(distilled, "parquet"),
        distilled.teachers,
    )


def kind_of(labels: Tensor, asked: Labels | None, where: str) -> Labels:
    """Return the kind of a label tensor: ``asked`` if given and possible, else the only possible kind.

    Raises DistilledError where ``asked`` is not possible, or the kind is ambiguous.
    """
    shape = f"{labels.dtype} of shape {tuple(labels.shape)}".removeprefix("torch.")
    whole = not labels.is_floating_point() or bool((labels == labels.round()).all())
    if labels.ndim == 1:
        if asked not in (None, "indices"):
            raise DistilledError(
                f"{where}: holds {shape}; {asked} have shape (images, classes); valid: --labels indices"
            )
        if not whole:
            raise DistilledError(
                f"{where}: holds {shape} with fractions; valid: whole class indices, or (images, classes)"
            )
        return "indices"
    if labels.ndim != 2:
        raise DistilledError(f"{where}: holds {shape}; valid: (images,) class indices, or (images, classes)")
    if asked == "indices":
        raise DistilledError(
            f"{where}: holds {shape}; class indices have shape (images,); valid: --labels logits or probabilities"
        )
    fault = _not_probabilities(labels)
    if asked == "probabilities" and fault:
        raise DistilledError(
            f"{where}: is not probabilities: {fault}; valid: rows of 0 or more that sum to 1, or --labels logits"
        )
    if asked is None and not fault:
        raise DistilledError(
            f"{where}: every row sums to 1, as probabilities do, while the code of DATM and LAD reads logits; say which with "
            "--labels probabilities or --labels logits"
        )
    return asked or "logits"


def _not_probabilities(labels_SK: Tensor) -> str:
    """Return why these are not probabilities; empty where they may be."""
    values = labels_SK.double()
    if bool((values < 0).any()):
        return f"the smallest value is {float(values.min()):.4g}"
    worst = values.sum(1)[(values.sum(1) - 1).abs().argmax()] if len(values) else torch.tensor(1.0)
    return f"a row sums to {float(worst):.4g}" if abs(float(worst) - 1) > _SUM_WITHIN else ""
