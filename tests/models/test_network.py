"""Networks of one's own: what experts and students may be, what is refused with one clear line, and what a layout makes of them."""

from __future__ import annotations

import itertools
import sys
import types

import pytest
import torch
from torch import nn

from lad_dist import plugins
from lad_dist.errors import DataError, RecipeError
from lad_dist.models import functional
from lad_dist.models.convnet import flat_parameters
from lad_dist.models.layout import Layout
from lad_dist.models.network import build
from lad_dist.models.zoo import NETWORKS, network
from lad_dist.plan.shapes import MeasuredShapes, Shapes
from lad_dist.recipe import NETWORKS as NAMES
from lad_dist.recipe import ModelConfig, Recipe

COUNT = itertools.count()


class Small(nn.Module):
    """A convolution, an optional layer, mean pooling and a classifier, which is declared first."""

    def __init__(self, channels: int, size: int, classes: int, *layers: nn.Module, bias: bool = True) -> None:
        super().__init__()
        self.classifier = nn.Linear(5, classes, bias=bias)
        self.layers = nn.Sequential(nn.Conv2d(channels, 5, 3), *layers)

    def forward(self, images):
        return self.classifier(self.layers(images).mean(dim=(2, 3)))


class Drawn(Small):
    def forward(self, images):
        return super().forward(images + torch.randn_like(images))


class Sharp(Small):
    def forward(self, images):
        return 2 * super().forward(images)


class Unused(Small):
    def __init__(self, *shape) -> None:
        super().__init__(*shape)
        self.spare = nn.Parameter(torch.zeros(3))


class Once(Small):
    def forward(self, images):
        return self.classifier(_Once.apply(self.layers(images)).mean(dim=(2, 3)))


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * gradient


def frozen(*shape):
    made = Small(*shape)
    made.layers[0].bias.requires_grad_(False)
    return made


@pytest.fixture
def mine(monkeypatch):
    """Makes ``mine:net`` whatever it is given, under a name that no cache knows."""

    def give(factory) -> str:
        name = f"mine_{next(COUNT)}"
        module = types.ModuleType(name)
        module.net = factory
        monkeypatch.setitem(sys.modules, name, module)
        return f"{name}:net"

    return give


def of(name: str, seed: int = 0) -> nn.Module:
    return build(ModelConfig(network=name), 1, 9, 4, seed=seed, purpose=("test",))


def test_the_names_of_recipes_are_the_registrys():
    assert set(NAMES) == {"convnet", *NETWORKS}


def test_a_network_of_ones_own(mine):
    name = mine(lambda channels, size, classes: Small(channels, size, classes, nn.GroupNorm(5, 5), nn.Softplus()))
    with torch.no_grad():  # where the check itself needs gradients
        net, images = of(name), torch.randn(3, 1, 9, 9)
    layout = Layout.of(net)
    assert layout.names[-2:] == layout.classifier == ("classifier.weight", "classifier.bias")
    assert layout.size == sum(p.numel() for p in net.parameters()) and layout.span("classifier").stop == layout.size
    views = layout.views(flat_parameters(net))
    torch.testing.assert_close(functional.logits(net, views, images), net(images), rtol=0, atol=0)
    features = functional.features(net, views, images)
    torch.testing.assert_close(net.classifier(features), net(images), rtol=0, atol=0)
    assert not net.classifier._forward_pre_hooks
    assert torch.equal(flat_parameters(of(name)), flat_parameters(net))
    assert not torch.equal(flat_parameters(of(name, seed=1)), flat_parameters(net))


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "alexnet", "mlp"])
def test_the_other_networks_with_instance_norm(name):
    net = of(name)
    assert Layout.of(net).classifier == tuple(n for n, _ in net.named_parameters())[-2:]


@pytest.mark.parametrize(("factory", "said"), [
    (lambda c, s, k: Small(c, s, k, nn.BatchNorm2d(5)), "has buffers (layers.1.running_mean and 2 more), which trajectories"),
    (lambda c, s, k: Small(c, s, k, nn.BatchNorm2d(5, track_running_stats=False)), "depend on the others of its batch"),
    (lambda c, s, k: nn.Sequential(nn.Flatten(), nn.Linear(81, k)), "its classifier 'classifier' is no such module; valid: an "),
    (lambda c, s, k: Small(c, s, k, bias=False), "its classifier 'classifier' is Linear of ['classifier.weight']"),
    (lambda c, s, k: Small(c, s, k + 1), "returns (4, 5) for 4 images; valid: logits of shape (images, 4)"),
    (lambda c, s, k: Small(c + 1, s, k), "on images of 1x9x9: RuntimeError"),
    (Drawn, "its logits differ between calls; valid: nothing random"),
    (lambda c, s, k: Small(c, s, k, nn.Dropout()), "its logits differ between calls"),
    (Sharp, "its logits are not the output of one call of 'classifier'"),
    (Unused, "parameter spare does not affect the logits"),
    (frozen, "parameter layers.0.bias is frozen"),
    (Once, "has no second derivative"),
    (lambda c, s, k: "net", "returned a str; valid: a callable (channels, size, classes) -> nn.Module"),
    (lambda c, s: None, "raised TypeError"),
    ("net", "is a str; valid: a callable (channels, size, classes) -> nn.Module"),
])  # fmt: skip
def test_what_experts_cannot_be_is_refused_in_one_line(mine, factory, said):
    with pytest.raises(RecipeError) as refused:
        of(mine(factory))
    assert said in str(refused.value) and str(refused.value).startswith("model.network: mine_")
    assert "\n" not in str(refused.value)


