"""Seconds of one step of each kind, unmeasured: a table of devices.

A CPU's rates are *measured*: benchmarks/results/all.json. A GPU's are *assumed*: operations, bytes and FLOPs of a step
are counted, and divided by a stated fraction of the card's data-sheet rates.
"""

from __future__ import annotations

from dataclasses import dataclass

from lad_dist.plan.scaling import Link, StepTime
from lad_dist.plan.shapes import Shapes


@dataclass(frozen=True)
class Work:
    """Work of one step: FLOPs as multiples of a forward pass, values read and written as multiples of the activations,
    and torch operations (``per_block`` times the depth, plus ``operations``).
    """

    flops: float
    passes: float
    per_block: int
    operations: int

    def launches(self, depth: int) -> int:
        """Return the torch operations of a step, each at least one kernel on a GPU."""
        return self.per_block * depth + self.operations


# Counted by running each kind of step under a dispatch mode (tests/plan/test_speed.py counts again), the block by
# torch's operations; what models/compiled_gpu.py saves is in benchmarks/results/step-h200.md.
WORK = {
    "representation/keep": Work(8, 89, 104, 38),
    "representation/recompute": Work(11, 113, 127, 62),
    "classifier/keep": Work(2.1, 24, 23, 52),
    "classifier/recompute": Work(3.1, 33, 32, 53),
    "experts/representation": Work(6, 48, 46, 43),
    "experts/classifier": Work(1, 9, 9, 41),
    "evaluate/train": Work(3, 24, 23, 9),
}
AUGMENTATION_OPERATIONS = 15  # of augmenting a batch, averaged over the augmentations


@dataclass(frozen=True)
class Card:
    """A GPU: FLOP/s of float32 convolutions (TF32 on tensor cores, torch's default), bytes/s and bytes of memory."""

    name: str
    flops: float
    bandwidth: float
    memory: int
    nvlink: bool


# NVIDIA's data sheets: dense TF32 rate, memory bandwidth, memory.
CARDS = {
    "a100": Card("NVIDIA A100 80GB SXM", 156e12, 2.039e12, 80 * 10**9, True),
    "h100": Card("NVIDIA H100 SXM", 494e12, 3.35e12, 80 * 10**9, True),
    "h200": Card("NVIDIA H200 SXM", 494e12, 4.8e12, 141 * 10**9, True),
    "l40s": Card("NVIDIA L40S", 183e12, 0.864e12, 48 * 10**9, False),
    "rtx4090": Card("NVIDIA GeForce RTX 4090", 82.6e12, 1.008e12, 24 * 10**9, False),
}
ASSUMED_FLOPS = 0.3  # of the card's rate: convolutions of 128 channels are small for tensor cores
ASSUMED_BANDWIDTH = 0.7  # of the card's: passes over tensors larger than its caches
ASSUMED_LAUNCH = 10e-6  # seconds of host time per torch operation, eager mode

CPU_SOURCE = "measured on an AMD EPYC, 2 threads, by benchmarks/all.py"
CPU_THREADS = 2
_CPU_SHAPES = Shapes(3, 32, 10, 128, 3)
# (seconds, images) of a step: benchmarks/results/all.json. evaluate/train is half of GSAM's two passes.
CPU_SECONDS = {
    "representation/keep": (0.2415, 100),
    "representation/recompute": (0.3345, 100),
    "classifier/keep": (0.0806, 100),
    "classifier/recompute": (0.1152, 100),
    "experts/representation": (0.457, 256),
    "experts/classifier": (0.0896, 256),
    "evaluate/train": (0.457 / 2, 256),
}
_CPU_OPERATION = 8e-6  # overhead of a torch operation in seconds, measured on one image

# NCCL's own model (src/graph/tuning.cc, LL128): 1.2 us a hop over NVLink, 1.9 over PCIe, 8.5 over a network; a tree
# reaches at most 80 to 130 GB/s over NVLink. 25 us for torch's call and the kernel's start are assumed.
LINKS = {
    "nvlink": Link("NVLink", 100e9, 25e-6, 1.2e-6, "assumed: NCCL's tuning model"),
    "pcie": Link("PCIe 4.0 x16", 20e9, 25e-6, 1.9e-6, "assumed: NCCL's tuning model; 32 GB/s each way by the standard"),
    "ethernet": Link(
        "100 Gbit/s Ethernet", 10e9, 30e-6, 8.5e-6, "assumed: NCCL's tuning model; 80% of the line's rate"
    ),
    "loopback": Link("gloo, one host", 1.0e9, 150e-6, 20e-6, "measured by benchmarks/ranks.py, rounded"),
}


def cpu_step(kind: str, shapes: Shapes, threads: int) -> StepTime:
    """Return a step's time on a CPU, by the table's time per FLOP, with the work shared evenly by threads."""
    seconds, images = CPU_SECONDS[kind]
    per_flop = seconds / (images * WORK[kind].flops * _CPU_SHAPES.forward_flops)
    per_image = per_flop * WORK[kind].flops * shapes.forward_flops * CPU_THREADS / threads
    return StepTime(per_image, per_step=_operations(kind, shapes) * _CPU_OPERATION)


def gpu_step(kind: str, shapes: Shapes, card: Card) -> StepTime:
    """Return a step's time on a GPU by counting: FLOPs plus bytes, but no less than the host takes to launch it."""
    work = WORK[kind]
    per_image = work.flops * shapes.forward_flops / (ASSUMED_FLOPS * card.flops)
    per_image += work.passes * 4 * shapes.activations / (ASSUMED_BANDWIDTH * card.bandwidth)
    return StepTime(per_image, launch=_operations(kind, shapes) * ASSUMED_LAUNCH)


def card_named(device_name: str) -> Card | None:
    """Return the table's card for torch's device name; None for others."""
    words = device_name.lower().replace(" ", "").replace("-", "")
    return next((card for key, card in CARDS.items() if key in words), None)


def _operations(kind: str, shapes: Shapes) -> int:
    return WORK[kind].launches(shapes.depth) + AUGMENTATION_OPERATIONS
