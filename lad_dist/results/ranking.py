"""DD-Ranking scores of a distilled set: the value of its images apart from soft labels and augmentation.

Source: Li et al., "DD-Ranking: Rethinking the Evaluation of Dataset Distillation", arXiv 2505.13300, and its code
(github.com/NUS-HPC-AI-Lab/DD-Ranking). With accuracies as fractions in [0, 1]:

    HLR   = real_hard - synthetic_hard            hard label recovery: loss against the real set
    IOR   = synthetic_any - random_any            improvement over random images, trained in the same way
    LRS   = scaled(w IOR - (1 - w) HLR)           label-robust score
    ARS   = scaled(g (synthetic_aug - random_aug) + (1 - g) (synthetic_noaug - random_noaug))  augmentation-robust score
    scaled(a) = (e^a - e^-1) / (e - e^-1), which maps [-1, 1] to [0, 1]

Under a long tail, here: *real* is the whole long-tailed training set with hard labels (source ``full``), not the
balanced set it was cut from, since no other data are available. *Random* are IPC images per class drawn from the
long-tailed set, balanced like the distilled set (classes with fewer images repeat them), with a teacher's soft labels
as in DD-Ranking (source ``random-soft``: mean logits of the experts; ``random-soft-plain`` without augmentation).
DD-Ranking searches the learning rate of random images; here ``evaluate.tune_lr`` does, for all sources alike.
*Synthetic hard* are the distilled images with their class as label (source ``distilled-hard``). Accuracy is on the test
set; if that is balanced, overall accuracy is balanced accuracy, so head classes weigh no more than others. A high-IPC
set may surpass the real set, whose networks are trained on a long tail: HLR is then negative and raises the score.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lad_dist.results import of_one_way
from lad_dist.results.paired import unlike


def label_robust_score(
    real_hard: float, synthetic_hard: float, synthetic_any: float, random_any: float, weight: float = 0.5
) -> float:
    """Return LRS in [0, 1] from accuracies in [0, 1]; ``..._any`` use the method's own training and kind of labels."""
    _check(real_hard, synthetic_hard, synthetic_any, random_any, weight)
    return _scaled(weight * (synthetic_any - random_any) - (1 - weight) * (real_hard - synthetic_hard))


def augmentation_robust_score(
    synthetic_augmented: float,
    random_augmented: float,
    synthetic_plain: float,
    random_plain: float,
    weight: float = 0.5,
) -> float:
    """Return ARS in [0, 1] from accuracies in [0, 1] with the method's augmentation and without (``..._plain``)."""
    _check(synthetic_augmented, random_augmented, synthetic_plain, random_plain, weight)
    return _scaled(weight * (synthetic_augmented - random_augmented) + (1 - weight) * (synthetic_plain - random_plain))


def scores(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return LRS and ARS by architecture from a run's rows (mean overall accuracy over seeds), where available.

    LRS needs the sources full, distilled-hard, distilled, random-soft; ARS distilled, random-soft, distilled-plain,
    random-soft-plain. If a source was measured in several ways, the most frequent one counts.
    """
    by: dict[tuple[str, str], list[float]] = {}
    same = of_one_way(rows)  # type: ignore[arg-type]
    for row in same:
        by.setdefault((row["architecture"], row["source"]), []).append(row["overall"])
    means = {key: statistics.fmean(values) for key, values in by.items()}
    found: dict[str, dict[str, float]] = {}
    for architecture in dict.fromkeys(name for name, _ in means):
        of = {source: mean for (name, source), mean in means.items() if name == architecture}
        lrs = [of.get(s) for s in ("full", "distilled-hard", "distilled", "random-soft")]
        ars = [of.get(s) for s in ("distilled", "random-soft", "distilled-plain", "random-soft-plain")]
        mine = {}
        mine_rows = [row for row in same if row["architecture"] == architecture]
        if None not in lrs and _alike(mine_rows, ("distilled", "distilled-hard", "random-soft")):
            mine["LRS"] = label_robust_score(*(x for x in lrs if x is not None))
        plain = ("distilled-plain", "random-soft-plain")
        if None not in ars and _alike(mine_rows, ("distilled", "random-soft")) and _alike(mine_rows, plain):
            mine["ARS"] = augmentation_robust_score(*(x for x in ars if x is not None))
        if mine:
            found[architecture] = mine
    return found


def _alike(rows: Sequence[Mapping[str, Any]], sources: tuple[str, ...]) -> bool:
    """Return whether networks on ``sources`` were trained alike but for their labels."""
    return set(unlike([row for row in rows if row["source"] in sources])) <= {"labels"}


def _scaled(value: float) -> float:
    return (math.exp(value) - math.exp(-1)) / (math.e - math.exp(-1))


def _check(*fractions: float) -> None:
    assert all(0 <= f <= 1 for f in fractions), "accuracies and weights are fractions in [0, 1]"
