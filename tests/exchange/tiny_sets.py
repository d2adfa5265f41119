"""A distilled set of six images with awkward class names, made without distilling."""

from __future__ import annotations

from typing import Any

import torch

from lad_dist.data.whitening import Whitening
from lad_dist.distilled import DistilledMeta, DistilledSet

NAMES = ("cat", 'T-shirt/top, "new"', "Ünal: | x")


def make_set(kind: str = "zca", channels: int = 3, hard: bool = False, **fields: Any) -> DistilledSet:
    """Six images of 4x4, three classes with awkward names; some pixels far outside [0, 1]."""
    draws = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (40, channels, 4, 4), dtype=torch.uint8, generator=draws)
    images = 2 * torch.randn(6, channels, 4, 4, generator=draws)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    logits = 200.0 * torch.nn.functional.one_hot(labels, 3).float() if hard else torch.randn(6, 3, generator=draws)
    values = dict(method="lad", dataset="digits/train", ipc=2, class_names=NAMES, counts=(50, 9, 2), lr=0.012299999594688416,
                  iteration=250, selection="last", recipe_hash="ab", experts_hash="cd", data_fingerprint="e",
                  recipe={"ipc": 2, "data": {"dataset": "digits", "root": "/home/me", "download": True}},
                  versions={"torch": "2"}) | fields  # fmt: skip
    return DistilledSet(images, logits, labels, DistilledMeta(**values), Whitening.fit(real, kind))
