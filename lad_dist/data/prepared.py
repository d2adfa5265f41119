"""Batches of whitened images for training and evaluation."""

from __future__ import annotations

import torch

from lad_dist.data.whitening import Whitening

DEFAULT_BUDGET_BYTES = 2**30


class PreparedSet:
    """A labelled set that hands out whitened float32 batches on ``device``.

    Where all whitened images fit ``budget_bytes`` they are made once and kept on the device (``resident``); else the
    uint8 images stay where they are and each batch is whitened when it is asked for. ZCA is a matrix product, whose
    last bit may depend on how many rows it is given, so the two ways agree to rounding only. Which one is taken
    therefore depends on nothing but the sizes: free memory has no say, and a resumed run takes the same way again.
    """

    def __init__(
        self,
        images_NCHW: torch.Tensor,
        labels_N: torch.Tensor,
        whitening: Whitening,
        device: torch.device | str = "cpu",
        budget_bytes: int = DEFAULT_BUDGET_BYTES,
    ) -> None:
        """images_NCHW: uint8; labels_N: int64. Raises ``DataError`` where the whitening was fitted to another shape."""
        assert images_NCHW.dtype == torch.uint8 and len(images_NCHW) == len(labels_N)
        self.device = torch.device(device)
        self.whitening = whitening.to(self.device)
        self.resident = images_NCHW.numel() * 4 <= budget_bytes
        self._images_NCHW = self.whitening.apply(images_NCHW) if self.resident else images_NCHW
        self.labels_N = labels_N.to(self.device)

    def __len__(self) -> int:
        return len(self.labels_N)

    def batch(self, indices_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Whitened images float32 (B, C, H, W) and labels int64 (B,), both on the device, in the given order."""
        images_BCHW = self._images_NCHW[indices_B.to(self._images_NCHW.device)]
        if not self.resident:
            images_BCHW = self.whitening.apply(images_BCHW)
        return images_BCHW, self.labels_N[indices_B.to(self.device)]
