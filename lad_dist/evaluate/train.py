"""Train a fresh network on a small or large set: how any set's worth is measured.

The published protocol: SGD with momentum, the learning rate divided by ten at half of the epochs, soft cross-entropy, DSA.
Shapes: S training images, B of one batch, C channels, H side, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lad_dist.data import augment
from lad_dist.errors import NumericalError
from lad_dist.recipe import AugmentConfig
from lad_dist.seeds import rng

BatchOf = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From row numbers (B,) to images (B, C, H, H) and label probabilities (B, K), both on the training device."""


def rows_of(images_SCHH: Tensor, p_SK: Tensor) -> BatchOf:
    """Batches of a set that is whole in memory."""
    return lambda rows_B: (images_SCHH[rows_B], p_SK[rows_B])


@dataclass(frozen=True)
class Settings:
    """How one network is trained; everything that its row in results.json needs to be redone."""

    epochs: int
    batch: int
    lr: float
    momentum: float
    weight_decay: float
    decay: float
    augment: AugmentConfig


def train(
    network: nn.Module,
    batch_of: BatchOf,
    count: int,
    settings: Settings,
    seed: int,
    counters: tuple[int | str, ...],
    on_epoch: Callable[[], None],
) -> float:
    """Train ``network`` in place on ``count`` images; returns the mean loss of the last epoch.

    All draws are functions of (seed, counters, epoch, step).

    Raises:
        NumericalError: the loss left the finite numbers.
    """
    device = next(network.parameters()).device
    sgd = torch.optim.SGD(
        network.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(sgd, [settings.epochs // 2 + 1], gamma=settings.decay)
    network.train()
    loss_sum = torch.zeros((), device=device)
    for epoch in range(settings.epochs):
        order = torch.from_numpy(rng(seed, "evaluate", *counters, "order", epoch).permutation(count))
        draws = rng(seed, "evaluate", *counters, "augment", epoch)
        loss_sum = torch.zeros((), device=device)
        for rows_B in order.split(settings.batch):
            images_BCHH, p_BK = batch_of(rows_B)
            drawn = augment.draw(draws, settings.augment, len(rows_B), images_BCHH.shape[2])
            logits_BK = network(augment.apply(images_BCHH, drawn))
            loss = -(p_BK * logits_BK.log_softmax(dim=1)).sum() / len(rows_B)
            sgd.zero_grad(set_to_none=True)
            loss.backward()
            sgd.step()
            loss_sum += loss.detach() * len(rows_B)
        schedule.step()
        on_epoch()
    network.eval()
    mean = float(loss_sum) / count
    if not torch.isfinite(torch.tensor(mean)):
        raise NumericalError(
            f"evaluation, {counters}: the training loss is {mean}; a smaller evaluate.lr usually cures it"
        )
    return mean
