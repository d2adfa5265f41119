"""Experts as teachers: outputs of their checkpoints on training images, and soft labels derived from them.

Used by distillation for the labels of the initial set, and by evaluation for soft labels of real images.

Shapes: N training images, S of them, K classes, P weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lad_dist.data.prepare import PreparedData
from lad_dist.errors import TrajectoryError
from lad_dist.labeller import Labeller
from lad_dist.models import functional
from lad_dist.models.layout import Layout
from lad_dist.models.network import build
from lad_dist.recipe import MOST_TEACHERS, Recipe
from lad_dist.trajectories.reader import Buffer

_BATCH = 1024

Output = Callable[[nn.Module, dict[str, Tensor], Tensor], Tensor]
"""``functional.logits`` or ``functional.features``."""


@torch.no_grad()
def outputs(
    function: Output, network: nn.Module, weights_P: Tensor, data: PreparedData, indices: np.ndarray | None = None
) -> Tensor:
    """Return the output of ``network`` with ``weights_P`` on training images (default: all of them), on the CPU."""
    views = Layout.of(network).views(weights_P)
    rows = torch.arange(len(data.train)) if indices is None else torch.from_numpy(indices)
    return torch.cat([function(network, views, data.train.batch(r)[0]) for r in rows.split(_BATCH)]).cpu()


def check_network(buffer: Buffer, layout: Layout) -> None:
    """Raise TrajectoryError if a buffer's trajectories belong to a network that its name no longer refers to."""
    if buffer.meta.parameters != tuple(zip(layout.names, layout.shapes, strict=True)):
        raise TrajectoryError(
            f"{buffer.folder}: these trajectories are from another network (its parameters differ); give the changed network "
            "another name, or choose another run folder"
        )


def labeller_of(recipe: Recipe, data: PreparedData, layout: Layout, weights: Sequence[Tensor]) -> Labeller:
    """Return the labeller of the recipe's networks with these weights, each (P,)."""
    views = [layout.views(w_P) for w_P in weights]
    return Labeller(recipe.model, data.splits.train.shape, views, recipe.distill.label_temperature)


class Teachers:
    """The last checkpoints of all experts of a recipe.

    They are of the classifier stage, or for a method without one (DATM, MTT, aligned) of the representation stage.
    ``run``: the name of their run, if it is not the one that they label for.
    """

    def __init__(self, recipe: Recipe, data: PreparedData, buffer: Buffer, run: str | None = None) -> None:
        self._recipe, self._data, self._buffer, self._run = recipe, data, buffer, run
        self._network = build(recipe.model, *data.splits.train.shape, seed=0, purpose=("template",)).to(data.device)
        self._layout = Layout.of(self._network)
        check_network(buffer, self._layout)
        self.stage, self._last = recipe.labelling

    def name(self, count: int | None = None) -> str:
        """Return ``mean logits of 10 classifier experts, epoch 10, temperature 1``; ``count``: of the first experts."""
        e, classifier = self._recipe.experts, self.stage == "classifier"
        used = e.count if count is None else count
        experts = f"{used} {self.stage} expert{'s' * (used > 1)}"
        adjusted = "" if classifier or not e.logit_adjustment else f", logit adjustment {e.logit_adjustment:g}"
        of = "" if self._run is None else f" of {self._run} ({self._recipe.experts_hash()[:8]})"
        temperature = f"temperature {self._recipe.distill.label_temperature:g}"
        return f"mean logits of {experts}{of}, epoch {self._last}{adjusted}, {temperature}"

    def count(self, asked: int | None) -> int:
        """Return the number of experts that label batches: ``asked``, by default at most MOST_TEACHERS."""
        return min(self._recipe.experts.count, MOST_TEACHERS if asked is None else asked)

    def bytes(self, asked: int | None) -> int:
        """Return the size of their weights as float32."""
        return 4 * self._layout.size * self.count(asked)

    def soft_labels(self, indices: np.ndarray) -> Tensor:
        """Return probabilities (S, K) for training images.

        They are the softmax of the mean logits over all experts, correct or not, divided by
        ``distill.label_temperature``.

        Raises:
            TrajectoryError: a checkpoint is missing or damaged; names it.
        """
        total_SK = torch.zeros(())
        for expert in range(self._recipe.experts.count):
            logits_SK = outputs(functional.logits, self._network, self._weights(expert), self._data, indices)
            total_SK = total_SK + logits_SK
        mean_SK = total_SK / self._recipe.experts.count
        return torch.softmax(mean_SK / self._recipe.distill.label_temperature, dim=1)

    def labeller(self, asked: int | None) -> Labeller:
        """Return the first experts (see ``count``), which label images as ``soft_labels`` does.

        Raises:
            TrajectoryError: a checkpoint is missing or damaged; names it.
        """
        used = range(self.count(asked))
        return labeller_of(self._recipe, self._data, self._layout, [self._weights(expert) for expert in used])

    def _weights(self, expert: int) -> Tensor:
        """Return an expert's final weights (P,); a classifier expert's backbone is its last representation epoch."""
        e = self._recipe.experts
        weights_P = torch.tensor(self._buffer.read("representation", expert, e.epochs))
        if self.stage == "classifier":
            classifier = torch.tensor(self._buffer.read("classifier", expert, self._last))
            weights_P[self._layout.span("classifier")] = classifier
        return weights_P.to(self._data.device)
