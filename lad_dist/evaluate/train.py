"""Train a fresh network on a small or large set; the measurement behind every evaluation.

The protocol of LAD: SGD with momentum, the learning rate divided by ten at half of the epochs, soft cross-entropy, DSA.
The protocol of RLDD: AdamW, the learning rate halved late, RandAugment, random resized crops, flips and CutMix, the
teacher's logits, and a moving average of the weights. ``Settings`` has the parts of both.

Shapes: R networks trained together, S training images, B of one batch, C channels, H side, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lad_dist.data import augment
from lad_dist.data.longtail import log_priors
from lad_dist.data.mixing import draw_mix, mix, mix_labels
from lad_dist.errors import NumericalError
from lad_dist.models.captured import Captured
from lad_dist.models.convnet import ConvNet
from lad_dist.models.optimizers import SGD, Adam, Optimizer
from lad_dist.models.stacked import StackedConvNets
from lad_dist.recipe import AugmentConfig, Recipe, without_later_defaults
from lad_dist.seeds import rng

BatchOf = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps row numbers (B,) to images (B, C, H, H) and label probabilities (B, K), both on the training device."""

Counters = tuple[int | str, ...]
CLASS_LOSS = 0.025  # RLDD's weight of the cross-entropy on the classes, beside the squared distance to the logits
_TRIAL_EPOCHS = 3  # momentum takes effect from the second on


def rows_of(images_SCHH: Tensor, p_SK: Tensor) -> BatchOf:
    """Return batches of a set held entirely in memory."""
    return lambda rows_B: (images_SCHH[rows_B], p_SK[rows_B])


@dataclass(frozen=True)
class TrainingSet:
    """Training set of one network: ``count`` images, served by ``batch_of``.

    ``labels_S`` are their classes, needed by class-balanced sampling and logit adjustment. ``label_views`` returns the
    label probabilities (B, K) of augmented images (B, C, H, H), in place of those that ``batch_of`` serves, and
    ``label_logits`` the logits behind them; ``stored`` the augmented and mixed images (S, C, H, H) of an epoch, their
    label logits and class shares (S, K), in place of augmentation and mixing. ``strong`` augments whitened images by draws
    of (seed, counters), where ``Settings.augmentation`` asks for it.
    """

    batch_of: BatchOf
    count: int
    labels_S: np.ndarray | None = None
    label_views: Callable[[Tensor], Tensor] | None = None
    label_logits: Callable[[Tensor], Tensor] | None = None
    stored: Callable[[int], tuple[Tensor, Tensor, Tensor]] | None = None
    strong: Callable[[Tensor, int, Counters], Tensor] | None = None


