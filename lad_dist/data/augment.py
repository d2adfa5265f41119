"""DSA: differentiable augmentation with explicit parameters (Zhao and Bilen, ICML 2021, arXiv 2102.08259).

One operation is drawn per batch, its parameters per image. Drawing (``draw``) and applying (``apply``) are separate:
the draws are NumPy numbers of a counter-based generator, so a rank that holds only some rows of a batch applies the
same parameters to them as a single process would.

Shapes: B images, C channels, H side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lad_dist.recipe import AugmentConfig


@dataclass(frozen=True)
class Draw:
    """One operation and its parameters for each image of a batch; ``values_BD`` has D numbers per image.

    color: brightness offset, saturation factor, contrast factor. crop: rows and columns shifted. cutout: centre row and
    column. flip: 1 to flip. scale: factors along x and y. rotate: radians. none: nothing.
    """

    operation: str
    values_BD: np.ndarray

    def rows(self, index: slice | np.ndarray) -> Draw:
        """The draw of some images of the batch."""
        return Draw(self.operation, self.values_BD[index])


def draw(rng: np.random.Generator, config: AugmentConfig, batch: int, size: int) -> Draw:
    """One operation, uniform among ``config.operations``, with parameters for ``batch`` images of ``size`` pixels a side."""
    if not config.operations:
        return Draw("none", np.zeros((batch, 0)))
    operation = config.operations[int(rng.integers(len(config.operations)))]
    uniform_B3 = rng.random((batch, 3))
    return Draw(operation, _RANGES[operation](uniform_B3, config, size))


def _color_range(u_B3: np.ndarray, c: AugmentConfig, size: int) -> np.ndarray:
    brightness = (u_B3[:, 0] - 0.5) * c.brightness
    return np.stack([brightness, u_B3[:, 1] * c.saturation, u_B3[:, 2] * 2 * c.contrast + 1 - c.contrast], axis=1)


def _crop_range(u_B3: np.ndarray, c: AugmentConfig, size: int) -> np.ndarray:
    shift = int(size * c.crop + 0.5)
    return np.minimum(np.floor(u_B3[:, :2] * (2 * shift + 1)), 2 * shift) - shift


def _cutout_range(u_B3: np.ndarray, c: AugmentConfig, size: int) -> np.ndarray:
    side = int(size * c.cutout + 0.5)
    places = size + 1 - side % 2
    first = np.minimum(np.floor(u_B3[:, :2] * places), places - 1) - side // 2
    return np.concatenate([first, np.full((len(first), 1), float(side))], axis=1)


def _flip_range(u_B3: np.ndarray, c: AugmentConfig, size: int) -> np.ndarray:
    return (u_B3[:, :1] < c.flip).astype(np.float64)


def _scale_range(u_B3: np.ndarray, c: AugmentConfig, size: int) -> np.ndarray:
    return u_B3[:, :2] * (c.scale - 1 / c.scale) + 1 / c.scale


def _rotate_range(u_B3: np.ndarray, c: AugmentConfig, size: int) -> np.ndarray:
    return (u_B3[:, :1] - 0.5) * 2 * np.deg2rad(c.rotate)


_RANGES: dict[str, Callable[[np.ndarray, AugmentConfig, int], np.ndarray]] = {
    "color": _color_range,
    "crop": _crop_range,
    "cutout": _cutout_range,
    "flip": _flip_range,
    "scale": _scale_range,
    "rotate": _rotate_range,
}


def apply(images_BCHH: Tensor, drawn: Draw) -> Tensor:
    """The augmented images, differentiable with respect to ``images_BCHH``; same shape and type."""
    if drawn.operation == "none" or len(images_BCHH) == 0:
        return images_BCHH
    values_BD = torch.as_tensor(drawn.values_BD, dtype=images_BCHH.dtype, device=images_BCHH.device)
    return _OPERATIONS[drawn.operation](images_BCHH, values_BD)


def color(x_BCHH: Tensor, values_B3: Tensor) -> Tensor:
    """Brightness added, then saturation about the mean over channels, then contrast about the image's mean."""
    brightness, saturation, contrast = (v.view(-1, 1, 1, 1) for v in values_B3.unbind(1))
    x_BCHH = x_BCHH + brightness
    if x_BCHH.shape[1] > 1:  # a grey image is its own mean over channels
        grey = x_BCHH.mean(dim=1, keepdim=True)
        x_BCHH = (x_BCHH - grey) * saturation + grey
    mean = x_BCHH.mean(dim=(1, 2, 3), keepdim=True)
    return (x_BCHH - mean) * contrast + mean


