"""A process of its own: the peak of resident memory during one phase, above what there was before. Linux only.

python phase_memory.py WIDTH CHANNELS SIZE CLASSES DEPTH IMAGES STEPS PHASE PATH      prints bytes
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from lad_dist.allocator import keep_freed_memory
from lad_dist.data import augment
from lad_dist.distill.student import Batch, Phase, Student, SyntheticSet
from lad_dist.models.convnet import build, flat_parameters
from lad_dist.recipe import AugmentConfig
from lad_dist.seeds import rng


def resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def problem(width: int, channels: int, size: int, classes: int, depth: int, images: int, steps: int, phase: str):
    module = build(channels, size, classes, width, depth, seed=0, purpose=("test",))
    student, start = Student(module), flat_parameters(module)
    layout, target = student.layout, start.clone()
    target += 0.01
    batches = [
        Batch(torch.arange(images), augment.draw(rng(0, "augment", step), AugmentConfig(), images, size))
        for step in range(steps)
    ]
    synthetic = SyntheticSet(
        torch.randn(images, channels, size, size), torch.randn(images, classes), torch.tensor(0.01)
    )
    if phase == "classifier":
        return student, synthetic, Phase(start, target, batches, layout.span("all"), classifier_only=True)
    return student, synthetic, Phase(start, target, batches, layout.span("backbone"), torch.ones(classes))


def main() -> None:
    *sizes, phase, path = sys.argv[1:]
    width, channels, size, classes, depth, images, steps = (int(n) for n in sizes)
    torch.set_num_threads(1)
    keep_freed_memory()  # as every process of lad-dist that computes on a CPU
    student, synthetic, whole = problem(width, channels, size, classes, depth, images, steps, phase)
    small, few, first = problem(width, channels, size, classes, depth, 2, 1, phase)
    small.run(few, first, path)  # kernels are compiled and buffers made once
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (proc(5))
    before = resident("VmRSS:")
    student.run(synthetic, whole, path)
    print(resident("VmHWM:") - before)


if __name__ == "__main__":
    main()
