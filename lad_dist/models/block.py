"""Instance norm, ReLU and 2x2 average pooling as one operation with hand-written first and second derivatives.

Between two convolutions the network is memory-bound, and autograd's second derivative of GroupNorm decomposes into
dozens of passes over the largest tensors. Here each derivative is written out. ``models/compiled.py`` evaluates it on a
CPU and ``models/compiled_gpu.py`` on a GPU. Where they are unavailable torch operations do, on a CPU for a few images
at a time so that intermediate results stay in cache. ``plain`` is the same operation composed of torch's own.

Derivation, for one image and channel with N = H*H pixels, m() the mean over them, s = (var + eps)^(-1/2), z = (x -
m(x)) s:

    forward     y = gamma z + beta,  r = max(y, 0),  p = pool(r)
    backward    from u = dL/dp:  g = unpool(u) [y > 0]  (unpool spreads a quarter of u over each 2x2 window)
                dbeta = sum g,  dgamma = sum g z,  dx = gamma s (g - m(g) - z m(g z))
    second      from the cotangents a of dx, c of dgamma, e of dbeta, the scalar
                phi = N gamma s (m(a g) - m(a) m(g) - m(a z) m(g z)) + N c m(g z) + N e m(g)
                has the derivatives
                by g      h = gamma s (a - m(a) - z m(a z)) + c z + e,   so by u: pool(h [y > 0])
                by gamma  N s (m(a g) - m(a) m(g) - m(a z) m(g z))
                by z      q = -gamma s (m(g z) a + m(a z) g) + c g
                by s      k = N gamma (m(a g) - m(a) m(g) - m(a z) m(g z)),  where ds/dx = -s^2 z / N
                by x      s (q - m(q) - z m(q z)) - k s^2 z / N
    The ReLU's own second derivative is zero wherever it exists, as in torch.

Shapes: B images, C channels, H side before pooling, h = H // 2 after it; an odd last row or column is dropped by the
pooling.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lad_dist.models.needs_grad import needs_grad

CACHE_VALUES = 2**19  # values of one tensor processed at a time on a CPU; 2 MiB in float32
_aten = torch.ops.aten
_log = logging.getLogger(__name__)


class NormReluPool(nn.Module):
    """Instance norm with learned scale and shift, ReLU, and 2x2 average pooling.

    From (B, C, H, H) to (B, C, H // 2, H // 2). ``fused`` False uses ``plain``, which is equal up to rounding, for
    comparison.
    """

    def __init__(self, channels: int, eps: float = 1e-5, fused: bool = True) -> None:
        super().__init__()
        self.eps, self.fused = eps, fused
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BCHH: Tensor) -> Tensor:
        if not self.fused:
            return plain(x_BCHH, self.weight, self.bias, self.eps)
        out: Tensor = _BlockForward.apply(x_BCHH.contiguous(), self.weight, self.bias, self.eps)  # type: ignore[no-untyped-call]
        return out


def plain(x_BCHH: Tensor, gamma_C: Tensor, beta_C: Tensor, eps: float = 1e-5) -> Tensor:
    """Compute the same with torch's own operations: the reference of tests and benchmarks."""
    return F.avg_pool2d(F.relu(F.group_norm(x_BCHH, x_BCHH.shape[1], gamma_C, beta_C, eps)), 2)


class _BlockForward(torch.autograd.Function):
    """Requires contiguous images: a copy made in here would be saved, and no second derivative reaches a copy."""

    @staticmethod
    def forward(ctx: Any, x_BCHH: Tensor, gamma_C: Tensor, beta_C: Tensor, eps: float) -> Tensor:
        kernels = _kernels(x_BCHH)
        forward = _forward if kernels is None else kernels.forward
        pooled, mean, rstd = forward(x_BCHH, gamma_C, beta_C, eps)
        ctx.save_for_backward(x_BCHH, gamma_C, beta_C, mean, rstd)
        return pooled

    @staticmethod
    def backward(ctx: Any, u_BChh: Tensor) -> tuple[Tensor | None, ...]:
        wanted = needs_grad(ctx)[1:]  # gamma and beta; earlier layers always need dx
        dx, dgamma, dbeta = _BlockBackward.apply(u_BChh.contiguous(), *ctx.saved_tensors, wanted)  # type: ignore[no-untyped-call]
        return dx, dgamma, dbeta, None


class _BlockBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u_BChh: Tensor,
        x_BCHH: Tensor,
        gamma_C: Tensor,
        beta_C: Tensor,
        mean: Tensor,
        rstd: Tensor,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        what, kernels = (u_BChh, x_BCHH, gamma_C, beta_C, mean, rstd), _kernels(x_BCHH)
        dx, dgamma, dbeta = _backward(*what, wanted) if kernels is None else kernels.backward(*what)
        ctx.save_for_backward(*what)
        return dx, dgamma, dbeta

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, a_BCHH: Tensor, c_C: Tensor, e_C: Tensor) -> tuple[Tensor | None, ...]:
        kernels = _kernels(a_BCHH)
        second = _second if kernels is None else kernels.second
        by_u, by_x, by_gamma = second(a_BCHH.contiguous(), c_C, e_C, *ctx.saved_tensors)
        return by_u, by_x, by_gamma, None, None, None, None


