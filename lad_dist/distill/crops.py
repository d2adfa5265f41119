"""Initial images from crops: of random resized crops of the training images, those that an expert classifies best.

As RLDD (arXiv 2511.18858) and RDED (Sun et al., CVPR 2024, arXiv 2312.03526) begin: each crop is scored by the expert's
cross-entropy on its class; rounds go through the images of a class, best crop first, and take one unused crop of each,
until the class has enough. So no image gives a second crop before every image has given one.

Shapes: S initial images, C channels, H side, K classes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lad_dist.data.longtail import positions_by_class
from lad_dist.data.prepare import PreparedData
from lad_dist.data.torchvision_import import import_torchvision
from lad_dist.seeds import rng, torch_seeded

SCALE = (0.25, 1.0)  # share of the image's area
_MOST_IMAGES = 100  # of a class that are cropped, and ten times its images in the set if those are more


def best_crops(
    data: PreparedData, logits_of: Callable[[Tensor], Tensor], ipc: int, crops: int, seed: int
) -> tuple[Tensor, np.ndarray]:
    """Return (whitened crops (S, C, H, H) on the CPU, class-major; indices (S,) of their images).

    ``logits_of``: from whitened images (B, C, H, H) to an expert's logits (B, K). ``crops``: candidates per image, more
    where a class needs them to have ``ipc``.
    """
    labels_N = data.splits.train.labels_N.numpy()
    chosen, indices = [], []
    for c, members in enumerate(positions_by_class(labels_N, data.classes)):
        members = rng(seed, "initial", "crops", c).permutation(members)[: max(_MOST_IMAGES, 10 * ipc)]
        each = max(crops, -(-ipc // len(members)))
        candidates, losses_r = _scored(data, members, logits_of, c, each, seed)
        taken = _in_rounds(losses_r.reshape(each, len(members)))[:ipc]
        chosen.append(candidates[torch.from_numpy(taken)])
        indices.append(members[taken % len(members)])
    return torch.cat(chosen), np.concatenate(indices)


def _scored(
    data: PreparedData, members: np.ndarray, logits_of: Callable[[Tensor], Tensor], c: int, crops: int, seed: int
) -> tuple[Tensor, np.ndarray]:
    """Return (crops (R * M, C, H, H), crop r of member m at r * M + m; their cross-entropies (R * M,))."""
    import_torchvision()
    transforms = importlib.import_module("torchvision.transforms.v2")
    images_MCHH = data.splits.train.images_NCHW[torch.from_numpy(members)]
    size = images_MCHH.shape[-1]
    crop = transforms.RandomResizedCrop(size, SCALE, antialias=True)
    with torch_seeded(seed, "initial", "crops", c):
        pixels = torch.stack([crop(image) for _ in range(crops) for image in images_MCHH])
    whitened = data.whitening.apply(pixels)
    with torch.no_grad():
        losses = [
            F.cross_entropy(logits_of(x), torch.full((len(x),), c, device=x.device), reduction="none").cpu()
            for x in whitened.split(512)
        ]
    return whitened.cpu(), torch.cat(losses).numpy()


def _in_rounds(losses_RM: np.ndarray) -> np.ndarray:
    """Return the positions of all crops in the order of choice: a round takes the next best crop of every image."""
    crops, images = losses_RM.shape
    by_round = np.argsort(losses_RM, axis=0, kind="stable")  # the crop that image m gives in round r
    order = []
    for r in range(crops):
        given = by_round[r]
        turn = np.argsort(losses_RM[given, np.arange(images)], kind="stable")
        order.append(given[turn] * images + turn)
    return np.concatenate(order)
