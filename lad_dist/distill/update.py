"""The outer optimizers of pixels, labels and the student's learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lad_dist.distill.student import SyntheticSet
from lad_dist.recipe import DistillConfig

ADAM_BETA2 = 0.99
_NAMES = ("images", "labels", "alpha")


class Gradients(Protocol):
    """The gradients of one phase's loss with respect to the synthetic set."""

    @property
    def loss(self) -> Tensor: ...
    @property
    def image_grad_SCHH(self) -> Tensor: ...
    @property
    def label_grad_SK(self) -> Tensor: ...
    @property
    def alpha_gradient(self) -> Tensor: ...


@dataclass(frozen=True)
class SetGradients:
    """Result of a phase without a student: loss, accuracy (0-dim, equal on every rank), gradients of this rank's images."""

    loss: Tensor
    accuracy: Tensor
    image_grad_SCHH: Tensor
    label_grad_SK: Tensor

    @property
    def alpha_gradient(self) -> Tensor:
        """Zero: the loss does not depend on the student's learning rate."""
        return torch.zeros_like(self.loss)


class Optimizers:
    """The optimizers of a synthetic set, which is updated in place.

    alpha uses SGD with momentum. Pixels and label logits use the same, or Adam (Kingma and Ba, arXiv 1412.6980) with
    their momentum as beta_1 and 0.99 as beta_2. Hard labels are not updated.
    """

    def __init__(self, images_SCHH: Tensor, logits_SK: Tensor, alpha: Tensor, config: DistillConfig) -> None:
        self.images_SCHH, self.logits_SK, self.alpha, self._config = images_SCHH, logits_SK, alpha, config
        d = config
        settings = ((d.lr_images, d.momentum_images), (d.lr_labels, d.momentum_labels), (d.lr_alpha, d.momentum_alpha))
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        for name, (lr, momentum) in zip(_NAMES, settings, strict=True):
            adam = d.optimizer == "adam" and name != "alpha"
            self._optimizers[name] = (
                torch.optim.Adam([self._tensor(name)], lr=lr, betas=(momentum, ADAM_BETA2))
                if adam
                else torch.optim.SGD([self._tensor(name)], lr=lr, momentum=momentum)
            )

    def synthetic_set(self) -> SyntheticSet:
        """Return the current set (shares the tensors)."""
        return SyntheticSet(self.images_SCHH, self.logits_SK, self.alpha)

    def step(self, phases: Sequence[tuple[float, Gradients]], iteration: int = 0) -> None:
        """Step along the sum of lambda times each phase's gradient, with the learning rates of ``iteration``."""
        self.images_SCHH.grad = weighted_sum([(lam, r.image_grad_SCHH) for lam, r in phases])
        self.alpha.grad = torch.stack([lam * r.alpha_gradient for lam, r in phases]).sum(0).to(self.alpha.dtype)
        if self._config.labels == "soft":
            self.logits_SK.grad = weighted_sum([(lam, r.label_grad_SK) for lam, r in phases])
        factor = schedule(self._config, iteration)
        for name, optimizer in self._optimizers.items():
            group = optimizer.param_groups[0]
            lr = group["lr"]
            group["lr"] = lr if name == "alpha" else lr * factor
            optimizer.step()
            group["lr"] = lr
            optimizer.zero_grad(set_to_none=True)

    def momentum_tensors(self) -> dict[str, Tensor]:
        """Return the optimizers' state by name; a tensor that was never stepped has none."""
        found = {}
        for name, optimizer in self._optimizers.items():
            state = optimizer.state.get(self._tensor(name), {})
            for prefix, key in (("momentum", "momentum_buffer"), ("momentum", "exp_avg"), ("square", "exp_avg_sq")):
                if state.get(key) is not None:
                    found[f"{prefix}_{name}"] = state[key]
        return found

    def load_momentum(self, tensors: dict[str, Tensor], iteration: int) -> None:
        """Restore the state that ``momentum_tensors`` returned after ``iteration`` iterations, replacing any other."""
        for name, optimizer in self._optimizers.items():
            optimizer.state.clear()
            momentum, square = tensors.get(f"momentum_{name}"), tensors.get(f"square_{name}")
            if momentum is None:
                continue
            tensor = self._tensor(name)
            momentum = momentum.to(tensor.device, tensor.dtype, copy=True)
            if square is None:
                optimizer.state[tensor] = {"momentum_buffer": momentum}
            else:
                square = square.to(tensor.device, tensor.dtype, copy=True)
                step = torch.tensor(float(iteration))
                optimizer.state[tensor] = {"step": step, "exp_avg": momentum, "exp_avg_sq": square}

    def _tensor(self, name: str) -> Tensor:
        return {"images": self.images_SCHH, "labels": self.logits_SK, "alpha": self.alpha}[name]


def weighted_sum(parts: Sequence[tuple[float, Tensor]]) -> Tensor:
    """Return the sum of weight times tensor, holding one product at a time; on a CPU it has the bits of a sum of all."""
    total = torch.zeros_like(parts[0][1])
    for weight, tensor in parts:
        total.add_(weight * tensor)
    return total


def schedule(config: DistillConfig, iteration: int) -> float:
    """Return the factor on the learning rates of pixels and labels in iteration ``iteration`` + 1."""
    if config.schedule == "constant":
        return 1.0
    return (1 + math.cos(math.pi * iteration / config.iterations)) / 2
