"""The block between two convolutions (``models/block.py``), compiled by Triton: ``models/compiled.py`` for GPUs.

One program computes one plane (one channel of one image), which it reads once. A plane is held as the four positions of
a pixel in its 2x2 pooling window, each an array of (rows, columns) windows, with masks where a side is odd. The
derivation is in ``models/block.py``. The kernels are used for a plane size only after their results on this GPU matched
torch's operations.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lad_dist.errors import first_line

LARGEST_SIDE = 128  # four quarters of a plane are held in registers
_TOLERANCE = 1e-3  # relative to the largest value; a wrong kernel differs by more, float32 rounding by far less


@triton.jit
def _windows(height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return (pixel of each window's corner, four masks of pixels inside the plane, index of each window once pooled).

    The last mask is that of whole windows.
    """
    p, q = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    top, bottom, left, right = 2 * p < height, 2 * p + 1 < height, 2 * q < width, 2 * q + 1 < width
    corner, place = 2 * p * width + 2 * q, p * (width // 2) + q
    return corner, top & left, top & right, bottom & left, bottom & right, place


@triton.jit
def _load(pointer, width, corner, m00, m01, m10, m11):
    """Load the four quarters of a plane, zero outside it."""
    a = tl.load(pointer + corner, mask=m00, other=0.0)
    b = tl.load(pointer + corner + 1, mask=m01, other=0.0)
    c = tl.load(pointer + corner + width, mask=m10, other=0.0)
    d = tl.load(pointer + corner + width + 1, mask=m11, other=0.0)
    return a, b, c, d


@triton.jit
def _store(pointer, width, corner, m00, m01, m10, m11, a, b, c, d):
    tl.store(pointer + corner, a, mask=m00)
    tl.store(pointer + corner + 1, b, mask=m01)
    tl.store(pointer + corner + width, c, mask=m10)
    tl.store(pointer + corner + width + 1, d, mask=m11)


@triton.jit
def _total(a, b, c, d):
    return tl.sum(tl.sum(a + b + c + d, axis=1), axis=0)


@triton.jit
def _forward(
    x, gamma, beta, eps, pooled, mean, rstd, channels, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    plane = tl.program_id(0).to(tl.int64)
    corner, m00, m01, m10, m11, place = _windows(height, width, ROWS, COLUMNS)
    a, b, c, d = _load(x + plane * height * width, width, corner, m00, m01, m10, m11)
    count = height * width
    m = _total(a, b, c, d) / count
    ca, cb, cc, cd = (
        tl.where(m00, a - m, 0.0),
        tl.where(m01, b - m, 0.0),
        tl.where(m10, c - m, 0.0),
        tl.where(m11, d - m, 0.0),
    )
    s = 1.0 / tl.sqrt(_total(ca * ca, cb * cb, cc * cc, cd * cd) / count + tl.load(eps))
    channel = plane % channels
    scale = s * tl.load(gamma + channel)
    shift = tl.load(beta + channel) - m * scale
    a, b, c, d = a * scale + shift, b * scale + shift, c * scale + shift, d * scale + shift
    a, b = tl.where(a <= 0, 0.0, a), tl.where(b <= 0, 0.0, b)  # NaN propagates, as in torch
    c, d = tl.where(c <= 0, 0.0, c), tl.where(d <= 0, 0.0, d)
    tl.store(pooled + plane * (height // 2) * (width // 2) + place, 0.25 * (a + b + c + d), mask=m11)
    tl.store(mean + plane, m)
    tl.store(rstd + plane, s)


@triton.jit
def _masked(u, a, b, c, d, scale, shift, place, m11):
    """Return g = unpool(u) [y > 0]: a quarter of u for each pixel of a whole window, zero elsewhere."""
    quarter = 0.25 * tl.load(u + place, mask=m11, other=0.0)
    ga, gb = tl.where(a * scale + shift <= 0, 0.0, quarter), tl.where(b * scale + shift <= 0, 0.0, quarter)
    gc, gd = tl.where(c * scale + shift <= 0, 0.0, quarter), tl.where(d * scale + shift <= 0, 0.0, quarter)
    return ga, gb, gc, gd


@triton.jit
def _backward(
    u, x, gamma, beta, mean, rstd, dx, dgamma, dbeta, channels, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    plane = tl.program_id(0).to(tl.int64)
    corner, m00, m01, m10, m11, place = _windows(height, width, ROWS, COLUMNS)
    a, b, c, d = _load(x + plane * height * width, width, corner, m00, m01, m10, m11)
    m, s, channel, count = tl.load(mean + plane), tl.load(rstd + plane), plane % channels, height * width
    scale = s * tl.load(gamma + channel)
    shift = tl.load(beta + channel) - m * scale
    ga, gb, gc, gd = _masked(u + plane * (height // 2) * (width // 2), a, b, c, d, scale, shift, place, m11)
    a, b, c, d = (a - m) * s, (b - m) * s, (c - m) * s, (d - m) * s  # z; outside the plane, g is zero
    sum_g, sum_gz = _total(ga, gb, gc, gd), _total(ga * a, gb * b, gc * c, gd * d)
    tl.store(dgamma + plane, sum_gz)
    tl.store(dbeta + plane, sum_g)
    m_g, m_gz = sum_g / count, sum_gz / count
    ga, gb = scale * (ga - m_g - a * m_gz), scale * (gb - m_g - b * m_gz)
    gc, gd = scale * (gc - m_g - c * m_gz), scale * (gd - m_g - d * m_gz)
    _store(dx + plane * count, width, corner, m00, m01, m10, m11, ga, gb, gc, gd)


@triton.jit
def _by_x(z, a, g, s, q_a, q_g, m_q, m_qz, k):
    return s * (q_a * a + q_g * g - m_q - m_qz * z) - k * z


@triton.jit
def _h(z, a, scale, m_a, m_az, gamma, beta, c, e):
    """Return h [y > 0]; y = gamma z + beta."""
    return tl.where(gamma * z + beta <= 0, 0.0, scale * (a - m_a - z * m_az) + c * z + e)


@triton.jit
def _second(
    a, c, e, u, x, gamma, beta, mean, rstd, by_u, by_x, by_gamma, channels, height, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(0).to(tl.int64)
    corner, m00, m01, m10, m11, place = _windows(height, width, ROWS, COLUMNS)
    channel, count, after = plane % channels, height * width, plane * (height // 2) * (width // 2)
    x0, x1, x2, x3 = _load(x + plane * count, width, corner, m00, m01, m10, m11)
    a0, a1, a2, a3 = _load(a + plane * count, width, corner, m00, m01, m10, m11)
    m, s, gamma_c, beta_c = (
        tl.load(mean + plane),
        tl.load(rstd + plane),
        tl.load(gamma + channel),
        tl.load(beta + channel),
    )
    scale = s * gamma_c
    g0, g1, g2, g3 = _masked(u + after, x0, x1, x2, x3, scale, beta_c - m * scale, place, m11)
    x0, x1, x2, x3 = (
        (x0 - m) * s,
        (x1 - m) * s,
        (x2 - m) * s,
        (x3 - m) * s,
    )  # z; outside the plane, a and g are zero
    m_a, m_g = _total(a0, a1, a2, a3) / count, _total(g0, g1, g2, g3) / count
    m_az, m_gz = _total(a0 * x0, a1 * x1, a2 * x2, a3 * x3) / count, _total(g0 * x0, g1 * x1, g2 * x2, g3 * x3) / count
    inner = _total(a0 * g0, a1 * g1, a2 * g2, a3 * g3) / count - m_a * m_g - m_az * m_gz  # k = N gamma inner
    tl.store(by_gamma + plane, count * s * inner)
    c_c, e_c = tl.load(c + channel), tl.load(e + channel)
    q_a, q_g = -scale * m_gz, c_c - scale * m_az  # q = q_a a + q_g g
    m_q, m_qz, k = q_a * m_a + q_g * m_g, q_a * m_az + q_g * m_gz, gamma_c * inner * s * s
    r0, r1 = _by_x(x0, a0, g0, s, q_a, q_g, m_q, m_qz, k), _by_x(x1, a1, g1, s, q_a, q_g, m_q, m_qz, k)
    r2, r3 = _by_x(x2, a2, g2, s, q_a, q_g, m_q, m_qz, k), _by_x(x3, a3, g3, s, q_a, q_g, m_q, m_qz, k)
    _store(by_x + plane * count, width, corner, m00, m01, m10, m11, r0, r1, r2, r3)
    h0, h1 = (
        _h(x0, a0, scale, m_a, m_az, gamma_c, beta_c, c_c, e_c),
        _h(x1, a1, scale, m_a, m_az, gamma_c, beta_c, c_c, e_c),
    )
    h2, h3 = (
        _h(x2, a2, scale, m_a, m_az, gamma_c, beta_c, c_c, e_c),
        _h(x3, a3, scale, m_a, m_az, gamma_c, beta_c, c_c, e_c),
    )
    tl.store(by_u + after + place, 0.25 * (h0 + h1 + h2 + h3), mask=m11)


def forward(x_BCHH: Tensor, gamma_C: Tensor, beta_C: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """As ``compiled.forward``."""
    batch, channels, height, width = x_BCHH.shape
    pooled = x_BCHH.new_empty(batch, channels, height // 2, width // 2)
    mean, rstd = (x_BCHH.new_empty(batch, channels, 1, 1) for _ in range(2))
    _run(_forward, x_BCHH, x_BCHH, gamma_C, beta_C, _value(eps, x_BCHH.dtype, x_BCHH.device), pooled, mean, rstd)
    return pooled, mean, rstd


def backward(
    u_BChh: Tensor, x_BCHH: Tensor, gamma_C: Tensor, beta_C: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``compiled.backward``."""
    dx = torch.empty_like(x_BCHH)
    dgamma, dbeta = (x_BCHH.new_empty(x_BCHH.shape[:2]) for _ in range(2))
    _run(_backward, x_BCHH, u_BChh, x_BCHH, gamma_C, beta_C, mean, rstd, dx, dgamma, dbeta)
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
    """As ``compiled.second``."""
    by_u, by_x, by_gamma = torch.empty_like(u_BChh), torch.empty_like(x_BCHH), x_BCHH.new_empty(x_BCHH.shape[:2])
    tensors = (a_BCHH, c_C, e_C, u_BChh, x_BCHH, gamma_C, beta_C, mean, rstd, by_u, by_x, by_gamma)
    _run(_second, x_BCHH, *tensors)
    return by_u, by_x, by_gamma.sum(dim=0)


def _run(kernel: Any, x_BCHH: Tensor, *tensors: Tensor) -> None:
    """Run a kernel over the planes of ``x_BCHH``, on its device."""
    batch, channels, height, width = x_BCHH.shape
    sides = (triton.next_power_of_2((height + 1) // 2), triton.next_power_of_2((width + 1) // 2))
    windows = sides[0] * sides[1]
    where = torch.cuda.device(x_BCHH.device) if x_BCHH.is_cuda else contextlib.nullcontext()
    if batch * channels:
        with where:
            held = [t.contiguous() for t in tensors]
            warps = 1 if windows <= 64 else 4 if windows <= 1024 else 16
            kernel[(batch * channels,)](
                *held, channels, height, width, ROWS=sides[0], COLUMNS=sides[1], num_warps=warps
            )


@functools.lru_cache(maxsize=64)
def _value(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return one value as a tensor on the device: as a kernel argument it would be rounded to float32."""
    return torch.tensor([value], dtype=dtype, device=device)


def check(x_BCHH: Tensor, by_torch: tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]) -> str | None:
    """Return why these kernels cannot be used for planes of this size, type and device, or None. Waits for the device.

    ``by_torch``: the same three functions in torch operations; its ``backward`` takes ``wanted`` as a further argument.
    """
    height, width = x_BCHH.shape[2:]
    if max(height, width) > LARGEST_SIDE:
        return f"planes of {height}x{width} are too large"
    like: dict[str, Any] = {"dtype": x_BCHH.dtype, "device": x_BCHH.device}
    x, a = (
        torch.linspace(-1, 1, 6 * height * width, **like).mul(f).sin().view(2, 3, height, width) for f in (31.0, 47.0)
    )
    gamma, beta, c, e = (torch.linspace(low, 1, 3, **like) for low in (-1.0, 0.2, -0.7, 0.5))
    u = torch.linspace(-1, 2, 6 * (height // 2) * (width // 2), **like).view(2, 3, height // 2, width // 2)
    try:
        pooled, mean, rstd = forward(x, gamma, beta, 1e-5)
        what = (u, x, gamma, beta, mean, rstd)
        ours = (pooled, mean, rstd, *backward(*what), *second(a, c, e, *what))
        first, back, twice = by_torch
        theirs = (*first(x, gamma, beta, 1e-5), *back(*what, (True, True)), *twice(a, c, e, *what))
        far = max(float((o - t).abs().max() / t.abs().max().clamp(min=1e-6)) for o, t in zip(ours, theirs, strict=True))
    except Exception as error:  # Triton, its compiler and the driver each raise their own types
        return f"{type(error).__name__}: {first_line(error)}"
    return None if far <= _TOLERANCE else f"they are {far:.1e} from torch's operations"
