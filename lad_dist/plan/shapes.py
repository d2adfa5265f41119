"""Sizes of a recipe's network on a data set: for ConvNet counted without building it, else measured on a few images.

Units: values (of 4 bytes in float32) and floating-point operations, per image unless said otherwise.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from lad_dist.models.convnet import feature_side
from lad_dist.recipe import ModelConfig

_GRAPH = {"representation": 2.5, "classifier": 1.25}  # multiples of the activations; see memory.py


@dataclass(frozen=True)
class Shapes:
    """A ConvNet of ``depth`` blocks of ``width`` channels; images (``channels``, ``size``, ``size``), ``classes``."""

    channels: int
    size: int
    classes: int
    width: int
    depth: int

    @classmethod
    def of(cls, model: ModelConfig, channels: int, size: int, classes: int) -> Shapes:
        """Return the shapes of the recipe's network. Raises as ``models.network.build``."""
        if model.network == "convnet":
            return Shapes(channels, size, classes, model.width, model.depth)
        return _measured(model.network, channels, size, classes)

    @property
    def name(self) -> str:
        """Name of the network, for display."""
        return f"ConvNet of width {self.width}, depth {self.depth}"

    @property
    def note(self) -> str:
        """Note on how the numbers were obtained, if not counted."""
        return ""

    @property
    def image(self) -> int:
        """D, values of an image."""
        return self.channels * self.size**2

    @property
    def sides(self) -> tuple[int, ...]:
        """Side of each block's convolution; the first pads grey images by 3."""
        first = self.size + 4 if self.channels == 1 else self.size
        return tuple(first >> block for block in range(self.depth))

    @property
    def activations(self) -> int:
        """Output values of all convolutions, which make up the graph of a step."""
        return sum(self.width * side**2 for side in self.sides)

    def graph(self, phase: str) -> float:
        """Return the values that a step's graph keeps: differentiated again (representation) or once (classifier)."""
        return _GRAPH[phase] * self.activations

    @property
    def largest(self) -> int:
        """Output values of the first, and largest, convolution."""
        return self.width * self.sides[0] ** 2

    @property
    def features(self) -> int:
        """Input values of the classifier."""
        return self.width * feature_side(self.size, self.channels, self.depth) ** 2

    @property
    def statistics(self) -> int:
        """Statistics of an image in the statistics phase: two per channel and 4x4 patch of each convolution's input."""
        channels = self.channels + self.width * (self.depth - 1)
        return 2 * (channels + sum((side // 4) ** 2 for side in self.sides))

    @property
    def classifier(self) -> int:
        """Weights and biases of the classifier."""
        return (self.features + 1) * self.classes

    @property
    def parameters(self) -> int:
        """P: every block has a convolution with biases and a norm's scale and shift."""
        inputs = (self.channels, *[self.width] * (self.depth - 1))
        return sum(9 * c * self.width + 3 * self.width for c in inputs) + self.classifier

    @property
    def forward_flops(self) -> int:
        """Operations (a multiply-add is two) of one forward pass: convolutions and classifier."""
        inputs = (self.channels, *[self.width] * (self.depth - 1))
        convolutions = sum(2 * 9 * c * self.width * side**2 for c, side in zip(inputs, self.sides, strict=True))
        return convolutions + 2 * self.features * self.classes


@dataclass(frozen=True)
class MeasuredShapes(Shapes):
    """Another network, measured by steps on one and on two images. ``depth``: pairs of layers with weights."""

    network: str
    all_parameters: int
    classifier_parameters: int
    graphs: tuple[int, int]  # values per image: representation, classifier
    largest_output: int
    outputs: int  # of all layers with weights
    flops: int

    @property
    def name(self) -> str:
        return f"network {self.network}"

    @property
    def note(self) -> str:
        return (
            f"{self.network}: its graphs, layers and FLOPs are measured on one and two images; memory beside the graphs is "
            "assumed to be ConvNet's multiple of the largest layer, and times are the table's for a ConvNet of as many FLOPs "
            "and layers, so both are rough"
        )

    @property
    def activations(self) -> int:
        return self.outputs

    def graph(self, phase: str) -> float:
        return float(self.graphs[phase == "classifier"])

    @property
    def largest(self) -> int:
        return self.largest_output

    @property
    def features(self) -> int:
        return self.classifier_parameters // self.classes - 1

    @property
    def classifier(self) -> int:
        return self.classifier_parameters

    @property
    def parameters(self) -> int:
        return self.all_parameters

    @property
    def forward_flops(self) -> int:
        return self.flops


@functools.cache
def _measured(network: str, channels: int, size: int, classes: int) -> MeasuredShapes:
    import torch
    from torch import Tensor, nn
    from torch.utils.flop_counter import FlopCounterMode

    from lad_dist.distill.memory import saved_for_backward
    from lad_dist.models import functional
    from lad_dist.models.convnet import flat_parameters
    from lad_dist.models.layout import Layout
    from lad_dist.models.network import build

    module = build(ModelConfig(network=network), channels, size, classes, seed=0, purpose=("template",))
    layout, layers = Layout.of(module), [m for m in module.modules() if list(m.parameters(recurse=False))]
    outputs: list[int] = []

    def images(count: int) -> Tensor:
        return torch.zeros(count, channels, size, size).requires_grad_()

    def graph(count: int, second: bool) -> int:
        """Return the values of all distinct storages that a step keeps for its backward pass."""
        theta_P = flat_parameters(module).requires_grad_(second)
        with saved_for_backward() as counted:
            if second:
                loss = functional.logits(module, layout.views(theta_P), images(count)).square().sum()
                kept: Tensor = torch.autograd.grad(loss, theta_P, create_graph=True)[0]
            else:
                kept = functional.features(module, layout.views(theta_P), images(count))
        del kept
        return counted() // 4

    def note_output(layer: nn.Module, given: object, out: object) -> None:
        if isinstance(out, Tensor):
            outputs.append(out.numel())

    handles = [layer.register_forward_hook(note_output) for layer in layers]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(images(1).detach())
    for handle in handles:
        handle.remove()
    representation, classifier = (graph(2, second) - graph(1, second) for second in (True, False))
    span = layout.span("classifier")
    return MeasuredShapes(
        channels,
        size,
        classes,
        width=0,
        depth=-(-len(layers) // 2),
        network=network,
        all_parameters=layout.size,
        classifier_parameters=span.stop - span.start,
        graphs=(max(representation, 0), max(classifier, 0)),
        largest_output=max(outputs, default=0),
        outputs=sum(outputs),
        flops=int(counter.get_total_flops()),
    )
