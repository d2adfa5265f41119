"""Triton's kernels of the block in Triton's interpreter, which works on a CPU's tensors.

test_compiled_gpu.py runs this file in a process whose environment has TRITON_INTERPRET=1 before Triton is imported.
"""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from lad_dist.models import block
from lad_dist.models import compiled_gpu as kernels
from lad_dist.models.block import NormReluPool, plain
from tests.support.blocks import SHAPES, check_equal, derivatives, forgotten, fused, inputs

BY_TORCH = (block._forward, block._backward, block._second)
__all__ = ["forgotten"]


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(block, "_kernels", lambda x: kernels)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_equals_torch_in_value_and_derivatives(shape, interpreted):
    check_equal(derivatives(fused, *inputs(*shape)), derivatives(plain, *inputs(*shape)), 1e-12)
    single = [t.float().detach().requires_grad_() for t in inputs(*shape)]
    check_equal(derivatives(fused, *single), derivatives(plain, *single), 1e-5)


@pytest.mark.parametrize("shape", [(1, 2, 4), (1, 1, 5)])
def test_derivatives_equal_finite_differences(shape, interpreted):
    assert gradcheck(fused, inputs(*shape), atol=1e-6)
    assert gradgradcheck(fused, inputs(*shape), atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (1, 2, 2, 7), (1, 1, 33, 65)])
def test_images_that_are_not_square(shape, interpreted):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    _, gamma, beta = inputs(1, shape[1], 2)
    check_equal(derivatives(fused, x, gamma, beta), derivatives(plain, x, gamma, beta), 1e-12)


def test_no_images(interpreted):
    assert NormReluPool(3)(torch.zeros(0, 3, 6, 6, requires_grad=True)).shape == (0, 3, 3, 3)


def test_what_is_not_a_number_is_not_hidden(interpreted):
    x, gamma, beta = inputs(2, 2, 4)
    with torch.no_grad():
        x[1, 0, 2, 3] = float("nan")
    y, by_x, *_ = derivatives(fused, x, gamma, beta)
    assert bool(y[1, 0].isnan().all() and by_x[1, 0].isnan().all() and y[0].isfinite().all())


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (3, 6)])
def test_right_kernels_are_trusted(size):
    assert kernels.check(torch.empty(0, 0, *size), BY_TORCH) is None


def test_wrong_ones_are_not(monkeypatch):
    planes = torch.empty(0, 0, 8, 8)
    second = kernels.second
    monkeypatch.setattr(kernels, "second", lambda *args: tuple(1.01 * t for t in second(*args)))
    assert "from torch's operations" in kernels.check(planes, BY_TORCH)
    monkeypatch.setattr(kernels, "second", lambda *args: tuple(t / 0 for t in second(*args)))
    assert "from torch's operations" in kernels.check(planes, BY_TORCH)
    assert "too large" in kernels.check(torch.empty(0, 0, 200, 200), BY_TORCH)


def test_what_fails_leaves_the_work_to_torch_and_one_line_says_so(forgotten, monkeypatch, caplog):
    def broken(*args):
        raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setattr(kernels, "forward", broken)
    for size in ((8, 8), (4, 4)):
        assert block._compiled_gpu(torch.device("cpu"), torch.float32, size) is None
    (record,) = caplog.records
    assert record.message.endswith("RuntimeError: no kernel image is available")
