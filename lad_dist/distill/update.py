"""The outer optimizers of pixels, labels and the student's learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lad_dist.distill.student import RowGradients, SyntheticSet
from lad_dist.models.optimizers import SGD, Adam, Optimizer
from lad_dist.ranks import Groups
from lad_dist.recipe import DistillConfig

ADAM_BETA2 = 0.99
_NAMES = ("images", "labels", "alpha")
_LARGE = 1e12  # values below it, with rates below it, cannot leave float32 in one step


class Gradients(Protocol):
    """The gradients of one phase's loss with respect to the synthetic set."""

    @property
    def loss(self) -> Tensor: ...
    @property
    def by_rows(self) -> RowGradients: ...
    @property
    def alpha_gradient(self) -> Tensor: ...


@dataclass(frozen=True)
class SetGradients:
    """Result of a phase without a student: loss, accuracy (0-dim, equal on every rank), gradients of this rank's images."""

    loss: Tensor
    accuracy: Tensor
    by_rows: RowGradients

    @property
    def alpha_gradient(self) -> Tensor:
        """Zero: the loss does not depend on the student's learning rate."""
        return torch.zeros_like(self.loss)


@dataclass(frozen=True)
class Mean:
    """A part of the mean of one phase's gradients over several windows; a sum of all parts is the mean."""

    loss: Tensor
    images_SCHH: Tensor
    labels_SK: Tensor
    alpha_gradient: Tensor

    @classmethod
    def of(cls, g: Gradients, count: int) -> Mean:
        """Return one of ``count`` windows' part."""
        rows = g.by_rows
        dtype = rows.images_TCHH.dtype  # of all four, so that one sum carries them
        return cls(*(t.to(dtype) / count for t in (g.loss, rows.images_SCHH, rows.labels_SK, g.alpha_gradient)))

    @property
    def by_rows(self) -> RowGradients:
        """The gradients of all rows."""
        count = len(self.images_SCHH)
        rows_S = torch.arange(count, device=self.images_SCHH.device)
        return RowGradients(rows_S, self.images_SCHH, self.labels_SK, count)

    def __add__(self, other: Mean) -> Mean:
        return Mean(*(a + b for a, b in zip(self._tensors(), other._tensors(), strict=True)))

    def over(self, groups: Groups) -> Mean:
        """Return the sum over the groups of ranks. All ranks call it.

        Loss and alpha's gradient, which all ranks of a group have, are summed over all ranks: the order of a sum depends
        on the place in a tensor and on its length, and these must have the same bits everywhere.
        """
        if groups.count == 1:
            return self
        loss, alpha_gradient = groups.all.total(torch.stack([self.loss, self.alpha_gradient]) / groups.within.world)
        rows = (self.images_SCHH, self.labels_SK)
        flat = groups.across.total(torch.cat([t.reshape(-1) for t in rows]))
        images, labels = (p.view_as(t) for p, t in zip(flat.split([t.numel() for t in rows]), rows, strict=True))
        return Mean(loss, images, labels, alpha_gradient)

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.loss, self.images_SCHH, self.labels_SK, self.alpha_gradient


