"""GSAM with a constant radius (Zhuang et al., ICLR 2022, arXiv 2203.08065), adaptive as in ASAM (arXiv 2102.11600).

Shapes: P parameters in one flat vector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LossOf = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A function from flat parameters (P,) to (mean loss, logits) on one fixed augmented batch."""


@dataclass(frozen=True)
class GsamStep:
    """The gradients of one step; ``logits`` (B, K) and ``loss`` are those of the unperturbed parameters."""

    gradient_P: Tensor
    clean_P: Tensor
    perturbation_P: Tensor
    logits_BK: Tensor
    loss: Tensor


def gsam_gradient(loss_of: LossOf, weights_P: Tensor, rho: float, alpha: float) -> GsamStep:
    """Return the GSAM gradient at ``weights_P``, before weight decay.

    g0 is the gradient at w; the perturbation is e = rho * w^2 * g0 / (|| |w| g0 || + 1e-12); g1 is the gradient at w +
    e on the same batch; the result is g1 - alpha * (the part of g0 orthogonal to g1). With ``rho`` 0 the result is g0,
    from one pass instead of two.
    """
    clean_P, loss, logits_BK = _gradient(loss_of, weights_P)
    if rho == 0:
        return GsamStep(clean_P, clean_P, torch.zeros_like(clean_P), logits_BK, loss)
    norm = torch.linalg.vector_norm(weights_P.abs() * clean_P)
    perturbation_P = weights_P.square() * clean_P * (rho / (norm + 1e-12))
    perturbed_P, _, _ = _gradient(loss_of, weights_P + perturbation_P)
    gradient_P = perturbed_P - alpha * orthogonal_part(clean_P, perturbed_P)
    return GsamStep(gradient_P, clean_P, perturbation_P, logits_BK, loss)


def orthogonal_part(g0_P: Tensor, g1_P: Tensor) -> Tensor:
    """Return the component of g0 orthogonal to g1 (GSAM, equation 11), norms + 1e-12 as in the official code."""
    n0, n1 = torch.linalg.vector_norm(g0_P) + 1e-12, torch.linalg.vector_norm(g1_P) + 1e-12
    cosine = torch.dot(g0_P, g1_P) / (n0 * n1)
    return g0_P - cosine * n0 * (g1_P / n1)


def _gradient(loss_of: LossOf, weights_P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    leaf_P = weights_P.detach().requires_grad_()
    with torch.enable_grad():
        loss, logits_BK = loss_of(leaf_P)
        (gradient_P,) = torch.autograd.grad(loss, leaf_P)
    return gradient_P, loss.detach(), logits_BK.detach()


def sgd_step(
    weights_P: Tensor, gradient_P: Tensor, velocity_P: Tensor | None, lr: float, weight_decay: float, momentum: float
) -> tuple[Tensor, Tensor]:
    """Return (weights, velocity) after a step of SGD with Nesterov momentum, as torch's; ``velocity_P`` None: at rest.

    Without momentum w - lr * (g + weight_decay * w), and a checkpoint is an expert's complete state.
    """
    direction_P = gradient_P + weight_decay * weights_P
    velocity_P = direction_P if velocity_P is None else momentum * velocity_P + direction_P
    return weights_P - lr * (direction_P + momentum * velocity_P), velocity_P
