"""Train a fresh network on a small or large set; the measurement behind every evaluation.

The published protocol: SGD with momentum, the learning rate divided by ten at half of the epochs, soft cross-entropy,
DSA.

Shapes: R networks trained together, S training images, B of one batch, C channels, H side, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from lad_dist.data import augment
from lad_dist.data.longtail import log_priors
from lad_dist.errors import NumericalError
from lad_dist.models.convnet import ConvNet
from lad_dist.models.stacked import StackedConvNets
from lad_dist.recipe import AugmentConfig
from lad_dist.seeds import rng

BatchOf = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps row numbers (B,) to images (B, C, H, H) and label probabilities (B, K), both on the training device."""

Counters = tuple[int | str, ...]
_TRIAL_EPOCHS = 3  # momentum takes effect from the second on


def rows_of(images_SCHH: Tensor, p_SK: Tensor) -> BatchOf:
    """Return batches of a set held entirely in memory."""
    return lambda rows_B: (images_SCHH[rows_B], p_SK[rows_B])


@dataclass(frozen=True)
class TrainingSet:
    """Training set of one network: ``count`` images, served by ``batch_of``.

    ``labels_S`` are their classes, needed by class-balanced sampling and logit adjustment. ``label_views`` returns the
    label probabilities (B, K) of augmented images (B, C, H, H), in place of those that ``batch_of`` serves.
    """

    batch_of: BatchOf
    count: int
    labels_S: np.ndarray | None = None
    label_views: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Settings:
    """Training settings of one network; with the network and the set, everything needed to reproduce its row.

    ``sampling``: an epoch is every image once, or as many images drawn class-balanced. ``logit_adjustment``: tau of the
    logit-adjusted loss, 0 for the plain one.
    """

    epochs: int
    batch: int
    lr: float
    momentum: float
    weight_decay: float
    decay: float
    augment: AugmentConfig
    sampling: Literal["shuffled", "class-balanced"] = "shuffled"
    logit_adjustment: float = 0.0


def train(
    network: nn.Module,
    images: TrainingSet,
    settings: Settings,
    seed: int,
    counters: Counters,
    on_epoch: Callable[[], None],
) -> float:
    """Train ``network`` in place on ``images``; return the mean loss of the last epoch.

    All draws are functions of (seed, counters, epoch, step).

    Raises:
        NumericalError: the loss became NaN or Inf.
    """
    (loss,) = _train(network, False, [images], settings, seed, [counters], on_epoch)
    return loss


def train_together(
    networks: Sequence[ConvNet],
    sets: Sequence[TrainingSet],
    settings: Settings,
    seed: int,
    counters: Sequence[Counters],
    on_epoch: Callable[[], None],
) -> list[float]:
    """``train`` several ConvNets together, each on its own set (all of one size) with its own draws.

    Weights and losses equal those of separate training, bit for bit if ``same_together``. ``on_epoch`` is called once
    per epoch of all.

    Raises:
        NumericalError: a loss became NaN or Inf.
    """
    stacked = StackedConvNets(networks)
    losses = _train(stacked, True, sets, settings, seed, counters, on_epoch)
    stacked.unstack(networks)
    for network in networks:
        network.eval()
    return losses


def same_together(
    networks: Callable[[], list[ConvNet]],
    sets: Sequence[TrainingSet],
    settings: Settings,
    seed: int,
    counters: Sequence[Counters],
) -> bool:
    """Return whether ``train_together`` matches ``train`` bit for bit, tested for a few epochs on ``networks()``.

    Whether a grouped convolution sums in the order of a single one depends on library, processor and shapes: on an AMD
    EPYC with torch 2.13 it does for grey images at widths 16, 32 and 64, but not at 4 and 12 or for three channels.
    """
    short = replace(settings, epochs=min(settings.epochs, _TRIAL_EPOCHS))
    alone, together = networks(), networks()
    try:
        losses = [
            train(network, images, short, seed, c, lambda: None)
            for network, images, c in zip(alone, sets, counters, strict=True)
        ]
        same = losses == train_together(together, sets, short, seed, counters, lambda: None)
    except NumericalError:
        return False  # separate training identifies the network at fault
    pairs = zip(alone, together, strict=True)
    return same and all(
        torch.equal(a, b) for x, y in pairs for a, b in zip(x.parameters(), y.parameters(), strict=True)
    )