def test_attention_of_torch_has_no_second_derivative():
    with pytest.raises(RecipeError, match=r"model\.network: vit: has no second derivative"):
        of("vit")


def test_small_images_are_refused_under_the_field_s_name():
    with pytest.raises(DataError, match=r"^model\.network: resnet18 takes images of at least 8"):
        build(ModelConfig(network="resnet18"), 1, 7, 4, seed=0, purpose=("test",))


def test_for_evaluation_batch_norm_is_welcome_and_logits_are_looked_at(mine):
    good = mine(lambda c, s, k: Small(c, s, k, nn.BatchNorm2d(5)))
    net = network(good, 1, 9, 4, seed=0, purpose=("test",))
    assert net.training and float(net.layers[1].running_mean.abs().sum()) == 0
    with pytest.raises(RecipeError, match=r"^evaluate\.architectures: mine_\d+:net: its logits differ between calls"):
        network(mine(lambda c, s, k: Small(c, s, k, nn.Dropout())), 1, 9, 4, seed=0, purpose=("test",))
    with pytest.raises(RecipeError, match=r"^evaluate\.architectures: mine_\d+:net: returns \(2, 5\) for 2 images"):
        network(mine(lambda c, s, k: Small(c, s, k + 1)), 1, 9, 4, seed=0, purpose=("test",))


def test_recipes_take_names_that_somebody_offers(monkeypatch):
    def doc(name: str) -> Recipe:
        return Recipe.model_validate({"model": {"network": name}, "evaluate": {"architectures": ["convnet", name]}})

    with pytest.raises(ValueError, match=r"should be 'convnet', .* or module:attribute") as refused:
        doc("resnet19")
    assert refused.value.error_count() == 2
    monkeypatch.setattr(plugins, "offered", lambda group: {"resnet19": None} if group == "lad_dist.networks" else {})
    assert doc("resnet19").model.network == "resnet19"


def test_the_own_network_is_what_is_evaluated_unless_the_recipe_says_otherwise():
    assert Recipe.model_validate({"model": {"network": "resnet18"}}).evaluate.architectures == ("resnet18",)
    both = {"model": {"network": "resnet18", "width": 8}, "evaluate": {"architectures": ["resnet18", "convnet"]}}
    assert Recipe.model_validate(both).evaluate.architectures == ("resnet18", "convnet")
    with pytest.raises(ValueError, match=r"model\.width: has no meaning with model\.network resnet18"):
        Recipe.model_validate({"model": {"network": "resnet18", "width": 8}})
    with pytest.raises(ValueError, match=r"distill\.precision: bfloat16 is convnet's"):
        Recipe.model_validate({"model": {"network": "resnet18"}, "distill": {"precision": "bfloat16"}})


def test_hashes_are_what_they_were():
    assert Recipe().experts_hash() != Recipe.model_validate({"model": {"network": "resnet18"}}).experts_hash()
    assert "network" not in Recipe().experts_document()["model"]


def test_the_plan_measures_what_it_cannot_count():
    """On the same network the measured sizes are those that are counted for ConvNet."""

    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            blocks = [nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(8, 8), nn.ReLU(), nn.AvgPool2d(2)]
            self.layers = nn.Sequential(*blocks, nn.Flatten())
            self.classifier = nn.Linear(8 * 8 * 8, 10)

        def forward(self, images):
            return self.classifier(self.layers(images))

    module = types.ModuleType("mine_same")
    module.net = lambda channels, size, classes: Same()
    sys.modules["mine_same"] = module
    try:
        shapes = Shapes.of(ModelConfig(network="mine_same:net"), 3, 16, 10)
    finally:
        del sys.modules["mine_same"]
    counted = Shapes(3, 16, 10, 8, 1)
    assert isinstance(shapes, MeasuredShapes) and "mine_same:net" in shapes.note
    for name in ("parameters", "classifier", "features", "forward_flops", "largest", "image"):
        assert getattr(shapes, name) == getattr(counted, name), name
    for phase in ("representation", "classifier"):  # torch's own norm, ReLU and pooling keep more than the fused block
        assert counted.graph(phase) < shapes.graph(phase) < 4 * counted.graph(phase)
