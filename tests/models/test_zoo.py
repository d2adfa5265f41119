"""Cross-architecture networks: every size, grey and colour, both norms; initialisation; ConvNets stacked."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lad_dist.errors import DataError
from lad_dist.models.convnet import build
from lad_dist.models.stacked import StackedConvNets
from lad_dist.models.zoo import network

OTHERS = ("vgg11", "resnet18", "alexnet", "mlp", "vit")


def made(name: str, channels: int = 1, size: int = 8, norm: str = "instance", seed: int = 0, **more) -> nn.Module:
    return network(name, channels, size, 7, width=4, depth=2, norm=norm, seed=seed, purpose=("test",), **more)


@pytest.mark.parametrize("name", ["convnet", *OTHERS])
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 13), (1, 28), (3, 64)])
def test_every_size_gives_logits_that_depend_on_the_image_and_gradients_for_every_weight(name, channels, size):
    net, images = made(name, channels, size), torch.randn(3, channels, size, size)
    logits = net(images)
    assert logits.shape == (3, 7) and bool(logits.isfinite().all())
    if name == "vit":  # its head starts at zero
        net[1].heads.head.weight.data.normal_()
        logits = net(images)
    assert float(logits.detach().std(dim=0).max()) > 1e-6  # a norm over a single pixel would leave nothing of the image
    net(images).square().sum().backward()
    without = [n for n, p in net.named_parameters() if p.grad is None or not bool(p.grad.isfinite().all())]
    assert without == []


@pytest.mark.parametrize("name", ["vgg11", "resnet18", "alexnet"])
def test_no_feature_map_shrinks_below_two_pixels(name):
    sides: list[int] = []
    for size in (8, 9, 16, 33):
        sides.clear()
        net = made(name, 1, size)
        for module in net.modules():
            if isinstance(module, nn.GroupNorm):
                module.register_forward_hook(lambda m, i, o: sides.append(o.shape[-1]))
        with torch.no_grad():
            net(torch.randn(1, 1, size, size))
        assert min(sides) >= 2 and sides[0] == size  # and the stem keeps the resolution


@pytest.mark.parametrize("name", ["convnet", "vgg11", "resnet18", "alexnet"])
def test_the_norm_is_an_option(name):
    def count(net: nn.Module, kind: type) -> int:
        return sum(isinstance(m, kind) for m in net.modules())

    instance, batch = made(name), made(name, norm="batch")
    assert count(instance, nn.BatchNorm2d) == 0 and count(batch, nn.BatchNorm2d) > 0
    assert count(batch, nn.GroupNorm) == 0
    sizes = [sum(p.numel() for p in net.parameters()) for net in (instance, batch)]
    assert sizes[0] == sizes[1]


def test_layers_are_torchvisions():
    """Weights of all convolutions at CIFAR's size, from the layers that the papers list."""

    def convolutions(name: str) -> int:
        return sum(m.weight.numel() for m in made(name, 3, 32).modules() if isinstance(m, nn.Conv2d))

    assert convolutions("vgg11") == 9 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 256 + 256 * 512 + 3 * 512 * 512)
    assert convolutions("alexnet") == 9 * 3 * 64 + 25 * 64 * 192 + 9 * (192 * 384 + 384 * 256 + 256 * 256)
    stages = 4 * 64**2 + 64 * 128 + 3 * 128**2 + 128 * 256 + 3 * 256**2 + 256 * 512 + 3 * 512**2
    assert convolutions("resnet18") == 9 * (3 * 64 + stages) + 64 * 128 + 128 * 256 + 256 * 512


@pytest.mark.parametrize("name", ["convnet", *OTHERS])
def test_initialisation_is_a_function_of_seed_and_purpose_alone(name):
    first = [p.detach().clone() for p in made(name).parameters()]
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(first, made(name).parameters(), strict=True))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert any(not torch.equal(a, b) for a, b in zip(first, made(name, seed=1).parameters(), strict=True))


@pytest.mark.parametrize("name", OTHERS)
def test_nothing_is_drawn_while_training(name):
    net, images = made(name).train(), torch.randn(2, 1, 8, 8)
    torch.manual_seed(1)
    first = net(images)
    torch.manual_seed(2)
    assert torch.equal(first, net(images))


@pytest.mark.parametrize("name", OTHERS)
def test_images_that_are_too_small_are_refused(name):
    with pytest.raises(DataError, match=rf"evaluate\.architectures: {name} takes images of at least 8 pixels"):
        made(name, size=7)


# --- several ConvNets at once -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "size", "depth"), [(1, 8, 2), (3, 9, 1), (3, 16, 3)])
def test_stacked_networks_equal_single_ones_in_value_and_gradient(channels, size, depth):
    nets = [build(channels, size, 5, 4, depth, seed=s, purpose=("test",)).double() for s in range(3)]
    images, weights = torch.randn(3, 6, channels, size, size).double(), torch.randn(3, 6, 5).double()
    stacked = StackedConvNets(nets)
    found = stacked(images)
    for net, x, logits in zip(nets, images, found, strict=True):
        torch.testing.assert_close(logits, net(x), rtol=1e-10, atol=1e-10)
    (found * weights).sum().backward()
    for net, x, w in zip(nets, images, weights, strict=True):
        (net(x) * w).sum().backward()
    for r, net in enumerate(nets):
        for own, block in zip(net.features.children(), stacked.blocks, strict=True):
            for name, p in own.named_parameters():
                gradient = block.get_parameter(name).grad.unflatten(0, (3, -1))[r]
                torch.testing.assert_close(gradient, p.grad, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(stacked.weight_RKD.grad[r], net.classifier.weight.grad, rtol=1e-9, atol=1e-9)


def test_stacking_and_back():
    nets, others = ([build(1, 8, 5, 4, 2, seed=s, purpose=(p,)) for s in range(2)] for p in ("a", "b"))
    StackedConvNets(nets).unstack(others)
    for a, b in zip(nets, others, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
