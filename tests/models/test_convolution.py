"""The convolution with derivatives of its own: equal to torch's in value and both derivatives, and no more work than asked for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from lad_dist.distill.student import Batch, Phase, Student, SyntheticSet
from lad_dist.models import convolution
from lad_dist.models.convnet import build, flat_parameters
from lad_dist.models.convolution import Convolution

SHAPES = {
    "colour": (3, 3, 4, 5, 1),
    "grey, padded by 3": (2, 1, 3, 4, 3),
    "no padding": (1, 2, 2, 5, 0),
}  # B, C, W, H, padding


def problem(batch: int, channels: int, width: int, side: int, padding: int, dtype: torch.dtype = torch.float64):
    draws = torch.Generator().manual_seed(batch + 10 * channels)
    x = torch.randn(batch, channels, side, side, dtype=dtype, generator=draws).requires_grad_()
    w = torch.randn(width, channels, 3, 3, dtype=dtype, generator=draws).requires_grad_()
    b = torch.randn(width, dtype=dtype, generator=draws).requires_grad_()
    ours, plain = (kind(channels, width, 3, padding=padding) for kind in (Convolution, nn.Conv2d))

    def of(module: nn.Module):
        return lambda x, w, b: torch.func.functional_call(module, {"weight": w, "bias": b}, (x,))

    return (x, w, b), of(ours), of(plain)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradcheck_and_gradgradcheck(shape):
    inputs, ours, _ = problem(*shape)
    assert gradcheck(ours, inputs)
    assert gradgradcheck(ours, inputs)


@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, False), (False, True, True), (False, True, False),
                                    (True, True, False), (False, False, True)])  # fmt: skip
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equal_to_torch_whatever_is_wanted(shape, wanted):
    def derivatives(inputs, operation):
        leaves = [t for t, w in zip(inputs, wanted, strict=True) if w]
        for t, w in zip(inputs, wanted, strict=True):
            t.requires_grad_(w)
        y = operation(*inputs)
        draws = torch.Generator().manual_seed(7)
        u = torch.randn(y.shape, dtype=y.dtype, generator=draws).requires_grad_()
        first = torch.autograd.grad(y.square() * u, leaves, torch.ones_like(y), create_graph=True)
        mixture = [torch.randn(g.shape, dtype=g.dtype, generator=draws) for g in first]
        second = torch.autograd.grad(first, [*leaves, u], mixture, allow_unused=True)
        return [y.detach(), *(g.detach() for g in first), *(s if s is not None else torch.zeros(1) for s in second)]

    inputs, ours, plain = problem(*shape)
    for a, b in zip(derivatives(inputs, ours), derivatives(inputs, plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_only_some_of_the_first_derivatives_are_derived_again():
    (x, w, b), ours, plain = problem(*SHAPES["colour"])
    for part in (0, 1, 2):
        found = []
        for operation in (ours, plain):
            y = operation(x, w, b)
            g = torch.ones_like(y).requires_grad_()
            first = torch.autograd.grad(y, (x, w, b), g, create_graph=True)[part]
            found.append(torch.autograd.grad(first.square().sum(), g)[0])
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_a_student_step_derives_no_weights_twice(monkeypatch):
    """By the images alone: of the weights only the first gradient is taken, and of the first layer's images only the last."""
    taken: list[tuple[int, tuple[bool, ...]]] = []
    original = convolution._derivatives

    def noting(g, x, w, padding, low, wanted):
        taken.append((x.shape[1], tuple(wanted)))
        return original(g, x, w, padding, low, wanted)

    monkeypatch.setattr(convolution, "_derivatives", noting)
    module = build(3, 16, 4, 8, 2, seed=0, purpose=("test",))
    student, start = Student(module), flat_parameters(module)
    target = start + 0.01
    phase = Phase(start, target, [Batch(torch.arange(5))], student.layout.span("all"))
    synthetic = SyntheticSet(torch.randn(5, 3, 16, 16), torch.randn(5, 4), torch.tensor(0.01))
    student.run(synthetic, phase, "keep")
    first, second = taken[:2], taken[2:]
    assert first == [(8, (True, True, True)), (3, (False, True, True))]
    assert sorted(second) == [(3, (True, False, False))] * 2 + [(8, (True, False, False))] * 2


def test_parameters_are_those_of_conv2d():
    torch.manual_seed(0)
    ours = Convolution(3, 5, 3, padding=1)
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 5, 3, padding=1)
    assert [n for n, _ in ours.named_parameters()] == ["weight", "bias"]
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))
    assert torch.equal(ours(torch.ones(2, 3, 6, 6)), plain(torch.ones(2, 3, 6, 6)))
