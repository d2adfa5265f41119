"""What ImageNet-LT's size costs: made-up images in its shape, and every stage measured on them.

    python benchmarks/scale.py --work FOLDER --make imagenet-lt       # the images alone
    python benchmarks/scale.py --work FOLDER --write                  # images, measurements, table

Makes list-file data sets in the shape of ImageNet-LT, Places-LT and iNaturalist 2018 (classes, images, largest and
smallest class) in FOLDER, which should be on a local disk with 3 GB free. The images are small JPEGs of mixed sizes;
each class has colours of its own, so that training finds something. ``--scale 0.1`` takes a tenth of each class.

Each measurement runs in a process of its own with one thread; seconds are processor seconds unless the table says
otherwise, since other work on the machine weighs less on them. ``--write`` puts the table into
benchmarks/results/scale.md; ``--only NAME`` runs some of the measurements and prints them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "scale.md"
SIDES = (72, 160)  # of the made-up images, pixels
QUALITY = 30
IMAGENET_SIDES = (500, 375)  # the usual size of an ImageNet photograph


@dataclass(frozen=True)
class Shape:
    """Classes, images, and sizes of the largest and smallest class of a data set; test images per class."""

    title: str
    classes: int
    images: int
    largest: int
    smallest: int
    test: int


SHAPES = {
    "imagenet-lt": Shape("ImageNet-LT", 1000, 115_846, 1280, 5, 50),
    "places-lt": Shape("Places-LT", 365, 62_500, 4980, 5, 100),
    "inaturalist": Shape("iNaturalist 2018", 8142, 437_513, 1000, 2, 3),
}


def class_sizes(shape: Shape, scale: float = 1.0) -> list[int]:
    """Return the images of each class, largest first: n_c = largest * (smallest / largest)^((c / (K - 1))^p).

    p is such that they add up to ``shape.images``; ``scale`` shrinks every class, to no less than two images.
    """
    places = np.arange(shape.classes) / (shape.classes - 1)

    def sizes(p: float) -> np.ndarray:
        return np.rint(shape.largest * (shape.smallest / shape.largest) ** (places**p)).astype(np.int64)

    low, high = 0.05, 20.0  # a larger p makes larger classes
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sizes(middle).sum() < shape.images else (low, middle)
    found = sizes(high)
    step = int(np.sign(shape.images - found.sum()))
    for i in range(abs(int(shape.images - found.sum()))):  # what rounding leaves, spread over the middle
        found[1 + i % (shape.classes // 2)] += step
    return [max(2, round(int(n) * scale)) for n in found]


def make(work: Path, name: str, scale: float = 1.0) -> Path:
    """Make the data set ``name`` below ``work``, unless it is there; return its folder."""
    from PIL import Image

    shape, root = SHAPES[name], work / f"{name}-{scale:g}"
    if (root / "train.txt").exists():
        return root
    counts = {"train": class_sizes(shape, scale), "test": [max(1, round(shape.test * scale))] * shape.classes}
    for split, of in counts.items():
        lines = []
        for c, count in enumerate(of):
            (root / split / f"{c:04d}").mkdir(parents=True, exist_ok=True)
            base = np.random.default_rng((c, 0)).uniform(40, 216, (4, 4, 3))
            drawn = np.random.default_rng((c, 1 + (split == "test")))
            for i in range(count):
                width, height = (int(side) for side in drawn.integers(*SIDES, 2))
                pixels = np.clip(base + drawn.normal(0, 30, base.shape), 0, 255).astype(np.uint8)
                file = f"{split}/{c:04d}/{i:05d}.jpg"
                picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
                picture.save(root / file, "JPEG", quality=QUALITY)
                lines.append(f"{file} {c}")
        (root / f"{split}.part").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for split in ("test", "train"):
        os.replace(root / f"{split}.part", root / f"{split}.txt")
    return root
