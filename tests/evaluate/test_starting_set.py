"""The set that distillation starts from, and real images with the experts' labels, as sources of their own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from lad_dist import results
from lad_dist.distilled import DistilledSet
from lad_dist.errors import DistilledError, TrajectoryError
from lad_dist.evaluate.baselines import random_real
from lad_dist.evaluate.measure import planned_rows
from lad_dist.evaluate.sources import drawn_as, settings_of, training_set
from lad_dist.models.convnet import build
from lad_dist.trajectories.reader import Buffer

EVERY = torch.arange(20)


def made(pipeline, source, seed=0):
    """(images, label probabilities) of the whole set that the network of ``seed`` is trained on."""
    return training_set(pipeline.recipe, pipeline.data, pipeline.run, source, seed).batch_of(EVERY)


def test_the_starting_set_is_what_a_distillation_that_moves_nothing_publishes(pipeline_of):
    still = {"iterations": 1, "lr_images": 0.0, "lr_labels": 0.0, "label_temperature": 2.0}
    unmoved = pipeline_of("unmoved", distill=still)
    moved = pipeline_of("moved", distill={"label_temperature": 2.0})
    for pipeline in (unmoved, moved):
        pipeline.distill()
    images, p = made(moved, "initial")
    expected = DistilledSet.load(unmoved.run.distilled)
    assert torch.equal(images, expected.images) and torch.equal(p, expected.soft_labels)
    assert not torch.equal(made(moved, "distilled")[0], images) and not torch.equal(made(moved, "distilled")[1], p)


def test_it_is_kept_through_a_checkpoint(pipeline_of, monkeypatch):
    from lad_dist.distill.loop import Distillation
    from lad_dist.errors import NumericalError

    whole, stopped = pipeline_of("whole"), pipeline_of("stopped")
    whole.distill()
    iterate = Distillation.iterate

    def failing(self, state, path):
        if state.iteration == 4:
            raise NumericalError("stopped here")
        return iterate(self, state, path)

    monkeypatch.setattr(Distillation, "iterate", failing)
    with pytest.raises(NumericalError):
        stopped.distill()
    monkeypatch.undo()
    stopped.distill()
    a, b = (DistilledSet.load(p.run.distilled) for p in (whole, stopped))
    assert torch.equal(a.initial_label_logits, b.initial_label_logits) and torch.equal(a.label_logits, b.label_logits)


def test_it_shares_the_distilled_sets_draws_and_rate(pipeline_of):
    pipeline = pipeline_of(distill={"lr_alpha": 1e-3})
    pipeline.distill()
    assert drawn_as("initial") == drawn_as("distilled")
    of = [settings_of(pipeline.recipe, pipeline.data, pipeline.run, s) for s in ("initial", "distilled", "random-soft")]
    assert of[0] == of[1] and of[0].lr != of[2].lr == pipeline.recipe.distill.alpha


def test_a_set_of_an_older_version_says_that_its_start_is_not_known(pipeline_of):
    pipeline = pipeline_of(evaluate={"baselines": ["initial"]})
    pipeline.distill()
    old = DistilledSet.load(pipeline.run.distilled)
    old.initial_label_logits = None
    shutil.rmtree(pipeline.run.distilled)
    pipeline.run.distilled.mkdir()
    old.write(pipeline.run.distilled)
    with pytest.raises(DistilledError, match=r"holds no initial label logits.*evaluate\.baselines"):
        pipeline.evaluate("initial")


@pytest.mark.parametrize(("method", "stage", "epoch"), [("lad", "classifier", 3), ("datm", "representation", 4)])
def test_soft_labels_of_random_images_are_the_mean_logits_of_all_experts(pipeline_of, method, stage, epoch):
    pipeline = pipeline_of(method=method, distill={"label_temperature": 3.0})
    picked = random_real(pipeline.recipe, pipeline.data, 1)
    images, p = made(pipeline, "random-soft", seed=1)
    hard_images, hard = made(pipeline, "random", seed=1)
    assert torch.equal(images, hard_images) and torch.equal(
        images, pipeline.data.train.batch(torch.from_numpy(picked))[0]
    )
    buffer, logits = Buffer(pipeline.run.trajectories), []
    for expert in range(2):
        weights = torch.tensor(buffer.read("representation", expert, 4))
        if stage == "classifier":
            tail = torch.tensor(buffer.read("classifier", expert, epoch))
            weights[-len(tail) :] = tail
        network = build(1, 8, 10, 4, 2, seed=0, purpose=("any",))
        torch.nn.utils.vector_to_parameters(weights, network.parameters())
        with torch.no_grad():
            logits.append(network(images))
    expected = ((logits[0] + logits[1]) / 2 / 3.0).softmax(dim=1)
    torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)
    assert (p.argmax(dim=1) != hard.argmax(dim=1)).any()  # wrong labels are left as they are


def test_herding_soft_labels_the_images_of_herding(pipeline_of):
    pipeline = pipeline_of()
    soft, hard = made(pipeline, "herding-soft"), made(pipeline, "herding")
    assert torch.equal(soft[0], hard[0]) and not torch.equal(soft[1], hard[1])
    assert (pipeline.run.results.parent / "chosen" / "herding.json").exists()  # one choice for both
    (row, *_) = planned_rows(pipeline.recipe, pipeline.data, pipeline.run, "herding-soft")
    assert row["settings"]["labels"] == "soft"
    assert row["settings"]["labelled_by"] == "mean logits of 2 classifier experts, epoch 3, temperature 1"
    assert row["settings"]["chosen_by"] == "expert 0, representation epoch 4"


def test_an_expert_that_is_missing_is_named(pipeline_of):
    pipeline = pipeline_of(experts={"count": 3})
    with pytest.raises(TrajectoryError, match="representation expert 2 epoch 4 is missing"):
        pipeline.evaluate("random-soft")


def test_another_labelling_is_measured_again(pipeline_of, small_recipe):
    pipeline = pipeline_of(evaluate={"seeds": 1})
    pipeline.evaluate("random-soft")
    softer = replace(pipeline, recipe=small_recipe(evaluate={"seeds": 1}, distill={"label_temperature": 5.0}))
    softer.evaluate("random-soft")
    (row,) = results.read(pipeline.run.results)
    assert row["settings"]["labelled_by"].endswith("temperature 5")


def test_an_imported_set_has_no_start_and_run_says_what_it_leaves_out(pipeline_of, silent):
    pipeline = pipeline_of(evaluate={"seeds": 1, "baselines": ["initial", "random-soft", "random"]})
    pipeline.distill()
    meta = pipeline.run.distilled / "meta.json"
    doc = json.loads(meta.read_text())
    assert results.wanted(pipeline.recipe, pipeline.run) == ["distilled", "initial", "random-soft", "random"]
    meta.write_text(json.dumps(doc | {"method": "imported"}))
    assert results.wanted(pipeline.recipe, pipeline.run) == ["distilled", "random"]


def test_the_images_of_random_soft_are_drawn_anew_for_each_seed(pipeline_of):
    pipeline = pipeline_of()
    a, b = (made(pipeline, "random-soft", seed)[0].numpy() for seed in (0, 1))
    assert not np.array_equal(a, b)
    assert torch.equal(made(pipeline, "random-soft-plain")[1], made(pipeline, "random-soft")[1])


def test_a_set_that_did_not_keep_its_start_is_measured_without_it(pipeline_of):
    """As versions before wrote it: `run` goes on and leaves `initial` out."""
    from safetensors.torch import load_file, save_file

    from lad_dist import results

    pipeline = pipeline_of("older")
    pipeline.experts()
    pipeline.distill()
    assert "initial" in results.wanted(pipeline.recipe, pipeline.run)
    file = pipeline.run.distilled / "tensors.safetensors"
    tensors = load_file(file)
    del tensors["initial_label_logits"]
    save_file(tensors, file)
    assert "initial" not in results.wanted(pipeline.recipe, pipeline.run)
    assert "random-soft" in results.wanted(pipeline.recipe, pipeline.run)
