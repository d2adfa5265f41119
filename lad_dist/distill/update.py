"""The outer optimizers: one SGD step each for pixels, labels and the student's learning rate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lad_dist.distill.student import PhaseResult, SyntheticSet


class Optimizers:
    """SGD with momentum on the tensors of a synthetic set, which are updated in place.

    ``lr`` and ``momentum`` are (images, labels, alpha). ``learn_labels`` False leaves the labels as they are.
    """

    def __init__(
        self,
        images_SCHH: Tensor,
        logits_SK: Tensor,
        alpha: Tensor,
        *,
        lr: tuple[float, float, float],
        momentum: tuple[float, float, float],
        learn_labels: bool = True,
    ) -> None:
        self.images_SCHH, self.logits_SK, self.alpha = images_SCHH, logits_SK, alpha
        self.learn_labels = learn_labels
        tensors = (images_SCHH, logits_SK, alpha)
        groups = [{"params": [t], "lr": rate, "momentum": m} for t, rate, m in zip(tensors, lr, momentum, strict=True)]
        self._sgd = torch.optim.SGD(groups)

    def synthetic_set(self) -> SyntheticSet:
        """The set as it is now (shares the tensors)."""
        return SyntheticSet(self.images_SCHH, self.logits_SK, self.alpha)

    def step(self, phases: Sequence[tuple[float, PhaseResult]]) -> None:
        """One step along the sum of lambda times each phase's gradient."""
        self.images_SCHH.grad = torch.stack([lam * r.image_grad_SCHH for lam, r in phases]).sum(0)
        self.alpha.grad = torch.stack([lam * r.match.alpha_gradient for lam, r in phases]).sum(0).to(self.alpha.dtype)
        if self.learn_labels:
            self.logits_SK.grad = torch.stack([lam * r.label_grad_SK for lam, r in phases]).sum(0)
        self._sgd.step()
        self._sgd.zero_grad(set_to_none=True)

    def momentum_tensors(self) -> dict[str, Tensor]:
        """The momentum buffers by name; a tensor that was never stepped has none."""
        named = zip(("images", "labels", "alpha"), (self.images_SCHH, self.logits_SK, self.alpha), strict=True)
        buffers = {name: self._sgd.state[t].get("momentum_buffer") for name, t in named if t in self._sgd.state}
        return {f"momentum_{name}": b for name, b in buffers.items() if b is not None}

    def load_momentum(self, tensors: dict[str, Tensor]) -> None:
        """Put back what ``momentum_tensors`` gave, and nothing else."""
        self._sgd.state.clear()
        for name, t in (("images", self.images_SCHH), ("labels", self.logits_SK), ("alpha", self.alpha)):
            if f"momentum_{name}" in tensors:
                self._sgd.state[t]["momentum_buffer"] = tensors[f"momentum_{name}"].to(t.device, t.dtype).clone()
