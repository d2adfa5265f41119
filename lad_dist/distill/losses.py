"""The student's loss, and its closed-form gradient for a linear classifier.

Shapes: B images of a batch, D features, K classes, P weights of the classifier.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_cross_entropy(
    logits_BK: Tensor, label_logits_BK: Tensor, class_weights_K: Tensor | None, whole: int | None = None
) -> Tensor:
    """l = -(1/B) sum_b sum_c w_c p_bc log q_bc with p = softmax(label logits), q = softmax(logits); LAD, section 4.1.

    ``class_weights_K`` None means 1 for every class. ``whole`` is B if the images are only part of a batch.
    """
    p_BK = F.softmax(label_logits_BK, dim=1)
    if class_weights_K is not None:
        p_BK = p_BK * class_weights_K
    return -(p_BK * F.log_softmax(logits_BK, dim=1)).sum() / (whole or len(logits_BK))


def linear_gradient(
    classifier_P: Tensor,
    features_BD: Tensor,
    label_logits_BK: Tensor,
    class_weights_K: Tensor | None,
    shapes: Sequence[tuple[int, ...]],
    whole: int,
) -> tuple[Tensor, Tensor]:
    """Return (g, loss): the classifier's closed-form gradient, whose derivative needs only one small graph.

    With r_bc = w_c p_bc, dl/dlogits_b = (sum_c r_bc) q_b - r_b, over B = ``whole``, and dW = dlogits^T F. ``shapes``
    are those of weight and bias.
    """
    weight_shape, bias_shape = shapes
    count = weight_shape[0] * weight_shape[1]
    weight_KD, bias_K = classifier_P[:count].view(weight_shape), classifier_P[count:].view(bias_shape)
    r_BK = F.softmax(label_logits_BK, dim=1)
    if class_weights_K is not None:
        r_BK = r_BK * class_weights_K
    logq_BK = F.log_softmax(F.linear(features_BD, weight_KD, bias_K), dim=1)
    dlogits_BK = (r_BK.sum(dim=1, keepdim=True) * logq_BK.exp() - r_BK) / whole
    gradient_P = torch.cat([(dlogits_BK.T @ features_BD).reshape(-1), dlogits_BK.sum(dim=0)])
    return gradient_P, -(r_BK * logq_BK).sum().detach() / whole
