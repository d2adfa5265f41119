"""User-defined data: ``data.dataset: custom`` and ``data.source: module:attribute``, or the name of an entry point.

    # mydata.py, importable by every process of the run (PYTHONPATH, or an installed package)
    def birds(config):                       # the recipe's data section
        return train, test

``train`` and ``test`` are each one of

- a map-style torch ``Dataset`` of (image, label): PIL images, or pixels as arrays or tensors;
- a Hugging Face ``datasets.Dataset`` with a column of images and one of labels;
- a pair of arrays or tensors (images, labels): (N, H, W), (N, C, H, W) or (N, H, W, C), C = 1 or 3;
- a ``lad_dist.data.sources.Source``.

Pixels are uint8, or floats in [0, 1]. Labels are integers 0..K-1. A package offers sources by name through entry points
of the group ``lad_dist.datasets``. The attribute may also be the pair (train, test) itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from lad_dist import plugins
from lad_dist.data.decoding import GREY_MODES, eight_bit
from lad_dist.data.sources import ArraySource, Indices, Item, Labels, Pixels, Source
from lad_dist.errors import DataError

if TYPE_CHECKING:
    from lad_dist.recipe import DataConfig

GROUP = "lad_dist.datasets"
_VALID = (
    "a torch Dataset of (image, label), a Hugging Face Dataset, a pair of arrays (images, labels), or a "
    "lad_dist.data.sources.Source"
)
_LABEL_LISTS = ("targets", "labels")  # names of torchvision data sets' label lists


def custom(config: DataConfig) -> tuple[Source, Source]:
    """Return the training pool and test split of ``data.source``. Raises DataError naming the problem."""
    assert config.source is not None, "the recipe was checked to name it"
    found = plugins.load(config.source, GROUP, "data.source", DataError)
    if callable(found):
        try:
            found = found(config)
        except DataError:
            raise
        except Exception as error:  # user code: may raise anything
            raise DataError(f"data.source: {config.source} raised {type(error).__name__}: {error}") from error
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise DataError(f"data.source: {config.source} returned {_kind(found)}; valid: (train, test)")
    train, test = (
        as_source(of, f"{config.source} ({split})", config) for of, split in zip(found, ("train", "test"), strict=True)
    )
    return train, test


def as_source(of: Any, where: str, config: DataConfig) -> Source:
    """Convert one split, in any of the forms above, to a ``Source``. Raises DataError, naming it by ``where``."""
    if hasattr(of, "items") and hasattr(of, "labels_N"):
        return of
    if isinstance(of, tuple | list) and len(of) == 2 and all(hasattr(part, "__array__") for part in of):
        return _of_arrays(of[0], of[1], where)
    if hasattr(of, "column_names") and hasattr(of, "features"):
        return _of_hugging_face(of, where, config)
    if hasattr(of, "__getitem__") and hasattr(of, "__len__"):
        return _of_items(of, where)
    raise DataError(f"data.source: {where}: is {_kind(of)}; valid: {_VALID}")


def _of_arrays(images: Any, labels: Any, where: str) -> ArraySource:
    pixels = _array(images)
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    elif pixels.ndim == 4 and pixels.shape[1] not in (1, 3) and pixels.shape[3] in (1, 3):
        pixels = pixels.transpose(0, 3, 1, 2)
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
        shape = tuple(np.shape(images))
        raise DataError(
            f"data.source: {where}: images of shape {shape}; valid: (N, H, W), (N, C, H, W), (N, H, W, C), C = 1 or 3"
        )
    labels_N = _labels(labels, where)
    if len(labels_N) != len(pixels):
        raise DataError(f"data.source: {where}: {len(pixels)} images, but {len(labels_N)} labels; valid: equal counts")
    return ArraySource(where, labels_N, _bytes(pixels, where))


def _of_hugging_face(of: Any, where: str, config: DataConfig) -> _Items:
    """Select the columns by the recipe's ``image_column`` and ``label_column``, else by type and name."""
    kinds = {name: type(feature).__name__ for name, feature in of.features.items()}
    marked = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    named = [name for name in ("label", "labels") if name in kinds]
    images = config.image_column or _only(where, "image", [name for name, kind in kinds.items() if kind == "Image"])
    labels = config.label_column or _only(where, "label", marked or named)
    for field, column in (("image_column", images), ("label_column", labels)):
        if column not in of.features:
            raise DataError(f"data.{field}: {where} has no column {column!r}; valid: {', '.join(of.column_names)}")
    names = getattr(of.features[labels], "names", None)
    return _Items(
        where, _labels(of[labels], where), lambda i: _item(of, where, i)[images], tuple(names) if names else None
    )


