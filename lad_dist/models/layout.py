"""A network's parameters as one flat vector with named spans: no offset is ever written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """Names and shapes of a network's parameters in module order; P values in total.

    ``classifier`` names the parameters of the classifier, which must be the last ones of the network.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    classifier: tuple[str, ...]

    @classmethod
    def of(cls, module: nn.Module, classifier_name: str = "classifier") -> Layout:
        """The layout of ``module``, whose sub-module ``classifier_name`` is the classifier."""
        names = tuple(name for name, _ in module.named_parameters())
        shapes = tuple(tuple(p.shape) for p in module.parameters())
        classifier = tuple(n for n in names if n.split(".")[0] == classifier_name)
        assert classifier and names[-len(classifier) :] == classifier, "the classifier must be the last of the network"
        return cls(names, shapes, classifier)

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
