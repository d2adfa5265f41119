"""Norm, ReLU and pooling as one operation: equal to torch's own in value and both derivatives."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from lad_dist.models import block, compiled
from lad_dist.models.block import NormReluPool, plain
from tests.support.blocks import SHAPES, check_equal, derivatives, forgotten, fused, inputs

__all__ = ["forgotten"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(params=[None, 1, 2**18], ids=["compiled", "torch, a chunk per image", "torch, one chunk"])
def way(request, monkeypatch):
    """Compiled, or by torch's operations, on one image at a time or on all at once."""
    if request.param is not None:
        monkeypatch.setattr(block, "_compiled", lambda: None)
        monkeypatch.setattr(block, "CACHE_VALUES", request.param)


def test_it_is_compiled_here():
    assert block._kernels(torch.zeros(1)) is compiled and block._kernels(torch.zeros(1, dtype=torch.bfloat16)) is None


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_equals_torch_in_value_and_derivatives(shape, way):
    check_equal(derivatives(fused, *inputs(*shape)), derivatives(plain, *inputs(*shape)), 1e-12)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_derivatives_equal_finite_differences(shape, way):
    assert gradcheck(fused, inputs(*shape), atol=1e-6)
    assert gradgradcheck(fused, inputs(*shape), atol=1e-5)


def test_unequal_chunks(monkeypatch):
    shape = (7, 2, 6)
    monkeypatch.setattr(block, "_compiled", lambda: None)
    monkeypatch.setattr(block, "CACHE_VALUES", 3 * 2 * 6 * 6)  # three images, three, one
    assert [s.stop - s.start for s in block._chunks(inputs(*shape)[0])] == [3, 3, 1]
    check_equal(derivatives(fused, *inputs(*shape)), derivatives(plain, *inputs(*shape)), 1e-12)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, True), (True, True, False)])
def test_where_only_some_gradients_are_wanted(wanted, way):
    shape = (3, 2, 5)
    ours, theirs = (derivatives(f, *inputs(*shape), wanted) for f in (fused, plain))
    check_equal(ours, theirs, 1e-12)


def test_float32_agrees_to_its_rounding(way):
    shape = (4, 3, 9)
    ours = derivatives(fused, *inputs(*shape, dtype=torch.float32))
    check_equal(ours, derivatives(plain, *inputs(*shape, dtype=torch.float32)), 1e-5)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("after", [True, False])
def test_memory_layouts_that_are_not_contiguous(before, after, way):
    def transposed(operation):
        def call(x, gamma, beta):
            y = operation(x.transpose(2, 3) if before else x, gamma, beta)
            return y.square().transpose(1, 3) if after else y

        return call

    shape = (3, 2, 5)
    check_equal(derivatives(transposed(fused), *inputs(*shape)), derivatives(transposed(plain), *inputs(*shape)), 1e-12)


def test_channels_last(way):
    def last(operation):
        return lambda x, gamma, beta: operation(x.contiguous(memory_format=torch.channels_last), gamma, beta)

    shape = (3, 4, 6)
    check_equal(derivatives(last(fused), *inputs(*shape)), derivatives(last(plain), *inputs(*shape)), 1e-12)


def test_no_images(way):
    x = torch.zeros(0, 3, 6, 6, requires_grad=True)
    y = NormReluPool(3)(x)
    assert y.shape == (0, 3, 3, 3)
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert gradient.shape == x.shape
    (second,) = torch.autograd.grad(gradient.sum(), x, allow_unused=True, materialize_grads=True)
    assert second.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_of_one_grey_value_stay_finite(dtype, way):
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
    assert type(ours(x).grad_fn).__name__ == "_BlockForwardBackward"
    assert type(plainly(x).grad_fn).__name__ == "AvgPool2DBackward0"
    torch.testing.assert_close(ours(x), plainly(x))


@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (2, 1, 8, 5), (1, 2, 2, 7)])
def test_images_that_are_not_square(shape, way):
    def rectangular() -> tuple[torch.Tensor, ...]:
        _, gamma, beta = inputs(1, shape[1], 2)
        x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        return x.requires_grad_(), gamma, beta

    check_equal(derivatives(fused, *rectangular()), derivatives(plain, *rectangular()), 1e-12)


