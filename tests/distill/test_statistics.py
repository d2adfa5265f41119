"""The statistics phase (method aligned): its loss and gradients against a plain derivation, its targets, whole runs, ranks."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lad_dist.distill import statistics
from lad_dist.distill.crops import _in_rounds, best_crops
from lad_dist.distill.loop import Distillation
from lad_dist.distill.replay import ReplayRecord
from lad_dist.distill.start import DataFacts
from lad_dist.distill.student import Batch, Student, SyntheticSet
from lad_dist.distilled import DistilledSet
from lad_dist.errors import DistilledError, Interrupted, RecipeError, RunDirError
from lad_dist.evaluate.measure import planned_rows
from lad_dist.models import functional
from lad_dist.models.convnet import build, flat_parameters
from lad_dist.pipeline import open_pipeline
from lad_dist.profile import Profile
from lad_dist.progress import read_events
from lad_dist.recipe import Recipe
from lad_dist.trajectories.reader import Buffer

ALIGNED = {"iterations": 6, "optimizer": "adam", "schedule": "cosine", "lr_images": 0.05, "lr_labels": 0.2,
           "batch": 12, "checkpoint_every": 2}  # fmt: skip


@pytest.fixture
def problem():
    """(student, synthetic set, theta, target): 6 images of 3 classes, in float64."""
    draws = torch.Generator().manual_seed(0)
    module = build(3, 16, 3, 4, 2, seed=0, purpose=("test",)).double()
    images = torch.randn(6, 3, 16, 16, generator=draws, dtype=torch.float64)
    logits = torch.randn(6, 3, generator=draws, dtype=torch.float64)
    student, theta = Student(module), flat_parameters(module)
    _, vectors = statistics.statistics_of(module, student.layout.views(theta), images)
    ends = tuple(np.cumsum([v.shape[1] for v in vectors]).tolist())
    target = statistics.Target(torch.randn(3, ends[-1], generator=draws, dtype=torch.float64), ends)
    return student, SyntheticSet(images, logits, torch.tensor(0.05)), theta, target


def by_hand(student, synthetic, theta, target, labels, weight, first):
    """The loss written out image by image and layer by layer, with autograd through everything."""
    images = synthetic.images_SCHH.clone().requires_grad_()
    views = student.layout.views(theta)
    inputs, x = [images], images
    for block in range(2):
        w, b = views[f"features.{4 * block}.weight"], views[f"features.{4 * block}.bias"]
        g, s = views[f"features.{4 * block + 1}.weight"], views[f"features.{4 * block + 1}.bias"]
        x = F.avg_pool2d(F.relu(F.group_norm(F.conv2d(x, w, b, padding=1), 4, g, s)), 2)
        inputs.append(x)
    logits = F.linear(x.flatten(1), views["classifier.weight"], views["classifier.bias"])
    total, at = F.cross_entropy(logits, labels), 0
    for layer, x in enumerate(inputs[:-1]):
        mean = x.mean(dim=(2, 3))
        variance = (x - mean[:, :, None, None]).square().mean(dim=(2, 3))
        side = x.shape[2] // 4
        patches = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(len(x), side * side, -1)
        patch_mean = patches.mean(dim=2)
        patch_variance = (patches - patch_mean.unsqueeze(2)).square().mean(dim=2)
        for vector in (mean, variance, patch_mean, patch_variance):
            wanted = target.means_KF[:, at : at + vector.shape[1]]
            at += vector.shape[1]
            far = (vector.mean(dim=0) - wanted.mean(dim=0)).norm()
            present = labels.unique().tolist()
            far = far + sum((vector[labels == c].mean(dim=0) - wanted[c]).norm() for c in present) / len(present)
            total = total + weight * (first if layer == 0 else 1) * 0.5 * far
    return total.detach(), torch.autograd.grad(total, images)[0], logits.detach()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 2, 2], [0, 0, 0, 2, 2, 2]])
def test_loss_and_gradients_equal_the_plain_derivation(problem, labels, temperature):
    student, synthetic, theta, target = problem
    rows, labels = torch.arange(6), torch.tensor(labels)
    found = statistics.align(student, synthetic, Batch(rows), rows, labels, theta, target, 0.3, 10.0, temperature)
    loss, images, logits = by_hand(student, synthetic, theta, target, labels, 0.3, 10.0)
    torch.testing.assert_close(found.loss, loss)
    torch.testing.assert_close(found.by_rows.images_SCHH, images)
    torch.testing.assert_close(found.by_rows.labels_SK, (synthetic.logits_SK - logits / temperature) / 6)
    assert float(found.accuracy) == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    assert float(images.abs().max()) > 0


def test_a_part_of_the_set_leaves_the_rest_alone(problem):
    student, synthetic, theta, target = problem
    rows, labels = torch.tensor([4, 1]), torch.tensor([2, 0])
    found = statistics.align(student, synthetic, Batch(rows), torch.arange(2), labels, theta, target, 1.0, 1.0, 1.0)
    untouched = [0, 2, 3, 5]
    assert float(found.by_rows.images_SCHH[untouched].abs().max()) == 0
    assert float(found.by_rows.labels_SK[untouched].abs().max()) == 0
    assert float(found.by_rows.images_SCHH[rows].abs().min()) > 0


def test_a_batch_with_the_targets_statistics_has_only_cross_entropy(problem):
    student, synthetic, theta, _ = problem
    labels, rows = torch.tensor([0, 0, 1, 1, 2, 2]), torch.arange(6)
    logits, vectors = statistics.statistics_of(student.module, student.layout.views(theta), synthetic.images_SCHH)
    found = torch.cat(vectors, dim=1).detach()
    ends = tuple(np.cumsum([v.shape[1] for v in vectors]).tolist())
    target = statistics.Target(torch.stack([found[labels == c].mean(0) for c in range(3)]), ends)
    result = statistics.align(student, synthetic, Batch(rows), rows, labels, theta, target, 1.0, 10.0, 1.0)
    assert float(result.loss) == pytest.approx(float(F.cross_entropy(logits, labels)), abs=1e-3)
    assert bool(result.by_rows.images_SCHH.isfinite().all())


def test_targets_are_class_means_over_all_training_images(pipeline_of, monkeypatch):
    monkeypatch.setattr(statistics, "_ROWS", 7)
    pipeline = pipeline_of(method="aligned", distill=ALIGNED)
    work = Distillation(pipeline.context(), DataFacts.of(pipeline.data), Buffer(pipeline.run.trajectories))
    theta, data = work.windows.teacher(0), pipeline.data
    target = statistics.measure(work.student, theta, data)
    images, labels = data.train.batch(torch.arange(len(data.train)))
    _, vectors = statistics.statistics_of(work.student.module, work.student.layout.views(theta), images)
    every = torch.cat(vectors, dim=1)
    for c in range(data.classes):
        torch.testing.assert_close(target.means_KF[c], every[labels == c].mean(dim=0), rtol=1e-4, atol=1e-5)


def test_a_network_without_convolutions_is_refused():
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    with pytest.raises(RecipeError, match="has no convolution"):
        statistics.statistics_of(module, dict(module.named_parameters()), torch.zeros(1, 1, 2, 2))


# --- crops ----------------------------------------------------------------------------------------------------------


def test_rounds_take_one_crop_of_every_image_before_a_second():
    losses = np.array([[3.0, 0.5, 2.0], [1.0, 4.0, 2.5]])  # 2 crops of 3 images
    assert _in_rounds(losses).tolist() == [1, 3, 2, 5, 0, 4]


def test_best_crops(pipeline_of):
    data = pipeline_of().data
    scored: list[torch.Tensor] = []

    def logits_of(images):
        scored.append(images)
        return images.mean(dim=(1, 2, 3)).unsqueeze(1) * torch.eye(1, data.classes)

    images, indices = best_crops(data, logits_of, 3, 4, seed=0)
    again, same = best_crops(data, logits_of, 3, 4, seed=0)
    other, _ = best_crops(data, logits_of, 3, 4, seed=1)
    assert torch.equal(images, again) and indices.tolist() == same.tolist() and not torch.equal(images, other)
    labels = data.splits.train.labels_N.numpy()
    assert labels[indices].tolist() == [c for c in range(data.classes) for _ in range(3)]
    assert all(len(set(indices[3 * c : 3 * c + 3].tolist())) == 3 for c in range(data.classes))
    first = scored[0]  # class 0, whose logit is the mean brightness: the brightest crops win
    best = first.mean(dim=(1, 2, 3)).max()
    assert float(images[0].mean()) == pytest.approx(float(best))
    few, indices = best_crops(data, logits_of, 40, 2, seed=0)  # more than two crops of an image in the small classes
    assert min(data.counts) < 20 and len(few) == 40 * data.classes
    for c, (own, chosen) in enumerate(zip(few.split(40), indices.reshape(-1, 40), strict=True)):
        assert len(own.flatten(1).unique(dim=0)) > 25  # of small images, two crops may be the same pixels
        assert set(labels[chosen]) == {c}


# --- whole runs -----------------------------------------------------------------------------------------------------


def bytes_of(pipeline) -> bytes:
    return (pipeline.run.distilled / "tensors.safetensors").read_bytes()


def test_a_run_from_teachers_of_one_stage(tmp_path, small_recipe, silent):
    recipe = small_recipe(
        method="aligned",
        experts={"classifier_epochs": 0, "logit_adjustment": 1.0, "cutmix": 0.5, "momentum": 0.9, "schedule": "cosine"},
        distill=ALIGNED,
        evaluate={
            "seeds": 1,
            "baselines": ["teachers", "initial", "initial-teacher", "random-teacher", "distilled-teacher"],
        },
    )
    pipeline = open_pipeline(recipe, tmp_path / "run", Profile(fleet="off"), None, torch.device("cpu"), silent)
    pipeline.all()
    made = DistilledSet.load(pipeline.run.distilled)
    assert not torch.equal(made.images, made.initial_images) and made.labeller().weights
    assert not torch.equal(made.label_logits, made.initial_label_logits)  # they follow the teacher
    done = [e for e in read_events(pipeline.run.events) if e["kind"] == "iteration"]
    assert [[p for p, _, _ in e["windows"]] for e in done] == [["statistics"]] * 6
    assert done[-1]["loss_statistics"] < done[0]["loss_statistics"]
    assert not (pipeline.run.trajectories / "classifier").exists()
    from lad_dist import results

    rows = {row["source"]: row for row in results.read(pipeline.run.results)}
    assert rows["teachers"]["seed"] == 0 and rows["teachers"]["settings"]["epochs"] == 0
    assert "logit adjustment 1" in rows["teachers"]["settings"]["labelled_by"]
    assert "The teachers themselves" in (pipeline.run.report / "index.html").read_text()
    assert "Statistics loss" in (pipeline.run.report / "index.html").read_text()


def test_stopped_anywhere_the_same_set_comes_out(pipeline_of, monkeypatch):
    fields = {"method": "aligned", "distill": ALIGNED}
    straight, stopped = pipeline_of("straight", **fields), pipeline_of("stopped", **fields)
    straight.distill()
    original = Distillation._align
    for at in (1, 4):
        with monkeypatch.context() as patch:

            def stop(self, synthetic, expert, iteration, at=at):
                if iteration == at:
                    raise Interrupted("stopped by the test")
                return original(self, synthetic, expert, iteration)

            patch.setattr(Distillation, "_align", stop)
            with pytest.raises(Interrupted):
                stopped.distill()
    stopped.distill()
    assert bytes_of(straight) == bytes_of(stopped)
    replayed = pipeline_of("replayed", **fields)
    replayed.distill(straight.run.root)
    assert bytes_of(straight) == bytes_of(replayed)


def test_two_ranks_make_the_set_of_one(pipeline_of):
    fields = {"method": "aligned", "distill": ALIGNED}
    alone, both = pipeline_of("alone", **fields), pipeline_of("both", **fields)
    alone.distill()
    both.profile = Profile(fleet="off", ranks=2, threads=1)
    both.distill()
    ours, theirs = (DistilledSet.load(p.run.distilled) for p in (both, alone))
    torch.testing.assert_close(ours.images, theirs.images, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.label_logits, theirs.label_logits, rtol=1e-4, atol=1e-4)


def test_it_starts_from_another_set(pipeline_of, monkeypatch):
    lad = pipeline_of("lad")
    lad.distill()
    for start in (lad.run.root, lad.run.distilled):
        hybrid = pipeline_of(f"from-{start.name}", method="aligned", distill={**ALIGNED, "initial_from": str(start)})
        hybrid.distill()
        ours, theirs = DistilledSet.load(hybrid.run.distilled), DistilledSet.load(lad.run.distilled)
        assert torch.equal(ours.initial_images, theirs.images)
        assert torch.equal(ours.initial_label_logits, theirs.label_logits)
    again = pipeline_of("again", method="aligned", distill={**ALIGNED, "initial_from": str(lad.run.distilled)})
    again.distill(hybrid.run.root)
    made_record = ReplayRecord.read(hybrid.run.root, again.recipe, again.run)
    assert bytes_of(again) == bytes_of(hybrid)
    lad.run.distilled.rename(lad.run.root / "before")
    with lad.run.publish_folder(lad.run.distilled) as folder:
        made = DistilledSet.load(lad.run.root / "before")
        made.images = made.images + 0.1
        made.write(folder)
    other = pipeline_of("another", method="aligned", distill={**ALIGNED, "initial_from": str(lad.run.distilled)})
    with pytest.raises(DistilledError, match=r"is not the set that .* started from"):
        other.distill(hybrid.run.root)
    with monkeypatch.context() as patch:
        patch.setattr(ReplayRecord, "read", classmethod(lambda cls, *_: replace(made_record, start=None)))
        other.distill(hybrid.run.root)
    shutil.rmtree(other.run.distilled)
    with pytest.raises(RunDirError, match="its initial set"):
        other.distill(hybrid.run.root)
    for said, changes in {
        "has 2 images per class; valid: a set of ipc 1": {"ipc": 1},
        "other training images": {"data": {"n_max": 15}},
        "whitened otherwise": {"data": {"whitening": "none"}},
    }.items():
        with pytest.raises(DistilledError, match=f"initial_from: .*{said}"):  # before anything is trained or written
            pipeline_of("other", **changes, distill={"initial_from": str(lad.run.root)})
    assert not (lad.run.root.parent / "other").exists()
    with pytest.raises(DistilledError, match="is not a distilled set"):
        pipeline_of("other", distill={"initial_from": str(lad.run.root.parent / "nowhere")})


def test_another_set_s_labels_are_those_of_the_method(pipeline_of):
    start = pipeline_of("start")
    start.distill()
    hard = pipeline_of("hard", method="mtt", distill={"initial_from": str(start.run.root)})
    hard.distill()
    found = DistilledSet.load(hard.run.distilled)
    assert torch.equal(found.initial_images, DistilledSet.load(start.run.distilled).images)
    assert torch.equal(found.soft_labels, F.one_hot(found.labels, 10).float()) and found.is_hard
    for source, labels in (("distilled", "hard"), ("initial", "hard"), ("random-soft", "soft"), ("random", "hard")):
        (row, *_) = planned_rows(hard.recipe, hard.data, hard.run, source)
        assert row["settings"]["labels"] == labels and row["keeps"]["labels"] == (20 if labels == "hard" else 800)


def test_a_network_without_convolutions_is_refused_before_anything_is_trained(tmp_path, small_recipe, silent):
    recipe = small_recipe(
        method="aligned", model={"network": "mlp"}, distill=ALIGNED, evaluate={"architectures": ["convnet"]}
    )
    with pytest.raises(RecipeError, match="has no convolution"):
        open_pipeline(recipe, tmp_path / "run", Profile(fleet="off"), None, torch.device("cpu"), silent)
    assert not (tmp_path / "run").exists()


def test_it_joins_the_matching_phases(pipeline_of):
    """LAD with a statistics phase beside its own two."""
    pipeline = pipeline_of(distill={"lambda_statistics": 0.1, "iterations": 2})
    pipeline.distill()
    done = [e for e in read_events(pipeline.run.events) if e["kind"] == "iteration"]
    assert [[p for p, _, _ in e["windows"]] for e in done] == [["representation", "classifier", "statistics"]] * 2


def test_what_does_not_fit_is_refused():
    for said, doc in {
        "method lad .*needs classifier experts": {"experts": {"classifier_epochs": 0}},
        "buffer.start_after: the statistics phase": {
            "distill": {"lambda_statistics": 1.0},
            "buffer": {"start_after": 2},
        },
        "at most 1 together": {"experts": {"cutmix": 0.7, "mixup": 0.5}},
        "warmup_epochs: 101 is above": {"experts": {"warmup_epochs": 101}},
        "experts.precision: bfloat16 is convnet's": {
            "model": {"network": "resnet18"},
            "experts": {"precision": "bfloat16"},
        },
    }.items():
        with pytest.raises(ValueError, match=said):
            Recipe.model_validate(doc)


def test_logits_of_the_teacher_are_those_of_the_network(problem):
    student, synthetic, theta, _ = problem
    views = student.layout.views(theta)
    logits, _ = statistics.statistics_of(student.module, views, synthetic.images_SCHH)
    assert torch.equal(logits, functional.logits(student.module, views, synthetic.images_SCHH))
