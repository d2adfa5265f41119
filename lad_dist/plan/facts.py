"""What is known of a recipe's data: from the files where they are here, else from what is published about the data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lad_dist.data.datasets import look
from lad_dist.data.longtail import exponential_counts
from lad_dist.errors import DataError
from lad_dist.recipe import DataConfig


@dataclass(frozen=True)
class Facts:
    """Shape of the images, training images per class, test images; ``source`` says where this is known from."""

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
        """Training images."""
        return sum(self.counts)


@dataclass(frozen=True)
class _Known:
    channels: int
    size: int
    classes: int
    per_class: int  # of the smallest class of the training pool
    test: int


# Each data set's own page; digits: lad_dist/data/arrays.py splits scikit-learn's 1,797 images.
_KNOWN = {
    "digits": _Known(1, 8, 10, 120, 540),
    "fashion-mnist": _Known(1, 28, 10, 6000, 10_000),
    "cifar10": _Known(3, 32, 10, 5000, 10_000),
    "cifar100": _Known(3, 32, 100, 500, 10_000),
    "tiny-imagenet": _Known(3, 64, 200, 500, 10_000),
}
# Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", CVPR 2019: 115,846 images, 1280 to 5 per class.
_IMAGENET_LT = "ImageNet_LT_train.txt"
_IMAGENET_LT_CLASSES, _IMAGENET_LT_IMAGES, _IMAGENET_LT_TEST = 1000, 115_846, 50_000
_IMAGENET_LT_LARGEST, _IMAGENET_LT_SMALLEST = 1280, 5


def facts_of(config: DataConfig) -> Facts:
    """What the stages will be given. Nothing is downloaded, and one image is decoded at most.

    Raises:
        DataError: the data are here and cannot be used, or are not here and nothing is published about them.
    """
    try:
        counts, test, pixels = look(config.model_copy(update={"download": False}))
    except DataError as absent:
        known = published(config)
        if known is None:
            raise DataError(
                f"plan: the data must be here for a data set that is not a published one; {absent}"
            ) from absent
        return known
    return Facts(pixels.channels, pixels.size, counts, test, "the data set's files")


def published(config: DataConfig) -> Facts | None:
    """What is published about the data set; None where that is nothing. Raises DataError for an impossible long tail."""
    known = _KNOWN.get(config.dataset)
    if known is None:
        return _imagenet_lt(config)
    pool = known.per_class - config.validation_per_class
    if config.imbalance == "natural":
        counts: tuple[int, ...] = (pool,) * known.classes
    else:
        counts = exponential_counts(
            pool if config.n_max is None else config.n_max, known.classes, config.imbalance_factor
        )
    return Facts(
        config.channels or known.channels,
        config.image_size or known.size,
        counts,
        known.test,
        f"what is published about {config.dataset} (its files are not here)",
    )


def _imagenet_lt(config: DataConfig) -> Facts | None:
    """The lists of ImageNet-LT: class sizes on an exponential of the published ends, levelled to the published total."""
    if config.dataset != "list" or config.train is None or Path(config.train).name != _IMAGENET_LT:
        return None
    if config.image_size is None:
        return None
    shape = exponential_counts(_IMAGENET_LT_LARGEST, _IMAGENET_LT_CLASSES, _IMAGENET_LT_LARGEST / _IMAGENET_LT_SMALLEST)
    middle = (_IMAGENET_LT_IMAGES - _IMAGENET_LT_LARGEST - _IMAGENET_LT_SMALLEST) / (sum(shape) - shape[0] - shape[-1])
    inner = [max(_IMAGENET_LT_SMALLEST, min(_IMAGENET_LT_LARGEST, int(n * middle))) for n in shape[1:-1]]
    short = _IMAGENET_LT_IMAGES - shape[0] - shape[-1] - sum(inner)
    step = 1 if short > 0 else -1
    for i in range(abs(short)):  # rounding
        inner[len(inner) // 3 + i % (len(inner) // 3)] += step
    return Facts(
        config.channels or 3,
        config.image_size,
        (shape[0], *inner, shape[-1]),
        _IMAGENET_LT_TEST,
        "what is published about ImageNet-LT (its lists are not here)",
    )
