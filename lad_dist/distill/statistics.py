"""The statistics phase: the set's images must have the layer statistics of the balanced training set.

Source: "Rethinking Long-tailed Dataset Distillation" (RLDD), arXiv 2511.18858, sections on statistical alignment and
recovery, after SRe2L (Yin et al., NeurIPS 2023, arXiv 2306.13092). A teacher, the last checkpoint of an expert, sees an
augmented batch of the set. The loss is its mean cross-entropy on the images' classes, plus

    weight * sum over layers l of f_l / 2 * (|m_l - M_l| + |v_l - V_l|),    f_l = first for the first layer, else 1

with |.| the Euclidean norm. m_l and v_l are means over images of what ``statistics_of`` measures of each image at the
input of convolution l: each channel's mean and spatial variance, and the mean and variance of each 4x4 patch. They are
compared twice and added: over the whole batch with the mean over classes (M_l, V_l), so that a tail class counts as
much as a head class, and class by class with the class's own, averaged over the classes of the batch.

Differences: statistics are exact means over a batch (which holds the whole set unless it is larger than
``distill.batch``) instead of moving averages; networks of experts have no batch norm, so convolutions' inputs are
measured, which exist in every network. The labels follow the teacher: their gradient is that of half the squared
distance to its logits over ``distill.label_temperature`` on the augmented images, a mean over the batch, so that they
average over views and teachers.

With several ranks, rank 0 measures the training images once and broadcasts the result. In an iteration each rank writes
its images' statistics to its own rows; the sum over ranks is the whole batch's, and the loss and its gradient by these
rows are computed identically on every rank.

Shapes: B images of a batch, b of them on this rank, C channels, H side, K classes, F statistics of one image.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lad_dist.data.prepare import PreparedData
from lad_dist.distill.student import Batch, RowGradients, Student, SyntheticSet
from lad_dist.distill.update import SetGradients
from lad_dist.errors import RecipeError
from lad_dist.models import functional

_PATCH = 4  # pixels a side
_ROWS = 512  # training images per pass


@dataclass(frozen=True)
class Target:
    """Statistics of the training images under one teacher.

    ``means_KF``: class means of the statistics of single images. ``ends``: end of each vector that is compared as one,
    four to a layer: channel means and variances, patch means and variances.
    """

    means_KF: Tensor
    ends: tuple[int, ...]


def statistics_of(module: nn.Module, views: dict[str, Tensor], images_BCHH: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the logits (B, K), and per vector of ``Target.ends`` the statistics of each image (B, length).

    Raises RecipeError if the network has no convolution.
    """
    with _convolution_inputs(module) as inputs:
        logits_BK = functional.logits(module, views, images_BCHH)
    if not inputs:
        raise RecipeError(
            "distill.lambda_statistics: the network has no convolution; valid: 0, or model.network convnet"
        )
    return logits_BK, [vector for x in inputs for vector in _vectors(x)]


def check(module: nn.Module, channels: int, size: int) -> None:
    """Raise RecipeError if the phase cannot measure a network of images (channels, size, size)."""
    statistics_of(module, dict(module.named_parameters()), torch.zeros(1, channels, size, size))


