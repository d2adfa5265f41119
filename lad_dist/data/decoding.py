"""Decode images into one preallocated uint8 tensor, all of one size and number of channels.

N images, C channels, S side of the (square) images.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from lad_dist import cores
from lad_dist.data.sources import ArraySource, Indices, Item, Pixels, Source
from lad_dist.errors import DataError

if TYPE_CHECKING:
    from lad_dist.recipe import DataConfig

# Errors that Pillow raises for damaged files, by format.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")  # older Pillows open a 16-bit PNG as "I"
GREY_MODES = ("1", "L", "LA", "La", *_SIXTEEN_BIT_MODES)
_BATCH = 256  # images in flight: bounds the memory of encoded images
_MAX_THREADS = 8
_MOST_BYTES = 2**30  # maximum size of an encoded image


@dataclass(frozen=True)
class PixelFormat:
    """Common format of all images."""

    channels: int  # 1 or 3
    size: int  # side, pixels
    resize: bool  # False: an image of another size is an error
    center_crop: bool  # False: an image that is not square is an error
    convert_to_grey: bool  # False: a colour image among grey ones is an error


def probe(source: Source, config: DataConfig) -> PixelFormat:
    """Return the format that ``config`` requests; unset fields follow the first image of ``source``."""
    _, first = next(source.items(np.zeros(1, dtype=np.int64)))
    image = _open(first)
    channels = config.channels or source.channels or (1 if image.mode in GREY_MODES else 3)
    if image.width != image.height and config.fit == "refuse":
        raise _not_square(first, image)
    return PixelFormat(
        channels=channels,
        size=config.image_size or min(image.size),
        resize=config.image_size is not None,
        center_crop=config.fit == "center-crop",
        convert_to_grey=config.channels == 1,
    )


def decode(
    source: Source, indices: Indices, pixel_format: PixelFormat, on_decoded: Callable[[int], None] = lambda _: None
) -> torch.Tensor:
    """Decode the images ``indices`` of ``source`` to uint8 (N, C, S, S), in the order of ``indices``.

    Memory is bounded by the result and a batch of encoded images. ``on_decoded`` receives the number of images just
    completed. Raises ``DataError`` naming the first unusable image.
    """
    shape = (len(indices), pixel_format.channels, pixel_format.size, pixel_format.size)
    if isinstance(source, ArraySource) and source.images_NCHW.shape[1:] == shape[1:]:
        images_NCSS = torch.from_numpy(np.ascontiguousarray(source.images_NCHW[indices]))
        on_decoded(len(indices))
        return images_NCSS
    images_NCSS = torch.empty(shape, dtype=torch.uint8)
    target = images_NCSS.numpy()

    def decode_one(entry: tuple[int, Item]) -> None:
        k, item = entry
        target[k] = _to_pixels(item, pixel_format)

    items = source.items(indices)
    # Pillow releases the interpreter lock while it decodes and resizes, so threads suffice.
    with ThreadPoolExecutor(min(_MAX_THREADS, cores.available())) as pool:
        while batch := list(islice(items, _BATCH)):
            for _ in pool.map(decode_one, batch):
                pass
            on_decoded(len(batch))
    return images_NCSS


def _open(item: Item) -> Image.Image:
    if isinstance(item.content, np.ndarray):
        return Image.fromarray(item.content)
    try:
        # Read whole: Pillow would keep each file open until its pixels are requested.
        content = _read(item.content, item.where) if isinstance(item.content, Path) else item.content
        image = Image.open(io.BytesIO(content))
        image.load()
    except FileNotFoundError as error:
        raise DataError(f"{item.where}: no such file") from error
    except UnidentifiedImageError as error:
        what = "of an unknown format" if content else "empty"
        raise DataError(
            f"{item.where}: not a readable image (it is {what}); valid: PNG, JPEG, BMP, WebP, ..."
        ) from error
    except _DECODE_ERRORS as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"{item.where}: not a readable image ({reason}); valid: PNG, JPEG, BMP, WebP, ...") from error
    return image


def _read(file: Path, where: str) -> bytes:
    """Return a regular file's content. Raises DataError for a FIFO (would block), a device or an oversized file."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as opened:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise DataError(f"{where}: not a regular file; valid: image files")
        if facts.st_size > _MOST_BYTES:
            raise DataError(f"{where}: {facts.st_size:,} bytes; valid: image files of at most {_MOST_BYTES:,} bytes")
        return opened.read()


def _to_pixels(item: Item, pixel_format: PixelFormat) -> Pixels:
    """Convert one image to uint8 (C, S, S): drop transparency; colour to grey by ITU-R 601 luma."""
    image = _open(item)
    if pixel_format.channels == 1 and image.mode not in GREY_MODES and not pixel_format.convert_to_grey:
        raise DataError(
            f"{item.where}: a colour image (mode {image.mode}) where the first image of the data set is grey; "
            "valid: data.channels: 3 to load all in colour, or 1 to load all in grey"
        )
    image = eight_bit(item.where, image).convert("L" if pixel_format.channels == 1 else "RGB")
    side = min(image.size)
    if image.width != image.height:
        if not pixel_format.center_crop:
            raise _not_square(item, image)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    if side != pixel_format.size:
        if not pixel_format.resize:
            raise DataError(
                f"{item.where}: {side}x{side} pixels where the first image of the data set has "
                f"{pixel_format.size}x{pixel_format.size}; valid: images of one size, or data.image_size to resize all"
            )
        # Pillow's bilinear filter widens with the reduction factor, which prevents aliasing in small pictures.
        image = image.resize((pixel_format.size, pixel_format.size), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def eight_bit(where: str, image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits (65535 -> 255), which Pillow's own conversion would clip; return others unchanged.

    Raises DataError, naming the image by ``where``, for pixels of no known range.
    """
    if image.mode == "F":
        raise DataError(f"{where}: floating-point pixels have no known range; valid: 8- or 16-bit images")
    if image.mode not in _SIXTEEN_BIT_MODES:
        return image
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise DataError(f"{where}: pixels from {pixels.min()} to {pixels.max()}; valid: 8- or 16-bit images")
    return Image.fromarray(np.rint(pixels / 257).astype(np.uint8))


def _not_square(item: Item, image: Image.Image) -> DataError:
    return DataError(
        f"{item.where}: {image.width}x{image.height} pixels is not square; "
        "valid: square images, or data.fit: center-crop to crop them"
    )
