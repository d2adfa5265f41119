"""bfloat16 convolutions of the student, and their effect on the gradient of the images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from lad_dist.distill.student import GradientPath, Phase, Student, SyntheticSet
from lad_dist.models.convolution import set_precision
from lad_dist.ranks import Ranks


@contextmanager
def _computing_in(module: nn.Module, name: str, afterwards: str) -> Iterator[None]:
    set_precision(module, name)
    try:
        yield
    finally:
        set_precision(module, afterwards)


def cosines_to_float32(
    student: Student, synthetic: SyntheticSet, phases: Sequence[Phase], path: GradientPath, ranks: Ranks
) -> list[float]:
    """Return, per phase, the cosine between the pixel gradients in bfloat16 and in float32, over all ranks' images.

    All ranks must call it. Leaves the student in bfloat16.
    """
    found = []
    for phase in phases:
        with _computing_in(student.module, "float32", afterwards="bfloat16"):
            exact = student.run(synthetic, phase, path).by_rows.images_TCHH.double()
        rough = student.run(synthetic, phase, path).by_rows.images_TCHH.double()
        sums = torch.stack([(exact * rough).sum(), exact.square().sum(), rough.square().sum()])
        dot, first, second = ranks.total(sums).tolist()
        found.append(dot / max((first * second) ** 0.5, 1e-300))
    return found
