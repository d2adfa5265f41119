"""A network's parameters as one flat vector with named spans, so that no offset is written by hand."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """Names and shapes of a network's parameters, P values in total: in module order, but with the classifier's last.

    ``classifier`` lists the names of the classifier's parameters.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    classifier: tuple[str, ...]

    @classmethod
    def of(cls, module: nn.Module) -> Layout:
        """Return the layout of ``module``, whose sub-module ``classifier_name(module)`` is the classifier."""
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
        """Return the slice of ``"all"``, ``"backbone"``, ``"classifier"`` or one named parameter in the flat vector."""
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
        """Split the flat vector into named tensors that share its memory and its graph."""
        pieces = flat_P.split(list(self.sizes))
        return {n: p.view(s) for n, p, s in zip(self.names, pieces, self.shapes, strict=True)}


def classifier_name(module: nn.Module) -> str:
    """Return the dotted name of the network's last step, an ``nn.Linear`` with a bias; all other parameters are the backbone.

    It is the network's attribute ``classifier_name``, by default ``classifier``.
    """
    return str(getattr(module, "classifier_name", "classifier"))
