"""Soft labels adjusted for the long tail after distillation (ADSA).

Source: Jiang et al., "Rectifying Soft-Label Entangled Bias in Long-Tailed Dataset Distillation", NeurIPS 2025, arXiv
2511.17914. The label logits f are shifted by the log of the training frequencies pi, as in logit adjustment (arXiv
2007.07314),

    p(y | x; tau) = softmax_y(f_y(x) - tau log pi_y),

and tau is chosen on the distilled images, used as a validation set, such that the mean confidence of a class's images
in their own class varies least between classes,

    tau* = argmin_tau std_i E_{x of class i} p(y = i | x; tau).

The paper adjusts labels that a network gives to distilled images; here f are the distilled label logits.

Shapes: S images, K classes, T values of tau.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TAUS = tuple(round(0.01 * i, 2) for i in range(301))
"""Grid of tau: 0 (no adjustment) to 3 in steps of 0.01. The paper does not name its one-dimensional minimiser."""


def adsa(logits_SK: Tensor, labels_S: Tensor, counts: Sequence[int]) -> tuple[Tensor, float]:
    """Return (label probabilities (S, K), tau) of the adjusted soft labels.

    ``labels_S`` are the classes of the images, ``counts`` the training images per class, all at least one.
    """
    logits_SK = logits_SK.double()
    log_priors_K = torch.tensor(counts, dtype=torch.float64, device=logits_SK.device).log() - torch.log(
        torch.tensor(float(sum(counts)), dtype=torch.float64)
    )
    spreads = [float(_spread(logits_SK - tau * log_priors_K, labels_S)) for tau in TAUS]
    tau = TAUS[spreads.index(min(spreads))]  # ties: the smallest tau, i.e. the smallest change
    return (logits_SK - tau * log_priors_K).softmax(dim=1).float(), tau


def _spread(logits_SK: Tensor, labels_S: Tensor) -> Tensor:
    """Return the standard deviation over classes of the mean confidence of a class's images in their own class."""
    own_S = logits_SK.log_softmax(dim=1).gather(1, labels_S.unsqueeze(1)).squeeze(1).exp()
    sums_K = torch.zeros(logits_SK.shape[1], dtype=own_S.dtype, device=own_S.device).index_add_(0, labels_S, own_S)
    sizes_K = torch.bincount(labels_S, minlength=logits_SK.shape[1])
    present = sizes_K > 0
    return (sums_K[present] / sizes_K[present]).std(correction=0)
