"""Stored labels: k augmented views of each image, with the teachers' logits of each view.

What a user keeps is the images and k x K numbers per image: the views are recomputed from the images, as their
augmentation, and which others they are mixed with by CutMix, depend on (seed, view) alone. FKD (Shen and Xing, ECCV
2022, arXiv 2112.01528) and SRe2L (arXiv 2306.13092) store labels in this way.

Shapes: S images, C channels, H side, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lad_dist.data import augment
from lad_dist.data.mixing import draw_mix, mix, mix_labels
from lad_dist.evaluate.train import TrainingSet
from lad_dist.labeller import Labeller
from lad_dist.recipe import Recipe
from lad_dist.seeds import rng

_ROWS = 512  # images augmented and labelled at a time


class StoredViews:
    """Called with an epoch, returns its views of all images (S, C, H, H), their label logits and class shares (S, K).

    Epoch e trains on view e modulo ``evaluate.stored_views``. ``images``: the set without its labels.
    """

    def __init__(self, images: TrainingSet, label: Labeller, recipe: Recipe, seed: int | str) -> None:
        self._images, self._label, self._recipe, self._seed = images, label, recipe, seed
        self._logits: dict[int, Tensor] = {}  # by view

    def __call__(self, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        view = epoch % self._recipe.evaluate.stored_views
        parts = [self._views(rows, view) for rows in torch.arange(self._images.count).split(_ROWS)]
        views, classes = zip(*parts, strict=True)
        views_SCHH, classes_SK = self._mixed(torch.cat(views), torch.cat(classes), view)
        if view not in self._logits:
            logits = [self._label.logits(x) / self._label.temperature for x in views_SCHH.split(_ROWS)]
            self._logits[view] = torch.cat(logits)
        return views_SCHH, self._logits[view], classes_SK

    def _mixed(self, views_SCHH: Tensor, classes_SK: Tensor, view: int) -> tuple[Tensor, Tensor]:
        """Mix the views in random batches, as training mixes its own."""
        e, count = self._recipe.evaluate, self._images.count
        draws = rng(self._recipe.seed, "evaluate", "stored", self._seed, view, "mix")
        order = torch.from_numpy(draws.permutation(count)).to(views_SCHH.device)
        for rows in order.split(e.batch):
            mixed = draw_mix(draws, e.cutmix, 0.0, len(rows), views_SCHH.shape[2])  # None without CutMix
            if mixed is not None:
                views_SCHH[rows] = mix(views_SCHH[rows], mixed)
                classes_SK[rows] = mix_labels(classes_SK[rows], mixed)
        return views_SCHH, classes_SK

    def _views(self, rows: Tensor, view: int) -> tuple[Tensor, Tensor]:
        images_BCHH, classes_BK = self._images.batch_of(rows)
        counters = ("stored", self._seed, view, int(rows[0]))
        if self._recipe.evaluate.augmentation == "randaugment":
            assert self._images.strong is not None
            return self._images.strong(images_BCHH, self._recipe.seed, counters), classes_BK
        draws = rng(self._recipe.seed, "evaluate", *counters)
        config, size = self._recipe.augment, images_BCHH.shape[2]
        return augment.apply(images_BCHH, augment.draw(draws, config, len(rows), size)), classes_BK
