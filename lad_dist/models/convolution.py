"""A convolution with hand-written first and second derivatives, for gradients that are differentiated again.

torch's second derivative of a convolution uses the output's gradient as the weights of an image-sized convolution, for
which libraries are not optimised. Written out, every term is an ordinary convolution of the batch:

    forward     y = x * w + b
    backward    from g = dL/dy:  dx = g *' w (transposed), dw = W(x, g) (correlation over images and pixels), db = sum g
    second      from the cotangents a of dx, c of dw, e of db, phi = <a, dx> + <c, dw> + <e, db> has the derivatives
                by g      a * w + x * c + e      one convolution of (a, x) with (w, c) side by side
                by x      g *' c
                by w      W(a, g)

With ``rounded`` set, the convolutions' factors are rounded to bfloat16 and their results converted to float32; sums
within a convolution are float32 on a GPU's tensor cores and in oneDNN. Everything between convolutions stays float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lad_dist.models.needs_grad import needs_grad

_aten = torch.ops.aten


class Convolution(nn.Conv2d):
    """A convolution of stride 1 with these derivatives; its parameters are those of ``nn.Conv2d``."""

    rounded = False

    def forward(self, x_BCHH: Tensor) -> Tensor:
        """(B, C, H, H) to (B, W, H', H')."""
        assert self.stride == (1, 1) and self.groups == 1 and isinstance(self.padding, tuple)
        out: Tensor = _ConvolutionForward.apply(x_BCHH, self.weight, self.bias, self.padding, self.rounded)  # type: ignore[no-untyped-call]
        return out


def set_precision(module: nn.Module, name: str) -> None:
    """Set the precision of the convolutions of ``module``: "float32" or "bfloat16"."""
    for each in module.modules():
        if isinstance(each, Convolution):
            each.rounded = name == "bfloat16"


class _ConvolutionForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, padding: tuple[int, int], low: bool) -> Tensor:
        ctx.padding, ctx.low = padding, low
        ctx.save_for_backward(x, w)
        return _convolved(x, w, b, padding, low)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        dx, dw, db = _ConvolutionBackward.apply(g, x, w, ctx.padding, ctx.low, needs_grad(ctx))  # type: ignore[no-untyped-call]
        return dx, dw, db, None, None


class _ConvolutionBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, w: Tensor, padding: tuple[int, int], low: bool, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, ...]:
        ctx.padding, ctx.low = padding, low
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x, w)
        dx, dw, db = _derivatives(g, x, w, padding, low, wanted)
        return dx, dw, db

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, a: Tensor | None, c: Tensor | None, e: Tensor | None) -> tuple[Tensor | None, ...]:
        (g, x, w), padding, low = ctx.saved_tensors, ctx.padding, ctx.low
        by_g = by_x = by_w = None
        pairs = [(image, weight) for image, weight in ((a, w), (x, c)) if image is not None and weight is not None]
        by_g_asked, by_x_asked, by_w_asked = needs_grad(ctx)
        if by_g_asked and pairs:
            images, weights = (torch.cat(tensors, dim=1) for tensors in zip(*pairs, strict=True))
            by_g = _convolved(images, weights, e, padding, low)
        elif by_g_asked and e is not None:
            by_g = e.view(1, -1, 1, 1).expand_as(g)
        if by_x_asked and c is not None:
            by_x = _derivatives(g, x, c, padding, low, (True, False, False))[0]
        if by_w_asked and a is not None:
            by_w = _derivatives(g, a, w, padding, low, (False, True, False))[1]
        return by_g, by_x, by_w, None, None, None


def _convolved(x: Tensor, w: Tensor, b: Tensor | None, padding: tuple[int, int], low: bool) -> Tensor:
    """x * w + b."""
    if not low:
        return torch.conv2d(x, w, b, padding=padding)
    out = torch.conv2d(x.bfloat16(), w.bfloat16(), padding=padding).to(x.dtype)
    return out if b is None else out.add_(b.view(1, -1, 1, 1))


def _derivatives(
    g: Tensor, x: Tensor, w: Tensor, padding: tuple[int, int], low: bool, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """Return (dx, dw, db) of x * w + b from g; None for those not ``wanted``."""
    if low:
        rounded = (g.bfloat16(), x.bfloat16(), w.bfloat16())
        dx, dw, _ = _derivatives(*rounded, padding, False, (*wanted[:2], False))
        db = g.sum(dim=(0, 2, 3)) if wanted[2] else None
        return *(None if t is None else t.to(g.dtype) for t in (dx, dw)), db
    out: tuple[Tensor | None, ...] = _aten.convolution_backward(
        g, x, w, [w.shape[0]], [1, 1], list(padding), [1, 1], False, [0, 0], 1, list(wanted)
    )
    return out
