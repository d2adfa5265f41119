"""Image order of an expert: a pure function of (seed, expert, stage, epoch)."""

from __future__ import annotations

import numpy as np

from lad_dist.data.longtail import positions_by_class


def shuffled_order(rng: np.random.Generator, count: int) -> np.ndarray:
    """Representation stage: each of ``count`` images once, shuffled."""
    return rng.permutation(count)


def class_aware_order(rng: np.random.Generator, labels_N: np.ndarray, draws_per_class: int) -> np.ndarray:
    """Classifier stage: class-aware sampling (Kang et al., ICLR 2020, arXiv 1910.09217).

    Classes come in shuffled cycles; each turn of a class takes ``draws_per_class`` consecutive draws from that class's
    own shuffled cycles. The length is (size of the largest class) * K draws; the last turn may be truncated.
    """
    members = positions_by_class(labels_N, int(labels_N.max()) + 1)
    classes = len(members)
    length = max(len(m) for m in members) * classes
    turns = -(-length // draws_per_class)
    turns_of = positions_by_class(_cycles(rng, np.arange(classes), turns), classes)
    drawn = np.empty(turns * draws_per_class, dtype=np.int64)
    by_turn = drawn.reshape(turns, draws_per_class)
    for positions, mine in zip(members, turns_of, strict=True):
        by_turn[mine] = _cycles(rng, positions, len(mine) * draws_per_class).reshape(len(mine), draws_per_class)
    return drawn[:length]


def _cycles(rng: np.random.Generator, items: np.ndarray, length: int) -> np.ndarray:
    """Repeat ``items``, reshuffled for every pass, and truncate to ``length``."""
    passes = -(-length // len(items))
    return np.concatenate([rng.permutation(items) for _ in range(passes)])[:length] if passes else items[:0]
