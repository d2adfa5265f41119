"""Facts about a recipe's data: from the files if they are here, else as published for the data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lad_dist.data.datasets import look
from lad_dist.data.longtail import exponential_counts, reserve_of
from lad_dist.errors import DataError
from lad_dist.recipe import DataConfig


@dataclass(frozen=True)
class DatasetInfo:
    """Shape of the images, training images per class, test images; ``source``: where these facts come from."""

    channels: int
    size: int
    counts: tuple[int, ...]
    test: int
    source: str

    @property
    def classes(self) -> int:
        return len(self.counts)

    @property
    def train(self) -> int:
        """Number of training images."""
        return sum(self.counts)


@dataclass(frozen=True)
class _Known:
    channels: int
    size: int
    classes: int
    per_class: int  # of the smallest class of the training pool
    test: int


# From each data set's own page; digits: lad_dist/data/arrays.py splits 1,797 images.
_KNOWN = {
    "digits": _Known(1, 8, 10, 120, 540),
    "fashion-mnist": _Known(1, 28, 10, 6000, 10_000),
    "cifar10": _Known(3, 32, 10, 5000, 10_000),
    "cifar100": _Known(3, 32, 100, 500, 10_000),
    "tiny-imagenet": _Known(3, 64, 200, 500, 10_000),
}


@dataclass(frozen=True)
class _Lists:
    title: str
    classes: int
    train: int
    test: int
    largest: int  # training images of a class
    smallest: int


# Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", CVPR 2019, and its lists.
_LISTS = {
    "ImageNet_LT_train.txt": _Lists("ImageNet-LT", 1000, 115_846, 50_000, 1280, 5),
    "Places_LT_train.txt": _Lists("Places-LT", 365, 62_500, 36_500, 4980, 5),
}


def dataset_info(config: DataConfig) -> DatasetInfo:
    """Return the facts about the data that the stages will use. Downloads nothing; inspects every image that is here.

    Raises:
        DataError: the data are here and cannot be used, or are not here and nothing is published about them.
    """
    try:
        counts, test, pixels = look(config.model_copy(update={"download": False}))
    except DataError:
        known = published(config)
        if known is None:
            raise
        return known
    return DatasetInfo(pixels.channels, pixels.size, counts, test, "the data set's files")


def published(config: DataConfig) -> DatasetInfo | None:
    """Return the published facts about the data set, or None. Raises DataError for an impossible long tail."""
    known = _KNOWN.get(config.dataset)
    if known is None:
        return _of_lists(config)
    pool = known.per_class - reserve_of(known.per_class, config.validation_per_class)
    if config.imbalance == "natural":
        counts: tuple[int, ...] = (pool,) * known.classes
    else:
        counts = exponential_counts(
            pool if config.n_max is None else config.n_max, known.classes, config.imbalance_factor
        )
    return DatasetInfo(
        config.channels or known.channels,
        config.image_size or known.size,
        counts,
        known.test,
        f"published statistics of {config.dataset} (its files are not here)",
    )


def _of_lists(config: DataConfig) -> DatasetInfo | None:
    """Return facts of published lists: class sizes on an exponential of the published ends, fitted to the total."""
    known = _LISTS.get(Path(config.train).name) if config.dataset == "list" and config.train is not None else None
    if known is None or config.image_size is None:
        return None
    shape = exponential_counts(known.largest, known.classes, known.largest / known.smallest)
    middle = (known.train - known.largest - known.smallest) / (sum(shape) - shape[0] - shape[-1])
    inner = [max(known.smallest, min(known.largest, int(n * middle))) for n in shape[1:-1]]
    short = known.train - shape[0] - shape[-1] - sum(inner)
    step = 1 if short > 0 else -1
    for i in range(abs(short)):  # spread rounding, and the raise of the smallest classes, over the larger ones
        inner[i % (2 * len(inner) // 3)] += step
    return DatasetInfo(
        config.channels or 3,
        config.image_size,
        (shape[0], *inner, shape[-1]),
        known.test,
        f"published statistics of {known.title} (its lists are not here)",
    )