@contextmanager
def _convolution_inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the input of every convolution of ``module``, in the order of their calls within the block."""
    found: list[Tensor] = []
    convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    handles = [m.register_forward_pre_hook(lambda _, given: found.append(given[0])) for m in convolutions]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _vectors(x_BCHW: Tensor) -> tuple[Tensor, ...]:
    """Return channel means, channel variances (B, C), patch means and patch variances (B, patches) of one input."""
    patches = x_BCHW.new_zeros(len(x_BCHW), 0), x_BCHW.new_zeros(len(x_BCHW), 0)
    if min(x_BCHW.shape[2:]) >= _PATCH:
        mean = F.avg_pool2d(x_BCHW, _PATCH).mean(dim=1).flatten(1)
        square = F.avg_pool2d(x_BCHW.square(), _PATCH).mean(dim=1).flatten(1)
        patches = mean, square - mean.square()
    return (x_BCHW.mean(dim=(2, 3)), x_BCHW.var(dim=(2, 3), correction=0), *patches)


@torch.no_grad()
def measure(student: Student, theta_P: Tensor, data: PreparedData) -> Target:
    """Measure the training images, not augmented, under the teacher ``theta_P``: one pass, sums in double precision."""
    views, classes = student.layout.views(theta_P), data.classes
    sums_KF: Tensor | None = None
    ends: tuple[int, ...] = ()
    for rows in torch.arange(len(data.train)).split(_ROWS):
        images_BCHH, labels_B = data.train.batch(rows)
        _, vectors = statistics_of(student.module, views, images_BCHH)
        found_BF = torch.cat(vectors, dim=1).double()
        if sums_KF is None:
            sums_KF = found_BF.new_zeros(classes, found_BF.shape[1])
            ends = tuple(torch.tensor([v.shape[1] for v in vectors]).cumsum(0).tolist())
        sums_KF.index_add_(0, labels_B, found_BF)
    assert sums_KF is not None, "a training set has images"
    counts_K = torch.tensor(data.counts, dtype=torch.float64, device=sums_KF.device)
    return Target((sums_KF / counts_K.unsqueeze(1)).float().cpu(), ends)


def distance(rows_BF: Tensor, labels_B: Tensor, target: Target, first: float) -> Tensor:
    """Return the sum over layers of a batch's statistics ``rows_BF``, differentiable by them; 0-dim."""
    means_KF = target.means_KF.to(rows_BF)
    whole_F = rows_BF.mean(dim=0) - means_KF.mean(dim=0)
    present, place_B = labels_B.unique(return_inverse=True)
    sums = rows_BF.new_zeros(len(present), rows_BF.shape[1]).index_add(0, place_B, rows_BF)
    classes_cF = sums / torch.bincount(place_B).to(rows_BF).unsqueeze(1) - means_KF[present]
    total = rows_BF.new_zeros(())
    for vector, (begin, end) in enumerate(pairwise((0, *target.ends))):
        if begin < end:
            gap = _norm(whole_F[begin:end]) + _norm(classes_cF[:, begin:end]).mean()
            total = total + 0.5 * (first if vector < 4 else 1.0) * gap
    return total


def _norm(x: Tensor) -> Tensor:
    """Euclidean norm over the last dimension, with a finite gradient at 0."""
    return (x.square().sum(dim=-1) + 1e-12).sqrt()


def align(
    student: Student,
    synthetic: SyntheticSet,
    batch: Batch,
    rows_in_batch_b: Tensor,
    labels_B: Tensor,
    theta_P: Tensor,
    target: Target,
    weight: float,
    first: float,
    temperature: float,
) -> SetGradients:
    """Return the phase's loss and its gradients for this rank's images and labels. All ranks call it.

    ``batch`` holds this rank's images of a synthetic batch, ``rows_in_batch_b`` their positions in it, ``labels_B`` the
    classes of the whole batch.
    """
    images_bCHH, views_bCHH = batch.views(synthetic, with_graph=True)
    length = target.ends[-1]
    whole = views_bCHH.new_zeros(batch.size, length + 2)  # statistics, cross-entropy, right or wrong
    image_grad, label_grad = torch.zeros_like(images_bCHH), torch.zeros_like(synthetic.logits_SK[batch.rows_B])
    labels_B = labels_B.to(whole.device)
    own_bF, entropy_b = whole[:0, :length], whole[:0, 0]
    if len(batch.rows_B):
        views = student.layout.views(theta_P.detach())
        logits_bK, vectors = statistics_of(student.module, views, views_bCHH)
        own_bF = torch.cat(vectors, dim=1)
        own_labels_b = labels_B[rows_in_batch_b]
        entropy_b = F.cross_entropy(logits_bK, own_labels_b, reduction="none")
        right_b = (logits_bK.argmax(dim=1) == own_labels_b).to(whole)
        whole[rows_in_batch_b] = torch.cat([own_bF.detach(), torch.stack([entropy_b.detach(), right_b], dim=1)], dim=1)
        label_grad = (synthetic.logits_SK[batch.rows_B] - logits_bK.detach() / temperature) / batch.size
    whole = student.ranks.total(whole)
    rows_BF = whole[:, :length].clone().requires_grad_()
    far = weight * distance(rows_BF, labels_B, target, first)
    loss = far.detach() + whole[:, length].mean()
    (grad_BF,) = torch.autograd.grad(far, rows_BF)
    if len(batch.rows_B):
        (image_grad,) = torch.autograd.grad(
            [own_bF, entropy_b],
            images_bCHH,
            [grad_BF[rows_in_batch_b], torch.full_like(entropy_b, 1 / batch.size)],
        )
    by_rows = RowGradients(batch.rows_B, image_grad, label_grad, len(synthetic.images_SCHH))
    return SetGradients(loss, whole[:, length + 1].mean(), by_rows)
