"""GSAM: its formula, its special cases, and the classifier stage's shortcut through the features."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from textbook import TextbookNet, gsam_steps

from lad_dist.experts.gsam import gsam_gradient, orthogonal_part, sgd_step
from lad_dist.experts.train import classifier_loss, network_loss
from lad_dist.models.convnet import ConvNet
from lad_dist.models.layout import Layout

RHO, ALPHA = 0.05, 0.4


@pytest.fixture
def problem():
    torch.manual_seed(0)
    textbook = TextbookNet(1, 8, 4, 2, 5).double()
    module = ConvNet(1, 8, 5, 4, 2).double()
    images, labels = torch.randn(2, 6, 1, 8, 8, dtype=torch.float64), torch.randint(0, 5, (2, 6))
    return textbook, module, Layout.of(module), textbook.flat(), images, labels


def test_equals_two_passes_through_the_module(problem):
    textbook, module, layout, weights, images, labels = problem
    h = {"lr": 0.1, "rho": RHO, "alpha": ALPHA, "weight_decay": 0.01}
    theirs = gsam_steps(textbook, images, labels, weights, frozen=False, **h)
    step = gsam_gradient(network_loss(module, layout, images[0], labels[0]), weights, RHO, ALPHA)
    torch.testing.assert_close(step.clean_P, theirs["step1_grad_clean"])
    torch.testing.assert_close(step.perturbation_P, theirs["step1_e_w"])
    torch.testing.assert_close(step.gradient_P, theirs["step1_grad_final"])
    torch.testing.assert_close(step.logits_BK, theirs["logits_step1"])
    torch.testing.assert_close(sgd_step(weights, step.gradient_P, None, 0.1, 0.01, 0.0)[0], theirs["params_after1"])
    assert float((step.gradient_P - step.clean_P).abs().max()) > 1e-4


def test_the_classifier_stage_is_gsam_of_the_frozen_network(problem):
    _, module, layout, weights, images, labels = problem
    start = layout.span("classifier").start

    def through_the_network(classifier_P: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        views = layout.views(torch.cat([weights[:start], classifier_P]))
        logits = torch.func.functional_call(module, views, (images[0],))
        return F.cross_entropy(logits, labels[0]), logits

    short = gsam_gradient(classifier_loss(module, layout, weights, images[0], labels[0]), weights[start:], RHO, ALPHA)
    long = gsam_gradient(through_the_network, weights[start:], RHO, ALPHA)
    for name in ("gradient_P", "clean_P", "perturbation_P", "logits_BK", "loss"):
        torch.testing.assert_close(getattr(short, name), getattr(long, name), rtol=1e-12, atol=1e-14)


def test_features_are_computed_once(problem, monkeypatch):
    _, module, layout, weights, images, labels = problem
    calls = []

    def backbone(x: torch.Tensor, original=module.backbone) -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return original(x)

    monkeypatch.setattr(module, "backbone", backbone)
    loss_of = classifier_loss(module, layout, weights, images[0], labels[0])
    gsam_gradient(loss_of, weights[layout.span("classifier")], RHO, ALPHA)
    assert calls == [False]


def test_rho_zero_is_the_plain_gradient_from_one_pass(problem):
    _, module, layout, weights, images, labels = problem
    calls = []

    def loss_of(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(w)
        return network_loss(module, layout, images[0], labels[0])(w)

    step = gsam_gradient(loss_of, weights, 0.0, ALPHA)
    leaf = weights.clone().requires_grad_()
    (plain,) = torch.autograd.grad(network_loss(module, layout, images[0], labels[0])(leaf)[0], leaf)
    assert len(calls) == 1
    assert torch.equal(step.gradient_P, plain) and torch.equal(step.clean_P, plain)
    assert float(step.perturbation_P.abs().max()) == 0


def test_a_small_rho_comes_close_to_the_plain_gradient(problem):
    _, module, layout, weights, images, labels = problem
    step = gsam_gradient(network_loss(module, layout, images[0], labels[0]), weights, 1e-9, ALPHA)
    torch.testing.assert_close(step.gradient_P, step.clean_P, rtol=1e-5, atol=1e-7)


def test_the_perturbation_is_of_length_rho_in_its_own_measure(problem):
    _, module, layout, weights, images, labels = problem
    e = gsam_gradient(network_loss(module, layout, images[0], labels[0]), weights, RHO, ALPHA).perturbation_P
    moved = weights != 0
    assert float((e[moved] / weights[moved].abs()).norm()) == pytest.approx(RHO)  # || e / |w| || = rho, as in ASAM


def test_orthogonal_part():
    g0, g1 = torch.tensor([3.0, 4.0, 0.0]).double(), torch.tensor([2.0, 0.0, 0.0]).double()
    torch.testing.assert_close(orthogonal_part(g0, g1), torch.tensor([0.0, 4.0, 0.0]).double())
    assert float(orthogonal_part(g1, g1).abs().max()) < 1e-10
    assert bool(orthogonal_part(torch.zeros(3), torch.zeros(3)).isfinite().all())


def test_sgd_step():
    w, g = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.5])
    torch.testing.assert_close(sgd_step(w, g, None, 0.1, 0.01, 0.0)[0], torch.tensor([1 - 0.1 * 0.51, -2 - 0.1 * 0.48]))
