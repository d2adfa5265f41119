"""The order in which an expert sees images."""

from __future__ import annotations

import numpy as np
import pytest

from lad_dist.experts.sampling import class_aware_order, shuffled_order
from lad_dist.seeds import rng

LABELS = np.repeat(np.arange(5), [11, 6, 4, 3, 1])
DRAWS = 4


def turns(labels: np.ndarray, order: np.ndarray, draws: int = DRAWS) -> list[np.ndarray]:
    return [labels[order[i : i + draws]] for i in range(0, len(order), draws)]


def test_every_image_once():
    order = shuffled_order(rng(0), 100)
    assert sorted(order.tolist()) == list(range(100)) and order.tolist() != list(range(100))


@pytest.mark.parametrize("seed", range(4))
def test_length_and_runs(seed):
    order = class_aware_order(rng(seed), LABELS, DRAWS)
    assert len(order) == 11 * 5
    assert all(len(set(turn.tolist())) == 1 for turn in turns(LABELS, order))


@pytest.mark.parametrize("seed", range(4))
def test_classes_come_in_shuffled_cycles(seed):
    order = class_aware_order(rng(seed), LABELS, DRAWS)
    sequence = [int(turn[0]) for turn in turns(LABELS, order)]
    cycles = [sequence[i : i + 5] for i in range(0, len(sequence), 5)]
    assert all(sorted(cycle) == list(range(5)) for cycle in cycles[:-1])
    assert len(set(cycles[-1])) == len(cycles[-1])
    assert len({tuple(c) for c in cycles[:-1]}) > 1


@pytest.mark.parametrize("seed", range(4))
def test_every_image_of_a_class_before_any_repeats(seed):
    labels, order = LABELS, class_aware_order(rng(seed), LABELS, DRAWS)
    for c in range(5):
        mine, members = order[labels[order] == c], np.flatnonzero(labels == c)
        for i in range(0, len(mine), len(members)):
            cycle = mine[i : i + len(members)]
            assert len(set(cycle.tolist())) == len(cycle)
            assert np.isin(cycle, members).all()


def test_the_tail_is_drawn_as_often_as_the_head():
    labels = np.repeat([0, 1], [400, 4])
    assert np.bincount(labels[class_aware_order(rng(0), labels, DRAWS)]).tolist() == [400, 400]


def test_a_last_turn_that_is_cut_short():
    labels = np.repeat(np.arange(3), [3, 2, 1])
    order = class_aware_order(rng(1), labels, DRAWS)
    assert len(order) == 9 and [len(t) for t in turns(labels, order)] == [4, 4, 1]


@pytest.mark.parametrize("draws", [1, 2, 7])
def test_other_numbers_of_draws(draws):
    order = class_aware_order(rng(0), LABELS, draws)
    assert len(order) == 55 and all(len(set(t.tolist())) == 1 for t in turns(LABELS, order, draws))


def test_a_function_of_the_generator():
    first = class_aware_order(rng(0, "epoch", 1), LABELS, DRAWS)
    np.testing.assert_array_equal(class_aware_order(rng(0, "epoch", 1), LABELS, DRAWS), first)
    assert first.tolist() != class_aware_order(rng(0, "epoch", 2), LABELS, DRAWS).tolist()


def test_labels_in_any_order():
    shuffled = rng(3).permutation(LABELS)
    order = class_aware_order(rng(0), shuffled, DRAWS)
    assert all(len(set(t.tolist())) == 1 for t in turns(shuffled, order))
