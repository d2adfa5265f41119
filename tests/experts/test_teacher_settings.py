"""Experts trained as teachers: momentum, cosine, logit adjustment, CutMix and mixup; bit-exact from any epoch."""

from __future__ import annotations

import math
from contextlib import closing

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lad_dist.data import augment
from lad_dist.data.mixing import draw_mix, mix
from lad_dist.data.prepare import prepare
from lad_dist.errors import Interrupted
from lad_dist.experts.gsam import sgd_step
from lad_dist.experts.train import ExpertTrainer, network_loss
from lad_dist.models import functional
from lad_dist.models.convnet import build, flat_parameters
from lad_dist.models.layout import Layout
from lad_dist.recipe import AugmentConfig
from lad_dist.seeds import rng
from lad_dist.trajectories import Buffer

TEACHER = {"classifier_epochs": 0, "logit_adjustment": 1.0, "cutmix": 0.4, "mixup": 0.3, "momentum": 0.9, "gsam_rho": 0.0,
           "schedule": "cosine", "warmup_epochs": 1, "epochs_per_part": 1, "precision": "bfloat16"}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory, small_recipe):
    return prepare(small_recipe(), tmp_path_factory.mktemp("data") / "whitening.safetensors", torch.device("cpu"))


def weights(folder) -> dict[int, np.ndarray]:
    buffer = Buffer(folder)
    return {t: buffer.read("representation", 0, t) for t in buffer.epochs("representation", 0)}


def test_continued_from_any_epoch_is_bit_exact(tmp_path, small_recipe, data):
    recipe = small_recipe(method="aligned", experts=TEACHER)
    whole = ExpertTrainer(recipe, data, tmp_path / "whole")
    assert whole.left([0]) == {0: 4}
    list(whole.train(0))
    assert whole.left([0]) == {0: 0} and not (tmp_path / "whole" / "classifier").exists()
    for at in (1, 3):
        stopped = ExpertTrainer(recipe, data, tmp_path / f"stopped-{at}")
        with pytest.raises(Interrupted), closing(stopped.train(0)) as epochs:
            for epoch in epochs:
                if epoch.epoch == at:
                    raise Interrupted("stopped by the test")
        list(ExpertTrainer(recipe, data, stopped.folder).train(0))  # another process: it knows the buffer alone
        ours, theirs = weights(stopped.folder), weights(whole.folder)
        assert ours.keys() == theirs.keys() and all(np.array_equal(ours[t], theirs[t]) for t in ours)


def test_momentum_is_that_of_torch():
    start, gradients = torch.randn(5), torch.randn(3, 5)
    parameter = torch.nn.Parameter(start.clone())
    sgd = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True)
    ours, velocity = start, None
    for gradient in gradients:
        parameter.grad = gradient.clone()
        sgd.step()
        ours, velocity = sgd_step(ours, gradient, velocity, 0.1, 0.01, 0.9)
    torch.testing.assert_close(ours, parameter.detach())


def test_learning_rates(tmp_path, small_recipe, data):
    def rate(epoch: int, step: int, **experts) -> float:
        return ExpertTrainer(small_recipe(experts={"lr": 0.5, **experts}), data, tmp_path).rate(epoch, step, 10)

    assert rate(1, 0) == rate(4, 9) == 0.5
    assert rate(1, 0, schedule="cosine") == 0.5
    assert rate(3, 0, schedule="cosine") == pytest.approx(0.25)
    assert rate(4, 5, schedule="cosine") == pytest.approx(0.25 * (1 + math.cos(math.pi * 3.5 / 4)))
    assert rate(1, 0, warmup_epochs=2) == pytest.approx(0.5 / 20) and rate(3, 0, warmup_epochs=2) == 0.5


def test_the_loss_of_a_mixed_and_adjusted_batch():
    module = build(1, 8, 3, 4, 2, seed=0, purpose=("test",))
    layout, theta = Layout.of(module), flat_parameters(module)
    images, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    shift, others = torch.tensor([0.0, -1.0, -2.0]), torch.tensor([1, 2, 0, 0])
    loss, logits = network_loss(module, layout, images, labels, shift, others, torch.tensor([0.3, 0.7]))(theta)
    targets = 0.3 * F.one_hot(labels, 3).float() + 0.7 * F.one_hot(others, 3).float()
    expected = -(targets * (logits + shift).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits, functional.logits(module, layout.views(theta), images))


def test_mixing():
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 2, 8, 8)
    shares, kinds = [], []
    for i in range(200):
        mixed = draw_mix(rng(0, i), 0.5, 0.25, 4, 8)
        kinds.append("none" if mixed is None else "mixup" if mixed.box is None else "cutmix")
        if mixed is None:
            continue
        out, others = mix(images, mixed), images[mixed.others_B]
        shares.append(mixed.share)
        expected = mixed.share * images.mean(dim=(1, 2, 3)) + (1 - mixed.share) * others.mean(dim=(1, 2, 3))
        torch.testing.assert_close(out.mean(dim=(1, 2, 3)), expected)
        if mixed.box is not None:  # every pixel is of one of the two
            assert bool(((out == images) | (out == others)).all())
    assert 70 < kinds.count("cutmix") < 130 and 30 < kinds.count("mixup") < 70 and min(shares) < 0.2 < 0.8 < max(shares)
    assert draw_mix(rng(0, 0), 0.0, 0.0, 4, 8) is None


def test_all_operations_one_after_the_other():
    config = AugmentConfig(compose="all", operations=("crop", "flip"))
    images = torch.randn(6, 3, 8, 8)
    drawn = augment.draw(rng(0, "x"), config, 6, 8)
    generator = rng(0, "x")
    first = augment.draw(generator, AugmentConfig(operations=("crop",), compose="all"), 6, 8)
    second = augment.draw(generator, AugmentConfig(operations=("flip",), compose="all"), 6, 8)
    assert torch.equal(augment.apply(images, drawn), augment.apply(augment.apply(images, first), second))
    rows = np.array([4, 1])
    assert torch.equal(augment.apply(images[rows], drawn.rows(rows)), augment.apply(images, drawn)[rows])


def test_what_was_there_keeps_its_hash(small_recipe):
    """New fields at their defaults are in no hash; each of them is where it is used."""
    plain = small_recipe()
    for changes in (
        {"experts": {"cutmix": 0.5}},
        {"experts": {"momentum": 0.5}},
        {"experts": {"schedule": "cosine"}},
        {"experts": {"logit_adjustment": 1.0}},
        {"augment": {"compose": "all"}},
    ):
        assert small_recipe(**changes).experts_hash() != plain.experts_hash()
    assert small_recipe(evaluate={"protocol": "rldd"}).experts_hash() == plain.experts_hash()
