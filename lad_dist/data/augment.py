"""DSA: differentiable augmentation with explicit parameters (Zhao and Bilen, ICML 2021, arXiv 2102.08259).

One operation is drawn per batch (or all are applied, ``augment.compose``), its parameters per image. Drawing (``draw``)
and applying (``apply``) are separate: the draws are NumPy numbers of a counter-based generator, so a rank that holds
only some rows of a batch applies the same parameters to them as a single process would. User-defined operations
(``Augmentation``) get their numbers in the same way.

Shapes: B images, C channels, H side in pixels, D numbers per image.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lad_dist import plugins
from lad_dist.errors import LadDistError, RecipeError
from lad_dist.recipe import AugmentConfig

GROUP = "lad_dist.augmentations"
_FIELD = "augment.operations"
_NUMBERS = 3  # uniform numbers drawn per image
_TOLERANCE = 1e-4  # between an image augmented alone and in a batch


class Augmentation(Protocol):
    """User-defined operation: maps images (B, C, H, H) and D numbers in [0, 1] per image to images of the same shape.

    Differentiable with respect to the images, which are whitened. It may be given any part of a batch, so an image's
    result must depend only on the image and its own numbers; nothing else may be drawn. An attribute ``numbers`` sets D
    (default 3).
    """

    def __call__(self, images_BCHH: Tensor, uniform_BD: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Draw:
    """One operation and its parameters for each image of a batch; ``values_BD`` has D numbers per image.

    ``then``: the draws of further operations, applied after it (``augment.compose`` all).

    color: brightness offset, saturation factor, contrast factor. crop: rows and columns shifted. cutout: centre row and
    column. flip: 1 to flip. scale: factors along x and y. rotate: radians. none: nothing. Others: uniform in [0, 1].
    """

    operation: str
    values_BD: np.ndarray
    then: tuple[Draw, ...] = ()

    def rows(self, index: slice | np.ndarray) -> Draw:
        """Return the draw of some images of the batch."""
        return Draw(self.operation, self.values_BD[index], tuple(one.rows(index) for one in self.then))


def draw(rng: np.random.Generator, config: AugmentConfig, batch: int, size: int) -> Draw:
    """Draw one operation, uniform among ``config.operations``, and parameters for ``batch`` images of side ``size``.

    With ``config.compose`` all, draw parameters for every operation.
    """
    if not config.operations:
        return Draw("none", np.zeros((batch, 0)))
    if config.compose == "all":
        first, *others = (_parameters(operation, rng, config, batch, size) for operation in config.operations)
        return Draw(first.operation, first.values_BD, tuple(others))
    operation = config.operations[int(rng.integers(len(config.operations)))]
    return _parameters(operation, rng, config, batch, size)


def _parameters(operation: str, rng: np.random.Generator, config: AugmentConfig, batch: int, size: int) -> Draw:
    if operation not in _RANGES:
        return Draw(operation, rng.random((batch, _numbers(operation))))
    uniform_B3 = rng.random((batch, _NUMBERS))
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
    """Return the augmented images, differentiable with respect to ``images_BCHH``; same shape and type."""
    if drawn.operation == "none" or len(images_BCHH) == 0:
        return images_BCHH
    for one in (drawn, *drawn.then):
        images_BCHH = _applied(images_BCHH, one)
    return images_BCHH


def _applied(images_BCHH: Tensor, drawn: Draw) -> Tensor:
    values_BD = torch.as_tensor(drawn.values_BD, dtype=images_BCHH.dtype, device=images_BCHH.device)
    if drawn.operation in _OPERATIONS:
        return _OPERATIONS[drawn.operation](images_BCHH, values_BD)
    check(drawn.operation, images_BCHH.shape[1], images_BCHH.shape[2])
    return _own(drawn.operation)(images_BCHH, values_BD)


# --- user-defined operations -----------------------------------------------------------------------------------------


@functools.cache
def _own(operation: str) -> Augmentation:
    what = "a callable (images, uniform numbers) -> images"
    found: Augmentation = plugins.load_callable(operation, GROUP, _FIELD, what)
    return found


def _numbers(operation: str) -> int:
    """Return D of an operation."""
    numbers = getattr(_own(operation), "numbers", _NUMBERS)
    if type(numbers) is not int or numbers < 0:
        raise RecipeError(
            f"{_FIELD}: {operation}: its attribute numbers is {numbers!r}; valid: the count of numbers per image"
        )
    return numbers


@functools.cache
@torch.enable_grad()
def check(operation: str, channels: int, size: int) -> None:
    """Test a user-defined operation on a few images. Raises RecipeError if it violates ``Augmentation``."""
    generator = torch.Generator().manual_seed(0)
    images_BCHH = torch.randn(4, channels, size, size, generator=generator).requires_grad_()
    uniform_BD = torch.rand(4, _numbers(operation), generator=generator)
    apply_own, where = _own(operation), f"{_FIELD}: {operation}"
    try:
        views_BCHH: object = apply_own(images_BCHH, uniform_BD)
        if not isinstance(views_BCHH, Tensor) or views_BCHH.shape != images_BCHH.shape:
            found = tuple(views_BCHH.shape) if isinstance(views_BCHH, Tensor) else type(views_BCHH).__name__
            raise RecipeError(
                f"{where}: returns {found} for images of {tuple(images_BCHH.shape)}; valid: the same shape"
            )
        if not views_BCHH.requires_grad:
            raise RecipeError(f"{where}: not differentiable with respect to the images; valid: torch operations")
        with torch.no_grad():
            pairs = zip(images_BCHH.split(1), uniform_BD.split(1), strict=True)
            alone_BCHH = torch.cat([apply_own(image, numbers) for image, numbers in pairs])
        (gradient,) = torch.autograd.grad(views_BCHH.sum(), images_BCHH)
    except LadDistError:
        raise
    except Exception as error:  # user code: may raise anything
        raise RecipeError(
            f"{where}: on images of {tuple(images_BCHH.shape)}: {type(error).__name__}: {error}"
        ) from error
    if not torch.allclose(views_BCHH.detach(), alone_BCHH, rtol=_TOLERANCE, atol=_TOLERANCE):
        raise RecipeError(
            f"{where}: an image's result changes with its batch or between calls; valid: a function of the image and its "
            "numbers"
        )
    if not bool(gradient.isfinite().all()):
        raise RecipeError(f"{where}: its gradient is not finite; valid: finite gradients")


# --- the operations of DSA --------------------------------------------------------------------------------------------


def color(x_BCHH: Tensor, values_B3: Tensor) -> Tensor:
    """Add brightness, then scale saturation about the mean over channels, then contrast about the image's mean."""
    brightness, saturation, contrast = (v.view(-1, 1, 1, 1) for v in values_B3.unbind(1))
    x_BCHH = x_BCHH + brightness
    if x_BCHH.shape[1] > 1:  # a grey image equals its mean over channels
        grey = x_BCHH.mean(dim=1, keepdim=True)
        x_BCHH = (x_BCHH - grey) * saturation + grey
    mean = x_BCHH.mean(dim=(1, 2, 3), keepdim=True)
    return (x_BCHH - mean) * contrast + mean


def crop(x_BCHH: Tensor, values_B2: Tensor) -> Tensor:
    """Shift by whole pixels (rows, columns); pixels from outside are zero."""
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
    """Set a square hole to zero; values are its first row, first column and side (the hole may leave the image).

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
    """Mirror left to right where the value is 1."""
    return torch.where(values_B1.view(-1, 1, 1, 1) > 0, x_BCHH.flip(3), x_BCHH)


def scale(x_BCHH: Tensor, values_B2: Tensor) -> Tensor:
    """Sample on a grid stretched by (x, y): factors above 1 shrink the picture. Bilinear, zeros outside."""
    zero = torch.zeros_like(values_B2[:, 0])
    return _sampled(x_BCHH, [values_B2[:, 0], zero, zero, zero, values_B2[:, 1], zero])


def rotate(x_BCHH: Tensor, values_B1: Tensor) -> Tensor:
    """Rotate by the angle in radians. Bilinear, zeros outside."""
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
