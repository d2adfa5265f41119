"""The block between two convolutions (``models/block.py``), compiled by numba: one pass over memory per derivative.

Each plane (one channel of one image) stays in the L1 cache while it is processed: first its sums, then its results. The
derivation is in ``models/block.py``. Planes are distributed in small groups to the threads of torch's own pool; a
plane's results do not depend on the thread that computes them, so any number of threads gives the same bits.

``data`` of a kernel is an array of 64-bit integers: a counter of the planes handed out, the number of planes per group,
the numbers of images, channels, rows and columns, then the addresses of the tensors in the order of the kernel's first
line.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic
from torch import Tensor

_FAST = {"reassoc", "contract", "nsz", "arcp"}  # sums in any order; NaN and Inf are preserved
_OPTIONS: dict[str, Any] = {"fastmath": _FAST, "error_model": "numpy", "boundscheck": False}
# Each kernel is compiled as one function. If kernels called others, a process that compiles and one that loads kernels
# from disk would run differently optimised copies of the callees, whose sums differ in the last bits.
_INLINED: dict[str, Any] = {"inline": "always", **_OPTIONS}
_ENTRY = types.void(types.CPointer(types.int64))
_HEAD = 6  # integers before the addresses
_VALUES_AT_A_TIME = 2**15  # about ten microseconds of work


@intrinsic
def _take(typing: Any, counter: Any, amount: Any) -> Any:
    """Atomically add to the first integer of an array and return its previous value."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", args[0], args[1], "monotonic")

    return types.int64(types.CPointer(types.int64), types.int64), build


