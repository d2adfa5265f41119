"""Sizes of the ConvNet (``models/convnet.py``) on one data set, counted without building it.

Units: values (of 4 bytes in float32) and floating-point operations, of one image unless said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

from lad_dist.models.convnet import feature_side


@dataclass(frozen=True)
class Shapes:
    """A ConvNet of ``depth`` blocks of ``width`` channels for images (``channels``, ``size``, ``size``) of ``classes``."""

    channels: int
    size: int
    classes: int
    width: int
    depth: int

    @property
    def image(self) -> int:
        """D, values of an image."""
        return self.channels * self.size**2

    @property
    def sides(self) -> tuple[int, ...]:
        """Side of each block's convolution; grey images are padded by 3 in the first."""
        first = self.size + 4 if self.channels == 1 else self.size
        return tuple(first >> block for block in range(self.depth))

    @property
    def activations(self) -> int:
        """Values of all convolutions' results: what the graph of a step is made of."""
        return sum(self.width * side**2 for side in self.sides)

    @property
    def largest(self) -> int:
        """Values of the first, and largest, convolution's result."""
        return self.width * self.sides[0] ** 2

    @property
    def features(self) -> int:
        """Values that the classifier is given."""
        return self.width * feature_side(self.size, self.channels, self.depth) ** 2

    @property
    def classifier(self) -> int:
        """Weights and biases of the classifier."""
        return (self.features + 1) * self.classes

    @property
    def parameters(self) -> int:
        """P: every block has a convolution with biases and a norm's scale and shift."""
        inputs = (self.channels, *[self.width] * (self.depth - 1))
        return sum(9 * c * self.width + 3 * self.width for c in inputs) + self.classifier

    @property
    def forward_flops(self) -> int:
        """Operations (a multiply-add is two) of one forward pass: convolutions and classifier."""
        inputs = (self.channels, *[self.width] * (self.depth - 1))
        convolutions = sum(2 * 9 * c * self.width * side**2 for c, side in zip(inputs, self.sides, strict=True))
        return convolutions + 2 * self.features * self.classes