@dataclass(frozen=True)
class Settings:
    """Training settings of one network; with the network and the set, everything needed to reproduce its row.

    ``sampling``: an epoch is every image once, or as many images drawn class-balanced. ``logit_adjustment``: tau of the
    logit-adjusted loss, 0 for the plain one. ``schedule``: the learning rate times ``decay`` at half of the epochs, or
    halved at 80, 90 and 95 %. ``augmentation``: DSA of the recipe, or RandAugment with crops and flips. ``cutmix``: share
    of the batches that are mixed. ``label_loss``: soft cross-entropy, or where a teacher labels the squared distance to
    its logits and CLASS_LOSS times the cross-entropy on the classes. ``ema``: decay of the weights' moving average that
    is measured; 0: none.
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
    optimizer: Literal["sgd", "adamw"] = "sgd"
    schedule: Literal["half", "late"] = "half"
    augmentation: Literal["dsa", "randaugment"] = "dsa"
    cutmix: float = 0.0
    label_loss: Literal["cross-entropy", "logits"] = "cross-entropy"
    ema: float = 0.0

    @classmethod
    def of_a_small_set(cls, recipe: Recipe, lr: float) -> Settings:
        """Return the recipe's settings for a synthetic set or as many real images, with the learning rate ``lr``."""
        e = recipe.evaluate
        return cls(
            epochs=e.epochs,
            batch=e.batch,
            lr=lr,
            momentum=e.momentum,
            weight_decay=e.weight_decay,
            decay=e.decay,
            augment=recipe.augment,
            optimizer=e.optimizer,
            schedule=e.schedule,
            augmentation=e.augmentation,
            cutmix=e.cutmix,
            label_loss=e.label_loss,
            ema=e.ema,
        )

    def document(self) -> dict[str, Any]:
        """Return the settings as plain values; later-added fields only where they differ from LAD's protocol."""
        doc = asdict(self)
        for name in ("optimizer", "schedule", "augmentation", "cutmix", "label_loss", "ema"):
            if doc[name] == getattr(type(self), name):
                del doc[name]
        own = self.augment.model_dump(mode="json")
        return doc | {"augment": without_later_defaults("augment", own)}


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
    average = _average(module, settings)
    module.train()
    step_of = _Step(module, stacked, sets, settings)
    optimizer, lr = _optimizer(step_of.weights, settings), settings.lr
    gradients = step_of if any(True for _ in module.buffers()) else partial(Captured("networks' steps"), step_of)
    losses_R = torch.zeros(len(sets), device=device)
    for epoch in range(settings.epochs):
        lr *= _decay(settings, epoch)
        orders = [_order(s, settings, seed, c, epoch) for s, c in zip(sets, counters, strict=True)]
        draws = [rng(seed, "evaluate", *c, "augment", epoch) for c in counters]
        stored = [None if s.stored is None else s.stored(epoch) for s in sets]
        losses_R = torch.zeros(len(sets), device=device)
        for step, rows in enumerate(zip(*(order.split(settings.batch) for order in orders), strict=True)):
            batches = [
                _batch(s, kept, rows_B, settings, g, seed, (*c, epoch, step))
                for s, kept, rows_B, g, c in zip(sets, stored, rows, draws, counters, strict=True)
            ]
            losses, gradient_P = gradients(*(tensor for batch in batches for tensor in batch.tensors()))
            optimizer.step(step_of.parts(gradient_P), lr)
            if average is not None:
                average.update_parameters(module)
            losses_R += losses * len(rows[0])
        on_epoch()
    if average is not None:
        module.load_state_dict(average.module.state_dict())
    module.eval()
    means = [total / count for total in losses_R.tolist()]
    for mean, of in zip(means, counters, strict=True):
        if not np.isfinite(mean):
            raise NumericalError(f"evaluation, {of}: the training loss is {mean}; try a smaller evaluate.lr")
    return means


@dataclass(frozen=True)
class _Batch:
    """Augmented images (B, C, H, H) and label probabilities (B, K).

    ``logits_BK``, where a teacher labelled them: its logits. ``classes_BK``: the classes, mixed as the images are.
    """

    views_BCHH: Tensor
    p_BK: Tensor
    logits_BK: Tensor | None
    classes_BK: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """Return what a step needs of it, for ``_Step``."""
        if self.logits_BK is None:
            return self.views_BCHH, self.p_BK
        return self.views_BCHH, self.p_BK, self.logits_BK, self.classes_BK


