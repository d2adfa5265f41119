"""Small data sets on disk, made by the tests themselves."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Image.Image:
    """A random picture of (width, height) pixels."""
    width, height = size
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def png(seed: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    picture(seed, size, mode).save(buffer, "PNG")
    return buffer.getvalue()


def write_folders(root: Path, counts: dict[str, int], splits: tuple[str, ...] = ("train", "test")) -> Path:
    """``root/<split>/<class>/<i>.png``, lossless; picture i of class c has the seed 100 * c + i."""
    for split in splits:
        for c, (name, count) in enumerate(sorted(counts.items())):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                picture(100 * c + i).save(folder / f"{i:02d}.png")
    return root


def pixels(seed: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> np.ndarray[Any, np.dtype[np.uint8]]:
    """What ``picture(seed)`` is as (C, H, W)."""
    array = np.asarray(picture(seed, size, mode))
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
