"""The matching loss, its direction and its gradient with respect to the student's learning rate."""

from __future__ import annotations

import pytest
import torch

from lad_dist.distill.matching import match
from lad_dist.errors import NumericalError

SPAN = slice(2, 9)


@pytest.fixture
def vectors() -> tuple[torch.Tensor, ...]:
    draws = torch.Generator().manual_seed(0)
    start, target, summed = (torch.randn(12, dtype=torch.float64, generator=draws) for _ in range(3))
    return start, target, summed, torch.tensor(0.3, dtype=torch.float64)


def test_formulas(vectors):
    start, target, summed, alpha = vectors
    found = match(start, target, summed, alpha, SPAN)
    s, t, g = start[SPAN], target[SPAN], summed[SPAN]
    distance = ((t - s) ** 2).sum()
    torch.testing.assert_close(found.loss, ((s - alpha * g - t) ** 2).sum() / distance)
    expected = torch.zeros_like(start)
    expected[SPAN] = 2 * (alpha * (t - s) + alpha**2 * g) / distance
    torch.testing.assert_close(found.direction_P, expected)
    torch.testing.assert_close(found.cosine, torch.nn.functional.cosine_similarity(-alpha * g, t - s, dim=0))
    torch.testing.assert_close(found.norm_ratio, (alpha * g).norm() / (t - s).norm())


def test_the_direction_is_the_gradient_by_the_sum(vectors):
    start, target, summed, alpha = vectors
    leaf = summed.clone().requires_grad_()
    loss = ((start - alpha * leaf - target)[SPAN] ** 2).sum() / ((target - start)[SPAN] ** 2).sum()
    (gradient,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(match(start, target, summed, alpha, SPAN).direction_P, gradient)


def test_alphas_gradient_equals_finite_differences(vectors):
    start, target, summed, alpha = vectors
    h = 1e-6
    above, below = (float(match(start, target, summed, alpha + d, SPAN).loss) for d in (h, -h))
    assert float(match(start, target, summed, alpha, SPAN).alpha_gradient) == pytest.approx((above - below) / (2 * h))


def test_a_student_that_arrives_and_one_that_stays(vectors):
    start, target, _, alpha = vectors
    there = match(start, target, (start - target) / alpha, alpha, SPAN)
    assert float(there.loss) == pytest.approx(0, abs=1e-25)
    assert float(there.cosine) == pytest.approx(1) and float(there.norm_ratio) == pytest.approx(1)
    stays = match(start, target, torch.zeros_like(start), alpha, SPAN)
    assert (float(stays.loss), float(stays.cosine), float(stays.norm_ratio)) == (1, 0, 0)


def test_an_expert_that_did_not_move_is_refused(vectors):
    start, _, summed, alpha = vectors
    target = start.clone()
    target[SPAN.stop :] += 1
    with pytest.raises(NumericalError, match="nothing to match"):
        match(start, target, summed, alpha, SPAN)
    match(start, target, summed, alpha, slice(0, 12))