class _Step:
    """The networks' losses (R,) on a batch each, and the flat gradient of all weights: what a GPU captures as one graph.

    Called with the tensors of every batch, one after the other. A network with buffers changes them. A parameter that the
    logits do not depend on has the gradient zero, so weight decay alone moves it.
    """

    def __init__(self, module: nn.Module, stacked: bool, sets: Sequence[TrainingSet], settings: Settings) -> None:
        self._module, self._stacked, self._sets, self._settings = module, stacked, sets, settings
        self.weights = [p for p in module.parameters() if p.requires_grad]
        self._shift_R1K: Tensor | None = None

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        each = len(tensors) // len(self._sets)
        views_R, p_R, *others = (tensors[i::each] for i in range(each))
        logits_RBK = self._module(torch.stack(views_R)) if self._stacked else self._module(views_R[0]).unsqueeze(0)
        if self._settings.logit_adjustment:
            if self._shift_R1K is None:
                shifts = [_log_priors(s, logits_RBK.shape[2]) for s in self._sets]
                self._shift_R1K = torch.stack(shifts).unsqueeze(1).to(logits_RBK)
            logits_RBK = logits_RBK + self._settings.logit_adjustment * self._shift_R1K
        losses_R = self._losses(logits_RBK, p_R, *others)
        gradients = torch.autograd.grad(losses_R.sum(), self.weights, materialize_grads=True)
        return losses_R.detach(), torch.cat([g.flatten() for g in gradients])

    def parts(self, gradient_P: Tensor) -> list[Tensor]:
        """Return the gradient of each of the weights, which share its memory."""
        sizes = [w.numel() for w in self.weights]
        return [part.view_as(w) for w, part in zip(self.weights, gradient_P.split(sizes), strict=True)]

    def _losses(
        self,
        logits_RBK: Tensor,
        p_R: Sequence[Tensor],
        targets_R: Sequence[Tensor] = (),
        classes_R: Sequence[Tensor] = (),
    ) -> Tensor:
        """Return the mean loss of each network's batch (R,)."""
        if self._settings.label_loss == "logits" and targets_R:
            squares_R = (logits_RBK - torch.stack(list(targets_R))).square().mean(dim=(1, 2))
            classes_RBK = torch.stack(list(classes_R))
            return squares_R - CLASS_LOSS * (classes_RBK * logits_RBK.log_softmax(dim=2)).sum(dim=2).mean(dim=1)
        terms_RBK = torch.stack(list(p_R)) * logits_RBK.log_softmax(dim=2)
        # Network by network: the summation order over all of them depends on their number.
        return torch.cat([-terms.sum(dim=(1, 2)) for terms in terms_RBK.split(1)]) / logits_RBK.shape[1]


def _batch(
    images: TrainingSet,
    stored: tuple[Tensor, Tensor, Tensor] | None,
    rows_B: Tensor,
    settings: Settings,
    draws: np.random.Generator,
    seed: int,
    counters: Counters,
) -> _Batch:
    if stored is not None:
        views_BCHH, logits_BK, classes_BK = (whole[rows_B.to(whole.device)] for whole in stored)
        return _Batch(views_BCHH, logits_BK.softmax(dim=1), logits_BK, classes_BK)
    images_BCHH, p_BK = images.batch_of(rows_B)
    if settings.augmentation == "randaugment":
        assert images.strong is not None
        views_BCHH = images.strong(images_BCHH, seed, (*counters, "strong"))
    else:
        views_BCHH = augment.apply(
            images_BCHH, augment.draw(draws, settings.augment, len(images_BCHH), images_BCHH.shape[2])
        )
    mixed = None
    if settings.cutmix:
        mixed = draw_mix(
            rng(seed, "evaluate", *counters, "mix"), settings.cutmix, 0.0, len(rows_B), views_BCHH.shape[2]
        )
    if mixed is not None:
        views_BCHH = mix(views_BCHH, mixed)
        p_BK = mix_labels(p_BK, mixed)
    if images.label_logits is not None and settings.label_loss == "logits":
        logits_BK = images.label_logits(views_BCHH)
        return _Batch(views_BCHH, logits_BK.softmax(dim=1), logits_BK, p_BK)
    labels_BK = p_BK if images.label_views is None else images.label_views(views_BCHH)
    return _Batch(views_BCHH, labels_BK, None, p_BK)


def _optimizer(weights: Sequence[Tensor], settings: Settings) -> Optimizer:
    if settings.optimizer == "adamw":
        return Adam(weights, weight_decay=settings.weight_decay)
    return SGD(weights, settings.momentum, settings.weight_decay)


def _decay(settings: Settings, epoch: int) -> float:
    """Return the factor on the learning rate as epoch ``epoch`` begins, from 0."""
    milestones, factor = [settings.epochs // 2 + 1], settings.decay
    if settings.schedule == "late":
        milestones, factor = [round(share * settings.epochs) for share in (0.8, 0.9, 0.95)], 0.5
    return factor ** milestones.count(epoch)


def _average(module: nn.Module, settings: Settings) -> AveragedModel | None:
    """Return the moving average of the weights, if the settings ask for one."""
    if settings.ema == 0:
        return None
    return AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))


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
