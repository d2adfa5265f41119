"""One expert: both stages, resumed from anywhere, the same whoever trains it."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from lad_dist.data.prepare import prepare
from lad_dist.errors import Interrupted, NumericalError, TrajectoryError
from lad_dist.experts import train as train_module
from lad_dist.experts.train import ExpertTrainer
from lad_dist.models.convnet import build, flat_parameters
from lad_dist.trajectories import Buffer


@pytest.fixture(scope="module")
def data(tmp_path_factory, small_recipe):
    return prepare(small_recipe(), tmp_path_factory.mktemp("data") / "whitening.safetensors", torch.device("cpu"))


@pytest.fixture
def trainer(tmp_path, small_recipe, data):
    def make(name: str = "buffer", folder: Path | None = None, **experts) -> ExpertTrainer:
        recipe = small_recipe(experts={"epochs_per_part": 1, **experts})
        return ExpertTrainer(recipe, data, folder or tmp_path / name)

    return make


def run(epochs, seen=lambda epoch: None) -> None:
    """Train all epochs, as a caller that must not lose any does."""
    with closing(epochs):
        for epoch in epochs:
            seen(epoch)


def parts(folder: Path) -> list[Path]:
    """Published parts in the order in which they were made."""
    return sorted(folder.rglob("*.parquet"), key=lambda p: (p.parent.parent.name == "classifier", p.name))


def rows(folder: Path) -> dict[tuple[str, int, int], np.ndarray]:
    buffer = Buffer(folder)
    return {(stage, e, t): buffer.read(stage, e, t) for stage in ("representation", "classifier")
            for e in buffer.experts(stage) for t in buffer.epochs(stage, e)}  # fmt: skip


def test_both_stages_and_what_their_rows_hold(trainer, data):
    t, seen = trainer(), []
    run(t.train(0), seen.append)
    found, layout = rows(t.folder), t.layout
    assert set(found) == {*(("representation", 0, e) for e in range(5)), *(("classifier", 0, e) for e in range(4))}
    length = {"representation": layout.size, "classifier": layout.size - layout.span("classifier").start}
    assert all(len(weights) == length[stage] for (stage, _, _), weights in found.items())
    np.testing.assert_array_equal(found["classifier", 0, 0], found["representation", 0, 4][layout.span("classifier")])
    initial = build(1, 8, 10, 4, 2, seed=0, purpose=("expert", 0))
    np.testing.assert_array_equal(found["representation", 0, 0], flat_parameters(initial))
    assert [(e.stage, e.epoch) for e in seen] == [*(("representation", i) for i in (1, 2, 3, 4)),
                                                  *(("classifier", i) for i in (1, 2, 3))]  # fmt: skip
    assert all(0 <= e.accuracy <= 1 and e.loss > 0 and e.images_per_second > 0 for e in seen)
    checkpoint = Buffer(t.folder).read_checkpoint("representation", 0, 3)
    assert (checkpoint.loss, checkpoint.accuracy) == (pytest.approx(seen[2].loss), pytest.approx(seen[2].accuracy))
    assert Buffer(t.folder).meta.class_counts == data.counts


def test_training_lowers_the_loss(trainer):
    seen = []
    run(trainer(epochs=25).train(0), seen.append)
    first, last = seen[0], seen[24]
    assert last.loss < 0.8 * first.loss and last.accuracy > 2 * first.accuracy


def test_continued_from_any_published_epoch_is_bit_exact(trainer, tmp_path):
    whole = trainer("whole")
    run(whole.train(0))
    digest, made = Buffer(whole.folder).digest(), parts(whole.folder)
    assert len(made) == 9
    for count in range(len(made) + 1):
        folder = tmp_path / f"first {count}"
        for part in made[:count]:
            target = folder / part.relative_to(whole.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(part, target)
        again = trainer(folder=folder)
        seen = []
        assert again.left([0]) == {0: 7 - max(0, count - 1 - (count > 5))}
        run(again.train(0), seen.append)
        assert len(seen) == 7 - max(0, count - 1 - (count > 5))
        assert Buffer(folder).digest() == digest


def test_a_gap_is_filled(trainer):
    t = trainer()
    run(t.train(0))
    digest = Buffer(t.folder).digest()
    parts(t.folder)[2].unlink()
    assert t.left([0])[0] > 0
    run(t.train(0))
    assert Buffer(t.folder).digest() == digest


def test_parts_may_be_cut_otherwise(trainer):
    one, three = trainer("one"), trainer("three", epochs_per_part=3)
    run(one.train(0))
    run(three.train(0))
    assert len(parts(three.folder)) < len(parts(one.folder))
    assert Buffer(one.folder).digest() == Buffer(three.folder).digest()


def test_an_interrupted_epoch_is_done_again(trainer, monkeypatch):
    whole, broken = trainer("whole"), trainer("broken", epochs_per_part=5)
    run(whole.train(0))

    def stop(epoch) -> None:
        if (epoch.stage, epoch.epoch) == ("representation", 2):
            raise Interrupted("stop")

    with pytest.raises(Interrupted):
        run(broken.train(0), stop)
    assert Buffer(broken.folder).last_contiguous_epoch("representation", 0) == 2  # what was finished is published
    run(broken.train(0))
    assert Buffer(broken.folder).digest() == Buffer(whole.folder).digest()


def test_experts_differ_and_do_not_depend_on_each_other(trainer):
    both, alone, many = trainer("both"), trainer("alone"), trainer("many", count=17)
    run(both.train(0))
    run(both.train(1))
    run(alone.train(1))
    run(many.train(1))
    together, single, counted = rows(both.folder), rows(alone.folder), rows(many.folder)
    assert {k for k in together if k[1] == 1} == set(single) == set(counted)
    for key, weights in single.items():
        np.testing.assert_array_equal(together[key], weights)
        np.testing.assert_array_equal(counted[key], weights)
    assert not np.array_equal(together["representation", 0, 0], together["representation", 1, 0])
    assert not np.array_equal(together["classifier", 0, 3], together["classifier", 1, 3])


def test_no_two_draws_share_their_randomness(trainer, monkeypatch):
    """Every expert, stage and epoch has an order of its own, and every step of them an augmentation of its own."""
    keys = []

    def recorded(seed, *counters, original=train_module.rng):
        keys.append((seed, *counters))
        return original(seed, *counters)

    monkeypatch.setattr(train_module, "rng", recorded)
    t = trainer()
    for expert in (0, 1):
        run(t.train(expert))
    assert len(keys) == len(set(keys)) == 2 * (4 * (1 + 3) + 3 * (1 + 7))  # 96 images and 200 draws in batches of 32


def test_another_seed_gives_other_experts(trainer):
    one, two = trainer("one"), trainer("two", seed=1)
    run(one.train(0))
    run(two.train(0))
    assert not np.array_equal(rows(one.folder)["representation", 0, 2], rows(two.folder)["representation", 0, 2])


def test_the_global_generators_have_no_say(trainer):
    one, two = trainer("one"), trainer("two")
    torch.manual_seed(1)
    run(one.train(0))
    torch.manual_seed(2)
    np.random.seed(3)
    run(two.train(0))
    assert Buffer(one.folder).digest() == Buffer(two.folder).digest()


@pytest.mark.parametrize(("field", "stage"), [("lr", "representation"), ("classifier_lr", "classifier")])
def test_nan_names_expert_stage_and_epoch_and_keeps_what_was_good(trainer, field, stage):
    t = trainer(**{field: 1e30})
    with pytest.raises(NumericalError, match=rf"(expert 1, {stage} stage, epoch \d)|({stage} expert 1 epoch \d)"):
        run(t.train(1))
    kept = rows(t.folder)
    assert (stage, 1, 0) in kept and all(np.isfinite(w).all() for w in kept.values())
    assert ("representation", 1, 4) in kept or stage == "representation"
    assert not list(t.folder.rglob(".*"))


def test_nan_in_the_loss_alone(trainer, monkeypatch):
    t = trainer()

    def epoch(self, stage, expert, number, weights, original=ExpertTrainer._epoch):
        found = original(self, stage, expert, number, weights)
        return (float("nan"), *found[1:]) if (stage, number) == ("representation", 3) else found

    monkeypatch.setattr(ExpertTrainer, "_epoch", epoch)
    with pytest.raises(NumericalError, match=r"expert 0, representation stage, epoch 3: the loss is nan.*experts\.lr"):
        run(t.train(0))
    assert Buffer(t.folder).last_contiguous_epoch("representation", 0) == 2


def test_gsam_and_augmentation_are_what_the_recipe_says(trainer, monkeypatch):
    seen = []

    def gsam(loss_of, weights, rho, alpha, original=train_module.gsam_gradient):
        seen.append((len(weights), rho, alpha))
        return original(loss_of, weights, rho, alpha)

    monkeypatch.setattr(train_module, "gsam_gradient", gsam)
    t = trainer(epochs=4, classifier_epochs=3, gsam_rho=0.02, gsam_alpha=0.1, batch=50)
    run(t.train(0))
    head = t.layout.size - t.layout.span("classifier").start
    count, largest = sum(t.meta.class_counts), max(t.meta.class_counts)
    whole_steps, head_steps = -(-count // 50), -(-largest * 10 // 50)
    assert seen == [(t.layout.size, 0.02, 0.1)] * 4 * whole_steps + [(head, 0.02, 0.1)] * 3 * head_steps


def test_the_classifier_stage_without_decay_or_rate_stands_still(trainer):
    t = trainer(classifier_lr=1e-30, classifier_weight_decay=0.0)
    run(t.train(0))
    found = rows(t.folder)
    np.testing.assert_array_equal(found["classifier", 0, 3], found["classifier", 0, 0])


def test_more_epochs_continue_fewer(trainer):
    """An expert's first epochs do not depend on how many there will be, though the recipes' buffers are apart."""
    short, long = trainer("short", epochs=4), trainer("long", epochs=6)
    run(short.train(0))
    run(long.train(0))
    for epoch in range(5):
        np.testing.assert_array_equal(rows(short.folder)["representation", 0, epoch],
                                      rows(long.folder)["representation", 0, epoch])  # fmt: skip


def test_a_buffer_of_another_recipe_is_refused(trainer):
    run(trainer().train(0))
    with pytest.raises(TrajectoryError, match="made by another recipe"):
        run(trainer(lr=0.01).train(0))
    with pytest.raises(TrajectoryError, match="made by another recipe"):
        trainer(lr=0.01).left(range(2))


def test_a_buffer_of_other_images_is_refused(trainer, data, monkeypatch):
    run(trainer().train(0))
    monkeypatch.setattr(type(data.splits.train), "fingerprint", lambda self: "other")
    with pytest.raises(TrajectoryError, match="data_fingerprint differ"):
        run(trainer().train(0))
