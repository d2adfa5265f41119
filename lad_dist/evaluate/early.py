"""Quick estimate of a synthetic set's accuracy during distillation.

A network is trained on the set for a tenth of ``evaluate.epochs``, at most 1,000 batches, and measured on at most 2,000
images: a small fraction of a full measurement over several seeds. Its accuracy is below the final one. It is not used
to select anything.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from lad_dist.data.prepare import PreparedData
from lad_dist.data.prepared import PreparedSet
from lad_dist.evaluate.accuracy import Accuracy, accuracy
from lad_dist.evaluate.strong import strong_augmentation
from lad_dist.evaluate.train import Settings, TrainingSet, rows_of, train
from lad_dist.models import zoo
from lad_dist.models.network import build
from lad_dist.recipe import NETWORKS, Recipe
from lad_dist.seeds import rng

PART_OF_EPOCHS = 10
MOST_BATCHES = 1000
MOST_IMAGES = 2000


class EarlyEvaluation:
    """Measures synthetic sets of one recipe on the images named by ``distill.select`` or ``evaluate.split``.

    Every call starts from the same network with the same draws, so differences come from the set alone.
    """

    def __init__(self, recipe: Recipe, data: PreparedData) -> None:
        self._recipe, self._data = recipe, data
        self.split = "validation" if recipe.distill.select == "validation" else recipe.evaluate.split
        self._images: PreparedSet | None = None

    @property
    def batches(self) -> int:
        """Number of batches that one measurement trains on or evaluates."""
        return self.epochs * self._batches_per_epoch + -(-MOST_IMAGES // self._recipe.evaluate.batch)

    @property
    def _batches_per_epoch(self) -> int:
        return -(-self._data.classes * self._recipe.ipc // self._recipe.evaluate.batch)

    @property
    def epochs(self) -> int:
        """Number of training epochs, at least one."""
        return max(1, min(self._recipe.evaluate.epochs // PART_OF_EPOCHS, MOST_BATCHES // self._batches_per_epoch))

    def __call__(self, images_SCHH: torch.Tensor, p_SK: torch.Tensor, alpha: float) -> Accuracy:
        """Train on whitened ``images_SCHH``, label probabilities ``p_SK``, learned learning rate ``alpha``; measure.

        Raises:
            NumericalError: the loss became NaN or Inf.
        """
        if self._images is None:
            self._images = self._sample()
        network = trained(self._recipe, self._data, images_SCHH, p_SK, alpha, self.epochs, "early")
        return accuracy(network, self._images, self._data.counts)

    def _sample(self) -> PreparedSet:
        """Return at most 2,000 images of the split, drawn once."""
        splits = self._data.splits
        images = splits.test if self.split == "test" else splits.validation
        assert images is not None, "the recipe was checked to hold out validation images"
        rows = rng(self._recipe.seed, "early", "images").permutation(len(images))[:MOST_IMAGES]
        rows_N = torch.from_numpy(np.sort(rows))
        return PreparedSet(images.images_NCHW[rows_N], images.labels_N[rows_N], self._data.whitening, self._data.device)


def trained(
    recipe: Recipe,
    data: PreparedData,
    images_SCHH: torch.Tensor,
    p_SK: torch.Tensor,
    alpha: float,
    epochs: int,
    purpose: str,
) -> nn.Module:
    """Train the recipe's network on a set with the recipe's settings; ``purpose`` separates its draws from others.

    Raises:
        NumericalError: the loss became NaN or Inf.
    """
    e, shape = recipe.evaluate, data.splits.train.shape
    settings = replace(Settings.of_a_small_set(recipe, alpha if e.lr is None else e.lr), epochs=epochs)
    m, seed, draws = recipe.model, recipe.seed, (purpose, "convnet")
    if e.norm == "instance" or m.network not in NETWORKS:
        network = build(m, *shape, seed=seed, purpose=draws)
    else:
        network = zoo.network(m.network, *shape, width=m.width, depth=m.depth, norm=e.norm, seed=seed, purpose=draws)
    network = network.to(data.device)
    pixels, p = images_SCHH.to(data.device), p_SK.to(data.device)
    images = TrainingSet(rows_of(pixels, p), len(pixels))
    if settings.augmentation == "randaugment":
        images = replace(images, strong=strong_augmentation(data.whitening, recipe.augment))
    train(network, images, settings, recipe.seed, (purpose,), lambda: None)
    return network