def _kernels(x_BCHH: Tensor) -> ModuleType | None:
    """Return the compiled module for tensors like ``x_BCHH``, or None for this file's functions."""
    device = x_BCHH.device
    if device.type not in ("cpu", "cuda") or x_BCHH.dtype not in (torch.float32, torch.float64):
        return None
    return _compiled() if device.type == "cpu" else _compiled_gpu(device, x_BCHH.dtype, tuple(x_BCHH.shape[2:]))


@functools.cache
def _compiled() -> ModuleType | None:
    """Return ``models/compiled.py``; None, with a warning, if it cannot run: then this file's functions are used."""
    try:
        from lad_dist.models import compiled

        compiled.team()
    except (ImportError, OSError, AttributeError) as error:
        _warn("cpu", str(error))
        return None
    return compiled


@functools.cache
def _compiled_gpu(device: torch.device, dtype: torch.dtype, size: tuple[int, ...]) -> ModuleType | None:
    """Return ``models/compiled_gpu.py``; None, with a warning, if it cannot run or its results differ from these."""
    try:
        from lad_dist.models import compiled_gpu
    except ImportError as error:
        _warn(device.type, str(error))
        return None
    with torch.no_grad():
        against = compiled_gpu.check(
            torch.empty(0, 0, *size, dtype=dtype, device=device), (_forward, _backward, _second)
        )
    if against is not None:
        _warn(device.type, against)
    return compiled_gpu if against is None else None


@functools.cache
def _warn(device: str, reason: str) -> None:
    """Log once why torch's operations are used."""
    _log.warning("norm, ReLU and pooling by torch's operations, slower than compiled (%s): %s", device, reason)


