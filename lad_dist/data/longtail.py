"""Long-tailed subset of a balanced training set: how many images each class keeps, and which.

Source: Zhao et al., "Distilling Long-tailed Datasets", arXiv 2408.14506, which takes the exponential profile from Cui
et al., "Class-Balanced Loss", arXiv 1901.05555.

K classes, c class index (0 is the head), n_c images of class c, N images in total.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from lad_dist.errors import DataError

Indices = npt.NDArray[np.int64]

_ORDER_SEED = 42  # of the published subsets
MANY_SHOT_ABOVE, FEW_SHOT_BELOW = 100, 20  # Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", 2019


def exponential_counts(
    n_max: int, num_classes: int, factor: float, class_names: Sequence[str] | None = None
) -> tuple[int, ...]:
    """Return images per class, n_c = trunc(n_max * r^(c/(K-1))) with r = 1/factor; a single class keeps n_max.

    Raises ``DataError`` if a class would keep no image, naming the largest usable factor.
    """
    if n_max < 1 or num_classes < 1 or not factor >= 1:
        raise DataError(
            f"data.imbalance_factor: {factor:g} with data.n_max {n_max} and {num_classes} classes; "
            "valid: a factor of at least 1, n_max of at least 1, at least one class"
        )
    rate = 1.0 / factor
    counts = []
    for c in range(num_classes):
        kept = n_max * rate ** (c / max(num_classes - 1, 1))
        # 49 * (1/49) is 0.999... in floating point: values below an integer by rounding only count as that integer.
        # (This changes nothing at any published rate.)
        counts.append(int(kept * (1 + 1e-12)))
    if counts[-1] < 1:
        empty = counts.index(0)
        raise DataError(
            f"data.imbalance_factor: {factor:g} leaves class {_name(empty, class_names)} without images, as the "
            f"largest class has {n_max}; the largest usable factor is {n_max}"
        )
    return tuple(counts)


def within_class_order(n: int) -> Indices:
    """Return the order in which a class of n images is kept: the same permutation for every class of that size."""
    return np.random.RandomState(_ORDER_SEED).permutation(n).astype(np.int64)


def log_priors(counts: Sequence[int]) -> npt.NDArray[np.float64]:
    """Return log pi_y of every class by its images, shape (K,); a class without images gets a very small finite value."""
    n_K = np.asarray(counts, dtype=np.float64)
    priors_K: npt.NDArray[np.float64] = np.log(np.maximum(n_K, 1e-12) / n_K.sum())
    return priors_K


def positions_by_class(labels_N: Indices, num_classes: int) -> list[Indices]:
    """Return the ascending positions of each class's images, for classes 0 to ``num_classes`` - 1.

    One sort for all classes: looking through the labels for each takes minutes for some thousand classes.
    """
    ordered = np.argsort(labels_N, kind="stable").astype(np.int64)
    ends = np.searchsorted(labels_N[ordered], np.arange(num_classes + 1))
    return [ordered[start:end] for start, end in pairwise(ends)]


def select(
    labels_N: Indices, counts: Sequence[int], held_out: int = 0, class_names: Sequence[str] | None = None
) -> Indices:
    """Return indices of the kept images, class after class, within a class in the order of ``within_class_order``.

    labels_N: the label of every image, in data set order. counts: images to keep of each class. held_out: the number
    per class that ``hold_out`` was asked to take from the end of each class's order. Raises ``DataError`` if a class
    has fewer images.
    """
    kept = []
    for c, (count, positions) in enumerate(zip(counts, positions_by_class(labels_N, len(counts)), strict=True)):
        reserved = reserve_of(len(positions), held_out)
        available = len(positions) - reserved
        if count > available:
            reserve = f" after {reserved} were held out for validation" if reserved else ""
            raise DataError(
                f"data.n_max: class {_name(c, class_names)} has {available} images{reserve}, but {count} are "
                "needed; valid: a smaller n_max or validation_per_class, or a larger imbalance_factor"
            )
        kept.append(positions[within_class_order(len(positions))[:count]])
    return np.concatenate(kept).astype(np.int64)


def reserve_of(count: int, per_class: int) -> int:
    """Return how many of a class's ``count`` images to hold out, at most ``per_class``; one stays for training."""
    return min(per_class, count - 1)


def hold_out(labels_N: Indices, per_class: int, num_classes: int) -> Indices:
    """Return indices of the validation images, class after class: the last ``per_class`` of each class's order.

    Smaller classes keep one training image and give the others; a class of one gives none. The training set takes a
    class's order from its start, so holding images out does not change its selection. Raises ``DataError`` if images
    are requested and no class can give any.
    """
    held = []
    for positions in positions_by_class(labels_N, num_classes):
        reserved = reserve_of(len(positions), per_class)
        held.append(positions[within_class_order(len(positions))[len(positions) - reserved :]])
    held_N = np.concatenate(held).astype(np.int64)
    if per_class and not len(held_N):
        raise DataError(
            f"data.validation_per_class: {per_class}, but every class has one image, which is kept to train on; valid: 0"
        )
    return held_N


def head_medium_tail(counts: Sequence[int]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return two groupings of the classes, each a dict of class indices in ascending order.

    ``by_count``: many (more than 100 training images), medium (20 to 100), few (fewer than 20). ``by_thirds``: the
    classes ordered by count, largest first (ties in label order): head and tail are floor(K/3) classes each, medium the
    rest.
    """
    order = sorted(range(len(counts)), key=lambda c: -counts[c])
    third = len(counts) // 3
    return {
        "by_count": {
            "many": tuple(c for c, n in enumerate(counts) if n > MANY_SHOT_ABOVE),
            "medium": tuple(c for c, n in enumerate(counts) if FEW_SHOT_BELOW <= n <= MANY_SHOT_ABOVE),
            "few": tuple(c for c, n in enumerate(counts) if n < FEW_SHOT_BELOW),
        },
        "by_thirds": {
            "head": tuple(sorted(order[:third])),
            "medium": tuple(sorted(order[third : len(order) - third])),
            "tail": tuple(sorted(order[len(order) - third :])),
        },
    }


def _name(c: int, class_names: Sequence[str] | None) -> str:
    return f"{c}" if class_names is None or class_names[c] == str(c) else f"{c} ({class_names[c]})"
