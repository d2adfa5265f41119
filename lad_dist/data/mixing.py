"""CutMix and mixup: batches whose images are mixed with others of the batch, and their labels in the same shares.

CutMix: Yun et al., ICCV 2019, arXiv 1905.04899; mixup: Zhang et al., ICLR 2018, arXiv 1710.09412; both with
lambda ~ Beta(1, 1).

Shapes: B images, C channels, H side in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixed:
    """How a batch is mixed: ``share`` of each image's own label, and the rows ``others_B`` that it is mixed with.

    ``box``: first row, last row + 1, first column, last column + 1 of the part cut from the others; None for mixup.
    """

    share: float
    others_B: Tensor
    box: tuple[int, int, int, int] | None


def draw_mix(rng: np.random.Generator, cutmix: float, mixup: float, batch: int, size: int) -> Mixed | None:
    """Draw how a batch of ``batch`` images of side ``size`` is mixed; None: not at all.

    ``cutmix``, ``mixup``: their probabilities, at most 1 together.
    """
    which, share = rng.random(), float(rng.beta(1.0, 1.0))
    if which >= cutmix + mixup:
        return None
    others_B = torch.from_numpy(rng.permutation(batch))
    if which >= cutmix:
        return Mixed(share, others_B, None)
    side = int(size * (1 - share) ** 0.5)
    row, column = (int(at) for at in rng.integers(size, size=2))
    top, left = max(row - side // 2, 0), max(column - side // 2, 0)
    bottom, right = min(row - side // 2 + side, size), min(column - side // 2 + side, size)
    return Mixed(1 - (bottom - top) * (right - left) / size**2, others_B, (top, bottom, left, right))


def mix(images_BCHH: Tensor, mixed: Mixed) -> Tensor:
    """Return the mixed images, of the same shape."""
    others_BCHH = images_BCHH[mixed.others_B.to(images_BCHH.device)]
    if mixed.box is None:
        return mixed.share * images_BCHH + (1 - mixed.share) * others_BCHH
    top, bottom, left, right = mixed.box
    out_BCHH = images_BCHH.clone()
    out_BCHH[:, :, top:bottom, left:right] = others_BCHH[:, :, top:bottom, left:right]
    return out_BCHH


def mix_labels(p_BK: Tensor, mixed: Mixed) -> Tensor:
    """Return the label probabilities of mixed images, (B, K)."""
    return mixed.share * p_BK + (1 - mixed.share) * p_BK[mixed.others_B.to(p_BK.device)]