def _train(
    module: nn.Module,
    stacked: bool,
    sets: Sequence[TrainingSet],
    settings: Settings,
    seed: int,
    counters: Sequence[Counters],
    on_epoch: Callable[[], None],
) -> list[float]:
    """Shared loop: the loss is the sum of the networks' losses, whose gradients are independent."""
    count, device = sets[0].count, next(module.parameters()).device
    sgd = torch.optim.SGD(
        module.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(sgd, [settings.epochs // 2 + 1], gamma=settings.decay)
    module.train()
    losses_R = torch.zeros(len(sets), device=device)
    shift_RK: list[Tensor] | None = None
    for epoch in range(settings.epochs):
        orders = [_order(s, settings, seed, c, epoch) for s, c in zip(sets, counters, strict=True)]
        draws = [rng(seed, "evaluate", *c, "augment", epoch) for c in counters]
        losses_R = torch.zeros(len(sets), device=device)
        for rows in zip(*(order.split(settings.batch) for order in orders), strict=True):
            batches = [s.batch_of(rows_B) for s, rows_B in zip(sets, rows, strict=True)]
            views = [
                augment.apply(x, augment.draw(g, settings.augment, len(x), x.shape[2]))
                for (x, _), g in zip(batches, draws, strict=True)
            ]
            logits_RBK = module(torch.stack(views)) if stacked else module(views[0]).unsqueeze(0)
            if settings.logit_adjustment:
                if shift_RK is None:
                    shift_RK = [_log_priors(s, logits_RBK.shape[2]).to(logits_RBK) for s in sets]
                logits_RBK = logits_RBK + settings.logit_adjustment * torch.stack(shift_RK).unsqueeze(1)
            p_RBK = torch.stack(
                [
                    p if s.label_views is None else s.label_views(x)
                    for s, x, (_, p) in zip(sets, views, batches, strict=True)
                ]
            )
            terms_RBK = p_RBK * logits_RBK.log_softmax(dim=2)
            # Network by network: the summation order over all of them depends on their number.
            losses = torch.cat([-terms.sum(dim=(1, 2)) for terms in terms_RBK.split(1)]) / len(rows[0])
            sgd.zero_grad(set_to_none=True)
            losses.sum().backward()
            sgd.step()
            losses_R += losses.detach() * len(rows[0])
        schedule.step()
        on_epoch()
    module.eval()
    means = [total / count for total in losses_R.tolist()]
    for mean, of in zip(means, counters, strict=True):
        if not np.isfinite(mean):
            raise NumericalError(f"evaluation, {of}: the training loss is {mean}; try a smaller evaluate.lr")
    return means


def _order(images: TrainingSet, settings: Settings, seed: int, counters: Counters, epoch: int) -> Tensor:
    """Return the row numbers of an epoch, shape (S,)."""
    draws = rng(seed, "evaluate", *counters, "order", epoch)
    if settings.sampling == "shuffled":
        return torch.from_numpy(draws.permutation(images.count))
    assert images.labels_S is not None
    return torch.from_numpy(class_balanced(draws, images.labels_S))


def class_balanced(draws: np.random.Generator, labels_S: np.ndarray) -> np.ndarray:
    """Draw as many row numbers as there are images: equal class shares, uniform with replacement within a class.

    Class-balanced sampling (Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", arXiv
    1910.09217, section 3).
    """
    present, sizes = np.unique(labels_S, return_counts=True)
    by_class, firsts = np.argsort(labels_S, kind="stable"), np.cumsum(sizes) - sizes
    classes = draws.permutation(np.resize(draws.permutation(len(present)), len(labels_S)))
    within = (draws.random(len(labels_S)) * sizes[classes]).astype(np.int64)
    rows: np.ndarray = by_class[firsts[classes] + within]
    return rows


def _log_priors(images: TrainingSet, classes: int) -> Tensor:
    """Return log pi_y of every class, shape (K,), which times tau is added to the logits in the logit-adjusted loss.

    Menon et al., "Long-tail learning via logit adjustment", arXiv 2007.07314, equation 10. A class without images,
    which no label names, gets the smallest finite value.
    """
    assert images.labels_S is not None
    return torch.from_numpy(log_priors(np.bincount(images.labels_S, minlength=classes).tolist()))
