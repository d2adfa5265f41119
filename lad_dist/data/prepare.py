"""A recipe's data, ready for training: long-tailed, whitened, on the device. The entry point of every stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lad_dist.data.datasets import DataSplits, load_splits
from lad_dist.data.prepared import PreparedSet
from lad_dist.data.whitening import Whitening
from lad_dist.recipe import Recipe
from lad_dist.rundir import published


@dataclass(frozen=True)
class PreparedData:
    """Splits as loaded (uint8) and as trained on (whitened, on ``device``)."""

    splits: DataSplits
    whitening: Whitening
    train: PreparedSet
    device: torch.device

    @property
    def counts(self) -> tuple[int, ...]:
        """Training images per class."""
        return self.splits.train.counts

    @property
    def classes(self) -> int:
        return self.splits.train.num_classes

    def evaluation_set(self, split: str) -> PreparedSet:
        """Return ``test`` or ``validation``, whitened like the training set."""
        images = self.splits.test if split == "test" else self.splits.validation
        assert images is not None, "the recipe was checked to hold out validation images"
        return PreparedSet(images.images_NCHW, images.labels_N, self.whitening, self.device)

    def keep_whitening(self, path: Path) -> None:
        """Store the whitening at ``path`` if it does not exist. Raises StorageError."""
        if not path.exists():
            with published(path) as temporary:
                self.whitening.save(temporary)


def prepare(
    recipe: Recipe, whitening_path: Path, device: torch.device, on_progress: Callable[[int, int], None] | None = None
) -> PreparedData:
    """Load the data and their whitening; fit and store the whitening at ``whitening_path`` if it does not exist.

    Raises:
        DataError: the data cannot be used.
        StorageError: the whitening cannot be stored.
    """
    data = accept(recipe, whitening_path, device, on_progress)
    data.keep_whitening(whitening_path)
    return data


def accept(
    recipe: Recipe, whitening_path: Path, device: torch.device, on_progress: Callable[[int, int], None] | None = None
) -> PreparedData:
    """Like ``prepare``, but write nothing. Raises DataError."""
    splits = load_splits(recipe.data, on_progress)
    images = splits.train.images_NCHW
    if whitening_path.exists():
        whitening = Whitening.load(whitening_path, device)
    else:
        d = recipe.data
        whitening = Whitening.fit(images, d.whitening, d.zca_eps, device, d.normalize_before_zca)
    train = PreparedSet(images, splits.train.labels_N, whitening, device)
    return PreparedData(splits, whitening, train, device)
