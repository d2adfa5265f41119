from __future__ import annotations

import numpy as np
import pytest

from lad_dist.data.datasets import choose_training_images
from lad_dist.data.longtail import (
    exponential_counts,
    head_medium_tail,
    hold_out,
    positions_by_class,
    select,
    within_class_order,
)
from lad_dist.distill.initial import choose_images
from lad_dist.errors import DataError
from lad_dist.experts.sampling import class_aware_order
from lad_dist.recipe import DataConfig


@pytest.mark.parametrize(
    ("key", "n_max", "classes", "factor"),
    [
        ("cifar10_0.1", 5000, 10, 10),
        ("cifar10_0.02", 5000, 10, 50),
        ("cifar10_0.01", 5000, 10, 100),
        ("cifar10_0.005", 5000, 10, 200),
        ("cifar100_0.1", 500, 100, 10),
        ("cifar100_0.05", 500, 100, 20),
    ],
)
def test_counts_equal_the_official_ones(golden, key, n_max, classes, factor):
    assert exponential_counts(n_max, classes, factor) == tuple(golden[f"longtail/{key}"].tolist())


@pytest.mark.parametrize("n", [500, 5000])
def test_order_within_a_class_equals_the_official_one(golden, n):
    np.testing.assert_array_equal(within_class_order(n), golden[f"longtail/within_class_order_{n}"])


def test_smallest_class_is_exact_for_every_factor():
    # 49 * (1 / 49) < 1 and 1280 * (1 / 512) ** (k / 9) in floating point: rounding must not take an image away
    for factor in range(1, 1001):
        for n_max in (factor, 49 * factor, 1280, 5000):
            if n_max >= factor:
                counts = exponential_counts(n_max, 10, factor)
                assert counts[0] == n_max
                assert counts[-1] == n_max // factor
                assert list(counts) == sorted(counts, reverse=True)
    assert exponential_counts(100, 3, 100) == (100, 10, 1)


def test_one_class_keeps_all():
    assert exponential_counts(7, 1, 100) == (7,)


def test_factor_one_is_balanced():
    assert exponential_counts(7, 3, 1) == (7, 7, 7)


def test_factor_that_empties_a_class_is_refused_with_the_largest_usable_one():
    assert exponential_counts(50, 3, 50)[-1] == 1
    with pytest.raises(
        DataError, match=r"data.imbalance_factor: 51 leaves class 2 \(truck\).*largest usable factor is 50"
    ):
        exponential_counts(50, 3, 51, ["cat", "dog", "truck"])


@pytest.mark.parametrize("factor", [0.5, 0, -3, float("nan")])
def test_factor_below_one_is_refused(factor):
    with pytest.raises(DataError, match=r"imbalance_factor"):
        exponential_counts(50, 3, factor)


def test_selection_is_class_major_and_takes_the_first_of_each_order():
    labels_N = np.array([2, 0, 1, 0, 2, 1, 0, 0, 2, 0])
    positions_0 = np.array([1, 3, 6, 7, 9])
    kept = select(labels_N, (3, 2, 1))
    np.testing.assert_array_equal(labels_N[kept], [0, 0, 0, 1, 1, 2])
    np.testing.assert_array_equal(kept[:3], positions_0[np.random.RandomState(42).permutation(5)[:3]])


def test_class_with_too_few_images_is_refused():
    with pytest.raises(DataError, match=r"data.n_max: class 1 \(b\) has 2 images, but 3 are needed"):
        select(np.array([0, 0, 0, 1, 1]), (3, 3), class_names=["a", "b"])
    with pytest.raises(DataError, match=r"class 0 has 2 images after 1 were held out for validation, but 3"):
        select(np.array([0, 0, 0, 1, 1]), (3, 1), held_out=1)


def test_held_out_images_are_the_end_of_each_order_and_never_trained_on():
    labels_N = np.repeat([0, 1], 6)
    held = hold_out(labels_N, 2, 2)
    kept = select(labels_N, (4, 1), held_out=2)
    assert not set(held) & set(kept)
    np.testing.assert_array_equal(labels_N[held], [0, 0, 1, 1])
    np.testing.assert_array_equal(kept, select(labels_N, (4, 1)))  # holding out does not change what is trained on


def test_every_class_keeps_an_image_to_train_on():
    labels_N = np.array([0, 0, 0, 0, 1, 1, 1, 2])
    held = hold_out(labels_N, 3, 3)
    assert labels_N[held].tolist() == [0, 0, 0, 1, 1]  # 3 of 4, 2 of 3, none of 1
    kept = select(labels_N, (1, 1, 1), held_out=3)
    assert sorted([*held, *kept]) == list(range(8))


def test_holding_out_where_no_class_can_give_an_image_is_refused():
    with pytest.raises(DataError, match=r"data.validation_per_class: 2, but every class has one image"):
        hold_out(np.array([0, 1, 2]), 2, 3)
    assert len(hold_out(np.array([0, 1, 2]), 0, 3)) == 0


def test_groups_of_ten_classes():
    groups = head_medium_tail((120, 101, 100, 44, 31, 22, 20, 19, 8, 6))
    assert groups["by_count"] == {"many": (0, 1), "medium": (2, 3, 4, 5, 6), "few": (7, 8, 9)}
    assert groups["by_thirds"] == {"head": (0, 1, 2), "medium": (3, 4, 5, 6), "tail": (7, 8, 9)}


def test_thirds_follow_the_counts_not_the_labels():
    assert head_medium_tail((5, 50, 7, 5))["by_thirds"] == {"head": (1,), "medium": (0, 2), "tail": (3,)}
    assert head_medium_tail((5, 4))["by_thirds"] == {"head": (), "medium": (0, 1), "tail": ()}


def test_positions_by_class_are_those_that_looking_for_each_class_finds():
    labels = np.random.default_rng(0).integers(0, 7, 200)
    labels[labels == 3] = 4  # a class without images
    found = positions_by_class(labels, 8)
    assert len(found) == 8 and not len(found[3]) and not len(found[7])
    for c, positions in enumerate(found):
        np.testing.assert_array_equal(positions, np.flatnonzero(labels == c))


def test_no_class_looks_through_all_labels(monkeypatch):
    """With 8,142 classes and 437,513 images, as iNaturalist 2018 has, that would be a minute in every epoch."""
    labels, names = np.repeat(np.arange(50), np.arange(60, 10, -1)), tuple(map(str, range(50)))

    def refuse(*_):
        raise AssertionError("the labels are looked through")

    monkeypatch.setattr(np, "flatnonzero", refuse)
    choose_training_images(labels, names, DataConfig(imbalance="natural", validation_per_class=5))
    choose_training_images(labels, names, DataConfig(imbalance_factor=5))
    class_aware_order(np.random.default_rng(0), labels, 4)
    choose_images(None, labels, 2, 50, seed=0)