def _forward(x_BCHH: Tensor, gamma_C: Tensor, beta_C: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (pooled, mean, 1 / standard deviation), as ``compiled.forward``."""
    batch, channels, height, width = x_BCHH.shape
    pooled = x_BCHH.new_empty(batch, channels, height // 2, width // 2)
    mean = x_BCHH.new_empty(batch, channels, 1, 1)
    rstd = torch.empty_like(mean)
    for rows in _chunks(x_BCHH):
        y, mean[rows], rstd[rows] = _group_norm(x_BCHH[rows], gamma_C, beta_C, eps)
        pooled[rows] = _pool(y.relu_())
    return pooled, mean, rstd


def _backward(
    u_BChh: Tensor,
    x_BCHH: Tensor,
    gamma_C: Tensor,
    beta_C: Tensor,
    mean: Tensor,
    rstd: Tensor,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx, dgamma, dbeta), as ``compiled.backward``; zeros for dgamma or dbeta if not ``wanted``."""
    dx = torch.empty_like(x_BCHH)
    dgamma, dbeta = torch.zeros_like(gamma_C), torch.zeros_like(beta_C)
    channels, pixels = x_BCHH.shape[1], x_BCHH.shape[2] * x_BCHH.shape[3]
    for rows in _chunks(x_BCHH):
        x, s = x_BCHH[rows], rstd[rows]
        scale = s * gamma_C.view(1, -1, 1, 1)
        y = torch.addcmul(beta_C.view(1, -1, 1, 1) - mean[rows] * scale, x, scale)
        g = _masked(u_BChh[rows], y)
        shape = (len(x), channels, pixels, channels)
        dx[rows], dgamma_part, dbeta_part = _aten.native_group_norm_backward(
            g, x, mean[rows].flatten(1), s.flatten(1), gamma_C, *shape, [True, *wanted]
        )
        if wanted[0]:
            dgamma += dgamma_part
        if wanted[1]:
            dbeta += dbeta_part
    return dx, dgamma, dbeta


def _second(
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
    """Return the derivatives by (u, x, gamma) from the cotangents of dx, dgamma and dbeta, as ``compiled.second``."""
    count = x_BCHH.shape[2] * x_BCHH.shape[3]
    by_u, by_x, by_gamma = torch.empty_like(u_BChh), torch.empty_like(x_BCHH), torch.zeros_like(gamma_C)
    c, e, gamma = c_C.view(1, -1, 1, 1), e_C.view(1, -1, 1, 1), gamma_C.view(1, -1, 1, 1)
    for rows in _chunks(x_BCHH):
        a, s = a_BCHH[rows], rstd[rows]
        z = torch.addcmul(-mean[rows] * s, x_BCHH[rows], s)
        y = torch.addcmul(beta_C.view(1, -1, 1, 1), z, gamma)
        g = _masked(u_BChh[rows], y)
        m_a, m_g = a.mean(dim=(2, 3), keepdim=True), g.mean(dim=(2, 3), keepdim=True)
        m_az, m_ag, m_gz = _dot(a, z) / count, _dot(a, g) / count, _dot(g, z) / count
        scale = gamma * s
        h = torch.addcmul(e - scale * m_a, z, c - scale * m_az).addcmul_(a, scale)
        by_u[rows] = _pool(_aten.threshold_backward(h, y, 0))
        inner = m_ag - m_a * m_g - m_az * m_gz  # k = N gamma inner
        q_a, q_g = -scale * m_gz, c - scale * m_az  # q = q_a a + q_g g
        m_q, m_qz = q_a * m_a + q_g * m_g, q_a * m_az + q_g * m_gz
        out = torch.addcmul(-s * m_q, z, -s * m_qz - gamma * inner * s.square(), out=by_x[rows])
        out.addcmul_(a, s * q_a).addcmul_(g, s * q_g)
        by_gamma += (s * inner).sum(dim=(0, 2, 3)) * count
    return by_u, by_x, by_gamma


def _chunks(x_BCHH: Tensor) -> list[slice]:
    """Return slices of the batch: one for all of it on a GPU, cache-sized ones on a CPU."""
    batch = len(x_BCHH)
    step = batch if x_BCHH.is_cuda else max(1, CACHE_VALUES // max(1, x_BCHH[0].numel())) if batch else 1
    return [slice(i, min(i + step, batch)) for i in range(0, batch, max(step, 1))]


def _group_norm(x: Tensor, gamma_C: Tensor, beta_C: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the instance norm of a chunk: (y, mean, 1 / standard deviation), the last two of shape (B, C, 1, 1)."""
    batch, channels, height, width = x.shape
    y, mean, rstd = torch.native_group_norm(x, gamma_C, beta_C, batch, channels, height * width, channels, eps)
    return y, mean.view(batch, channels, 1, 1), rstd.view(batch, channels, 1, 1)


def _pool(y_BCHW: Tensor) -> Tensor:
    """2x2 average pooling: rows by addition, columns by a matrix product, which is vectorised, unlike avg_pool2d."""
    half = y_BCHW.shape[2] // 2
    rows_BChW = y_BCHW[:, :, 0 : 2 * half : 2] + y_BCHW[:, :, 1 : 2 * half : 2]
    return rows_BChW @ _columns(y_BCHW.shape[3], y_BCHW.dtype, y_BCHW.device)


def _masked(u_BChw: Tensor, y_BCHW: Tensor) -> Tensor:
    """Return g = unpool(u) [y > 0] of a chunk."""
    batch, channels, height, width = y_BCHW.shape
    half = height // 2
    spread_BChW = u_BChw @ _columns(width, y_BCHW.dtype, y_BCHW.device).T
    g_BCHW = torch.empty_like(y_BCHW)
    if height % 2:
        g_BCHW[:, :, -1] = 0
    pairs = (batch, channels, half, 2, width)
    _aten.threshold_backward(
        spread_BChW.unsqueeze(3).expand(pairs),
        y_BCHW[:, :, : 2 * half].unflatten(2, (half, 2)),
        0,
        grad_input=g_BCHW[:, :, : 2 * half].unflatten(2, (half, 2)),
    )
    return g_BCHW


@functools.lru_cache(maxsize=64)
def _columns(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the matrix (W, w) with 0.25 where column j of W belongs to column j // 2 of w; an odd last column is 0."""
    half = width // 2
    matrix = torch.zeros(width, half, dtype=dtype, device=device)
    columns = torch.arange(2 * half, device=device)
    matrix[columns, columns // 2] = 0.25
    return matrix


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum a * b over pixels, keeping dimensions."""
    batch, channels = a.shape[:2]
    rows = (batch * channels, 1, -1)
    return torch.bmm(a.reshape(rows), b.reshape(rows).mT).view(batch, channels, 1, 1)
