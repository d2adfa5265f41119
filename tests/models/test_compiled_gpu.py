"""Triton's kernels of the block: in Triton's interpreter, compiled for cards that are not here, and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lad_dist.models import block
from lad_dist.models.block import plain
from tests.support.blocks import check_equal, fused, inputs

pytest.importorskip("triton", reason="Triton is made for Linux on x86-64")
ROOT = Path(__file__).parents[2]


def test_in_tritons_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/models/in_interpreter.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert done.returncode == 0 and " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-4000:]


@pytest.mark.parametrize("card", [80, 90], ids=["A100", "H100 and H200"])
@pytest.mark.parametrize("name", ["_forward", "_backward", "_second"])
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_they_compile_for_cards_that_are_not_here(card, name, dtype, monkeypatch):
    """Down to machine code; nothing but running it is left to the card."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lad_dist.models import compiled_gpu

    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # its default so far; left open, it warns that this will change
    kernel = getattr(compiled_gpu, name)
    sizes = ("channels", "height", "width")
    kinds = {n: "constexpr" if n.isupper() else "i32" if n in sizes else f"*{dtype}" for n in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=kinds, constexprs={"ROWS": 16, "COLUMNS": 16})
    assert triton.compile(source, target=GPUTarget("cuda", card, 32)).asm["cubin"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("side", [6, 7, 28, 32, 64])
def test_on_a_gpu(side):
    from lad_dist.models import compiled_gpu

    there = [t.detach().float().cuda().requires_grad_() for t in inputs(4, 3, side)]
    assert block._kernels(there[0]) is compiled_gpu
    x, gamma, beta = there

    def both(operation) -> list[torch.Tensor]:
        y = operation(x, gamma, beta)
        u = torch.linspace(-1, 1, y.numel(), device="cuda").view_as(y).requires_grad_()
        first = torch.autograd.grad(y, there, u, create_graph=True)
        second = torch.autograd.grad(first, [*there, u], [g.cos() for g in first], materialize_grads=True)
        return [y.detach(), *(g.detach() for g in first), *second]

    check_equal(both(fused), both(plain), 1e-4)
