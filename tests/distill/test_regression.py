"""The regression phase: its loss and gradients against a plain derivation, its real batches, and whole runs with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from lad_dist.distill.loop import Distillation
from lad_dist.distill.regression import RealBatches, RealFeatures, kept_features, regress
from lad_dist.distill.start import DataFacts
from lad_dist.distill.state import _trajectory_hash
from lad_dist.distill.student import Batch, Student, SyntheticSet
from lad_dist.distilled import DistilledSet
from lad_dist.errors import Interrupted, NumericalError
from lad_dist.models import functional
from lad_dist.models.convnet import build, flat_parameters
from lad_dist.progress import read_events
from lad_dist.recipe import Recipe
from lad_dist.trajectories.reader import Buffer

CPU = torch.device("cpu")
REGRESSION = {"lambda_regression": 1.0, "optimizer": "adam", "schedule": "cosine", "lr_images": 0.02, "lr_labels": 0.02,
              "regression_epoch_max": 4, "regression_dropout": 0.3}  # fmt: skip


@pytest.fixture
def problem():
    """(student, synthetic set, theta, real features): 6 images of 3 classes, in float64."""
    draws = torch.Generator().manual_seed(0)
    module = build(1, 8, 3, 4, 2, seed=0, purpose=("test",)).double()
    images = torch.randn(6, 1, 8, 8, generator=draws, dtype=torch.float64)
    logits = torch.randn(6, 3, generator=draws, dtype=torch.float64)
    student, theta = Student(module), flat_parameters(module)
    real_images = torch.randn(9, 1, 8, 8, generator=draws, dtype=torch.float64)
    features = functional.features(module, student.layout.views(theta), real_images).detach()
    targets = torch.softmax(torch.randn(9, 3, generator=draws, dtype=torch.float64), dim=1)
    real = RealFeatures(features, targets, torch.arange(9) % 3)
    return student, SyntheticSet(images, logits, torch.tensor(0.05)), theta, real


def by_normal_equations(student, synthetic, theta, real, ridge, rows):
    """The same loss by the primal problem: weights (D + 1, K) from (F'F + s I)^-1 F' p, with autograd through everything."""
    images, logits = synthetic.images_SCHH.clone().requires_grad_(), synthetic.logits_SK.clone().requires_grad_()
    features = F.pad(functional.features(student.module, student.layout.views(theta), images[rows]), (0, 1), value=1.0)
    p = torch.softmax(logits[rows], dim=1) - 1 / 3
    scale = ridge * features.square().sum(dim=1).mean()
    weights = torch.linalg.solve(
        features.T @ features + scale * torch.eye(features.shape[1], dtype=features.dtype), features.T @ p
    )
    predicted = 1 / 3 + F.pad(real.features_RD, (0, 1), value=1.0) @ weights
    loss = (predicted - real.targets_RK).square().sum(dim=1).mean()
    return loss.detach(), *torch.autograd.grad(loss, [images, logits])


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4, 5], [4, 1, 5]])
def test_loss_and_gradients_equal_the_primal_problem(problem, rows):
    student, synthetic, theta, real = problem
    rows = torch.tensor(rows)
    found = regress(student, synthetic, Batch(rows), torch.arange(len(rows)), theta, real, ridge=0.1)
    loss, images, labels = by_normal_equations(student, synthetic, theta, real, 0.1, rows)
    torch.testing.assert_close(found.loss, loss)
    torch.testing.assert_close(found.by_rows.images_SCHH, images)
    torch.testing.assert_close(found.by_rows.labels_SK, labels)
    assert float(images.abs().max()) > 0 and float(labels.abs().max()) > 0


def test_features_left_out_take_no_part(problem):
    """The same as a network without them: their real values do not matter, and the rest is the smaller primal problem."""
    student, synthetic, theta, real = problem
    rows, features = torch.arange(6), real.features_RD.shape[1]
    kept = torch.arange(features) % 2
    found = regress(student, synthetic, Batch(rows), rows, theta, real, ridge=0.1, kept_D=kept)
    other = RealFeatures(real.features_RD + 100 * (1 - kept), real.targets_RK, real.labels_R)
    again = regress(student, synthetic, Batch(rows), rows, theta, other, ridge=0.1, kept_D=kept)
    torch.testing.assert_close(found.loss, again.loss)
    torch.testing.assert_close(found.by_rows.images_SCHH, again.by_rows.images_SCHH)

    def rest(module, views, images, all_of=functional.features):
        return all_of(module, views, images)[:, kept == 1]

    smaller = RealFeatures(real.features_RD[:, kept == 1], real.targets_RK, real.labels_R)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(functional, "features", rest)
        loss, images, labels = by_normal_equations(student, synthetic, theta, smaller, 0.1, rows)
    torch.testing.assert_close(found.loss, loss)
    torch.testing.assert_close(found.by_rows.images_SCHH, images)
    torch.testing.assert_close(found.by_rows.labels_SK, labels)


def test_which_features_are_kept():
    recipe = Recipe.model_validate({"distill": {"regression_dropout": 0.75}})
    first, again, next_one = (kept_features(recipe, 64, iteration) for iteration in (3, 3, 4))
    assert first.sum() == 16 and torch.equal(first, again) and not torch.equal(first, next_one)
    assert kept_features(recipe, 1, 0).tolist() == [1.0]
    assert kept_features(Recipe(), 64, 0) is None
    with pytest.raises(ValidationError, match="regression_dropout"):
        Recipe.model_validate({"distill": {"regression_dropout": 1.0}})


def test_a_classifier_that_recovers_the_targets_has_no_loss(problem):
    """Real images that are the synthetic ones, with their soft labels as targets: next to no ridge, next to no loss."""
    student, synthetic, theta, _ = problem
    features = functional.features(student.module, student.layout.views(theta), synthetic.images_SCHH).detach()
    p = torch.softmax(synthetic.logits_SK, dim=1)
    real = RealFeatures(features, p, p.argmax(dim=1))
    found = regress(student, synthetic, Batch(torch.arange(6)), torch.arange(6), theta, real, ridge=1e-9)
    assert float(found.loss) < 1e-8 and float(found.accuracy) == 1.0


def test_real_batches_hold_every_class_equally_often(pipeline_of):
    pipeline = pipeline_of(distill={**REGRESSION, "regression_batch": 40, "regression_targets": "hard"})
    work = Distillation(pipeline.context(), DataFacts.of(pipeline.data), Buffer(pipeline.run.trajectories))
    batches = RealBatches(pipeline.recipe, pipeline.data, None)
    theta = work.windows.weights("representation", 0, 0)
    first, again, other = (batches.features(work.student, theta, i) for i in (0, 0, 1))
    each = -(-40 // pipeline.data.classes)
    assert np.bincount(first.labels_R.numpy()).tolist() == [each] * pipeline.data.classes
    assert torch.equal(first.targets_RK, F.one_hot(first.labels_R, pipeline.data.classes).float())
    assert torch.equal(first.features_RD, again.features_RD)
    assert not torch.equal(first.features_RD, other.features_RD)


def bytes_of(pipeline) -> bytes:
    return (pipeline.run.distilled / "tensors.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["lad", "lad-fr"])
def test_stopped_anywhere_the_same_set_comes_out(pipeline_of, monkeypatch, method):
    fields = {"method": method, "distill": REGRESSION}
    straight, stopped = pipeline_of("straight", **fields), pipeline_of("stopped", **fields)
    straight.distill()
    original = Distillation._regress
    for at in (1, 4):
        with monkeypatch.context() as patch:

            def stop(self, synthetic, theta, iteration, at=at):
                if iteration == at:
                    raise Interrupted("stopped by the test")
                return original(self, synthetic, theta, iteration)

            patch.setattr(Distillation, "_regress", stop)
            with pytest.raises(Interrupted):
                stopped.distill()
    stopped.distill()
    assert bytes_of(straight) == bytes_of(stopped)
    ours = DistilledSet.load(straight.run.distilled)
    assert not torch.equal(ours.images, ours.initial_images)
    done = [e for e in read_events(straight.run.events) if e["kind"] == "iteration"]
    phases = [name for name, _, _ in done[0]["windows"]]
    assert phases == (["regression"] if method == "lad-fr" else ["representation", "classifier", "regression"])
    assert all(0 <= e["accuracy_regression"] <= 1 and e["loss_regression"] > 0 for e in done)


def test_a_phase_that_runs_away_is_named_and_the_last_good_state_kept(pipeline_of, monkeypatch):
    pipeline = pipeline_of(method="lad-fr", distill=REGRESSION)
    original = Distillation._regress

    def broken(self, synthetic, theta, iteration):
        result = original(self, synthetic, theta, iteration)
        if iteration == 3:
            result.by_rows.images_TCHH[0] = float("nan")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Distillation, "_regress", broken)
        with pytest.raises(NumericalError, match=r"iteration 4: the regression phase produced NaN or Inf"):
            pipeline.distill()
    pipeline.distill()
    straight = pipeline_of("straight", method="lad-fr", distill=REGRESSION)
    straight.distill()
    assert bytes_of(pipeline) == bytes_of(straight)


def test_a_cosine_ends_where_the_iterations_do_and_is_part_of_the_course():
    def hash_of(**distill) -> str:
        return _trajectory_hash(Recipe.model_validate({"distill": distill}))

    assert hash_of(iterations=10) == hash_of(iterations=20)
    assert hash_of(iterations=10, schedule="cosine") != hash_of(iterations=20, schedule="cosine")
    assert hash_of() != hash_of(lambda_regression=0.5)


def test_the_hash_of_a_recipe_that_uses_nothing_new_is_what_it_was():
    """Computed by the commit before the regression phase: checkpoints of then are continued."""
    assert _trajectory_hash(Recipe()) == "83cf22f71c2fdd370ed77055b773e4b76ed0cf11019cb06235998a78ced0dde5"


def test_what_does_not_fit_is_refused():
    faults = {
        "at most 41": {"distill": {"lambda_regression": 1.0, "regression_epoch_max": 42}, "experts": {"epochs": 40}},
        "every phase has weight 0": {"distill": {"lambda_representation": 0.0, "lambda_classifier": 0.0}},
        "soft targets": {"distill": {"lambda_regression": 1.0}, "buffer": {"start_after": 2}},
    }
    for said, doc in faults.items():
        with pytest.raises(ValueError, match=said):
            Recipe.model_validate(doc)
    Recipe.model_validate({"method": "lad-fr", "experts": {"epochs": 12, "classifier_epochs": 1}})  # no windows
