"""SGD and Adam by torch's functional forms.

The classes of ``torch.optim`` import torch's compiler when one is made, which nothing here uses: with torch 2.13 that is 1.5 s
and 150 MB in every process. The functional forms are what their ``step`` calls, so the results have the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd


class Optimizer(Protocol):
    """Changes tensors in place. Its state is one tensor per tensor and name; none before the first step."""

    def step(self, gradients: Sequence[Tensor], lr: float) -> None:
        """Step along the gradients, one per tensor in their order."""

    def state(self) -> dict[str, list[Tensor]]:
        """Return the state, not copied."""

    def load(self, state: Mapping[str, Sequence[Tensor]], steps: int) -> None:
        """Take over what ``state`` returned after ``steps`` steps; empty: forget everything."""


class SGD:
    """SGD with momentum; the gradient of ``weight_decay`` / 2 times the squared norm is added to the gradients."""

    def __init__(self, tensors: Sequence[Tensor], momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        self._tensors, self._momentum, self._weight_decay = list(tensors), momentum, weight_decay
        self._state: list[Tensor | None] = [None] * len(self._tensors)

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], lr: float) -> None:
        sgd(
            self._tensors,
            list(gradients),
            self._state,
            weight_decay=self._weight_decay,
            momentum=self._momentum,
            lr=lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )

    def state(self) -> dict[str, list[Tensor]]:
        kept = [t for t in self._state if t is not None]
        return {"momentum": kept} if kept else {}

    def load(self, state: Mapping[str, Sequence[Tensor]], steps: int) -> None:
        self._state = list(state["momentum"]) if state else [None] * len(self._tensors)


class Adam:
    """Adam (Kingma and Ba, arXiv 1412.6980); weight decay is decoupled (AdamW, Loshchilov and Hutter, arXiv 1711.05101)."""

    def __init__(
        self, tensors: Sequence[Tensor], betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.0
    ) -> None:
        self._tensors, self._betas, self._weight_decay = list(tensors), betas, weight_decay
        self._state: dict[str, list[Tensor]] = {}
        self._steps: list[Tensor] = []

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], lr: float) -> None:
        if not self._state:
            self.load({name: [torch.zeros_like(t) for t in self._tensors] for name in ("momentum", "square")}, 0)
        adam(
            self._tensors,
            list(gradients),
            self._state["momentum"],
            self._state["square"],
            [],
            self._steps,
            decoupled_weight_decay=True,
            amsgrad=False,
            beta1=self._betas[0],
            beta2=self._betas[1],
            lr=lr,
            weight_decay=self._weight_decay,
            eps=1e-8,
            maximize=False,
        )

    def state(self) -> dict[str, list[Tensor]]:
        return self._state

    def load(self, state: Mapping[str, Sequence[Tensor]], steps: int) -> None:
        self._state = {name: list(tensors) for name, tensors in state.items()}
        self._steps = [torch.tensor(float(steps)) for _ in self._tensors]  # on the host, as torch.optim.Adam keeps them
