"""Several ConvNets of one shape computed together, each on its own images, by grouped instead of R small convolutions.

Shapes: R networks, B images of a batch, C channels, H side in pixels, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lad_dist.models.block import NormReluPool
from lad_dist.models.convnet import ConvNet

_Module = TypeVar("_Module", bound=nn.Module)


class StackedConvNets(nn.Module):
    """R ConvNets with instance norm, from images (R, B, C, H, H) to logits (R, B, K).

    Results equal each network's up to rounding. The channels of all networks are concatenated, network by network:
    convolutions have R groups; instance norm needs none. Parameters are copies, named as in one network; ``unstack``
    writes them back.
    """

    def __init__(self, networks: Sequence[ConvNet]) -> None:
        super().__init__()
        self.count = len(networks)
        self.blocks = nn.ModuleList()
        modules = [list(n.features.children()) for n in networks]
        for position in range(0, len(modules[0]), 2):
            self.blocks.append(_grouped([m[position] for m in modules]))
            self.blocks.append(_side_by_side([m[position + 1] for m in modules]))
        self.weight_RKD = nn.Parameter(torch.stack([n.classifier.weight.detach() for n in networks]))
        self.bias_RK = nn.Parameter(torch.stack([n.classifier.bias.detach() for n in networks]))

    def forward(self, images_RBCHH: Tensor) -> Tensor:
        networks, batch, channels, height, width = images_RBCHH.shape
        x = images_RBCHH.transpose(0, 1).reshape(batch, networks * channels, height, width)
        for block in self.blocks:
            x = block(x)
        features_RBD = x.view(batch, networks, -1).transpose(0, 1)
        each = zip(features_RBD.contiguous(), self.weight_RKD, self.bias_RK, strict=True)
        return torch.stack([F.linear(*network) for network in each])  # a batched product would differ in the last bits

    @torch.no_grad()
    def unstack(self, networks: Sequence[ConvNet]) -> None:
        """Copy the parameters into ``networks``, in the order in which they were stacked."""
        for r, network in enumerate(networks):
            for own, block in zip(network.features.children(), self.blocks, strict=True):
                for name, p in own.named_parameters():
                    p.copy_(block.get_parameter(name).unflatten(0, (self.count, -1))[r])
            network.classifier.weight.copy_(self.weight_RKD[r])
            network.classifier.bias.copy_(self.bias_RK[r])


def _grouped(convolutions: Sequence[nn.Module]) -> nn.Conv2d:
    first = convolutions[0]
    assert isinstance(first, nn.Conv2d)
    count = len(convolutions)
    made = nn.Conv2d(
        count * first.in_channels,
        count * first.out_channels,
        kernel_size=first.kernel_size,  # type: ignore[arg-type]
        padding=first.padding,  # type: ignore[arg-type]
        groups=count,
        device="meta",
    )
    return _filled(made, convolutions)


def _side_by_side(norms: Sequence[nn.Module]) -> NormReluPool:
    first = norms[0]
    assert isinstance(first, NormReluPool), "only instance norm treats every channel by itself"
    return _filled(NormReluPool(len(norms) * len(first.weight), first.eps, first.fused), norms)


def _filled(made: _Module, parts: Sequence[nn.Module]) -> _Module:
    for name, _ in parts[0].named_parameters():
        setattr(made, name, nn.Parameter(torch.cat([p.get_parameter(name).detach() for p in parts])))
    return made