def _only(where: str, what: str, columns: list[str]) -> str:
    if len(columns) != 1:
        raise DataError(
            f"data.{what}_column: {where} has {len(columns)} columns of {what}s; valid: the name of one column"
        )
    return columns[0]


def _of_items(of: Any, where: str) -> _Items:
    """Wrap a map-style data set. Labels come from its label list if it has one, else from fetching every item once."""
    labels = next((getattr(of, name) for name in _LABEL_LISTS if hasattr(of, name)), None)
    if labels is None or len(labels) != len(of):
        labels = [_pair(of, where, i)[1] for i in range(len(of))]
    names = getattr(of, "classes", None)
    class_names = tuple(str(name) for name in names) if isinstance(names, Sequence) else None
    return _Items(where, _labels(labels, where), lambda i: _pair(of, where, i)[0], class_names)


def _item(of: Any, where: str, index: int) -> Any:
    """Fetch item ``index`` with user code."""
    try:
        return of[index]
    except Exception as error:  # user code: may raise anything
        raise DataError(f"data.source: {where}: item {index} raised {type(error).__name__}: {error}") from error


def _pair(of: Any, where: str, index: int) -> tuple[Any, Any]:
    item = _item(of, where, index)
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise DataError(f"data.source: {where}: item {index} is {_kind(item)}; valid: (image, label)")
    return item[0], item[1]


@dataclass(frozen=True)
class _Items:
    """Images fetched one by one."""

    where: str
    labels_N: Labels
    fetch: Callable[[int], Any]
    class_names: tuple[str, ...] | None = None
    channels: int | None = None
    notes: tuple[str, ...] = ()

    def items(self, indices: Indices) -> Iterator[tuple[int, Item]]:
        for k, index in enumerate(indices):
            where = f"{self.where}: image {index}"
            yield k, Item(where, _pixels(self.fetch(int(index)), where))


def _pixels(image: Any, where: str) -> Pixels:
    """Convert a PIL image, array or tensor to uint8 (H, W) or (H, W, 3)."""
    if isinstance(image, Image.Image):
        grey = image.mode in GREY_MODES
        return np.asarray(eight_bit(where, image).convert("L" if grey else "RGB"), dtype=np.uint8)
    if not hasattr(image, "__array__"):
        raise DataError(f"data.source: {where}: is {_kind(image)}; valid: a PIL image, an array or a tensor")
    pixels = _array(image)
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.ndim != 2 and (pixels.ndim != 3 or pixels.shape[2] != 3):
        raise DataError(
            f"data.source: {where}: shape {np.shape(image)}; valid: (H, W), (C, H, W) or (H, W, C), C = 1 or 3"
        )
    return np.ascontiguousarray(_bytes(pixels, where))


def _bytes(pixels: np.ndarray[Any, Any], where: str) -> Pixels:
    """Return uint8 unchanged; scale floats in [0, 1] to 0..255."""
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype.kind != "f":
        raise DataError(f"data.source: {where}: pixels of type {pixels.dtype}; valid: uint8, or floats in [0, 1]")
    if not bool(np.all((pixels >= 0) & (pixels <= 1))):
        raise DataError(f"data.source: {where}: pixels outside [0, 1]; valid: uint8, or floats in [0, 1]")
    return np.rint(pixels * 255).astype(np.uint8)


def _labels(labels: Any, where: str) -> Labels:
    """Validate the labels: one integer per image."""
    found = _array(labels)
    if found.ndim != 1 or (found.dtype.kind not in "iu" and len(found)):
        raise DataError(
            f"data.source: {where}: labels of type {found.dtype}, shape {found.shape}; valid: one integer per image"
        )
    return found.astype(np.int64)


def _array(of: Any) -> np.ndarray[Any, Any]:
    """Return an array, or a tensor of any device, as an array."""
    return np.asarray(of.detach().cpu() if hasattr(of, "detach") else of)


def _kind(of: Any) -> str:
    return f"{type(of).__module__}.{type(of).__name__}"
