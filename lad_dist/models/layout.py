"""A network's parameters as one flat vector with named spans: no offset is ever written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """Names and shapes of a network's parameters, P values in total: in module order, but for the classifier's, which are last.

    ``classifier`` names the parameters of the classifier.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    classifier: tuple[str, ...]

    @classmethod
    def of(cls, module: nn.Module) -> Layout:
        """The layout of ``module``, whose sub-module ``classifier_name(module)`` is the classifier."""
        shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        classifier = tuple(n for n in shapes if n.startswith(f"{classifier_name(module)}."))
        assert classifier, "the network was checked to have a classifier"
        names = (*(n for n in shapes if n not in classifier), *classifier)
        return cls(names, tuple(shapes[n] for n in names), classifier)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(prod(shape) for shape in self.shapes)

    @property
    def size(self) -> int:
        """P, the length of the flat vector."""
        return sum(self.sizes)

    def span(self, part: str) -> slice:
        """Where ``"all"``, ``"backbone"``, ``"classifier"`` or one named parameter lies in the flat vector."""
        start = sum(s for n, s in zip(self.names, self.sizes, strict=True) if n not in self.classifier)
        if part == "all":
            return slice(0, self.size)
        if part == "backbone":
            return slice(0, start)
        if part == "classifier":
            return slice(start, self.size)
        index = self.names.index(part)
        begin = sum(self.sizes[:index])
        return slice(begin, begin + self.sizes[index])

    def views(self, flat_P: Tensor) -> dict[str, Tensor]:
        """The flat vector as named tensors that share its memory and its graph."""
        pieces = flat_P.split(list(self.sizes))
        return {n: p.view(s) for n, p, s in zip(self.names, pieces, self.shapes, strict=True)}

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors in module order as one vector."""
        import torch

        return torch.cat([t.reshape(-1) for t in tensors])


def classifier_name(module: nn.Module) -> str:
    """The dotted name of a network's last linear layer: what its attribute of this name says, by default ``classifier``."""
    return str(getattr(module, "classifier_name", "classifier"))
