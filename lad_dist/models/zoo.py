"""Networks by name: torchvision's definitions adapted to small images, and networks of plugins.

A distilled set is evaluated on them in addition to ConvNet, and experts and students may use them as well
(``network.py``).

The stem is a 3x3 convolution of stride 1 without pooling (ResNet, AlexNet; VGG's already is one), layers that would
shrink the feature map below 2x2 are omitted, and the head is global average pooling and one linear layer, without
dropout, as in the evaluation code of the dataset-distillation literature (Zhao and Bilen's DC,
github.com/VICO-UoE/DatasetCondensation). Every convolution of VGG, AlexNet and ResNet is followed by instance norm
(GroupNorm with one group per channel) or batch norm. No random numbers are drawn in training.

Shapes: B images of a batch, C channels, H side in pixels, K classes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lad_dist import plugins
from lad_dist.errors import DataError, LadDistError, RecipeError
from lad_dist.models.convnet import ConvNet
from lad_dist.seeds import torch_seeded

SMALLEST = 8  # pixels a side
_MLP_WIDTHS = (128, 128)  # as in DC's MLP
_VIT = {"num_layers": 6, "num_heads": 4, "hidden_dim": 128, "mlp_dim": 256}

GROUP = "lad_dist.networks"
_FIELD = "evaluate.architectures"
_Norm = Callable[[int], nn.Module]


class Factory(Protocol):
    """A network's constructor: from channels, side in pixels and classes to a module from images to logits.

    It is called under a seeded generator, from which all initial weights must come.
    """

    def __call__(self, channels: int, size: int, classes: int, /) -> nn.Module: ...


def network(
    name: str,
    channels: int,
    size: int,
    classes: int,
    *,
    width: int = 128,
    depth: int = 3,
    norm: str = "instance",
    seed: int,
    purpose: tuple[int | str, ...],
) -> nn.Module:
    """Build the network ``name`` from images (B, C, H, H) to logits (B, K).

    Its initialisation is a pure function of ``seed`` and ``purpose``. ``width`` and ``depth`` are ConvNet's; ``norm``
    is "instance" or "batch" (MLP and ViT have none of these).

    Raises:
        DataError: the images are too small for the network.
        RecipeError: there is no such network, or it returns no logits for such images.
    """
    with torch_seeded(seed, "init", *purpose):
        if name == "convnet":
            return ConvNet(channels, size, classes, width, depth, norm=norm)
        made = make(name, channels, size, classes, norm)
    if name not in NETWORKS:
        _check_logits(made, channels, size, classes, f"{_FIELD}: {name}")
    return made


def make(name: str, channels: int, size: int, classes: int, norm: str = "instance", field: str = _FIELD) -> nn.Module:
    """Build the network ``name``, of ``NETWORKS`` or a plugin's ``Factory``, with weights from torch's generator.

    Raises as ``network``.
    """
    if name in NETWORKS:
        if size < SMALLEST:
            raise DataError(
                f"{field}: {name} takes images of at least {SMALLEST} pixels a side, these have {size}; valid: convnet"
            )
        return NETWORKS[name](channels, size, classes, _group_norm if norm == "instance" else nn.BatchNorm2d)
    what = "a callable (channels, size, classes) -> nn.Module"
    factory: Factory = plugins.load_callable(name, GROUP, field, what)
    try:
        made: object = factory(channels, size, classes)
    except LadDistError:
        raise
    except Exception as error:  # any error of the factory
        raise RecipeError(f"{field}: {name} raised {type(error).__name__}: {error}; valid: {what}") from error
    if not isinstance(made, nn.Module):
        raise RecipeError(f"{field}: {name} returned a {type(made).__name__}; valid: {what}")
    return made


@torch.no_grad()
def _check_logits(module: nn.Module, channels: int, size: int, classes: int, where: str) -> None:
    """Raise RecipeError if ``module`` does not return logits for an image, or draws random numbers."""
    tried = copy.deepcopy(module)  # batch norm updates its statistics on every batch
    images_BCHH = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))
    try:
        with torch_seeded(0, "check"):
            first, second = tried(images_BCHH), tried(images_BCHH)
            shape = tuple(tried.eval()(images_BCHH).shape)
    except Exception as error:  # any error of the network's code
        raise RecipeError(f"{where}: on images of {channels}x{size}x{size}: {type(error).__name__}: {error}") from error
    if shape != (2, classes):
        raise RecipeError(f"{where}: returns {shape} for 2 images; valid: logits of shape (images, {classes})")
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-6):
        raise RecipeError(f"{where}: its logits differ between calls; valid: nothing random in training, so no dropout")


def _group_norm(width: int) -> nn.Module:
    return nn.GroupNorm(width, width)


def _torchvision() -> ModuleType:
    from lad_dist.data.torchvision_import import import_torchvision

    return import_torchvision()


def _vgg11(channels: int, size: int, classes: int, norm: _Norm) -> nn.Module:
    models = _torchvision().models
    with torch.device("meta"):  # only its list of layers is needed
        layers = list(models.vgg11(weights=None, num_classes=1).features)
    made = _Plain(layers, channels, size, classes, norm)
    for module in made.modules():  # as torchvision's VGG initialises itself
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)
    return made


def _alexnet(channels: int, size: int, classes: int, norm: _Norm) -> nn.Module:
    models = _torchvision().models
    with torch.device("meta"):
        layers = list(models.alexnet(weights=None).features)
    first_pooling = next(i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d))
    return _Plain(layers[:first_pooling] + layers[first_pooling + 1 :], channels, size, classes, norm)


class _Plain(nn.Module):
    """The convolutions, ReLUs and poolings of ``layers`` in order, then the classifier.

    The first convolution is a 3x3 stem, each convolution is followed by a norm, and poolings are kept while they leave
    2x2 or more.
    """

    def __init__(self, layers: Iterable[nn.Module], channels: int, size: int, classes: int, norm: _Norm) -> None:
        super().__init__()
        made: list[nn.Module] = []
        width, side = channels, size
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                kernel = layer.kernel_size[0] if made else 3
                made += [nn.Conv2d(width, layer.out_channels, kernel, padding=kernel // 2), norm(layer.out_channels)]
                width = layer.out_channels
            elif isinstance(layer, nn.MaxPool2d):
                pool, stride = layer.kernel_size, layer.stride
                assert isinstance(pool, int) and isinstance(stride, int)
                left = (side - pool) // stride + 1
                if left >= 2:
                    made.append(nn.MaxPool2d(pool, stride))
                    side = left
            else:
                made.append(nn.ReLU(inplace=True))
        self.features = nn.Sequential(*made)
        self.classifier = nn.Linear(width, classes)

    def forward(self, images_BCHH: Tensor) -> Tensor:
        logits_BK: Tensor = self.classifier(self.features(images_BCHH).mean(dim=(2, 3)))
        return logits_BK


def _resnet18(channels: int, size: int, classes: int, norm: _Norm) -> nn.Module:
    from importlib import import_module

    _torchvision()
    resnet = import_module("torchvision.models.resnet")
    made: Any = resnet.ResNet(resnet.BasicBlock, [2, 2, 2, 2], num_classes=classes, norm_layer=norm)
    made.conv1 = nn.Conv2d(channels, 64, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(made.conv1.weight, mode="fan_out", nonlinearity="relu")
    made.maxpool = nn.Identity()
    made.classifier_name = "fc"
    side = size
    for stage in (made.layer2, made.layer3, made.layer4):
        first: Any = stage[0]
        if math.ceil(side / 2) >= 2:
            side = math.ceil(side / 2)
        else:
            first.conv1.stride = first.downsample[0].stride = (1, 1)
    return made


def _mlp(channels: int, size: int, classes: int, norm: _Norm) -> nn.Module:
    ops = _torchvision().ops
    made: Any = nn.Sequential(nn.Flatten(), ops.MLP(channels * size * size, [*_MLP_WIDTHS, classes]))
    made.classifier_name = next(n for n, m in reversed(list(made.named_modules())) if isinstance(m, nn.Linear))
    return made


def _vit(channels: int, size: int, classes: int, norm: _Norm) -> nn.Module:
    """Build a small vision transformer on 4x4 patches (8x8 above 32 pixels); other sides are padded with zeros."""
    patch = 4 if size <= 32 else 8
    missing = -size % patch
    vit = _torchvision().models.VisionTransformer(
        image_size=size + missing, patch_size=patch, num_classes=classes, **_VIT
    )
    vit.conv_proj = nn.Conv2d(channels, _VIT["hidden_dim"], kernel_size=patch, stride=patch)
    nn.init.trunc_normal_(vit.conv_proj.weight, std=math.sqrt(1 / (channels * patch * patch)))  # as torchvision's
    nn.init.zeros_(vit.conv_proj.bias)
    before = missing // 2
    after = missing - before
    made: Any = nn.Sequential(nn.ZeroPad2d((before, after, before, after)), vit)
    made.classifier_name = "1.heads.head"
    return made


NETWORKS: dict[str, Callable[[int, int, int, _Norm], nn.Module]] = {
    "vgg11": _vgg11,
    "resnet18": _resnet18,
    "alexnet": _alexnet,
    "mlp": _mlp,
    "vit": _vit,
}
