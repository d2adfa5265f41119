"""Load the long-tailed training set, the held-out set and the test set from a recipe's ``data`` section.

N images, C channels (1 grey, 3 colour), H = W side, K classes. Images are uint8; whitening converts them to floats
later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from lad_dist.data import decoded
from lad_dist.data.arrays import cifar, digits, fashion_mnist
from lad_dist.data.custom import custom
from lad_dist.data.decoding import PixelFormat, probe
from lad_dist.data.folders import image_folder, image_list, tiny_imagenet
from lad_dist.data.longtail import exponential_counts, hold_out, reserve_of, select
from lad_dist.data.parquet import parquet
from lad_dist.data.sources import Indices, Labels, Source, check_labels
from lad_dist.errors import DataError

if TYPE_CHECKING:
    import hashlib

    from lad_dist.recipe import DataConfig

Progress = Callable[[int, int], None]  # (images done, images in total)

_OPENERS: dict[str, Callable[[DataConfig], tuple[Source, Source]]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "cifar10": cifar,
    "cifar100": cifar,
    "tiny-imagenet": tiny_imagenet,
    "image-folder": image_folder,
    "list": image_list,
    "parquet": parquet,
    "custom": custom,
}


@dataclass(frozen=True, eq=False)  # comparing tensors yields no single truth value; use ``fingerprint``
class ImageSet:
    """Labelled images of one size."""

    images_NCHW: torch.Tensor  # uint8
    labels_N: torch.Tensor  # int64, 0..K-1
    class_names: tuple[str, ...]
    name: str

    def __post_init__(self) -> None:
        assert self.images_NCHW.dtype == torch.uint8 and self.labels_N.dtype == torch.int64
        assert self.images_NCHW.ndim == 4 and self.images_NCHW.shape[2] == self.images_NCHW.shape[3]
        assert self.labels_N.shape == self.images_NCHW.shape[:1]

    def __len__(self) -> int:
        return len(self.labels_N)

    @property
    def channels(self) -> int:
        """1 for grey, 3 for colour."""
        return int(self.images_NCHW.shape[1])

    @property
    def size(self) -> int:
        """Side of the images, pixels."""
        return int(self.images_NCHW.shape[2])

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, side in pixels, classes: what a network is built for."""
        return self.channels, self.size, self.num_classes

    @property
    def counts(self) -> tuple[int, ...]:
        """Images per class."""
        return tuple(torch.bincount(self.labels_N, minlength=self.num_classes).tolist())

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of shape, images and labels in order: equal where training would be equal.

        It is computed once, which takes seconds for gigabytes, and again if a tensor was written to.
        """
        written = (self.images_NCHW._version, self.labels_N._version)
        known = vars(self).get("_known")
        if known is None or known[0] != written:
            known = vars(self)["_known"] = written, self._with_labels(decoded.pixel_digest(self.images_NCHW))
        return str(known[1])

    def with_pixel_digest(self, digest: hashlib._Hash | None) -> ImageSet:
        """Return this set, its fingerprint computed from the known ``decoded.pixel_digest`` of its images."""
        if digest is not None:
            written = (self.images_NCHW._version, self.labels_N._version)
            vars(self)["_known"] = written, self._with_labels(digest)
        return self

    def _with_labels(self, digest: hashlib._Hash) -> str:
        digest = digest.copy()
        digest.update(self.labels_N.numpy().astype("<i8", copy=False).data)
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class DataSplits:
    """Data splits used by the stages."""

    train: ImageSet  # exponential: class after class, in the order of ``longtail.select``; natural: in data set order
    validation: ImageSet | None  # held out of the training pool, small classes keep one; None unless requested
    test: ImageSet
    full_counts: tuple[int, ...]  # images per class of the training pool, before holding any out
    notes: tuple[str, ...] = ()  # what was found but not used, one sentence each

    def fingerprints(self, split: str) -> dict[str, str]:
        """Return the fingerprints of the training images and of those in ``split`` (test or validation)."""
        measured = self.test if split == "test" else self.validation
        assert measured is not None, "the recipe was checked to hold out validation images"
        return {"train": self.train.fingerprint(), split: measured.fingerprint()}


def load_splits(config: DataConfig, on_progress: Progress | None = None) -> DataSplits:
    """Open the data set, build the long tail, and decode only the selected images.

    ``on_progress`` is called with (images done, images in total), from this thread. Raises ``DataError`` naming the
    file or field at fault.
    """
    o = _open(config)
    train, test, class_names, kept, held_out, pixel_format = (
        o.train,
        o.test,
        o.class_names,
        o.kept,
        o.held_out,
        o.pixels,
    )
    total = len(kept) + len(held_out) + len(test.labels_N)
    done = 0

    def report(more: int) -> None:
        nonlocal done
        done += more
        if on_progress is not None:
            on_progress(done, total)

    cache_notes: list[str] = []

    def load(source: Source, indices: Indices, split: str) -> ImageSet:
        found = decoded.load(source, indices, pixel_format, report)
        cache_notes.extend([found.note] if found.note else [])
        return ImageSet(
            images_NCHW=found.images_NCHW,
            labels_N=torch.from_numpy(source.labels_N[indices]),
            class_names=class_names,
            name=f"{config.dataset}/{split}",
        ).with_pixel_digest(found.digest)

    return DataSplits(
        train=load(train, kept, "train"),
        validation=load(train, held_out, "validation") if len(held_out) else None,
        test=load(test, np.arange(len(test.labels_N), dtype=np.int64), "test"),
        full_counts=tuple(np.bincount(train.labels_N, minlength=len(class_names)).tolist()),
        notes=(*train.notes, *test.notes, *cache_notes),
    )


def look(config: DataConfig) -> tuple[tuple[int, ...], int, PixelFormat]:
    """Return (training images per class, test images, pixel format) of ``load_splits`` without holding any image.

    Every image is decoded, unless it is kept decoded, so whatever ``load_splits`` rejects is rejected here; large sets
    are kept for it (``decoded.py``). Raises ``DataError`` as it does.
    """
    o = _open(config)
    counts = np.bincount(o.train.labels_N[o.kept], minlength=len(o.class_names)).tolist()
    everything = (o.train, o.kept), (o.train, o.held_out), (o.test, np.arange(len(o.test.labels_N), dtype=np.int64))
    for source, indices in everything:
        decoded.check(source, indices, o.pixels)
    return tuple(counts), len(o.test.labels_N), o.pixels


@dataclass(frozen=True)
class _Opened:
    """A data set with its labels read and its images selected."""

    train: Source
    test: Source
    class_names: tuple[str, ...]
    kept: Indices
    held_out: Indices
    pixels: PixelFormat


def _open(config: DataConfig) -> _Opened:
    train, test = _OPENERS[config.dataset](config)
    num_classes = check_labels(train)
    if num_classes < 2:
        raise DataError(f"{train.where}: one class; valid: two or more")
    if config.test_fraction is None:  # otherwise single-image classes are untested
        check_labels(test, num_classes)
    elif not len(test.labels_N):
        raise DataError(
            f"{train.where}: every class has one image, so none can be tested; valid: a separate test split"
        )
    class_names = train.class_names or tuple(str(c) for c in range(num_classes))
    kept, held_out = choose_training_images(train.labels_N, class_names, config)
    return _Opened(train, test, class_names, kept, held_out, probe(train, config))


def choose_training_images(
    labels_N: Labels, class_names: tuple[str, ...], config: DataConfig
) -> tuple[Indices, Indices]:
    """Return indices into the training pool: (training images, held-out images), by labels alone."""
    num_classes, reserve = len(class_names), config.validation_per_class
    held_out = hold_out(labels_N, reserve, num_classes)
    if config.imbalance == "natural":
        return np.setdiff1d(np.arange(len(labels_N), dtype=np.int64), held_out), held_out
    smallest = int(np.bincount(labels_N, minlength=num_classes).min())
    smallest -= reserve_of(smallest, reserve)
    n_max = config.n_max if config.n_max is not None else smallest
    counts = exponential_counts(n_max, num_classes, config.imbalance_factor, class_names)
    return select(labels_N, counts, reserve, class_names), held_out
