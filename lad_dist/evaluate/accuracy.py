"""Accuracy of a network: overall, per class and per group of classes; calibration; confusion matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lad_dist.data.longtail import head_medium_tail
from lad_dist.data.prepared import PreparedSet

ECE_BINS = 15
MATRIX_CLASSES = 200  # up to which a row holds its whole confusion matrix


@dataclass(frozen=True)
class Accuracy:
    """Accuracy figures of one network, as fractions in [0, 1].

    ``balanced`` is the mean accuracy over the classes present in the set; ``per_class`` is 0 for absent classes, which
    are excluded from all means. ``head``, ``medium`` and ``tail`` are means of class accuracies over thirds of the
    classes, ordered by training count; ``by_count`` groups by many (> 100), medium (20 to 100) and few (< 20) training
    images. Empty groups are None. ``ece`` is the expected calibration error over 15 equal confidence bins.
    ``confusion[true][predicted]`` counts images. With more than ``MATRIX_CLASSES`` classes it is empty, as its size
    would grow with their square; ``confusion_pairs`` then holds (true, predicted, images) wherever there are images.
    """

    overall: float
    balanced: float
    per_class: tuple[float, ...]
    head: float | None
    medium: float | None
    tail: float | None
    by_count: dict[str, float | None]
    ece: float
    confusion: tuple[tuple[int, ...], ...]
    confusion_pairs: tuple[tuple[int, int, int], ...] = ()


@torch.no_grad()
def accuracy(
    logits_of: Callable[[Tensor], Tensor], images: PreparedSet, counts: Sequence[int], batch: int = 512
) -> Accuracy:
    """Measure the top-1 predictions of ``logits_of`` on a set; ``counts`` are the training images of each class."""
    classes = len(counts)
    confidence, right, told = [], [], []
    for rows in torch.arange(len(images)).split(batch):
        images_BCHH, labels_B = images.batch(rows)
        logits_BK = logits_of(images_BCHH)
        said_B = logits_BK.argmax(dim=1)
        told.append((labels_B * classes + said_B).cpu())
        confidence.append(logits_BK.softmax(dim=1).gather(1, said_B.unsqueeze(1)).squeeze(1).cpu())
        right.append((said_B == labels_B).cpu())
    pair_J, images_J = torch.cat(told).unique(return_counts=True)  # J pairs (true, predicted)
    true_J, said_J = pair_J // classes, pair_J % classes
    total_K = torch.zeros(classes, dtype=torch.int64).index_add_(0, true_J, images_J)
    right_K = torch.zeros(classes, dtype=torch.int64).index_add_(0, true_J, images_J * (true_J == said_J))
    per_class = (right_K / total_K.clamp_min(1)).tolist()
    groups = head_medium_tail(counts)

    def mean(members: Sequence[int]) -> float | None:
        held = [per_class[c] for c in members if total_K[c] > 0]
        return sum(held) / len(held) if held else None

    thirds = {name: mean(members) for name, members in groups["by_thirds"].items()}
    return Accuracy(
        overall=float(right_K.sum() / total_K.sum()),
        balanced=float((right_K / total_K.clamp_min(1))[total_K > 0].double().mean()),
        per_class=tuple(per_class),
        head=thirds["head"],
        medium=thirds["medium"],
        tail=thirds["tail"],
        by_count={name: mean(members) for name, members in groups["by_count"].items()},
        ece=calibration_error(torch.cat(confidence), torch.cat(right)),
        confusion=_matrix(pair_J, images_J, classes) if classes <= MATRIX_CLASSES else (),
        confusion_pairs=()
        if classes <= MATRIX_CLASSES
        else tuple(zip(true_J.tolist(), said_J.tolist(), images_J.tolist(), strict=True)),
    )


def _matrix(pair_J: Tensor, images_J: Tensor, classes: int) -> tuple[tuple[int, ...], ...]:
    counts = torch.zeros(classes * classes, dtype=torch.int64).index_add_(0, pair_J, images_J)
    return tuple(tuple(row) for row in counts.view(classes, classes).tolist())


def calibration_error(confidence_N: Tensor, right_N: Tensor, bins: int = ECE_BINS) -> float:
    """Return the expected calibration error: sum over bins of |B| / N * |accuracy(B) - mean confidence(B)|.

    Bins are ((m - 1) / M, m / M] (Guo et al., "On Calibration of Modern Neural Networks", arXiv 1706.04599, equation
    3).
    """
    confidence_N = confidence_N.double()
    which_N = (confidence_N * bins).ceil().long().clamp(1, bins) - 1
    gap_M = torch.zeros(bins, dtype=torch.float64).index_add_(0, which_N, right_N.double() - confidence_N)
    return float(gap_M.abs().sum() / len(confidence_N))
