"""The regression phase: a linear classifier fitted in closed form to the set's features must predict real images.

Source: Zhou et al., "Dataset Distillation using Neural Feature Regression" (FRePo), NeurIPS 2022, arXiv 2206.00719,
equation 5. Differences: the feature networks are checkpoints of the representation experts instead of a pool trained on
the synthetic set; the real batch is class-balanced, so the tail counts as much as the head without class weights; the
targets may be the classifier experts' soft labels.

With the backbone of a checkpoint fixed, F the features of a batch of the set and p its soft labels, ridge regression
predicts real features R by

    q = 1/K + R F^T (F F^T + ridge * mean(diag F F^T) I)^-1 (p - 1/K)

and the loss is the mean over real images of ||q - target||^2. This corresponds to training a last layer *to
convergence* on the set, whereas a matching phase follows a student for a few steps (measured in
benchmarks/notes-convergence.md). Each iteration may use a random subset of the features
(``distill.regression_dropout``), so that a few checkpoints serve as many networks and the set does not overfit the
features of any one of them.

With several ranks, rank 0 computes the real features and broadcasts them. Each rank computes the features of its own
images and writes them to its own rows; the sum over ranks is the whole batch's. The small regression is then computed
identically on every rank, and each rank backpropagates its own rows of the gradient to its pixels.

Shapes: B images of a synthetic batch, b of them on this rank, R real images, K classes, D features and a constant one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lad_dist.data import augment
from lad_dist.data.longtail import positions_by_class
from lad_dist.data.prepare import PreparedData
from lad_dist.distill.student import Batch, RowGradients, Student, SyntheticSet
from lad_dist.distill.update import SetGradients
from lad_dist.models import functional
from lad_dist.recipe import Recipe
from lad_dist.seeds import rng


@dataclass(frozen=True)
class RealFeatures:
    """Features (R, D) of real images under one checkpoint, their targets (R, K), and their classes (R,)."""

    features_RD: Tensor
    targets_RK: Tensor
    labels_R: Tensor


class RealBatches:
    """The real images of each iteration, on rank 0. ``teacher(rows)`` returns training images' logits for soft targets.

    A batch is class-balanced; a class's images repeat only when it has too few.
    """

    def __init__(self, recipe: Recipe, data: PreparedData, teacher: Callable[[np.ndarray], Tensor] | None) -> None:
        self._recipe, self._data = recipe, data
        labels_N = data.splits.train.labels_N.numpy()
        self._members = positions_by_class(labels_N, data.classes)
        self._soft_NK = None if teacher is None else torch.softmax(teacher(np.arange(len(labels_N))), dim=1)

    @torch.no_grad()
    def features(self, student: Student, theta_P: Tensor, iteration: int) -> RealFeatures:
        """Return features of an iteration's real batch under ``theta_P``: a function of (seed, iteration)."""
        recipe, counters = self._recipe, ("distill", iteration, "regression")
        draws = rng(recipe.seed, *counters, "real")
        each = -(-recipe.distill.regression_batch // len(self._members))
        rows_R = torch.from_numpy(np.concatenate([_some(draws, m, each) for m in self._members]))
        images_RCHH, labels_R = self._data.train.batch(rows_R)
        drawn = augment.draw(
            rng(recipe.seed, *counters, "augment-real"), recipe.augment, len(rows_R), images_RCHH.shape[2]
        )
        views_RCHH = augment.apply(images_RCHH, drawn)
        features_RD = functional.features(student.module, student.layout.views(theta_P), views_RCHH)
        hard_R = labels_R.cpu()
        if self._soft_NK is None:
            targets_RK = torch.nn.functional.one_hot(hard_R, len(self._members)).float()
        else:
            targets_RK = self._soft_NK[rows_R]
        return RealFeatures(features_RD.cpu(), targets_RK, hard_R)


def _some(draws: np.random.Generator, members: np.ndarray, count: int) -> np.ndarray:
    """Draw ``count`` members; each is drawn once before any repeats."""
    turns = [draws.permutation(members) for _ in range(-(-count // len(members)))]
    return np.concatenate(turns)[:count]


def kept_features(recipe: Recipe, features: int, iteration: int) -> Tensor | None:
    """Return the mask (D,), 1 or 0, of features that an iteration's regression uses; None for all.

    It is equal on every rank.
    """
    dropout = recipe.distill.regression_dropout
    if dropout == 0:
        return None
    order = rng(recipe.seed, "distill", iteration, "regression", "features").permutation(features)
    kept_D = torch.zeros(features)
    kept_D[torch.from_numpy(order[: max(1, round((1 - dropout) * features))])] = 1
    return kept_D


def regress(
    student: Student,
    synthetic: SyntheticSet,
    batch: Batch,
    rows_in_batch_b: Tensor,
    theta_P: Tensor,
    real: RealFeatures,
    ridge: float,
    kept_D: Tensor | None = None,
) -> SetGradients:
    """Return the regression's loss and its gradients for this rank's images and labels. All ranks call it.

    ``batch`` holds this rank's images of a synthetic batch, and ``rows_in_batch_b`` their positions in it. ``kept_D``:
    see ``kept_features``; a dropped feature is 0 for every image.
    """
    device, classes = theta_P.device, synthetic.logits_SK.shape[1]
    kept_D = real.features_RD.new_ones(real.features_RD.shape[1]) if kept_D is None else kept_D
    kept_D = kept_D.to(device, real.features_RD.dtype)
    real_RD = _with_constant(real.features_RD.to(device) * kept_D)
    targets_RK, labels_R = real.targets_RK.to(device), real.labels_R.to(device)
    whole_BD = real_RD.new_zeros(batch.size, real_RD.shape[1])
    whole_BK = real_RD.new_zeros(batch.size, classes)
    images_bCHH, views_bCHH = batch.views(synthetic, with_graph=True)
    labels_bK = synthetic.logits_SK[batch.rows_B].requires_grad_()
    own_bD, own_bK = real_RD.new_zeros(0, real_RD.shape[1]), labels_bK
    if len(batch.rows_B):
        views = student.layout.views(theta_P.detach())
        own_bD = _with_constant(functional.features(student.module, views, views_bCHH) * kept_D)
        own_bK = torch.softmax(labels_bK, dim=1) - 1 / classes
        whole_BD[rows_in_batch_b], whole_BK[rows_in_batch_b] = own_bD.detach(), own_bK.detach()
    features_BD = student.ranks.total(whole_BD).requires_grad_()
    labels_BK = student.ranks.total(whole_BK).requires_grad_()
    gram_BB = features_BD @ features_BD.T
    eye_BB = torch.eye(batch.size, device=device, dtype=gram_BB.dtype)
    solved_BK = torch.linalg.solve(gram_BB + ridge * gram_BB.diagonal().mean() * eye_BB, labels_BK)
    predicted_RK = 1 / classes + real_RD @ (features_BD.T @ solved_BK)
    loss = (predicted_RK - targets_RK).square().sum(dim=1).mean()
    grad_BD, grad_BK = torch.autograd.grad(loss, [features_BD, labels_BK])
    image_grad, label_grad = torch.zeros_like(images_bCHH), torch.zeros_like(labels_bK)
    if len(batch.rows_B):
        image_grad, label_grad = torch.autograd.grad(
            [own_bD, own_bK], [images_bCHH, labels_bK], [grad_BD[rows_in_batch_b], grad_BK[rows_in_batch_b]]
        )
    by_rows = RowGradients(batch.rows_B, image_grad, label_grad, len(synthetic.images_SCHH))
    right = (predicted_RK.detach().argmax(dim=1) == labels_R).float().mean()
    return SetGradients(loss.detach(), right, by_rows)


def _with_constant(features_BD: Tensor) -> Tensor:
    return torch.cat([features_BD, features_BD.new_ones(len(features_BD), 1)], dim=1)
