"""The outer step: SGD with momentum on pixels, labels and the learning rate."""

from __future__ import annotations

import math

import pytest
import torch
from textbook import Momentum

from lad_dist.distill.matching import Match
from lad_dist.distill.student import PhaseResult, RowGradients
from lad_dist.distill.update import Optimizers, weighted_sum
from lad_dist.recipe import DistillConfig

LR, MOMENTUM, LAMBDAS = (3.0, 0.5, 0.01), (0.5, 0.9, 0.3), (0.7, 1.3)


def phase_result(seed: int) -> PhaseResult:
    draws = torch.Generator().manual_seed(seed)
    zero = torch.zeros(())
    match = Match(zero, zero, torch.randn((), generator=draws), zero, zero)
    by_rows = RowGradients(
        torch.arange(4), torch.randn(4, 1, 3, 3, generator=draws), torch.randn(4, 2, generator=draws), 4
    )
    return PhaseResult(match, by_rows, zero, zero)


def config(lr=LR, momentum=MOMENTUM, **fields) -> DistillConfig:
    names = ("images", "labels", "alpha")
    rates = {f"lr_{n}": float(x) for n, x in zip(names, lr, strict=True)}
    return DistillConfig(**rates, **{f"momentum_{n}": float(x) for n, x in zip(names, momentum, strict=True)}, **fields)


def optimizers(seed: int = 0, **fields) -> Optimizers:
    draws = torch.Generator().manual_seed(seed)
    tensors = torch.randn(4, 1, 3, 3, generator=draws), torch.randn(4, 2, generator=draws), torch.tensor(5.0)
    return Optimizers(*tensors, config(**fields))


def phases(step: int) -> list[tuple[float, PhaseResult]]:
    return [(lam, phase_result(10 * step + i)) for i, lam in enumerate(LAMBDAS)]


def step(o: Optimizers, both: list[tuple[float, PhaseResult]], iteration: int = 0) -> None:
    o.step_alpha(both)
    o.step_set(both, iteration)


def values(o: Optimizers) -> list[torch.Tensor]:
    return [o.images_SCHH.clone(), o.logits_SK.clone(), o.alpha.clone()]