class Optimizers:
    """The optimizers of a synthetic set, which is updated in place.

    alpha uses SGD with momentum. Pixels and label logits use the same, or Adam (Kingma and Ba, arXiv 1412.6980) with
    their momentum as beta_1 and 0.99 as beta_2. Hard labels are not updated.
    """

    def __init__(self, images_SCHH: Tensor, logits_SK: Tensor, alpha: Tensor, config: DistillConfig) -> None:
        self.images_SCHH, self.logits_SK, self.alpha, self._config = images_SCHH, logits_SK, alpha, config
        d = config
        self._rates = {"images": d.lr_images, "labels": d.lr_labels, "alpha": d.lr_alpha}
        momentum = {"images": d.momentum_images, "labels": d.momentum_labels, "alpha": d.momentum_alpha}
        self._optimizers: dict[str, Optimizer] = {
            name: Adam([self._tensor(name)], (momentum[name], ADAM_BETA2))
            if d.optimizer == "adam" and name != "alpha"
            else SGD([self._tensor(name)], momentum[name])
            for name in _NAMES
        }

    def synthetic_set(self) -> SyntheticSet:
        """Return the current set (shares the tensors)."""
        return SyntheticSet(self.images_SCHH, self.logits_SK, self.alpha)

    def step_alpha(self, phases: Sequence[tuple[float, Gradients]]) -> bool:
        """Step alpha alone; return whether it stayed finite and above zero."""
        gradient = torch.stack([lam * r.alpha_gradient for lam, r in phases]).sum(0).to(self.alpha.dtype)
        self._optimizers["alpha"].step([gradient], self._rates["alpha"])
        return bool(self.alpha.isfinite() & (self.alpha > 0))

    def step_set(self, phases: Sequence[tuple[float, Gradients]], iteration: int) -> None:
        """Step pixels and labels alone."""
        parts = {"images": [(lam, r.by_rows, r.by_rows.images_TCHH) for lam, r in phases]}
        if self._config.labels == "soft":
            parts["labels"] = [(lam, r.by_rows, r.by_rows.labels_TK) for lam, r in phases]
        factor = schedule(self._config, iteration)
        for name, rows in parts.items():
            self._optimizers[name].step([weighted_sum(rows)], self._rates[name] * factor)

    def may_overflow(self, phases: Sequence[tuple[float, Gradients]]) -> bool:
        """Return whether a step could take pixels or labels out of float32: some number is very large, or NaN."""
        state = [t for name, t in self.momentum_tensors().items() if not name.endswith("alpha")]
        largest = [_largest(t) for t in (self.images_SCHH, self.logits_SK, *state)]
        for part in ("images_TCHH", "labels_TK"):
            largest.append(sum(abs(lam) * _largest(getattr(r.by_rows, part)) for lam, r in phases))
        rates = [self._rates[name] for name in ("images", "labels")]
        return not all(value < _LARGE for value in (*largest, *rates))

    def copy(self, whole: bool) -> dict[str, Tensor]:
        """Return copies of alpha and its momentum, or of the ``whole`` set and all of the optimizers' state."""
        names = _NAMES if whole else ("alpha",)
        state = {k: t.clone() for k, t in self.momentum_tensors().items() if k.partition("_")[2] in names}
        return {name: self._tensor(name).clone() for name in names} | state

    def restore(self, kept: dict[str, Tensor], iteration: int) -> None:
        """Put back what ``copy`` returned after ``iteration`` iterations."""
        names = [name for name in _NAMES if name in kept]
        for name in names:
            self._tensor(name).copy_(kept[name])
        self.load_momentum(kept, iteration, names)

    def momentum_tensors(self) -> dict[str, Tensor]:
        """Return the optimizers' state by name; a tensor that was never stepped has none."""
        return {
            f"{kind}_{name}": tensor
            for name, optimizer in self._optimizers.items()
            for kind, (tensor,) in optimizer.state().items()
        }

    def load_momentum(self, tensors: dict[str, Tensor], iteration: int, names: Sequence[str] = _NAMES) -> None:
        """Restore the state of ``names`` as ``momentum_tensors`` returned it after ``iteration`` iterations."""
        for name in names:
            like = self._tensor(name)
            state = {
                kind: [tensors[f"{kind}_{name}"].to(like.device, like.dtype, copy=True)]
                for kind in ("momentum", "square")
                if f"{kind}_{name}" in tensors
            }
            self._optimizers[name].load(state, iteration)

    def _tensor(self, name: str) -> Tensor:
        return {"images": self.images_SCHH, "labels": self.logits_SK, "alpha": self.alpha}[name]


def weighted_sum(parts: Sequence[tuple[float, RowGradients, Tensor]]) -> Tensor:
    """Return the sum of weight times rows (T, ...), spread over S rows; on a CPU it has the bits of a sum of whole ones."""
    _, first, rows = parts[0]
    total = rows.new_zeros(first.count, *rows.shape[1:])
    for weight, of, rows_T in parts:
        total.index_add_(0, of.rows_T, weight * rows_T)
    return total


def _largest(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, torch.inf)) if tensor.numel() else 0.0


def schedule(config: DistillConfig, iteration: int) -> float:
    """Return the factor on the learning rates of pixels and labels in iteration ``iteration`` + 1."""
    if config.schedule == "constant":
        return 1.0
    return (1 + math.cos(math.pi * iteration / config.iterations)) / 2
