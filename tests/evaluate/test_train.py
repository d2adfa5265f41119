"""Training a fresh network on a set: the published protocol."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from lad_dist.data import augment
from lad_dist.errors import NumericalError
from lad_dist.evaluate.train import Settings, TrainingSet, class_balanced, rows_of, train, train_together
from lad_dist.models.convnet import ConvNet, build, flat_parameters
from lad_dist.recipe import AugmentConfig
from lad_dist.seeds import rng

SETTINGS = Settings(epochs=4, batch=4, lr=0.05, momentum=0.9, weight_decay=5e-4, decay=0.1,
                    augment=AugmentConfig(operations=("crop", "flip")))  # fmt: skip


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.randn(10, 3, generator=torch.Generator().manual_seed(1)).softmax(1)


def network() -> ConvNet:
    return build(1, 8, 3, 4, 2, seed=0, purpose=("test",))


def trained(images, labels, settings=SETTINGS, seed=0, counters=("distilled", 0), on_epoch=lambda: None):
    net = network()
    loss = train(net, TrainingSet(rows_of(images, labels), len(images)), settings, seed, counters, on_epoch)
    return flat_parameters(net), loss


def test_equals_a_plain_loop(images, labels):
    net = network()
    sgd = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for epoch in range(4):
        sgd.param_groups[0]["lr"] = 0.05 if epoch <= 2 else 0.005  # the published loop: from epoch E // 2 + 1 on
        order, draws = (rng(0, "evaluate", "distilled", 0, what, epoch) for what in ("order", "augment"))
        losses = []
        for rows in torch.from_numpy(order.permutation(10)).split(4):
            x = augment.apply(images[rows], augment.draw(draws, SETTINGS.augment, len(rows), 8))
            loss = torch.nn.functional.cross_entropy(net(x), labels[rows])  # the soft one, as labels are probabilities
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            losses.append(float(loss.detach()) * len(rows))
    weights, mean = trained(images, labels)
    torch.testing.assert_close(weights, flat_parameters(net), rtol=1e-5, atol=1e-6)
    assert mean == pytest.approx(sum(losses) / 10, rel=1e-4)


def test_the_rate_falls_at_half(images, labels):
    snapshots, net = [], network()
    settings = replace(SETTINGS, epochs=6, decay=1e-12, momentum=0.0)

    def snapshot() -> None:
        snapshots.append(flat_parameters(net))

    train(net, TrainingSet(rows_of(images, labels), 10), settings, 0, (), snapshot)
    moved = [float((b - a).abs().max()) > 1e-7 for a, b in pairwise(snapshots)]
    assert moved == [True, True, True, False, False]


def test_learns(images, labels):
    hard = torch.nn.functional.one_hot(torch.arange(10) % 3, 3).float()
    settings = replace(SETTINGS, epochs=60, augment=AugmentConfig(operations=()))
    net = network()
    loss = train(net, TrainingSet(rows_of(images, hard), 10), settings, 0, (), lambda: None)
    assert loss < 0.1 and not net.training
    assert (net(images).argmax(1) == hard.argmax(1)).all()


def test_a_function_of_seed_and_counters(images, labels):
    first = trained(images, labels)
    torch.manual_seed(3)
    assert torch.equal(trained(images, labels)[0], first[0])
    for other in (trained(images, labels, seed=1), trained(images, labels, counters=("distilled", 1)),
                  trained(images, labels, counters=("random", 0))):  # fmt: skip
        assert not torch.equal(other[0], first[0])


def test_on_epoch_counts_epochs(images, labels):
    calls = []
    trained(images, labels, on_epoch=lambda: calls.append(1))
    assert len(calls) == 4


def test_nan_is_refused(images, labels):
    with pytest.raises(NumericalError, match=r"evaluation, \('distilled', 0\): the training loss is .*evaluate\.lr"):
        trained(images, labels, replace(SETTINGS, lr=1e30))


# --- several networks at once -----------------------------------------------------------------------------------------


def test_networks_trained_together_equal_those_trained_alone(images, labels):
    """Each with its own set, start, order and draws; the last batch is a short one."""

    def nets() -> list[ConvNet]:
        return [build(1, 8, 3, 4, 2, seed=s, purpose=("test",)).double() for s in range(3)]

    sets = [TrainingSet(rows_of(images.double() + s, labels.double().roll(s, 0)), 10) for s in range(3)]
    counters = [("distilled", "convnet", s) for s in range(3)]
    alone, together, epochs = nets(), nets(), []
    losses = [train(n, s, SETTINGS, 0, c, lambda: None) for n, s, c in zip(alone, sets, counters, strict=True)]
    assert train_together(together, sets, SETTINGS, 0, counters, lambda: epochs.append(1)) == pytest.approx(losses)
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(flat_parameters(b), flat_parameters(a), rtol=1e-9, atol=1e-9)
        assert not b.training
    assert len(epochs) == 4 and losses[0] != pytest.approx(losses[1])


def test_the_network_that_left_the_numbers_is_named(images, labels):
    broken = torch.full_like(images, torch.nan)
    nets = [network() for _ in range(2)]
    sets = [TrainingSet(rows_of(x, labels), 10) for x in (images, broken)]
    with pytest.raises(NumericalError, match=r"\('b',\): the training loss is nan"):
        train_together(nets, sets, SETTINGS, 0, [("a",), ("b",)], lambda: None)


# --- long tails -------------------------------------------------------------------------------------------------------


def test_class_balanced_sampling_draws_every_class_alike():
    labels = np.array([0] * 90 + [2] * 3 + [1] * 9)[np.random.default_rng(0).permutation(102)]
    rows = class_balanced(rng(0, "test"), labels)
    assert len(rows) == 102 and np.bincount(labels[rows]).tolist() == [34, 34, 34]
    assert set(np.flatnonzero(labels == 2)) == set(rows[labels[rows] == 2])
    assert len(set(rows[labels[rows] == 0])) > 20  # of 34, from 90
    assert np.array_equal(rows, class_balanced(rng(0, "test"), labels))
    assert not np.array_equal(labels[rows], np.sort(labels[rows]))


def test_the_logit_adjusted_loss(images):
    """One step by hand: cross-entropy of f + tau log pi (Menon et al., equation 10)."""
    classes = np.array([0] * 6 + [1] * 3 + [2])
    hard = torch.nn.functional.one_hot(torch.from_numpy(classes), 3).float()
    settings = replace(SETTINGS, epochs=1, batch=10, logit_adjustment=1.5, augment=AugmentConfig(operations=()))
    net, by_hand = network(), network()
    loss = train(net, TrainingSet(rows_of(images, hard), 10, classes), settings, 0, (), lambda: None)
    shifted = by_hand(images) + 1.5 * torch.tensor([0.6, 0.3, 0.1]).log()
    expected = torch.nn.functional.cross_entropy(shifted, torch.from_numpy(classes))
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    sgd = torch.optim.SGD(by_hand.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    expected.backward()
    sgd.step()
    torch.testing.assert_close(flat_parameters(net), flat_parameters(by_hand))
