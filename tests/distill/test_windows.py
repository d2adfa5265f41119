"""Windows: which stretch of which expert an iteration matches."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from lad_dist.distill.windows import Windows
from lad_dist.errors import TrajectoryError
from lad_dist.models.convnet import ConvNet
from lad_dist.models.layout import Layout
from lad_dist.trajectories import Buffer


@pytest.fixture(scope="module")
def layout():
    return Layout.of(ConvNet(1, 8, 10, 4, 2))


@pytest.fixture
def windows(small_experts, small_recipe, layout):
    def make(folder=small_experts / "trajectories", seed: int = 0, **distill) -> Windows:
        return Windows(Buffer(folder), layout, small_recipe(seed=seed, distill=distill), torch.device("cpu"))

    return make


def test_the_upper_bound_grows_linearly_and_stays(windows):
    grown = windows(start_epoch_max_first=1, start_epoch_max=3, start_epoch_growth=10)
    assert [grown.start_bound(i) for i in (0, 4, 5, 9, 10, 1000)] == [1, 1, 2, 2, 3, 3]
    assert [windows(start_epoch_max=3).start_bound(i) for i in (0, 50)] == [3, 3]


def test_windows_lie_within_the_bounds_and_reach_them(windows):
    w = windows(start_epoch_min=1, start_epoch_max=4, classifier_start_epoch_max=2)
    drawn = [(x.expert, x.epoch) for x in (w.draw("representation", i) for i in range(80))]
    assert set(drawn) == {(e, t) for e in (0, 1) for t in (1, 2, 3)}
    drawn = [(x.expert, x.epoch) for x in (w.draw("classifier", i) for i in range(60))]
    assert set(drawn) == {(e, t) for e in (0, 1) for t in (0, 1)}


def test_early_windows_while_the_bound_grows(windows):
    w = windows(start_epoch_max_first=1, start_epoch_max=3, start_epoch_growth=100)
    assert {w.draw("representation", i).epoch for i in range(40)} == {0}
    assert {w.draw("representation", i).epoch for i in range(100, 140)} == {0, 1, 2}


def test_a_draw_is_a_function_of_seed_and_iteration(windows):
    def draws(order, **fields) -> dict[int, tuple[int, int]]:
        w = windows(**fields)
        return {i: (x.expert, x.epoch) for i, x in ((i, w.draw("representation", i)) for i in order)}

    assert draws(range(20)) == draws(reversed(range(20)))
    assert draws(range(20)) != draws(range(20), seed=1)
    assert len(set(draws(range(20)).values())) > 2


def test_the_stages_draw_independently(windows):
    w = windows(start_epoch_max=2, classifier_start_epoch_max=2)
    pairs = {(w.draw("representation", i).expert, w.draw("classifier", i).expert) for i in range(30)}
    assert pairs == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_the_ends_are_checkpoints(windows, small_experts, layout):
    buffer, w = Buffer(small_experts / "trajectories"), windows(window_epochs=2, start_epoch_max=3)
    for iteration in range(4):
        x = w.draw("representation", iteration)
        np.testing.assert_array_equal(x.start_P, buffer.read("representation", x.expert, x.epoch))
        np.testing.assert_array_equal(x.target_P, buffer.read("representation", x.expert, x.epoch + 2))
        x = w.draw("classifier", iteration)
        last = buffer.read("representation", x.expert, 4)
        backbone, classifier = layout.span("backbone"), layout.span("classifier")
        for weights, epoch in ((x.start_P, x.epoch), (x.target_P, x.epoch + 2)):
            np.testing.assert_array_equal(weights[backbone], last[backbone])
            np.testing.assert_array_equal(weights[classifier], buffer.read("classifier", x.expert, epoch))


def test_teacher(windows, small_experts, layout):
    buffer, w = Buffer(small_experts / "trajectories"), windows()
    np.testing.assert_array_equal(w.teacher(1)[layout.span("classifier")], buffer.read("classifier", 1, 3))


@pytest.fixture
def reads(monkeypatch):
    found = []

    def read(self, stage, expert, epoch, original=Buffer.read):
        found.append((stage, expert, epoch))
        return original(self, stage, expert, epoch)

    monkeypatch.setattr(Buffer, "read", read)
    return found


def test_the_recipe_bounds_the_cache(windows, small_experts, small_recipe, layout, reads):
    assert windows().checkpoints.limit_bytes == 128 * 2**20
    recipe = small_recipe(buffer={"cache_mb": 3})
    w = Windows(Buffer(small_experts / "trajectories"), layout, recipe, torch.device("cpu"))
    assert w.checkpoints.limit_bytes == 3 * 2**20
    for _ in range(3):
        w.weights("representation", 0, 1)
    assert reads == [("representation", 0, 1)]


def test_classifier_windows_share_the_backbone_of_their_expert(windows, reads):
    w = windows(classifier_start_epoch_max=2)
    for iteration in range(12):
        w.draw("classifier", iteration)
    assert sum(stage == "representation" for stage, _, _ in reads) == 2  # one for each expert
    assert len(reads) == len(set(reads))


def test_weights_are_the_callers_to_change(windows):
    w = windows()
    for row in (("representation", 0, 1), ("classifier", 0, 1)):
        before = w.weights(*row)
        w.weights(*row).zero_()
        assert torch.equal(w.weights(*row), before) and before.abs().sum() > 0


def test_an_iteration_that_was_read_ahead_is_the_same_and_reads_nothing(windows, reads):
    plain, ahead, stages = windows(), windows(), ["representation", "classifier"]
    for iteration in range(6):
        wanted = [plain.draw(stage, iteration) for stage in stages]
        ahead.read_ahead(stages, iteration)
        until = time.monotonic() + 10
        while (ahead.checkpoints._wanted or ahead.checkpoints._reading) and time.monotonic() < until:
            time.sleep(0.002)
        time.sleep(0.01)
        seen = len(reads)
        for x, y in zip(wanted, (ahead.draw(stage, iteration) for stage in stages), strict=True):
            assert (x.expert, x.epoch) == (y.expert, y.epoch)
            assert torch.equal(x.start_P, y.start_P) and torch.equal(x.target_P, y.target_P)
        assert len(reads) == seen
    ahead.close()


def test_nothing_is_read_ahead_of_the_last_iteration(windows, reads):
    w = windows(iterations=3)
    w.read_ahead(["representation"], 3)
    assert w.checkpoints._thread is None and reads == []


def test_only_the_experts_that_are_set_are_drawn(windows):
    w = windows()
    w.experts = (1,)
    assert {w.choose("representation", i)[0] for i in range(20)} == {1}
    of_all = [windows().choose("representation", i) for i in range(20)]
    w.experts = (0, 1)
    assert [w.choose("representation", i) for i in range(20)] == of_all


def test_a_missing_checkpoint_is_named(windows):
    with pytest.raises(TrajectoryError, match="representation expert 5 epoch 0 is missing"):
        windows().weights("representation", 5, 0)
