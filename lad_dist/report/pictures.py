"""Synthetic images as pictures: un-whitened, enlarged without smoothing, one row per class.

G classes shown, M images of each, C channels (1 grey, 3 colour), H side.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lad_dist.distilled import DistilledSet

MOST_CLASSES, MOST_IMAGES = 100, 10
_MOST_PIXELS = 9_000_000  # of both strips together: above this fewer classes are shown, at least ten
CELL = 64  # minimum pixels a side of an image in the PNG grid
_LOSSLESS_PIXELS = 3_000_000  # above this, the page's copies are JPEG, so that it stays at a few megabytes
_INK, _PAPER, _RULE = (40, 40, 40), (255, 255, 255), (225, 225, 225)


@dataclass(frozen=True)
class Gallery:
    """The displayed part of a distilled set. Pixels are uint8 (G, M, H, H, C)."""

    names: tuple[str, ...]
    counts: tuple[int, ...]
    synthetic_GMHHC: Tensor
    initial_GMHHC: Tensor
    classes: int  # in the set
    per_class: int  # in the set

    @property
    def limited(self) -> str:
        """Describe what is omitted; empty if everything is shown."""
        shown_classes, shown = len(self.names), self.synthetic_GMHHC.shape[1]
        parts = [f"the first {shown} of {self.per_class} images of each class"] if shown < self.per_class else []
        if shown_classes < self.classes:
            parts.append(f"{shown_classes} of {self.classes} classes, evenly spread over the order by training images")
        return f"Shown: {'; '.join(parts)}." if parts else ""

    @property
    def lossless(self) -> bool:
        """Whether the page holds the exact pixels."""
        return 2 * self.synthetic_GMHHC[..., 0].numel() <= _LOSSLESS_PIXELS


def gallery(distilled: DistilledSet) -> Gallery:
    """Select at most ``MOST_CLASSES`` classes, largest first, and the first ``MOST_IMAGES`` images of each.

    Of large images fewer classes, so that the page stays at some megabytes.
    """
    meta = distilled.meta
    order = sorted(range(len(meta.class_names)), key=lambda c: -meta.counts[c])
    row = 2 * min(meta.ipc, MOST_IMAGES) * distilled.images.shape[-1] ** 2
    most = max(10, min(MOST_CLASSES, _MOST_PIXELS // row))
    chosen = [order[i * len(order) // most] for i in range(most)] if len(order) > most else order
    rows_GM = torch.stack([(distilled.labels == c).nonzero()[:, 0][: min(meta.ipc, MOST_IMAGES)] for c in chosen])
    return Gallery(
        tuple(meta.class_names[c] for c in chosen),
        tuple(meta.counts[c] for c in chosen),
        _pixels(distilled, distilled.images, rows_GM),
        _pixels(distilled, distilled.initial_images, rows_GM),
        len(order),
        meta.ipc,
    )


def _pixels(distilled: DistilledSet, images_SCHH: Tensor, rows_GM: Tensor) -> Tensor:
    """Return the selected images as uint8 (G, M, H, H, C); only those are un-whitened: ZCA costs C^2 H^4 each."""
    pixels = distilled.whitening.pixels(images_SCHH[rows_GM.flatten()].cpu()).permute(0, 2, 3, 1)
    return pixels.reshape(*rows_GM.shape, *pixels.shape[1:])


def png_grid(shown: Gallery, title: str, images_GMHHC: Tensor) -> bytes:
    """Return PNG bytes: one row per class with its name, images enlarged by an integer factor without smoothing."""
    classes, count, size = images_GMHHC.shape[:3]
    factor = max(-(-CELL // size), 1)
    cell, gap, margin, head = size * factor, 6, 16, 46
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    texts = [
        (name if len(name) <= 24 else name[:23] + "…", f"{n:,} training images")
        for name, n in zip(shown.names, shown.counts, strict=True)
    ]
    label = int(max(max(font.getlength(a), small.getlength(b)) for a, b in texts)) + 14
    notes = " ".join(t for t in ("Whitening undone.", shown.limited) if t)
    wide = margin * 2 + max(label + count * (cell + gap), int(font.getlength(title)), int(small.getlength(notes)))
    canvas = Image.new("RGB", (wide, head + margin * 2 + classes * (cell + gap)), _PAPER)
    pen = ImageDraw.Draw(canvas)
    pen.text((margin, margin), title, _INK, font=font)
    pen.text((margin, margin + 22), notes, _INK, font=small)
    for row in range(classes):
        y = head + margin + row * (cell + gap)
        pen.line((margin, y - gap // 2, wide - margin, y - gap // 2), _RULE)
        pen.text((margin, y + cell // 2 - 18), texts[row][0], _INK, font=font)
        pen.text((margin, y + cell // 2 + 2), texts[row][1], _INK, font=small)
        for i in range(count):
            tile = _image(images_GMHHC[row, i]).resize((cell, cell), Image.Resampling.NEAREST)
            canvas.paste(tile, (margin + label + i * (cell + gap), y))
    return _encoded(canvas, "PNG")


def data_uris(images_MHHC: Tensor, lossless: bool) -> list[str]:
    """Return each image at its own size as a data URI; the page enlarges it."""
    kind = "PNG" if lossless else "JPEG"
    encoded = (_encoded(_image(pixels), kind) for pixels in images_MHHC)
    return [f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}" for data in encoded]


def _image(pixels_HWC: Tensor) -> Image.Image:
    array = pixels_HWC.numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def _encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "PNG":
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, kind, quality=92, subsampling=0)
    return buffer.getvalue()
