"""Accuracy overall, per class and by groups, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from lad_dist.data.prepared import PreparedSet
from lad_dist.data.whitening import Whitening
from lad_dist.evaluate.accuracy import accuracy, calibration_error


def prepared(labels: list[int], said: list[int]) -> PreparedSet:
    """Images whose first pixel is what ``read`` will say."""
    images = torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor(said, dtype=torch.uint8)
    return PreparedSet(images, torch.tensor(labels), Whitening.fit(images, "none"))


def read(classes: int):
    return lambda images: torch.nn.functional.one_hot((images[:, 0, 0, 0] * 255).round().long(), classes).float()


LABELS, SAID = [0, 0, 0, 0, 1, 1, 2, 2, 3, 4, 5], [0, 0, 0, 1, 1, 0, 2, 2, 3, 0, 0]
COUNTS = (300, 120, 100, 40, 20, 10)


@pytest.mark.parametrize("batch", [1, 3, 512])
def test_by_hand(batch):
    found = accuracy(read(6), prepared(LABELS, SAID), COUNTS, batch)
    assert found.overall == pytest.approx(7 / 11)
    assert found.per_class == pytest.approx((0.75, 0.5, 1, 1, 0, 0))
    assert (found.head, found.medium, found.tail) == pytest.approx(((0.75 + 0.5) / 2, 1.0, 0.0))
    assert found.by_count == pytest.approx({"many": 0.625, "medium": 2 / 3, "few": 0.0})


def test_groups_follow_the_counts_not_the_order_of_classes():
    found = accuracy(read(6), prepared(LABELS, SAID), (10, 20, 40, 100, 120, 300))
    assert (found.head, found.medium, found.tail) == pytest.approx((0.0, 1.0, 0.625))


def test_groups_weigh_classes_alike_whatever_the_test_set():
    found = accuracy(read(3), prepared([0, 0, 0, 0, 1, 2], [0, 0, 0, 0, 1, 0]), (300, 300, 2))
    assert found.overall == pytest.approx(5 / 6)
    assert found.by_count == {"many": 1.0, "medium": None, "few": 0.0}


def test_fewer_than_three_classes_have_no_head_and_no_tail():
    found = accuracy(read(2), prepared([0, 1], [0, 0]), (30, 3))
    assert (found.head, found.medium, found.tail) == (None, 0.5, None)


def test_classes_without_images_count_in_no_mean():
    found = accuracy(read(6), prepared([0, 0, 1, 3, 4], [0, 1, 1, 3, 4]), COUNTS)  # none of the classes 2 and 5
    assert found.balanced == pytest.approx(3.5 / 4)
    assert (found.head, found.medium, found.tail) == pytest.approx((0.75, 1.0, 1.0))
    assert found.by_count == pytest.approx({"many": 0.75, "medium": 1.0, "few": None})
    assert found.per_class == pytest.approx((0.5, 1, 0, 1, 1, 0))


def test_all_right_and_all_wrong():
    assert accuracy(read(6), prepared(LABELS, LABELS), COUNTS).overall == 1
    assert accuracy(read(7), prepared([0, 1, 2], [3, 3, 3]), (9, 8, 7, 6, 5, 4, 3)).overall == 0


def test_confusion_and_balanced_accuracy_by_hand():
    found = accuracy(read(6), prepared(LABELS, SAID), COUNTS)
    expected = [[3, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 2, 0, 0, 0], [0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0],
                [1, 0, 0, 0, 0, 0]]  # fmt: skip
    assert [list(row) for row in found.confusion] == expected
    assert found.balanced == pytest.approx((0.75 + 0.5 + 1 + 1 + 0 + 0) / 6)


def test_balanced_accuracy_leaves_out_classes_that_the_set_does_not_hold():
    found = accuracy(read(3), prepared([0, 0, 0, 1], [0, 0, 0, 0]), (9, 8, 7))
    assert found.balanced == pytest.approx(0.5) and found.overall == 0.75


def test_calibration_error_by_hand():
    """Bins (0, 1/15], ..., (14/15, 1]: 0.95 and 0.97 share one, 0.5 and 0.52 another, 1/15 is in the first."""
    confidence = torch.tensor([0.95, 0.97, 0.5, 0.52, 1 / 15], dtype=torch.float64)
    right = torch.tensor([True, False, True, True, False])
    gaps = abs(1 - 1.92) + abs(2 - 1.02) + abs(0 - 1 / 15)
    assert calibration_error(confidence, right) == pytest.approx(gaps / 5)
    edge = torch.tensor(
        [0.15, 0.2], dtype=torch.float64
    )  # 3/15 is the upper end of the third bin, not the lower of the fourth
    assert calibration_error(edge, torch.tensor([False, True])) == pytest.approx(abs(1 - 0.35) / 2)
    assert calibration_error(torch.ones(4), torch.ones(4, dtype=torch.bool)) == 0
    assert calibration_error(torch.ones(4), torch.zeros(4, dtype=torch.bool)) == 1


def test_calibration_of_a_network_that_always_says_a_third():
    found = accuracy(lambda images: torch.zeros(len(images), 3), prepared([0, 1, 2, 0], [0] * 4), (9, 8, 7))
    assert found.overall == 0.5 and found.ece == pytest.approx(0.5 - 1 / 3)


def test_of_many_classes_the_pairs_that_occur_say_what_the_matrix_does(monkeypatch):
    whole = accuracy(read(6), prepared(LABELS, SAID), COUNTS)
    monkeypatch.setattr("lad_dist.evaluate.accuracy.MATRIX_CLASSES", 5)
    pairs = accuracy(read(6), prepared(LABELS, SAID), COUNTS, batch=2)
    assert pairs.confusion == () and whole.confusion_pairs == ()
    matrix = [[0] * 6 for _ in range(6)]
    for true, said, images in pairs.confusion_pairs:
        matrix[true][said] = images
    assert matrix == [list(row) for row in whole.confusion]
    assert (pairs.overall, pairs.balanced, pairs.per_class) == (whole.overall, whole.balanced, whole.per_class)
