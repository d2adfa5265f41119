"""The network: sizes, initialisation, and the layout of its weights in one vector."""

from __future__ import annotations

import pytest
import torch
from textbook import TextbookNet

from lad_dist.errors import DataError
from lad_dist.models import functional
from lad_dist.models.convnet import ConvNet, build, feature_side, flat_parameters
from lad_dist.models.layout import Layout


@pytest.mark.parametrize(("channels", "size", "classes", "width", "depth", "parameters"), [
    (3, 32, 10, 128, 3, 320_010),   # the published network for CIFAR
    (3, 64, 200, 128, 4, None),     # Tiny-ImageNet
    (1, 28, 10, 32, 3, None),       # Fashion-MNIST: padded to 32
    (1, 8, 10, 32, 2, None),        # digits: padded to 12
    (3, 13, 7, 6, 2, None),
    (1, 4, 2, 1, 1, None),
])  # fmt: skip
def test_sizes_and_outputs_equal_the_textbook_network(channels, size, classes, width, depth, parameters):
    net, textbook = ConvNet(channels, size, classes, width, depth), TextbookNet(channels, size, width, depth, classes)
    ours, theirs = ([(n, p.shape) for n, p in m.named_parameters()] for m in (net, textbook))
    assert ours == theirs
    assert parameters is None or len(flat_parameters(net)) == parameters
    textbook.load_state_dict(net.state_dict())
    images = torch.randn(2, channels, size, size)
    torch.testing.assert_close(net(images), textbook(images), rtol=1e-4, atol=1e-5)
    assert net.backbone(images).shape == (2, width * feature_side(size, channels, depth) ** 2)


@pytest.mark.parametrize(("channels", "size", "depth"), [(3, 4, 3), (1, 3, 3), (3, 7, 3)])
def test_too_many_blocks_are_refused(channels, size, depth):
    with pytest.raises(DataError, match=rf"model\.depth: {depth} blocks halve {size}x{size} images to zero"):
        ConvNet(channels, size, 10, 4, depth)


def test_the_deepest_that_fits():
    assert ConvNet(3, 8, 2, 4, 3)(torch.randn(1, 3, 8, 8)).shape == (1, 2)
    assert ConvNet(1, 4, 2, 4, 3)(torch.randn(1, 1, 4, 4)).shape == (1, 2)  # grey images are padded to 8


def test_initialisation_is_a_function_of_seed_and_purpose_alone():
    def made(seed: int = 3, *purpose: int | str) -> torch.Tensor:
        return flat_parameters(build(1, 8, 10, 4, 2, seed=seed, purpose=purpose or ("expert", 1)))

    first = made()
    torch.manual_seed(99)
    torch.randn(5)
    before = torch.random.get_rng_state()
    assert torch.equal(made(), first)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(made(4), first) and not torch.equal(made(3, "expert", 2), first)


def test_flat_parameters_is_a_copy():
    net = ConvNet(1, 8, 10, 4, 1)
    flat = flat_parameters(net)
    flat.zero_()
    assert float(net.classifier.weight.detach().abs().sum()) > 0


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_spans(depth):
    net = ConvNet(3, 16, 5, 6, depth)
    layout, flat = Layout.of(net), flat_parameters(net)
    head = net.classifier.weight.numel() + net.classifier.bias.numel()
    assert layout.size == len(flat)
    assert layout.span("all") == slice(0, len(flat))
    assert layout.span("classifier") == slice(len(flat) - head, len(flat))
    assert layout.span("backbone") == slice(0, len(flat) - head)
    assert layout.classifier == ("classifier.weight", "classifier.bias")
    for name, p in net.named_parameters():
        assert torch.equal(flat[layout.span(name)].view(p.shape), p.detach())
    with pytest.raises(ValueError, match="not in tuple"):
        layout.span("nothing")


def test_views_share_memory_and_graph():
    layout = Layout.of(ConvNet(1, 8, 3, 2, 1))
    flat = torch.randn(layout.size, requires_grad=True)
    views = layout.views(flat)
    assert list(views) == list(layout.names)
    assert views["classifier.weight"].data_ptr() == flat[layout.span("classifier.weight")].data_ptr()
    (gradient,) = torch.autograd.grad(views["classifier.bias"].sum(), flat)
    assert gradient.nonzero().flatten().tolist() == list(range(layout.size))[layout.span("classifier.bias")]
    assert torch.equal(torch.cat([view.reshape(-1) for view in views.values()]), flat)


def test_a_classifier_that_is_not_the_last_module_is_last_in_the_vector():
    net = torch.nn.Sequential()
    net.add_module("classifier", torch.nn.Linear(2, 2))
    net.add_module("more", torch.nn.Linear(2, 3))
    layout = Layout.of(net)
    assert layout.names == ("more.weight", "more.bias", "classifier.weight", "classifier.bias")
    assert (layout.span("backbone"), layout.span("classifier")) == (slice(0, 9), slice(9, 15))
    weights = flat_parameters(net)
    for name, view in layout.views(weights).items():
        assert torch.equal(view, net.get_parameter(name))


def test_computation_with_weights_passed_in():
    net, other = (build(1, 8, 3, 4, 2, seed=s, purpose=("test",)) for s in (0, 1))
    views, images = Layout.of(net).views(flat_parameters(other)), torch.randn(2, 1, 8, 8)
    assert torch.equal(functional.logits(net, views, images), other(images))
    assert torch.equal(functional.features(net, views, images), other.backbone(images))