def crop(x_BCHH: Tensor, values_B2: Tensor) -> Tensor:
    """Shifted by whole pixels (rows, columns); what comes in from outside is zero."""
    batch, _, height, width = x_BCHH.shape
    rows = torch.arange(height, device=x_BCHH.device) + values_B2[:, :1].long()
    columns = torch.arange(width, device=x_BCHH.device) + values_B2[:, 1:2].long()
    inside = _inside(rows, height)[:, :, None] & _inside(columns, width)[:, None, :]
    picked = x_BCHH[
        torch.arange(batch, device=x_BCHH.device)[:, None, None, None],
        torch.arange(x_BCHH.shape[1], device=x_BCHH.device)[None, :, None, None],
        rows.clamp(0, height - 1)[:, None, :, None],
        columns.clamp(0, width - 1)[:, None, None, :],
    ]
    return picked * inside[:, None]


def _inside(positions: Tensor, length: int) -> Tensor:
    return (positions >= 0) & (positions < length)


def cutout(x_BCHH: Tensor, values_B3: Tensor) -> Tensor:
    """A square hole set to zero; values are its first row, first column and side (the hole may leave the image).

    A hole that leaves the image is clamped to the border row or column, as in the official implementation.
    """
    height, width = x_BCHH.shape[2:]
    side = values_B3[:, 2:3]
    row_hole = _hole(values_B3[:, :1], side, height)
    column_hole = _hole(values_B3[:, 1:2], side, width)
    return x_BCHH * ~(row_hole[:, None, :, None] & column_hole[:, None, None, :])


def _hole(first: Tensor, side: Tensor, length: int) -> Tensor:
    position = torch.arange(length, device=first.device, dtype=first.dtype)
    begin = first.clamp(0, length - 1)
    end = (first + side - 1).clamp(0, length - 1)
    return (position >= begin) & (position <= end) & (side > 0)


def flip(x_BCHH: Tensor, values_B1: Tensor) -> Tensor:
    """Mirrored left to right where the value is 1."""
    return torch.where(values_B1.view(-1, 1, 1, 1) > 0, x_BCHH.flip(3), x_BCHH)


def scale(x_BCHH: Tensor, values_B2: Tensor) -> Tensor:
    """Sampled on a grid stretched by (x, y): factors above 1 shrink the picture. Bilinear, zeros outside."""
    zero = torch.zeros_like(values_B2[:, 0])
    return _sampled(x_BCHH, [values_B2[:, 0], zero, zero, zero, values_B2[:, 1], zero])


def rotate(x_BCHH: Tensor, values_B1: Tensor) -> Tensor:
    """Rotated by the angle in radians. Bilinear, zeros outside."""
    cos, sin = torch.cos(values_B1[:, 0]), torch.sin(values_B1[:, 0])
    zero = torch.zeros_like(cos)
    return _sampled(x_BCHH, [cos, -sin, zero, sin, cos, zero])


def _sampled(x_BCHH: Tensor, entries: list[Tensor]) -> Tensor:
    theta_B23 = torch.stack(entries, dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta_B23, list(x_BCHH.shape), align_corners=True)
    return F.grid_sample(x_BCHH, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


_OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "color": color,
    "crop": crop,
    "cutout": cutout,
    "flip": flip,
    "scale": scale,
    "rotate": rotate,
}
