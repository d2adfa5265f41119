"""Gradient alignment: how closely the student follows the expert, per phase and class group.

An expert's weights are biased by its long-tailed training set, and a student on a balanced synthetic set cannot follow
them equally well for every class (LAD: Zhao et al., arXiv 2408.14506). Row c of the last linear layer (and its bias c)
belongs to class c, so the rows of head, medium and tail classes show which classes' movement the student's gradients
reproduce.

Shapes: P parameters of the whole network, K classes, F features of the last layer's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, nan, sqrt

import torch
from torch import Tensor

from lad_dist.data.longtail import head_medium_tail
from lad_dist.models.layout import Layout

GROUPS = ("head", "medium", "tail")
BACKBONE = "backbone"


def alignment(
    start_P: Tensor, target_P: Tensor, gradient_sum_P: Tensor, alpha: Tensor, layout: Layout, counts: Sequence[int]
) -> dict[str, float]:
    """Return cosine and norm ratio of the student's displacement -alpha G to the expert's theta* - theta_t, per part.

    Keys are ``cosine_PART`` and ``norm_ratio_PART``. PART is ``backbone`` (all weights before the last layer), or
    ``head``, ``medium`` or ``tail``: the last layer's rows (weights and bias) of these classes, which are thirds of the
    classes by ``counts`` (K,), training images per class. Sums are in double precision, values have four significant
    digits.

    Undefined values are omitted: a cosine where student or expert did not move (the backbone in the classifier phase),
    a norm ratio where the expert did not, and a group without classes. Has no side effects; waits for the device once.
    """
    classes = len(counts)
    spans = [layout.span(name) for name in layout.classifier]
    rows_KF = torch.cat([_displacements(start_P, target_P, gradient_sum_P, s).view(2, classes, -1) for s in spans], 2)
    before = _displacements(start_P, target_P, gradient_sum_P, layout.span("backbone"))
    sums = torch.cat([_products(rows_KF), _products(before).unsqueeze(1)], 1)  # (3, K + 1)
    step, products = float(alpha), sums.tolist()
    members = {BACKBONE: (classes,), **head_medium_tail(counts)["by_thirds"]}
    figures: dict[str, float] = {}
    for part in (*GROUPS, BACKBONE):
        dot, summed, expert = (sum(values[i] for i in members[part]) for values in products)
        student_norm, expert_norm = step * sqrt(summed), sqrt(expert)
        cosine = -step * dot / (student_norm * expert_norm) if student_norm * expert_norm > 0 else nan
        ratio = student_norm / expert_norm if expert_norm > 0 else nan
        figures |= {f"cosine_{part}": cosine, f"norm_ratio_{part}": ratio}
    return {name: float(f"{value:.4g}") for name, value in figures.items() if isfinite(value)}


def _displacements(start_P: Tensor, target_P: Tensor, gradient_sum_P: Tensor, span: slice) -> Tensor:
    """Return (2, length of the span): G and the expert's displacement."""
    return torch.stack([gradient_sum_P[span], target_P[span] - start_P[span]]).detach().double()


def _products(pairs: Tensor) -> Tensor:
    """Reduce (2, ..., F) to (3, ...): G . expert, G . G and expert . expert."""
    summed, expert = pairs
    return torch.stack([(summed * expert).sum(-1), summed.square().sum(-1), expert.square().sum(-1)])
