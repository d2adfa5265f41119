"""Norm, ReLU and pooling as one operation: equal to torch's own in value and both derivatives."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from lad_dist.models import block
from lad_dist.models.block import NormReluPool, plain

EPS = 1e-5
SHAPES = {  # B, C, H
    "even side": (3, 2, 6),
    "odd side": (2, 3, 5),
    "one channel": (2, 1, 4),
    "one image": (1, 2, 4),
    "side 2": (2, 2, 2),
    "side 3": (2, 2, 3),
}


def fused(x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    views = {"weight": gamma, "bias": beta}
    return torch.func.functional_call(NormReluPool(len(gamma), EPS), views, (x,))


def inputs(batch: int, channels: int, side: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    draws = torch.Generator().manual_seed(batch * 100 + channels * 10 + side)
    x = 2 * torch.randn(batch, channels, side, side, dtype=dtype, generator=draws) + 0.5
    gamma = torch.randn(channels, dtype=dtype, generator=draws)
    beta = 0.3 * torch.randn(channels, dtype=dtype, generator=draws)
    return tuple(t.requires_grad_() for t in (x, gamma, beta))


def derivatives(operation, x, gamma, beta, wanted=(True, True, True)) -> list[torch.Tensor]:
    """The value, the gradients by x, gamma and beta, and the gradients of a mixture of those by everything."""
    draws = torch.Generator().manual_seed(1)
    leaves = [t for t, w in zip((x, gamma, beta), wanted, strict=True) if w]
    for t, w in zip((x, gamma, beta), wanted, strict=True):
        t.requires_grad_(w)
    y = operation(x, gamma, beta)
    u = torch.randn(y.shape, dtype=y.dtype, generator=draws).requires_grad_()
    first = torch.autograd.grad(y, leaves, u, create_graph=True)
    mixture = [torch.randn(g.shape, dtype=g.dtype, generator=draws) for g in first]
    second = torch.autograd.grad(first, [*leaves, u], mixture, allow_unused=True)
    zero = [torch.zeros_like(t) if g is None else g for g, t in zip(second, [*leaves, u], strict=True)]
    return [y.detach(), *(g.detach() for g in first), *zero]


def check_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor], tolerance: float) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert bool(a.isfinite().all())
        assert float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


@pytest.fixture(params=[1, 2**18], ids=["a chunk per image", "one chunk"])
def chunks(request, monkeypatch):
    """Work on one image at a time, or on all at once."""
    monkeypatch.setattr(block, "CACHE_VALUES", request.param)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_equals_torch_in_value_and_derivatives(shape, chunks):
    check_equal(derivatives(fused, *inputs(*shape)), derivatives(plain, *inputs(*shape)), 1e-12)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_derivatives_equal_finite_differences(shape, chunks):
    assert gradcheck(fused, inputs(*shape), atol=1e-6)
    assert gradgradcheck(fused, inputs(*shape), atol=1e-5)


def test_unequal_chunks(monkeypatch):
    shape = (7, 2, 6)
    monkeypatch.setattr(block, "CACHE_VALUES", 3 * 2 * 6 * 6)  # three images, three, one
    assert [s.stop - s.start for s in block._chunks(inputs(*shape)[0])] == [3, 3, 1]
    check_equal(derivatives(fused, *inputs(*shape)), derivatives(plain, *inputs(*shape)), 1e-12)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, True), (True, True, False)])
def test_where_only_some_gradients_are_wanted(wanted):
    shape = (3, 2, 5)
    ours, theirs = (derivatives(f, *inputs(*shape), wanted) for f in (fused, plain))
    check_equal(ours, theirs, 1e-12)


def test_float32_agrees_to_its_rounding(chunks):
    shape = (4, 3, 9)
    ours = derivatives(fused, *inputs(*shape, dtype=torch.float32))
    check_equal(ours, derivatives(plain, *inputs(*shape, dtype=torch.float32)), 1e-5)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("after", [True, False])
def test_memory_layouts_that_are_not_contiguous(before, after):
    def transposed(operation):
        def call(x, gamma, beta):
            y = operation(x.transpose(2, 3) if before else x, gamma, beta)
            return y.square().transpose(1, 3) if after else y

        return call

    shape = (3, 2, 5)
    check_equal(derivatives(transposed(fused), *inputs(*shape)), derivatives(transposed(plain), *inputs(*shape)), 1e-12)


def test_channels_last():
    def last(operation):
        return lambda x, gamma, beta: operation(x.contiguous(memory_format=torch.channels_last), gamma, beta)

    shape = (3, 4, 6)
    check_equal(derivatives(last(fused), *inputs(*shape)), derivatives(last(plain), *inputs(*shape)), 1e-12)


def test_no_images():
    x = torch.zeros(0, 3, 6, 6, requires_grad=True)
    y = NormReluPool(3)(x)
    assert y.shape == (0, 3, 3, 3)
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert gradient.shape == x.shape
    (second,) = torch.autograd.grad(gradient.sum(), x, allow_unused=True, materialize_grads=True)
    assert second.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_of_one_grey_value_stay_finite(dtype):
    shape = (2, 2, 4)

    def constant() -> tuple[torch.Tensor, ...]:
        x, gamma, beta = inputs(*shape, dtype=dtype)
        return torch.full_like(x, 0.7).requires_grad_(), gamma, beta.detach().abs().requires_grad_()

    ours, theirs = derivatives(fused, *constant()), derivatives(plain, *constant())
    check_equal(ours[:4], theirs[:4], 1e-3 if dtype == torch.float32 else 1e-9)  # 1 / deviation is 316
    assert all(bool(t.isfinite().all()) for t in ours)


def test_the_switch_takes_torchs_operations():
    x = torch.randn(2, 3, 6, 6)
    ours, plainly = NormReluPool(3), NormReluPool(3, fused=False)
    assert type(ours(x).grad_fn).__name__ == "_ForwardBackward"
    assert type(plainly(x).grad_fn).__name__ == "AvgPool2DBackward0"
    torch.testing.assert_close(ours(x), plainly(x))