def test_steps_equal_a_hand_loop():
    ours = optimizers()
    by_hand, rules = values(ours), [Momentum(lr, m) for lr, m in zip(LR, MOMENTUM, strict=True)]
    for i in range(4):
        both = phases(i)
        step(ours, both)
        totals = [sum(lam * r.by_rows.images_SCHH for lam, r in both), sum(lam * r.by_rows.labels_SK for lam, r in both),
                  sum(lam * r.match.alpha_gradient for lam, r in both)]  # fmt: skip
        by_hand = [rule.step(x, g) for rule, x, g in zip(rules, by_hand, totals, strict=True)]
        for a, b in zip(values(ours), by_hand, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_momentum_survives_saving():
    straight, first = optimizers(), optimizers()
    for o in (straight, first):
        step(o, phases(0))
        step(o, phases(1))
    second = optimizers(seed=5)
    for tensor, value in zip((second.images_SCHH, second.logits_SK, second.alpha), values(first), strict=True):
        tensor.copy_(value)
    second.load_momentum({k: t.clone() for k, t in first.momentum_tensors().items()}, iteration=2)
    step(straight, phases(2))
    step(second, phases(2))
    assert all(torch.equal(a, b) for a, b in zip(values(straight), values(second), strict=True))
    assert set(second.momentum_tensors()) == {"momentum_images", "momentum_labels", "momentum_alpha"}


def test_loading_no_momentum_forgets_what_there_was():
    o, fresh = optimizers(), optimizers()
    start = values(o)
    step(o, phases(0))
    for tensor, value in zip((o.images_SCHH, o.logits_SK, o.alpha), start, strict=True):
        tensor.copy_(value)
    o.load_momentum({}, iteration=0)
    assert o.momentum_tensors() == {}
    step(o, phases(1))
    step(fresh, phases(1))
    assert all(torch.equal(a, b) for a, b in zip(values(o), values(fresh), strict=True))


def test_hard_labels_never_change():
    o = optimizers(labels="hard")
    before = o.logits_SK.clone()
    for i in range(3):
        step(o, phases(i))
    assert torch.equal(o.logits_SK, before)
    assert set(o.momentum_tensors()) == {"momentum_images", "momentum_alpha"}


def test_the_synthetic_set_is_the_tensors_themselves():
    o = optimizers()
    synthetic = o.synthetic_set()
    step(o, phases(0))
    assert torch.equal(synthetic.images_SCHH, o.images_SCHH) and torch.equal(synthetic.alpha, o.alpha)
    assert not o.images_SCHH.requires_grad


@pytest.mark.parametrize("which", [0, 1, 2])
def test_each_rate_is_its_own(which):
    rates = [0.0, 0.0, 0.0]
    rates[which] = 1.0
    draws = optimizers()
    o = Optimizers(draws.images_SCHH, draws.logits_SK, draws.alpha, config(rates, (0, 0, 0)))
    before = values(o)
    step(o, phases(0))
    assert [not torch.equal(a, b) for a, b in zip(values(o), before, strict=True)] == [i == which for i in range(3)]


def test_adam_equals_torch_and_survives_saving():
    """Pixels and labels by Adam along a cosine; alpha by SGD."""
    fields = {"optimizer": "adam", "schedule": "cosine", "iterations": 6}
    ours, saved = optimizers(**fields), optimizers(**fields)
    images, labels = ours.images_SCHH.clone(), ours.logits_SK.clone()
    by_hand = torch.optim.Adam(
        [
            {"params": [x], "lr": lr, "betas": (m, 0.99)}
            for x, lr, m in zip((images, labels), LR, MOMENTUM, strict=False)
        ]
    )
    for i in range(6):
        both = phases(i)
        for x, name in ((images, "images_SCHH"), (labels, "labels_SK")):
            x.grad = sum(lam * getattr(r.by_rows, name) for lam, r in both)
        factor = (1 + math.cos(math.pi * i / 6)) / 2
        for group, lr in zip(by_hand.param_groups, LR, strict=False):
            group["lr"] = lr * factor
        by_hand.step()
        step(ours, both, i)
        step(saved, both, i)
        restored = optimizers(seed=9, **fields)
        for tensor, value in zip(
            (restored.images_SCHH, restored.logits_SK, restored.alpha), values(saved), strict=True
        ):
            tensor.copy_(value)
        restored.load_momentum(saved.momentum_tensors(), i + 1)
        saved = restored
    for a, b, c in zip(values(ours), values(saved), (images, labels, ours.alpha), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (20, 3, 32, 32), (101, 3, 7, 7), (13, 10)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_weighted_sum_has_the_bits_of_a_sum_of_all(shape, count):
    parts = []
    for i in range(count):
        draws = torch.Generator().manual_seed(i)
        rows = torch.randperm(shape[0], generator=draws)[: max(1, shape[0] * (i + 1) // 3)].sort().values
        gradients = RowGradients(rows, torch.randn(shape, generator=draws)[rows], torch.zeros(len(rows), 2), shape[0])
        parts.append((0.1 * (i + 1), gradients, gradients.images_TCHH))
    whole = torch.stack([weight * g.images_SCHH for weight, g, _ in parts]).sum(0)
    assert torch.equal(weighted_sum(parts), whole)


def test_only_alpha_moves_when_it_would_not_stay_positive():
    o, both = optimizers(), phases(0)
    step(o, both)
    before, momentum = values(o), {k: t.clone() for k, t in o.momentum_tensors().items()}
    kept = o.copy(whole=False)
    assert set(kept) == {"alpha", "momentum_alpha"}
    for _, r in both:
        r.match = Match(*(torch.zeros(()),) * 2, torch.tensor(1e9), *(torch.zeros(()),) * 2)
    assert not o.step_alpha(both) and float(o.alpha) < 0
    o.restore(kept, 1)
    assert all(torch.equal(a, b) for a, b in zip(values(o), before, strict=True))
    assert all(torch.equal(t, momentum[k]) for k, t in o.momentum_tensors().items())


@pytest.mark.parametrize("value", [1e13, float("inf"), float("nan")])
@pytest.mark.parametrize("where", ["images", "labels", "momentum", "gradient", "label gradient"])
def test_what_may_overflow(where, value):
    o, both = optimizers(), phases(1)
    step(o, phases(0))
    assert not o.may_overflow(both)
    rows = both[1][1].by_rows
    tensors = {"images": o.images_SCHH, "labels": o.logits_SK, "momentum": o.momentum_tensors()["momentum_images"],
               "gradient": rows.images_TCHH, "label gradient": rows.labels_TK}  # fmt: skip
    tensors[where].flatten()[-1] = value
    assert o.may_overflow(both)


def test_a_whole_copy_puts_everything_back():
    o, undisturbed = (optimizers(optimizer="adam", iterations=6) for _ in range(2))
    for each in (o, undisturbed):
        step(each, phases(0))
    before, kept = values(o), o.copy(whole=True)
    step(o, phases(1), 1)
    o.restore(kept, 1)
    assert all(torch.equal(a, b) for a, b in zip(values(o), before, strict=True))
    for each in (o, undisturbed):
        step(each, phases(2), 1)
    assert all(torch.equal(a, b) for a, b in zip(values(o), values(undisturbed), strict=True))
