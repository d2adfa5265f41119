"""Batches of whitened images for training and evaluation."""

from __future__ import annotations

import torch

from lad_dist.data.whitening import Whitening

DEFAULT_BUDGET_BYTES = 2**30


class PreparedSet:
    """Labelled set that serves whitened float32 batches on ``device``.

    If all whitened images fit in ``budget_bytes`` they are computed once and kept on the device (``resident``); else
    the uint8 images stay in place and each batch is whitened on demand. ZCA is a matrix product, whose last bit may
    depend on the number of rows, so the two modes agree only to rounding. The mode therefore depends only on sizes, not
    on free memory, and a resumed run uses the same mode again.
    """

    def __init__(
        self,
        images_NCHW: torch.Tensor,
        labels_N: torch.Tensor,
        whitening: Whitening,
        device: torch.device | str = "cpu",
        budget_bytes: int = DEFAULT_BUDGET_BYTES,
    ) -> None:
        """images_NCHW: uint8; labels_N: int64. Raises ``DataError`` if the whitening was fitted to another shape."""
        assert images_NCHW.dtype == torch.uint8 and len(images_NCHW) == len(labels_N)
        self.device = torch.device(device)
        self.whitening = whitening.to(self.device)
        self.resident = images_NCHW.numel() * 4 <= budget_bytes
        self._images_NCHW = self.whitening.apply(images_NCHW) if self.resident else images_NCHW
        self.labels_N = labels_N.to(self.device)

    def __len__(self) -> int:
        return len(self.labels_N)

    def batch(self, indices_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return whitened images float32 (B, C, H, W) and labels int64 (B,), both on the device, in the given order."""
        images_BCHW = self._images_NCHW[indices_B.to(self._images_NCHW.device)]
        if not self.resident:
            images_BCHW = self.whitening.apply(images_BCHW)
        return images_BCHW, self.labels_N[indices_B.to(self.device)]