@intrinsic
def _at(typing: Any, address: Any, like: Any) -> Any:
    """Return a pointer to values of the type of ``like``."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(types.int64, like), build


@njit(**_INLINED)
def _forward(data: Any, zero: Any) -> None:
    d = carray(data, _HEAD + 7)  # x, gamma, beta, eps (one value); pooled, mean, rstd
    amount, channels, height, width = d[1], d[3], d[4], d[5]
    planes, half, columns, count = d[2] * channels, height // 2, width // 2, height * width
    x = carray(_at(d[6], zero), (planes, height, width))
    gamma, beta, eps = carray(_at(d[7], zero), channels), carray(_at(d[8], zero), channels), carray(_at(d[9], zero), 1)
    pooled = carray(_at(d[10], zero), (planes, half, columns))
    mean, rstd = carray(_at(d[11], zero), planes), carray(_at(d[12], zero), planes)
    kind = x.dtype.type
    n, one, quarter = kind(count), kind(1), kind(0.25)
    row = np.empty(width, x.dtype)
    start = _take(data, amount)
    while start < planes:
        for i in range(start, min(start + amount, planes)):
            plane = x[i].ravel()
            total = zero
            for j in range(count):
                total += plane[j]
            m = total / n
            squares = zero
            for j in range(count):
                squares += (plane[j] - m) * (plane[j] - m)
            s = one / np.sqrt(squares / n + eps[0])
            mean[i], rstd[i] = m, s
            scale = s * gamma[i % channels]
            shift = beta[i % channels] - m * scale
            for p in range(half):
                above, below, out = x[i, 2 * p], x[i, 2 * p + 1], pooled[i, p]
                for j in range(width):
                    y0, y1 = above[j] * scale + shift, below[j] * scale + shift
                    row[j] = (zero if y0 <= zero else y0) + (zero if y1 <= zero else y1)  # NaN propagates
                for j in range(columns):
                    out[j] = quarter * (row[2 * j] + row[2 * j + 1])
        start = _take(data, amount)


@njit(**_INLINED)
def _masked(u: Any, x: Any, scale: Any, shift: Any, row: Any, g: Any) -> None:
    """Compute g = unpool(u) [y > 0] of one plane; unpooled parts of ``g`` and the end of ``row`` must be zero."""
    zero, quarter = x.dtype.type(0), x.dtype.type(0.25)
    for p in range(u.shape[0]):
        for j in range(u.shape[1]):
            row[2 * j] = u[p, j] * quarter
            row[2 * j + 1] = u[p, j] * quarter
        for side in range(2):
            values, out = x[2 * p + side], g[2 * p + side]
            for j in range(values.shape[0]):
                out[j] = zero if values[j] * scale + shift <= zero else row[j]


@njit(**_INLINED)
def _backward(data: Any, zero: Any) -> None:
    d = carray(data, _HEAD + 9)  # u, x, gamma, beta, mean, rstd; dx, and dgamma and dbeta of every plane
    amount, channels, height, width = d[1], d[3], d[4], d[5]
    planes, count = d[2] * channels, height * width
    u = carray(_at(d[6], zero), (planes, height // 2, width // 2))
    x, dx = carray(_at(d[7], zero), (planes, height, width)), carray(_at(d[12], zero), (planes, count))
    gamma, beta = carray(_at(d[8], zero), channels), carray(_at(d[9], zero), channels)
    mean, rstd = carray(_at(d[10], zero), planes), carray(_at(d[11], zero), planes)
    dgamma, dbeta = carray(_at(d[13], zero), planes), carray(_at(d[14], zero), planes)
    n = x.dtype.type(count)
    row, masked = np.zeros(width, x.dtype), np.zeros((height, width), x.dtype)
    g = masked.ravel()
    start = _take(data, amount)
    while start < planes:
        for i in range(start, min(start + amount, planes)):
            m, s = mean[i], rstd[i]
            scale = s * gamma[i % channels]
            _masked(u[i], x[i], scale, beta[i % channels] - m * scale, row, masked)
            plane, out = x[i].ravel(), dx[i]
            sum_g, sum_gz = zero, zero
            for j in range(count):
                sum_g += g[j]
                sum_gz += g[j] * ((plane[j] - m) * s)
            dgamma[i], dbeta[i] = sum_gz, sum_g
            m_g, m_gz = sum_g / n, sum_gz / n
            for j in range(count):
                out[j] = scale * (g[j] - m_g - (plane[j] - m) * s * m_gz)
        start = _take(data, amount)


@njit(**_INLINED)
def _second(data: Any, zero: Any) -> None:
    d = carray(data, _HEAD + 12)  # a, c, e, u, x, gamma, beta, mean, rstd; by u, by x, and by gamma of every plane
    amount, channels, height, width = d[1], d[3], d[4], d[5]
    planes, half, columns, count = d[2] * channels, height // 2, width // 2, height * width
    u, by_u = carray(_at(d[9], zero), (planes, half, columns)), carray(_at(d[15], zero), (planes, half, columns))
    x, a_all = carray(_at(d[10], zero), (planes, height, width)), carray(_at(d[6], zero), (planes, count))
    c_all, e_all = carray(_at(d[7], zero), channels), carray(_at(d[8], zero), channels)
    gamma_all, beta = carray(_at(d[11], zero), channels), carray(_at(d[12], zero), channels)
    mean, rstd = carray(_at(d[13], zero), planes), carray(_at(d[14], zero), planes)
    by_x, by_gamma = carray(_at(d[16], zero), (planes, count)), carray(_at(d[17], zero), planes)
    n, quarter = x.dtype.type(count), x.dtype.type(0.25)
    row, masked, spare = (
        np.zeros(width, x.dtype),
        np.zeros((height, width), x.dtype),
        np.empty((height, width), x.dtype),
    )
    g, h = masked.ravel(), spare.ravel()
    start = _take(data, amount)
    while start < planes:
        for i in range(start, min(start + amount, planes)):
            m, s, gamma = mean[i], rstd[i], gamma_all[i % channels]
            c, e = c_all[i % channels], e_all[i % channels]
            scale = s * gamma
            shift = beta[i % channels] - m * scale
            _masked(u[i], x[i], scale, shift, row, masked)
            plane, a, out = x[i].ravel(), a_all[i], by_x[i]
            m_a, m_g, m_az, m_ag, m_gz = zero, zero, zero, zero, zero
            for j in range(count):
                z = (plane[j] - m) * s
                m_a += a[j]
                m_g += g[j]
                m_az += a[j] * z
                m_ag += a[j] * g[j]
                m_gz += g[j] * z
            m_a, m_g, m_az, m_ag, m_gz = m_a / n, m_g / n, m_az / n, m_ag / n, m_gz / n
            inner = m_ag - m_a * m_g - m_az * m_gz  # k = N gamma inner
            by_gamma[i] = n * s * inner
            q_a, q_g = -scale * m_gz, c - scale * m_az  # q = q_a a + q_g g
            m_q, m_qz = q_a * m_a + q_g * m_g, q_a * m_az + q_g * m_gz
            for j in range(count):
                z = (plane[j] - m) * s
                out[j] = s * (q_a * a[j] + q_g * g[j] - m_q - m_qz * z) - gamma * inner * s * s * z
                value = scale * (a[j] - m_a - z * m_az) + c * z + e
                h[j] = zero if plane[j] * scale + shift <= zero else value
            for p in range(half):
                above, below, pooled = spare[2 * p], spare[2 * p + 1], by_u[i, p]
                for j in range(width):
                    row[j] = above[j] + below[j]
                for j in range(columns):
                    pooled[j] = quarter * (row[2 * j] + row[2 * j + 1])
                row[width - 1] = zero
        start = _take(data, amount)


def _forward_float32(data: Any) -> None:
    _forward(data, np.float32(0))


def _forward_float64(data: Any) -> None:
    _forward(data, np.float64(0))


def _backward_float32(data: Any) -> None:
    _backward(data, np.float32(0))


def _backward_float64(data: Any) -> None:
    _backward(data, np.float64(0))


def _second_float32(data: Any) -> None:
    _second(data, np.float32(0))


def _second_float64(data: Any) -> None:
    _second(data, np.float64(0))


_ENTRIES: dict[torch.dtype, dict[str, Callable[[Any], None]]] = {
    torch.float32: {"forward": _forward_float32, "backward": _backward_float32, "second": _second_float32},
    torch.float64: {"forward": _forward_float64, "backward": _backward_float64, "second": _second_float64},
}
_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_held: list[Any] = []  # owners of the machine code of the kernels in use


def forward(x_BCHH: Tensor, gamma_C: Tensor, beta_C: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (pooled (B, C, h, h), mean, 1 / standard deviation), the last two of shape (B, C, 1, 1)."""
    batch, channels, height, width = x_BCHH.shape
    pooled = x_BCHH.new_empty(batch, channels, height // 2, width // 2)
    mean, rstd = (x_BCHH.new_empty(batch, channels, 1, 1) for _ in range(2))
    _run("forward", x_BCHH, x_BCHH, gamma_C, beta_C, x_BCHH.new_tensor([eps]), pooled, mean, rstd)
    return pooled, mean, rstd


def backward(
    u_BChh: Tensor, x_BCHH: Tensor, gamma_C: Tensor, beta_C: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx, dgamma (C,), dbeta (C,))."""
    dx = torch.empty_like(x_BCHH)
    dgamma, dbeta = (x_BCHH.new_empty(x_BCHH.shape[:2]) for _ in range(2))
    _run("backward", x_BCHH, u_BChh, x_BCHH, gamma_C, beta_C, mean, rstd, dx, dgamma, dbeta)
    return dx, dgamma.sum(dim=0), dbeta.sum(dim=0)


def second(
    a_BCHH: Tensor,
    c_C: Tensor,
    e_C: Tensor,
    u_BChh: Tensor,
    x_BCHH: Tensor,
    gamma_C: Tensor,
    beta_C: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the derivatives by (u, x, gamma) from the cotangents a of dx, c of dgamma and e of dbeta."""
    by_u, by_x, by_gamma = torch.empty_like(u_BChh), torch.empty_like(x_BCHH), x_BCHH.new_empty(x_BCHH.shape[:2])
    tensors = (a_BCHH, c_C, e_C, u_BChh, x_BCHH, gamma_C, beta_C, mean, rstd, by_u, by_x, by_gamma)
    _run("second", x_BCHH, *tensors)
    return by_u, by_x, by_gamma.sum(dim=0)


def _run(name: str, x_BCHH: Tensor, *tensors: Tensor) -> None:
    """Run a kernel over the planes of ``x_BCHH``; all tensors are on the CPU, of one type."""
    held = [t.contiguous() for t in tensors]  # outputs are newly allocated, so contiguous
    batch, channels, height, width = x_BCHH.shape
    amount = max(1, _VALUES_AT_A_TIME // max(1, height * width))
    data = (ctypes.c_int64 * (_HEAD + len(held)))(
        0, amount, batch, channels, height, width, *(t.data_ptr() for t in held)
    )
    kernel, threads = _kernel(name, x_BCHH.dtype), min(torch.get_num_threads(), -(-batch * channels // amount))
    if threads > 1:
        team()(kernel, ctypes.byref(data), threads, 0)
    elif threads:
        kernel(data)


@functools.cache
def _kernel(name: str, dtype: torch.dtype) -> Any:
    """Return the compiled kernel, cached on disk by numba if possible: compiling takes about a second."""
    entry = _ENTRIES[dtype][name]
    try:
        compiled = cfunc(_ENTRY, cache=True, **_OPTIONS)(entry)
    except Exception:  # no cache folder, or its contents are damaged
        compiled = cfunc(_ENTRY, **_OPTIONS)(entry)
    _held.append(compiled)
    return _FUNCTION(compiled.address)


@functools.cache
def team() -> Any:
    """Return a function that runs a kernel on each thread of torch's own pool: ``team()(kernel, data, threads, 0)``.

    With a second pool, the threads of the two would compete for the same cores.

    Raises:
        OSError: torch's OpenMP library cannot be found.
        AttributeError: the library lacks the entry.
    """
    folder = Path(torch.__file__).parent / "lib"
    library = ctypes.CDLL(str(folder / "libtorch_cpu.so"))  # symbols are also looked up in its dependencies
    run = library.GOMP_parallel
    run.restype, run.argtypes = None, (_FUNCTION, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    return run
