"""The ConvNet of the dataset-distillation literature (Gidaris 2018; used by DC, MTT, DATM and LAD).

Shapes: B images of a batch, C channels, H side in pixels, W width, K classes.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from lad_dist.errors import DataError
from lad_dist.models.block import NormReluPool
from lad_dist.models.convolution import Convolution
from lad_dist.models.layout import Layout
from lad_dist.seeds import torch_seeded


def feature_side(size: int, channels: int, depth: int) -> int:
    """Return the side of the last feature map. Grey images are padded by 3 in the first block: 4 more pixels a side."""
    return (size + 4 if channels == 1 else size) >> depth


class ConvNet(nn.Module):
    """``depth`` blocks of 3x3 convolution, instance norm, ReLU and 2x2 average pooling, then one linear classifier.

    Instance norm is GroupNorm with one group per channel, with learned scale and shift. The parameters of
    ``classifier`` are the classifier in the sense of the method; all others are the backbone. ``fused`` False uses
    torch's operations instead of ``block.py``. ``norm`` "batch" uses batch norm, for evaluation only.

    Raises:
        DataError: the images are too small for ``depth`` blocks.
    """

    classifier_name = "classifier"

    def __init__(
        self,
        channels: int,
        size: int,
        classes: int,
        width: int = 128,
        depth: int = 3,
        fused: bool = True,
        norm: str = "instance",
    ) -> None:
        super().__init__()
        side = feature_side(size, channels, depth)
        if side < 1:
            raise DataError(f"model.depth: {depth} blocks halve {size}x{size} images to zero; use fewer blocks")
        layers: dict[str, nn.Module] = {}  # named by position in published code: convolution, norm, ReLU, pooling
        for block in range(depth):
            first = block == 0
            padding = 3 if first and channels == 1 else 1
            convolution = Convolution if fused else nn.Conv2d
            layers[str(4 * block)] = convolution(channels if first else width, width, kernel_size=3, padding=padding)
            if norm == "instance":
                layers[str(4 * block + 1)] = NormReluPool(width, fused=fused)
            else:
                layers[str(4 * block + 1)] = nn.BatchNorm2d(width)
                layers[str(4 * block + 2)] = nn.ReLU()
                layers[str(4 * block + 3)] = nn.AvgPool2d(2)
        self.features = nn.Sequential(OrderedDict(layers))
        self.classifier = nn.Linear(width * side * side, classes)

    def backbone(self, images_BCHH: Tensor) -> Tensor:
        """Features, shape (B, W * side * side)."""
        return self.features(images_BCHH).flatten(1)

    def forward(self, images_BCHH: Tensor) -> Tensor:
        """Logits, shape (B, K)."""
        return self.classifier(self.backbone(images_BCHH))


def build(
    channels: int, size: int, classes: int, width: int, depth: int, *, seed: int, purpose: tuple[int | str, ...]
) -> ConvNet:
    """Build a ConvNet whose initialisation (torch's default) is a pure function of ``seed`` and ``purpose``."""
    with torch_seeded(seed, "init", *purpose):
        return ConvNet(channels, size, classes, width, depth)


def flat_parameters(module: nn.Module) -> Tensor:
    """Return all parameters as one vector, shape (P,), in the order of ``Layout.of``, detached from the module."""
    return torch.cat([module.get_parameter(name).detach().reshape(-1) for name in Layout.of(module).names])
