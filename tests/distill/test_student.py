"""The student: both gradient paths, both phases and both forms of the block against the textbook double loop."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from textbook import TextbookNet, double_loop
from torch import Tensor

from lad_dist.data import augment
from lad_dist.distill.memory import choose_path, free_bytes, step_bytes
from lad_dist.distill.student import Batch, Phase, PhaseResult, Student, SyntheticSet, soft_cross_entropy
from lad_dist.models.convnet import ConvNet
from lad_dist.recipe import OPERATIONS, AugmentConfig
from lad_dist.seeds import rng

PATHS = ("keep", "recompute")


class Problem:
    """Random images, labels, weights and windows; seven images in batches of three, so the last one is smaller."""

    def __init__(self, dtype: torch.dtype, *, channels: int = 3, side: int = 10, width: int = 6, depth: int = 2, steps: int = 7,
                 operations: tuple[str, ...] = OPERATIONS, weighted: bool = True, fused: bool = True, count: int = 7) -> None:
        torch.manual_seed(0)
        classes = 4
        self.textbook = TextbookNet(channels, side, width, depth, classes).to(dtype)
        module = ConvNet(channels, side, classes, width, depth, fused=fused).to(dtype)
        self.student = Student(module)
        self.start = self.textbook.flat()
        images = torch.randn(count, channels, side, side, dtype=dtype)
        self.synthetic = SyntheticSet(images, torch.randn(count, classes, dtype=dtype), torch.tensor(0.05, dtype=dtype))
        self.target = self.start + 0.02 * torch.randn_like(self.start)
        self.weights = torch.tensor([2.0, 1.2, 0.6, 0.2], dtype=dtype) if weighted else None
        draws = rng(0, "student")
        self.batches = []
        for step in range(steps):
            rows = torch.from_numpy(draws.permutation(count)[: 1 if step == 2 else 3])
            config = AugmentConfig(operations=operations[step % len(operations) :][:1]) if operations else None
            drawn = augment.draw(draws, config, len(rows), side) if config else None
            self.batches.append(Batch(rows, drawn))

    def phase(self, classifier_only: bool, span: str | None = None) -> Phase:
        layout = self.student.layout
        target = self.target.clone()
        if classifier_only:
            target[layout.span("backbone")] = self.start[layout.span("backbone")]
        compared = layout.span(span or ("all" if classifier_only else "backbone"))
        return Phase(self.start, target, self.batches, compared, self.weights, classifier_only)

    def expected(self, phase: Phase) -> dict[str, Tensor]:
        s = self.synthetic
        views = [(lambda x, d=b.draw: x if d is None else augment.apply(x, d)) for b in phase.batches]
        return double_loop(self.textbook, s.images_SCHH, s.logits_SK, s.alpha, phase.start_P, phase.target_P,
                           [b.rows_B for b in phase.batches], weights=phase.class_weights_K, views=views,
                           classifier_only=phase.classifier_only, compared=phase.span)


def quantities(result: PhaseResult) -> dict[str, Tensor]:
    return {"image_grad": result.image_grad_SCHH, "label_grad": result.label_grad_SK, "lr_grad": result.match.alpha_gradient,
            "grand_loss": result.match.loss, "gradient_sum": result.gradient_sum_P, "final_student_params": result.final_P,
            "inner_losses": torch.stack(result.inner_losses)}  # fmt: skip


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
    return max((float((ours[n] - theirs[n]).abs().max() / theirs[n].abs().max()), n) for n in ours)


@pytest.mark.parametrize("classifier_only", [False, True], ids=["representation", "classifier"])
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unweighted"])
@pytest.mark.parametrize(("channels", "side", "fused", "dtype"), [
    (3, 10, True, torch.float64), (1, 9, True, torch.float64), (3, 10, False, torch.float64),
    (3, 10, True, torch.float32), (1, 8, True, torch.float32), (3, 10, False, torch.float32),
])  # fmt: skip
def test_both_paths_equal_the_textbook_double_loop(classifier_only, weighted, channels, side, fused, dtype):
    problem = Problem(dtype, channels=channels, side=side, fused=fused, weighted=weighted)
    assert {b.draw.operation for b in problem.batches} == set(OPERATIONS)
    phase = problem.phase(classifier_only)
    expected = problem.expected(phase)
    found = {path: quantities(problem.student.run(problem.synthetic, phase, path)) for path in PATHS}
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for path in PATHS:
        error, name = worst(found[path], expected)
        print(path,error,name)
        assert error < tolerance, (path, name)
    assert worst(found["keep"], found["recompute"])[0] < tolerance
