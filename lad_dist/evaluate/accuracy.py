"""Accuracy overall, per class, and by head, medium and tail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lad_dist.data.longtail import head_medium_tail
from lad_dist.data.prepared import PreparedSet


@dataclass(frozen=True)
class Accuracy:
    """Fractions in [0, 1]. ``head``, ``medium`` and ``tail`` are means of the classes' accuracies over the thirds of the
    classes by training count; ``by_count`` the same over many (> 100), medium (20 to 100) and few (< 20) training images,
    None for an empty group."""

    overall: float
    per_class: tuple[float, ...]
    head: float | None
    medium: float | None
    tail: float | None
    by_count: dict[str, float | None]


@torch.no_grad()
def accuracy(
    logits_of: Callable[[Tensor], Tensor], images: PreparedSet, counts: Sequence[int], batch: int = 512
) -> Accuracy:
    """Top-1 accuracy of ``logits_of`` on a set; ``counts`` are the training images of each class."""
    classes = len(counts)
    right_K, total_K = torch.zeros(classes), torch.zeros(classes)
    for rows in torch.arange(len(images)).split(batch):
        images_BCHH, labels_B = images.batch(rows)
        correct_B = (logits_of(images_BCHH).argmax(dim=1) == labels_B).cpu().float()
        right_K.index_add_(0, labels_B.cpu(), correct_B)
        total_K.index_add_(0, labels_B.cpu(), torch.ones_like(correct_B))
    per_class = (right_K / total_K.clamp_min(1)).tolist()
    groups = head_medium_tail(counts)

    def mean(members: Sequence[int]) -> float | None:
        return sum(per_class[c] for c in members) / len(members) if members else None

    thirds = {name: mean(members) for name, members in groups["by_thirds"].items()}
    return Accuracy(
        overall=float(right_K.sum() / total_K.sum()),
        per_class=tuple(per_class),
        head=thirds["head"],
        medium=thirds["medium"],
        tail=thirds["tail"],
        by_count={name: mean(members) for name, members in groups["by_count"].items()},
    )
