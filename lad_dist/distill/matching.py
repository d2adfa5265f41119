"""The matching loss of one phase and its gradients with respect to the student's inputs.

Shapes: P parameters of the whole network; a phase compares those in its ``span``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lad_dist.errors import NumericalError, RecipeError
from lad_dist.methods import MatchingLoss


@dataclass(frozen=True)
class Match:
    """Result of matching a student to its expert (0-dim tensors unless stated otherwise).

    ``loss`` is L = ||theta_t - alpha G - theta*||^2 / ||theta_t - theta*||^2, ``direction_P`` the vector v whose
    product with the gradient g_i of step i has dL/d(pixels, labels of batch i) as its gradient, ``alpha_gradient``
    dL/dalpha. ``cosine`` and ``norm_ratio`` compare the student's displacement with the expert's.
    """

    loss: Tensor
    direction_P: Tensor
    alpha_gradient: Tensor
    cosine: Tensor
    norm_ratio: Tensor


def match(
    start_P: Tensor,
    target_P: Tensor,
    gradient_sum_P: Tensor,
    alpha: Tensor,
    span: slice,
    loss: MatchingLoss | None = None,
) -> Match:
    """Compare a student's displacement -alpha G with the expert's theta* - theta_t over ``span``.

    The gradient is TESLA's (Cui et al., ICML 2023, arXiv 2211.10586): every g_i is differentiated at fixed theta_i, so
    it needs no graph through the whole unroll, and differs from the fully unrolled gradient by 5 to 10%:

        v = 2 (alpha (theta* - theta_t) + alpha^2 G) / ||theta_t - theta*||^2
        dL/dalpha = -2 (theta_t - alpha G - theta*) . G / ||.||^2

    With a custom ``loss``, a function of the displacement d = -alpha G, v = -alpha dL/dd and dL/dalpha = -dL/dd . G.

    Raises:
        NumericalError: start and target are equal over the span, so the loss is undefined.
        RecipeError: ``loss`` does not return a scalar that depends on the displacement.
    """
    expert = target_P[span] - start_P[span]
    summed = gradient_sum_P[span]
    distance = expert.square().sum()
    if float(distance) == 0:
        raise NumericalError("the expert has the same weights at both ends of a window, so there is nothing to match")
    direction_P = torch.zeros_like(start_P)
    if loss is None:
        residual = -expert - alpha * summed
        direction_P[span] = 2 * (alpha * expert + alpha**2 * summed) / distance
        value, alpha_gradient = residual.square().sum() / distance, -2 * torch.dot(residual, summed) / distance
    else:
        value, slope = _by_autograd(loss, -alpha * summed, expert)
        direction_P[span], alpha_gradient = -alpha * slope, -torch.dot(slope, summed)
    expert_norm, student_norm = distance.sqrt(), alpha * torch.linalg.vector_norm(summed)
    return Match(
        loss=value,
        direction_P=direction_P,
        alpha_gradient=alpha_gradient,
        cosine=-alpha
        * torch.dot(summed, expert)
        / (student_norm * expert_norm).clamp_min(torch.finfo(expert.dtype).tiny),
        norm_ratio=student_norm / expert_norm,
    )


def _by_autograd(loss: MatchingLoss, student_p: Tensor, expert_p: Tensor) -> tuple[Tensor, Tensor]:
    """Return (L, dL/d student_p) of a custom matching loss."""
    with torch.enable_grad():
        moved_p = student_p.detach().requires_grad_()
        value: object = loss(moved_p, expert_p.detach())
    if not isinstance(value, Tensor) or value.shape != () or not value.requires_grad:
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise RecipeError(
            f"method: its loss returned a {found} that does not depend on the student, or is not scalar; valid: a 0-dim "
            "tensor, differentiable by its first argument"
        )
    (slope_p,) = torch.autograd.grad(value, moved_p)
    return value.detach(), slope_p
