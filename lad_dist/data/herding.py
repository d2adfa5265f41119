"""Herding: examples whose mean is closest to that of all (Welling, ICML 2009; as in iCaRL, arXiv 1611.07725)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def herd(features_ND: Tensor, count: int) -> np.ndarray:
    """Return the positions of ``count`` rows, in selection order; at most N.

    Rows are scaled to unit length; each pick minimises the distance between the mean of the picks and the mean of all
    rows. Ties go to the first row, so the result is a function of the features alone.
    """
    rows_ND = torch.nn.functional.normalize(features_ND.double(), dim=1)
    mean_D, total_D = rows_ND.mean(dim=0), torch.zeros_like(rows_ND[0])
    free_N = torch.ones(len(rows_ND), dtype=torch.bool)
    picked: list[int] = []
    for n in range(1, min(count, len(rows_ND)) + 1):
        distance_N = ((total_D + rows_ND) / n - mean_D).square().sum(dim=1)
        best = int(torch.where(free_N, distance_N, torch.inf).argmin())
        picked.append(best)
        free_N[best] = False
        total_D = total_D + rows_ND[best]
    return np.array(picked, dtype=np.int64)
