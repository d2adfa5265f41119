"""What tests of the block between two convolutions share, whichever way it is computed."""

from __future__ import annotations

import pytest
import torch

from lad_dist.models import block
from lad_dist.models.block import NormReluPool

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


@pytest.fixture
def forgotten():
    """What is known about kernels is found out anew, in the test and after it."""
    kept = (block._compiled, block._compiled_gpu, block._warn)
    for each in kept:
        each.cache_clear()
    yield
    for each in kept:
        each.cache_clear()
