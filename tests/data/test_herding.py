"""Herding: picks that stand for all."""

from __future__ import annotations

import torch

from lad_dist.data.herding import herd


def test_the_first_pick_is_the_row_nearest_to_the_mean():
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.7, 0.7], [-0.2, 1.0]])
    unit = torch.nn.functional.normalize(rows, dim=1)
    assert herd(rows, 1).tolist() == [int((unit - unit.mean(0)).norm(dim=1).argmin())]


def test_every_pick_is_the_best_for_the_mean_of_the_picks():
    rows = torch.nn.functional.normalize(torch.randn(12, 5, generator=torch.Generator().manual_seed(0)).double(), dim=1)
    picked = herd(rows, 5).tolist()
    for n in range(1, 6):
        free = [i for i in range(12) if i not in picked[: n - 1]]
        sums = {i: (rows[[*picked[: n - 1], i]].mean(0) - rows.mean(0)).norm() for i in free}
        assert picked[n - 1] == min(sums, key=sums.get)


def test_no_row_is_picked_twice_and_no_more_than_there_are():
    assert sorted(herd(torch.ones(3, 2), 10).tolist()) == [0, 1, 2]
