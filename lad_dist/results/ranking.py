"""DD-Ranking's scores of a distilled set: what its images are worth apart from soft labels and augmentation.

Source: Li et al., "DD-Ranking: Rethinking the Evaluation of Dataset Distillation", arXiv 2505.13300, and its code
(github.com/NUS-HPC-AI-Lab/DD-Ranking). With accuracies as fractions in [0, 1]:

    HLR   = real_hard - synthetic_hard            hard label recovery: what is lost against the real set
    IOR   = synthetic_any - random_any            improvement over random images, trained in the same way
    LRS   = scaled(w IOR - (1 - w) HLR)           label-robust score
    ARS   = scaled(g (synthetic_aug - random_aug) + (1 - g) (synthetic_noaug - random_noaug))   augmentation-robust score
    scaled(a) = (e^a - e^-1) / (e - e^-1), which takes [-1, 1] to [0, 1]

Under a long tail, here: *real* is the whole long-tailed training set with hard labels (source ``full``), not the balanced set
that it was cut from, because that is all the data there is. *Random* are IPC images of every class drawn from the long-tailed
set, balanced as the distilled set is, a class with fewer images giving them repeatedly, and with a teacher's soft labels as
DD-Ranking's have (source ``random-soft``: mean logits of the experts; ``random-soft-plain`` without augmentation). DD-Ranking
searches the learning rate of random images; here ``evaluate.tune_lr`` does, for all sources alike. *Synthetic hard* are the
distilled images with their class as label (source ``distilled-hard``). Accuracy is on the test set; where that is balanced,
overall accuracy is balanced accuracy, so that head classes count no more than others. A high-IPC set may surpass the real set,
whose networks see a tail: HLR is then negative, and counts in favour.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from lad_dist.results import of_one_way


def label_robust_score(
    real_hard: float, synthetic_hard: float, synthetic_any: float, random_any: float, weight: float = 0.5
) -> float:
    """LRS in [0, 1]. ``..._any`` are trained in the method's own way, with its kind of labels; accuracies in [0, 1]."""
    _check(real_hard, synthetic_hard, synthetic_any, random_any, weight)
    return _scaled(weight * (synthetic_any - random_any) - (1 - weight) * (real_hard - synthetic_hard))


def augmentation_robust_score(
    synthetic_augmented: float,
    random_augmented: float,
    synthetic_plain: float,
    random_plain: float,
    weight: float = 0.5,
) -> float:
    """ARS in [0, 1], from accuracies in [0, 1] with the method's augmentation and without any (``..._plain``)."""
    _check(synthetic_augmented, random_augmented, synthetic_plain, random_plain, weight)
    return _scaled(weight * (synthetic_augmented - random_augmented) + (1 - weight) * (synthetic_plain - random_plain))


def scores(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """By architecture LRS and ARS from a run's rows (means of overall accuracy over seeds), each where its networks are there.

    LRS needs the sources full, distilled-hard, distilled, random-soft; ARS distilled, random-soft, distilled-plain,
    random-soft-plain. Of a source that was measured in several ways, the way of most of its rows counts.
    """
    by: dict[tuple[str, str], list[float]] = {}
    for row in of_one_way(rows):  # type: ignore[arg-type]
        by.setdefault((row["architecture"], row["source"]), []).append(row["overall"])
    means = {key: statistics.fmean(values) for key, values in by.items()}
    found: dict[str, dict[str, float]] = {}
    for architecture in dict.fromkeys(name for name, _ in means):
        of = {source: mean for (name, source), mean in means.items() if name == architecture}
        lrs = [of.get(s) for s in ("full", "distilled-hard", "distilled", "random-soft")]
        ars = [of.get(s) for s in ("distilled", "random-soft", "distilled-plain", "random-soft-plain")]
        mine = {}
        if None not in lrs:
            mine["LRS"] = label_robust_score(*(x for x in lrs if x is not None))
        if None not in ars:
            mine["ARS"] = augmentation_robust_score(*(x for x in ars if x is not None))
        if mine:
            found[architecture] = mine
    return found


def _scaled(value: float) -> float:
    return (math.exp(value) - math.exp(-1)) / (math.e - math.exp(-1))


def _check(*fractions: float) -> None:
    assert all(0 <= f <= 1 for f in fractions), "accuracies and weights are fractions in [0, 1]"
