"""Images of a distilled set as PNG, with the whitening undone.

S images, C channels (1 grey, 3 colour), H side.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from lad_dist.distilled import DistilledSet

CELL = 64  # minimum side of an image in a grid, pixels
GAP = 2  # white pixels around every image of a grid
_AT_ONCE = 128  # images un-whitened at a time: ZCA costs C^2 H^4 each
_OTHER_MODES = "pictures are grey or colour"

Progress = Callable[[int], None]


def pixels(distilled: DistilledSet, on_images: Progress = lambda _: None) -> Tensor:
    """Return all images as uint8 (S, H, H, C): whitening undone, clipped to [0, 1], rounded.

    ``on_images`` is called with the number of newly converted images.
    """
    parts = []
    for images_BCHH in distilled.images.cpu().split(_AT_ONCE):
        parts.append(distilled.whitening.to("cpu").pixels(images_BCHH).permute(0, 2, 3, 1))
        on_images(len(images_BCHH))
    return torch.cat(parts)


def png(pixels_HHC: Tensor) -> bytes:
    """Encode one image as PNG, which is lossless."""
    return _encoded(_image(pixels_HHC))


def png_grid(rows: Sequence[Tensor]) -> bytes:
    """Encode a grid as PNG, with one row per entry of ``rows``, uint8 (images, H, H, C).

    Images are enlarged by an integer factor without smoothing. With cell the enlarged side, image i of row r starts at
    (GAP + i * (cell + GAP), GAP + r * (cell + GAP)).
    """
    size, channels = int(rows[0].shape[1]), int(rows[0].shape[3])
    assert channels in (1, 3), _OTHER_MODES
    cell = size * enlargement(size)
    step, most = cell + GAP, max(len(row) for row in rows)
    canvas = Image.new("L" if channels == 1 else "RGB", (GAP + most * step, GAP + len(rows) * step), "white")
    for r, images in enumerate(rows):
        for i, image in enumerate(images):
            tile = _image(image).resize((cell, cell), Image.Resampling.NEAREST)
            canvas.paste(tile, (GAP + i * step, GAP + r * step))
    return _encoded(canvas)


def enlargement(size: int) -> int:
    """Return the integer factor by which a grid enlarges images of this side."""
    return max(-(-CELL // size), 1)


def _image(pixels_HHC: Tensor) -> Image.Image:
    array = pixels_HHC.numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def _encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
