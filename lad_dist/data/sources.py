"""Interface of data sets to the loader: all labels available at once, images fetched by index.

Labels come first because a long-tailed subset is selected by label: only the selected images are ever decoded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lad_dist.errors import DataError

Labels = npt.NDArray[np.int64]
Indices = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]

ROOT_VARIABLE = "LAD_DIST_DATA"
_SHOWN = 10  # offending labels listed in a message


@dataclass(frozen=True)
class Item:
    """One image before decoding. ``where`` names it in messages: a file, or a file and its row or line."""

    where: str
    content: Path | bytes | Pixels  # a file, an encoded image, or pixels (H, W) or (H, W, 3)


class Source(Protocol):
    """One split of a data set."""

    @property
    def where(self) -> str:
        """The file or folder, and the column, of the labels."""

    @property
    def labels_N(self) -> Labels:
        """The label of every image, in data set order."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names by label, or None where the data set has none."""

    @property
    def channels(self) -> int | None:
        """1 or 3 if the kind of data set determines it, else None."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What was found but not used, one sentence each."""

    def items(self, indices: Indices) -> Iterator[tuple[int, Item]]:
        """Yield (k, image ``indices[k]``) for every k, in whichever order is cheapest to read."""


@dataclass(frozen=True)
class ArraySource:
    """Images already in memory: (N, C, H, W), C = 1 or 3."""

    where: str
    labels_N: Labels
    images_NCHW: Pixels
    class_names: tuple[str, ...] | None = None
    channels: int | None = field(default=None)
    notes: tuple[str, ...] = ()

    def items(self, indices: Indices) -> Iterator[tuple[int, Item]]:
        for k, index in enumerate(indices):
            image_CHW = self.images_NCHW[index]
            pixels = image_CHW[0] if len(image_CHW) == 1 else np.ascontiguousarray(image_CHW.transpose(1, 2, 0))
            yield k, Item(f"{self.where}: image {index}", pixels)


@dataclass(frozen=True)
class FileSource:
    """One image file per image. ``lines`` holds each image's line in the list file, if any."""

    where: str
    labels_N: Labels
    files: Sequence[Path]
    class_names: tuple[str, ...] | None = None
    channels: int | None = None
    lines: Sequence[int] | None = None
    notes: tuple[str, ...] = ()

    def items(self, indices: Indices) -> Iterator[tuple[int, Item]]:
        for k, index in enumerate(indices):
            file = self.files[index]
            named_by = f"{self.where}:{self.lines[index]}: " if self.lines is not None else ""
            yield k, Item(f"{named_by}{file}", file)


def data_root(root: str | None) -> Path:
    """Return the data folder: ``root`` with ~ and environment variables expanded, else $LAD_DIST_DATA, else ./data.

    Raises ``DataError`` if a variable in it is not set.
    """
    given = root if root is not None else os.environ.get(ROOT_VARIABLE, "data")
    expanded = os.path.expanduser(os.path.expandvars(given))
    if "$" in expanded:
        raise DataError(f"data.root: {given!r} contains an environment variable that is not set: {expanded!r}")
    return Path(expanded)


def existing_folder(folder: Path, what: str) -> Path:
    """Return ``folder``. Raises ``DataError`` if it is not a folder; ``what`` names the field to correct."""
    if not folder.is_dir():
        raise DataError(f"{what}: {folder.absolute()} is not a folder; valid: an existing folder")
    return folder


def check_labels(source: Source, num_classes: int | None = None) -> int:
    """Check that the labels are 0..K-1 with an image of every class; return K.

    num_classes: K if known (from names, or from the training split); else the largest label determines it. Raises
    ``DataError`` naming the source, the invalid labels and the valid ones.
    """
    if not len(source.labels_N):
        raise DataError(f"{source.where}: no images")
    present = np.unique(source.labels_N)
    known = num_classes if num_classes is not None else (len(source.class_names) if source.class_names else None)
    top = known if known is not None else max(int(present[-1]) + 1, 1)
    outside = present[(present < 0) | (present >= top)]
    if len(outside):
        raise DataError(f"{source.where}: labels {_listing(outside)} are not valid; valid: integers 0 to {top - 1}")
    if len(present) < top:
        gaps = _gaps(present, top)
        if known is None:
            raise DataError(
                f"{source.where}: labels {_listing(gaps)} do not occur although the largest is {top - 1}; "
                "valid: integers 0 to K-1 with no gaps"
            )
        names = source.class_names or ()
        named = [f"{c} ({names[c]})" if names and names[c] != str(c) else str(c) for c in gaps]
        raise DataError(
            f"{source.where}: no images of class {_listing(named)}; "
            f"valid: at least one image of each of the {top} classes"
        )
    if top < 2:
        raise DataError(f"{source.where}: one class only; valid: two or more")
    return top


def _gaps(present: Labels, top: int) -> list[int]:
    """Return the first few missing labels below ``top``; cheap even if one stray label makes ``top`` 10^12."""
    gaps: list[int] = []
    expected = 0
    for label in (*present.tolist(), top):
        gaps.extend(range(expected, min(label, expected + _SHOWN + 1)))
        if len(gaps) > _SHOWN:
            break
        expected = label + 1
    return gaps


def _listing(labels: Sequence[int] | Sequence[str] | Labels) -> str:
    return ", ".join(str(label) for label in labels[:_SHOWN]) + (", ..." if len(labels) > _SHOWN else "")
