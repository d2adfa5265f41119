"""Strong augmentation of whitened images by torchvision: RandAugment, random resized crops and flips (RLDD's protocol).

RandAugment: Cubuk et al., NeurIPS 2020, arXiv 1909.13719. Its operations are of pixels, so a batch is taken back from
the whitened scale to 8 bits a channel, augmented, and whitened again; synthetic images are clamped to [0, 1] by that.

Shapes: B images, C channels, H side in pixels.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from lad_dist.data.torchvision_import import import_torchvision
from lad_dist.data.whitening import Whitening
from lad_dist.recipe import AugmentConfig
from lad_dist.seeds import Counter, torch_seeded

CROP_SCALE = (0.08, 1.0)  # share of the image's area


def strong_augmentation(
    whitening: Whitening, config: AugmentConfig
) -> Callable[[Tensor, int, tuple[Counter, ...]], Tensor]:
    """Return a function that augments whitened images (B, C, H, H), each by its own draws of (seed, counters).

    Images are flipped with the probability ``config.flip``, if the recipe's operations have flips at all.
    """
    import_torchvision()
    transforms = importlib.import_module("torchvision.transforms.v2")
    flip = config.flip if "flip" in config.operations else 0.0

    def augmented(images_BCHH: Tensor, seed: int, counters: tuple[Counter, ...]) -> Tensor:
        size = images_BCHH.shape[-1]
        steps = transforms.Compose(
            [
                transforms.RandAugment(),
                transforms.RandomResizedCrop(size, CROP_SCALE, antialias=True),
                transforms.RandomHorizontalFlip(flip),
            ]
        )
        pixels_BCHH = whitening.pixels(images_BCHH).cpu()
        with torch_seeded(seed, "evaluate", *counters):
            return whitening.apply(torch.stack([steps(image) for image in pixels_BCHH]))

    return augmented
