"""The least time that the rows of benchmarks/step.py can take on this machine: counted operations over measured rates.

Counted: the multiplications and additions of every convolution that a row must do, and the values that norm, ReLU and pooling
must read and write at least once. Measured: the rate of the network's own convolutions, and of copying. What the floor leaves
out (the classifier, augmentation, sums of P values) is small beside it; a row below 1.0 times its floor would be a mistake.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# How often each convolution is computed (forward, or by its input, or by its weights: all cost the same), in the first layer,
# whose input needs no gradient by the weights' sake, and in the others; and how often a block reads or writes values of the
# size of its convolution's result: forward 1.25 (result read, a quarter written), backward 2.25, second derivative 3.5.
COUNTS: dict[str, tuple[int, int, float]] = {
    "representation/keep": (5, 7, 1.25 + 2.25 + 3.5 + 2.25),
    "representation/recompute": (7, 10, 2 * (1.25 + 2.25) + 3.5 + 2.25),
    "classifier/keep": (2, 2, 1.25 + 2.25),
    "classifier/recompute": (3, 3, 2 * 1.25 + 2.25),
    "gsam/representation": (4, 6, 2 * (1.25 + 2.25)),
    "gsam/classifier": (1, 1, 1.25),
}


@dataclass(frozen=True)
class Rates:
    """Operations of convolutions per second, by layer, and bytes that a copy reads and writes per second."""

    convolutions: tuple[float, ...]
    copy: float


@dataclass(frozen=True)
class Layer:
    """One convolution on one image: operations, and values of its result."""

    operations: float
    values: int


def layers(backbone: nn.Sequential, image: Tensor) -> list[tuple[nn.Conv2d, Tensor, Layer]]:
    """Every convolution of ``backbone`` with what goes into it, for one image (1, C, H, H)."""
    found, x = [], image
    with torch.no_grad():
        for module in backbone:
            y = module(x)
            if isinstance(module, nn.Conv2d):
                taps = module.in_channels * module.kernel_size[0] * module.kernel_size[1]
                found.append((module, x, Layer(2.0 * taps * y.numel(), y.numel())))
            x = y
    return found


def rates(backbone: nn.Sequential, image: Tensor, batch: int, repeats: int = 5) -> Rates:
    """Measured on this machine, as it is set up in this process."""
    per_layer = []
    for module, x, layer in layers(backbone, image):
        images, weight, bias = x.repeat(batch, 1, 1, 1), module.weight.detach(), module.bias
        with torch.no_grad():
            seconds = _median(lambda: torch.conv2d(images, weight, bias, padding=module.padding), images, repeats)  # noqa: B023
        per_layer.append(batch * layer.operations / seconds)
    source = torch.randn(2**25, device=image.device)
    target = torch.empty_like(source)
    copied = _median(lambda: target.copy_(source), source, repeats)
    return Rates(tuple(per_layer), 2 * source.nbytes / copied)


def floors(backbone: nn.Sequential, image: Tensor, measured: Rates, batches: dict[str, int]) -> dict[str, float]:
    """Seconds per row; ``batches`` says how many images a row's step has."""
    found = [layer for _, _, layer in layers(backbone, image)]
    out = {}
    for row, (first, others, passes) in COUNTS.items():
        seconds = 0.0
        for i, (layer, rate) in enumerate(zip(found, measured.convolutions, strict=True)):
            seconds += (
                first if i == 0 else others
            ) * layer.operations / rate + passes * 4 * layer.values / measured.copy
        out[row] = batches[row] * seconds
    return out


def _median(job: Callable[[], object], on: Tensor, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        job()
        if on.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])
