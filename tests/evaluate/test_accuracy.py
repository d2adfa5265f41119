"""Accuracy overall, per class and by groups, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from lad_dist.data.prepared import PreparedSet
from lad_dist.data.whitening import Whitening
from lad_dist.evaluate.accuracy import accuracy


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


def test_all_right_and_all_wrong():
    assert accuracy(read(6), prepared(LABELS, LABELS), COUNTS).overall == 1
    assert accuracy(read(7), prepared([0, 1, 2], [3, 3, 3]), (9, 8, 7, 6, 5, 4, 3)).overall == 0
