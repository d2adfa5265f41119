"""The initial synthetic set: real images that an expert classifies correctly, with the experts' logits as soft labels.

Shapes: E experts, S images, K classes, N training images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lad_dist.data import augment
from lad_dist.data.herding import herd
from lad_dist.data.longtail import positions_by_class
from lad_dist.distilled import hard_logits
from lad_dist.recipe import AugmentConfig
from lad_dist.seeds import rng

PASS = 1024  # images of one forward pass: rows are split at its multiples, so that parts have the bits of the whole
MOST_BYTES = 2**30  # of the experts' logits at a time
_ATTEMPTS = 8  # augmentation draws per copy until it differs


@dataclass(frozen=True)
class InitialSet:
    """The initial set, class-major: ``indices_S`` into the training set, ``logits_SK`` of the labels, and statistics.

    ``without_expert`` counts the images that no expert classified correctly, labelled with their class's mean logits;
    ``repeated`` the images used more than once because too few of their class were classified correctly
    (``vary_repeats``).
    """

    indices_S: np.ndarray
    logits_SK: Tensor
    without_expert: int
    repeated: int


def rows_at_a_time(experts: int, classes: int) -> int:
    """Return how many images' logits of several experts to hold at a time: a multiple of ``PASS``."""
    return max(1, MOST_BYTES // (4 * experts * classes * PASS)) * PASS


def label_logits(expert_logits_ESK: Tensor, true_S: Tensor) -> tuple[Tensor, Tensor]:
    """Return (logits (S, K), number of correct experts (S,)).

    The logits are the mean over the experts that classify an image correctly; zeros, a uniform label, if none does.
    """
    correct_ES = expert_logits_ESK.argmax(dim=2) == true_S
    weights_ES1 = correct_ES.to(expert_logits_ESK.dtype).unsqueeze(2)
    count_S = correct_ES.sum(dim=0)
    mean_SK = (expert_logits_ESK * weights_ES1).sum(dim=0) / count_S.clamp_min(1).unsqueeze(1)
    return mean_SK, count_S


def choose_images(
    predicted_N: Tensor | None,
    labels_N: np.ndarray,
    ipc: int,
    classes: int,
    seed: int,
    features_ND: Tensor | None = None,
) -> tuple[np.ndarray, int]:
    """Return (indices (classes * ipc,) class-major, number of repeats).

    Chooses per class among the images that the chooser classifies correctly (by ``predicted_N``), at random or, with
    ``features_ND``, by herding. Fewer than ``ipc`` of them are repeated in turn. If there are none (or no chooser),
    takes random images of the class.
    """
    correct_N = np.ones(len(labels_N), dtype=bool)
    if predicted_N is not None:
        correct_N = predicted_N.cpu().numpy() == labels_N
    chosen, repeated = [], 0
    for c, members in enumerate(positions_by_class(labels_N, classes)):
        usable = members[correct_N[members]]
        if features_ND is not None and len(usable):
            usable = usable[herd(features_ND[torch.from_numpy(usable)], ipc)]
        else:
            usable = rng(seed, "initial", "images", c).permutation(usable if len(usable) else members)
        chosen.append(np.resize(usable, ipc))
        repeated += max(0, ipc - len(usable))
    return np.concatenate(chosen), repeated


def build(
    logits_of: Callable[[int, np.ndarray], Tensor],
    experts: Sequence[int],
    labels_N: np.ndarray,
    ipc: int,
    classes: int,
    *,
    seed: int,
    only_correct: bool,
    hard_labels: bool,
    one_expert: bool = False,
    features_of: Callable[[int], Tensor] | None = None,
    predicted_of: Callable[[int], Tensor | None] | None = None,
) -> InitialSet:
    """Build the initial set.

    ``logits_of(expert, indices)`` returns logits of an expert's last checkpoint on training images.
    ``features_of(expert)``, if given, returns that expert's features (N, D) of all training images, for herding.
    ``predicted_of(expert)``: the classes (N,) that it predicts for all training images, where their logits would not
    fit; None: from ``logits_of``.

    One of ``experts``, drawn at random, chooses the images; all of them label them. An image that no expert classifies
    correctly is labelled with the mean logits of its class over these experts and the class's training images. With
    ``one_expert`` only the drawn expert labels, with its unmodified logits.
    """
    everything = np.arange(len(labels_N))
    drawn = experts[int(rng(seed, "initial", "chooser").integers(len(experts)))]
    chooser = drawn if only_correct else None
    predicted_N: Tensor | None = None
    if chooser is not None:
        known = None if predicted_of is None else predicted_of(chooser)
        predicted_N = logits_of(chooser, everything).argmax(dim=1) if known is None else known
    indices_S, repeated = choose_images(
        predicted_N,
        labels_N,
        ipc,
        classes,
        seed,
        None if chooser is None or features_of is None else features_of(chooser),
    )
    true_S = torch.from_numpy(labels_N[indices_S])
    if hard_labels:
        logits_SK = hard_logits(true_S, classes)
        return InitialSet(indices_S, logits_SK, 0, repeated)
    if one_expert:
        return InitialSet(indices_S, logits_of(drawn, indices_S), 0, repeated)
    parts: list[tuple[Tensor, Tensor]] = []
    for part_S in np.split(indices_S, range(step := rows_at_a_time(len(experts), classes), len(indices_S), step)):
        logits_ESK = torch.stack([logits_of(e, part_S) for e in experts])
        parts.append(label_logits(logits_ESK, torch.from_numpy(labels_N[part_S])))
    logits_SK, count_S = (torch.cat(each) for each in zip(*parts, strict=True))
    orphan_S, members_of = count_S == 0, positions_by_class(labels_N, classes)
    for c in true_S[orphan_S].unique().tolist():
        mean_K = torch.stack([logits_of(e, members_of[c]).mean(dim=0) for e in experts]).mean(dim=0)
        logits_SK[orphan_S & (true_S == c)] = mean_K
    return InitialSet(indices_S, logits_SK, int(orphan_S.sum()), repeated)


def vary_repeats(images_SCHH: Tensor, indices_S: np.ndarray, seed: int, config: AugmentConfig) -> Tensor:
    """Return the images with the second and later copies of a training image augmented, so that copies can diverge.

    Draws depend on (seed, position). A draw without effect, such as half of all flips, is repeated a few times.
    """
    seen: set[int] = set()
    varied_SCHH = images_SCHH.clone()
    for s, index in enumerate(indices_S.tolist()):
        for attempt in range(_ATTEMPTS if index in seen else 0):
            drawn = augment.draw(rng(seed, "initial", "repeat", s, attempt), config, 1, images_SCHH.shape[-1])
            varied_SCHH[s] = augment.apply(images_SCHH[s : s + 1], drawn)[0]
            if not torch.equal(varied_SCHH[s], images_SCHH[s]):
                break
        seen.add(index)
    return varied_SCHH