def test_large_planes_in_float32(way):
    shape = (2, 2, 130)
    ours = derivatives(fused, *inputs(*shape, dtype=torch.float32))
    check_equal(ours, derivatives(plain, *inputs(*shape, dtype=torch.float32)), 2e-5)


def test_what_is_not_a_number_is_not_hidden(way):
    x, gamma, beta = inputs(2, 2, 4)
    with torch.no_grad():
        x[1, 0, 2, 3] = float("nan")
    y, by_x, *_ = derivatives(fused, x, gamma, beta)
    assert bool(y[1, 0].isnan().all() and by_x[1, 0].isnan().all())
    assert bool(y[0].isfinite().all() and y[1, 1].isfinite().all())


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_any_number_of_threads_gives_the_same_bits(threads, monkeypatch):
    monkeypatch.setattr(compiled, "_VALUES_AT_A_TIME", 200)  # many turns for each
    found = []
    for count in (1, 2, 3, 7):
        threads(count)
        found.append(derivatives(fused, *inputs(9, 5, 12, dtype=torch.float32)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_from_several_threads_of_python_at_a_time(threads):
    threads(2)
    expected = derivatives(fused, *inputs(40, 8, 30))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: derivatives(fused, *inputs(40, 8, 30)), range(12)))
    assert all(torch.equal(a, b) for each in found for a, b in zip(expected, each, strict=True))


def test_without_numba_torch_computes_it_and_one_line_says_so(forgotten, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "lad_dist.models.compiled", None)
    monkeypatch.delattr("lad_dist.models.compiled")
    shape = (3, 2, 6)
    check_equal(derivatives(fused, *inputs(*shape)), derivatives(plain, *inputs(*shape)), 1e-12)
    (record,) = caplog.records
    assert "by torch's operations" in record.message and "slower" in record.message


def test_with_another_openmp_torch_computes_it(forgotten, monkeypatch, caplog):
    def gone():
        raise OSError("libtorch_cpu.so: cannot open shared object file")

    monkeypatch.setattr(compiled, "team", gone)
    shape = (3, 2, 6)
    check_equal(derivatives(fused, *inputs(*shape)), derivatives(plain, *inputs(*shape)), 1e-12)
    assert "libtorch_cpu.so" in caplog.text


PROGRAM = """
import hashlib, sys
import torch
from tests.support.blocks import derivatives, fused, inputs
for dtype in sys.argv[1:]:
    found = derivatives(fused, *inputs(9, 5, 12, dtype=getattr(torch, dtype)))
    print(dtype, hashlib.sha256(b"".join(t.numpy().tobytes() for t in found)).hexdigest())
"""
BOTH = ("float32", "float64")


def run_with_cache(folder: Path, *dtypes: str) -> set[str]:
    """A digest of what a new process computes in each type, with kernels kept in ``folder``."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, *dtypes]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return set(done.stdout.splitlines())


@pytest.fixture(scope="module")
def bits(tmp_path_factory):
    """What a process computes that compiles everything."""
    return run_with_cache(tmp_path_factory.mktemp("kernels"), *BOTH)


def test_the_same_bits_whoever_compiled_and_in_whichever_order(bits, tmp_path):
    assert len(bits) == 2
    assert run_with_cache(tmp_path, *reversed(BOTH)) == bits  # compiled in another order
    assert run_with_cache(tmp_path, *BOTH) == bits  # found on disk
    assert run_with_cache(tmp_path, "float64") < bits


def test_damaged_kernels_on_disk_are_compiled_anew(bits, tmp_path):
    run_with_cache(tmp_path, "float32")
    files = [f for f in tmp_path.rglob("*") if f.suffix in (".nbi", ".nbc")]
    assert len(files) == 6
    for file in files:
        file.write_bytes(file.read_bytes()[:10])
    assert run_with_cache(tmp_path, "float32") < bits


def test_where_no_kernels_can_be_kept(bits, tmp_path):
    (tmp_path / "file").touch()
    assert run_with_cache(tmp_path / "file", "float32") < bits
