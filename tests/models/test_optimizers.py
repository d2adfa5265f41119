"""SGD and Adam by torch's functional forms: the bits of torch's classes, and the state that checkpoints hold."""

from __future__ import annotations

import pytest
import torch

from lad_dist.models.optimizers import SGD, Adam

RATES = [0.1, 0.1, 0.05, 0.2, 0.01]
KINDS = {
    "sgd": (lambda w: SGD(w), lambda w: torch.optim.SGD(w, lr=1.0)),
    "momentum": (lambda w: SGD(w, 0.9, 5e-4), lambda w: torch.optim.SGD(w, lr=1.0, momentum=0.9, weight_decay=5e-4)),
    "adam": (lambda w: Adam(w, (0.5, 0.99)), lambda w: torch.optim.Adam(w, lr=1.0, betas=(0.5, 0.99))),
    "adamw": (lambda w: Adam(w, weight_decay=0.01), lambda w: torch.optim.AdamW(w, lr=1.0, weight_decay=0.01)),
}  # fmt: skip


def weights(dtype: torch.dtype) -> list[torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draws, dtype=dtype) for shape in ((), (3,), (4, 3, 3, 3))]


def gradients(step: int, dtype: torch.dtype) -> list[torch.Tensor]:
    draws = torch.Generator().manual_seed(1 + step)
    return [torch.randn(w.shape, generator=draws, dtype=dtype) for w in weights(dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_have_the_bits_of_torchs_classes(kind, dtype):
    ours, theirs = weights(dtype), [w.requires_grad_() for w in weights(dtype)]
    make, reference = KINDS[kind]
    optimizer, torchs = make(ours), reference(theirs)
    for step, lr in enumerate(RATES):
        optimizer.step(gradients(step, dtype), lr)
        for w, g in zip(theirs, gradients(step, dtype), strict=True):
            w.grad = g
        torchs.param_groups[0]["lr"] = lr
        torchs.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), step


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_state_goes_on_as_the_other_would(kind):
    make, dtype = KINDS[kind][0], torch.float32
    ours = weights(dtype)
    first = make(ours)
    assert first.state() == {}
    for step in range(3):
        first.step(gradients(step, dtype), 0.1)
    theirs = [w.clone() for w in ours]
    second = make(theirs)
    second.load({name: [t.clone() for t in tensors] for name, tensors in first.state().items()}, 3)
    for optimizer in (first, second):
        optimizer.step(gradients(3, dtype), 0.1)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_state_forgets(kind):
    make, dtype = KINDS[kind][0], torch.float32
    used, fresh = weights(dtype), weights(dtype)
    optimizer = make(used)
    optimizer.step(gradients(0, dtype), 0.1)
    for w, start in zip(used, fresh, strict=True):
        w.copy_(start)
    optimizer.load({}, 0)
    assert optimizer.state() == {}
    optimizer.step(gradients(1, dtype), 0.1)
    make(fresh).step(gradients(1, dtype), 0.1)
    assert all(torch.equal(a, b) for a, b in zip(used, fresh, strict=True))


def test_weights_that_require_gradients_are_stepped_in_place():
    (w,) = (torch.nn.Parameter(torch.ones(2)),)
    SGD([w]).step([torch.ones(2)], 0.5)
    assert w.tolist() == [0.5, 0.5] and w.requires_grad and w.grad is None
