"""Evaluate a network with weights passed as arguments, such as an autograd graph's leaves or an expert's checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lad_dist.models.convnet import ConvNet
from lad_dist.models.layout import classifier_name


def logits(module: nn.Module, views: dict[str, Tensor], images_BCHH: Tensor) -> Tensor:
    """Return the logits (B, K) of ``module`` with the weights ``views`` (see ``Layout.views``)."""
    out_BK: Tensor = torch.func.functional_call(module, views, (images_BCHH,))
    return out_BK


def features(module: nn.Module, views: dict[str, Tensor], images_BCHH: Tensor) -> Tensor:
    """Return the features (B, D), the classifier's input, of ``module`` with the weights ``views``."""
    renamed = {f"network.{name}": view for name, view in views.items()}
    out_BD: Tensor = torch.func.functional_call(_Backbone(module), renamed, (images_BCHH,))
    return out_BD


class _Backbone(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images_BCHH: Tensor) -> Tensor:
        if isinstance(self.network, ConvNet):
            return self.network.backbone(images_BCHH)
        given: list[Tensor] = []
        classifier = self.network.get_submodule(classifier_name(self.network))
        handle = classifier.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0]))
        try:
            self.network(images_BCHH)
        finally:
            handle.remove()
        return given[0]
