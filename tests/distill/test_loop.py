"""The distillation loop: phases of every method, resuming bit for bit, and what happens when numbers run away."""

from __future__ import annotations

import json
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lad_dist.data.longtail import head_medium_tail
from lad_dist.distill.initial import vary_repeats
from lad_dist.distill.loop import Distillation, SaveClock, class_weights
from lad_dist.distill.start import DataFacts
from lad_dist.distill.state import State
from lad_dist.distill.student import Student
from lad_dist.distill.update import Optimizers
from lad_dist.distilled import HARD_LABEL_LOGIT, DistilledSet
from lad_dist.errors import DistilledError, Interrupted, NumericalError, TrajectoryError
from lad_dist.models import functional
from lad_dist.progress import read_events
from lad_dist.rundir import load_tensors, save_tensors
from lad_dist.trajectories.reader import Buffer

CPU = torch.device("cpu")


def events(pipeline, kind: str) -> list[dict]:
    return [e for e in read_events(pipeline.run.events) if e["kind"] == kind]


def work_of(pipeline) -> Distillation:
    return Distillation(pipeline.context(), DataFacts.of(pipeline.data), Buffer(pipeline.run.trajectories))


def result(pipeline) -> tuple[bytes, float]:
    """All that the distilled set came to."""
    distilled = DistilledSet.load(pipeline.run.distilled)
    return (pipeline.run.distilled / "tensors.safetensors").read_bytes(), distilled.lr


def checkpoint(pipeline) -> dict[str, torch.Tensor]:
    state = State.load(pipeline.run.distill_checkpoint, pipeline.recipe, CPU)
    o = state.optimizers
    return {"images": o.images_SCHH, "logits": o.logits_SK, "alpha": o.alpha, "initial": state.initial_SCHH,
            "iteration": torch.tensor(state.iteration), **o.momentum_tensors()}  # fmt: skip


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def fail_at(monkeypatch, iteration: int, error: BaseException) -> None:
    """Stop the run in the middle of an iteration, between its two phases."""
    phases = []

    def run(self, synthetic, phase, path, original=Student.run):
        phases.append(phase)
        if len(phases) == 2 * iteration + 2:
            raise error
        return original(self, synthetic, phase, path)

    monkeypatch.setattr(Student, "run", run)


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def undisturbed(pipeline_of):
    """A run of six iterations (checkpoints every two)."""
    pipeline = pipeline_of("undisturbed")
    pipeline.distill()
    return pipeline


@pytest.mark.parametrize("at", [0, 1, 3, 5])
def test_interrupted_and_continued_equals_undisturbed(pipeline_of, undisturbed, monkeypatch, at):
    pipeline = pipeline_of("interrupted")
    with monkeypatch.context() as patch:
        fail_at(patch, at, Interrupted("stop"))
        with pytest.raises(Interrupted):
            pipeline.distill()
    assert not pipeline.run.distilled.exists()
    assert int(checkpoint(pipeline)["iteration"]) == at
    pipeline.distill()
    assert result(pipeline) == result(undisturbed)
    assert equal(checkpoint(pipeline), checkpoint(undisturbed))
    assert [e["iteration"] for e in events(pipeline, "iteration")] == [1, 2, 3, 4, 5, 6]


def test_killed_between_checkpoints_equals_undisturbed(pipeline_of, undisturbed, monkeypatch):
    pipeline = pipeline_of("killed")
    with monkeypatch.context() as patch:
        fail_at(patch, 3, SystemError("as a kill: nobody saves anything"))
        with pytest.raises(SystemError):
            pipeline.distill()
    assert int(checkpoint(pipeline)["iteration"]) == 2
    pipeline.distill()
    assert result(pipeline) == result(undisturbed)


@pytest.mark.parametrize(
    "fields", [{"gradient": "recompute"}, {"gradient": "captured"}, {"checkpoint_every": 100}, {"memory_gb": 1e-6}]
)
def test_how_it_is_computed_does_not_change_the_result(pipeline_of, undisturbed, fields):
    pipeline = pipeline_of("otherwise", distill=fields)
    pipeline.distill()
    ours, theirs = (DistilledSet.load(p.run.distilled) for p in (pipeline, undisturbed))
    torch.testing.assert_close(ours.images, theirs.images, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.label_logits, theirs.label_logits, rtol=1e-5, atol=1e-6)


def test_one_iteration_can_be_redone_alone(pipeline_of):
    pipeline = pipeline_of()
    work = [work_of(pipeline) for _ in range(2)]
    work[0].phases(0)
    first, second = work[0].phases(4), work[1].phases(4)
    for a, b in zip(first, second, strict=True):
        assert (a.window.expert, a.window.epoch) == (b.window.expert, b.window.epoch)
        for x, y in zip(a.phase.batches, b.phase.batches, strict=True):
            assert torch.equal(x.rows_B, y.rows_B) and x.draw.operation == y.draw.operation
            assert (x.draw.values_BD == y.draw.values_BD).all()


def test_batches_are_permutations_that_are_refilled(pipeline_of):
    pipeline = pipeline_of(distill={"student_steps": 9, "batch": 6})
    batches = work_of(pipeline).phases(0)[0].phase.batches
    assert [len(b.rows_B) for b in batches] == [6, 6, 6, 2, 6, 6, 6, 2, 6]
    first, second = torch.cat([b.rows_B for b in batches[:4]]), torch.cat([b.rows_B for b in batches[4:8]])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(20))
    assert first.tolist() != second.tolist()
    assert all(len(b.draw.values_BD) == len(b.rows_B) for b in batches)
    larger = pipeline_of("larger", distill={"batch": 500})
    batches = work_of(larger).phases(0)[0].phase.batches
    assert {len(b.rows_B) for b in batches} == {20}


def test_a_checkpoint_of_another_recipe_or_damaged(pipeline_of, undisturbed):
    path, recipe = undisturbed.run.distill_checkpoint, undisturbed.recipe
    other = recipe.model_copy(update={"seed": 1})
    with pytest.raises(DistilledError, match="another recipe"):
        State.load(path, other, CPU)
    (shard,) = path.rglob("*.safetensors")
    assert str(shard.relative_to(path)) == "iteration-000006/shard-000-of-001.safetensors"
    raw = shard.read_bytes()
    for damaged in (raw[:-7], raw[:20], b"", b"\xff" * len(raw)):
        shard.write_bytes(damaged)
        with pytest.raises(DistilledError, match="iteration-000006: is not a readable checkpoint"):
            State.load(path, recipe, CPU)
    shard.rename(shard.with_name("shard-001-of-002.safetensors"))
    with pytest.raises(DistilledError, match="shards are missing"):
        State.load(path, recipe, CPU)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("images", lambda t: t.sum(), "its images are a single number"),
        (
            "images",
            lambda t: t.flatten(1),
            r"images is torch.float32 of shape \(20, .*\); valid: floats, a row for each of 20",
        ),
        ("images", lambda t: t.long(), "images is torch.int64"),
        ("momentum_images", lambda t: t[:5], r"momentum_images is torch.float32 of shape \(5, "),
        ("label_logits", lambda t: t[:4], r"label_logits is torch.float32 of shape \(4, "),
        ("initial_images", lambda t: t.sum(), r"initial_images is torch.float32 of shape \(\)"),
        ("alpha", lambda t: t.expand(3).clone(), r"alpha is torch.float32 of shape \(3,\)"),
        ("images", None, "it is not a whole safetensors file"),
        ("iteration", "-1", "it says iteration -1"),
        ("iteration", "x", "invalid literal"),
        ("recipe_hash", None, "'recipe_hash'"),
    ],
)
def test_tensors_that_do_not_fit_are_named(undisturbed, tmp_path, name, change, said):
    """With a right checksum: by another program."""
    shutil.copytree(undisturbed.run.distill_checkpoint, tmp_path / "distill")
    (shard,) = (tmp_path / "distill").rglob("*.safetensors")
    tensors, metadata = load_tensors(shard)
    part = tensors if name in tensors else metadata
    if change is None:
        del part[name]
    else:
        part[name] = change(part[name]) if callable(change) else change
    save_tensors(tensors, shard, metadata)
    with pytest.raises(DistilledError, match=rf"iteration-000006: is not a readable checkpoint \(.*{said}"):
        State.load(tmp_path / "distill", undisturbed.recipe, CPU)


@pytest.mark.parametrize("content", [b"", bytes(4000), b"PAR1" * 100], ids=["empty", "zeros", "something else"])
def test_a_damaged_shard_is_named(undisturbed, tmp_path, content):
    shutil.copytree(undisturbed.run.distill_checkpoint, tmp_path / "distill")
    (shard,) = (tmp_path / "distill").rglob("*.safetensors")
    shard.write_bytes(content)
    with pytest.raises(DistilledError, match=rf"iteration-000006: is not a readable checkpoint \({shard.name}: it is"):
        State.load(tmp_path / "distill", undisturbed.recipe, CPU)


def test_no_flipped_bit_in_a_checkpoint_passes(undisturbed, tmp_path):
    recipe = undisturbed.recipe
    shutil.copytree(undisturbed.run.distill_checkpoint, tmp_path / "distill")
    (shard,) = (tmp_path / "distill").rglob("*.safetensors")
    good, draws = shard.read_bytes(), random.Random(0)
    header = int.from_bytes(good[:8], "little") + 8
    for place in (*range(header), *(draws.randrange(len(good)) for _ in range(300))):
        bad = bytearray(good)
        bad[place] ^= 1 << draws.randrange(8)
        shard.write_bytes(bad)
        with pytest.raises(DistilledError, match="iteration-000006"):
            State.load(tmp_path / "distill", recipe, CPU)


def test_a_checkpoint_of_a_version_without_checksums_is_still_read(undisturbed, tmp_path):
    shutil.copytree(undisturbed.run.distill_checkpoint, tmp_path / "distill")
    (shard,) = (tmp_path / "distill").rglob("*.safetensors")
    tensors, metadata = load_tensors(shard)
    del metadata["sha256"]
    save_file(tensors, shard, metadata)
    state = State.load(tmp_path / "distill", undisturbed.recipe, CPU)
    assert state is not None and torch.equal(state.optimizers.images_SCHH, tensors["images"])


class _KilledError(Exception):
    """As SIGKILL: nothing is saved on the way out."""


def test_a_run_that_is_killed_again_and_again_gets_on(pipeline_of, undisturbed, monkeypatch):
    """checkpoint_every alone would have it begin at 0 each time."""
    pipeline = pipeline_of("killed", distill={"checkpoint_every": 10_000})
    iterate, done = Distillation.iterate, []

    def killed(self, state, path):
        if len(done) == 2:
            raise _KilledError
        done.append(state.iteration)
        return iterate(self, state, path)

    monkeypatch.setattr(SaveClock, "due", lambda self: True)
    with monkeypatch.context() as patched:
        patched.setattr(Distillation, "iterate", killed)
        for _ in range(2):
            done.clear()
            with pytest.raises(_KilledError):
                pipeline.distill()
    pipeline.distill()
    assert [e["iteration"] for e in events(pipeline, "distill-started")] == [0, 2, 4]
    assert result(pipeline) == result(undisturbed)


def test_checkpoints_by_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("lad_dist.distill.loop.time", SimpleNamespace(monotonic=lambda: now[0]))

    def saved_at(step: float, until: float, cost: float = 0.0) -> list[float]:
        """Iterations of ``step`` seconds."""
        clock, found, begun = SaveClock(), [], now[0]
        while now[0] - begun < until:
            now[0] += step
            if clock.due():
                found.append(round(now[0] - begun, 3))
                clock.saved(cost)
        return found

    assert saved_at(0.5, 200) == [1, 2, 4, 8, 16, 32, 64, 124, 184]
    assert saved_at(5.0, 13) == [5, 10]  # killed after 13 s, it has saved two iterations
    assert saved_at(90.0, 270) == [90, 180, 270]
    assert saved_at(0.5, 100, cost=1.0) == [1, 21, 42, 84]  # a twentieth of the time at most


def test_state_round_trip_keeps_every_bit(undisturbed, tmp_path):
    state = State.load(undisturbed.run.distill_checkpoint, undisturbed.recipe, CPU)
    state.save(tmp_path / "again", undisturbed.recipe)
    again = State.load(tmp_path / "again", undisturbed.recipe, CPU)
    assert again.iteration == 6 and again.label_source == state.label_source
    assert set(state.label_source) == {"images_no_expert_classified", "images_repeated"}
    assert equal(again.optimizers.momentum_tensors(), state.optimizers.momentum_tensors())
    assert len(state.optimizers.momentum_tensors()) == 3
    assert torch.equal(again.alpha, state.alpha) and torch.equal(again.initial_SCHH, state.initial_SCHH)


# --- numbers that run away --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 3])
def test_nan_names_the_iteration_and_leaves_the_last_good_state(pipeline_of, undisturbed, monkeypatch, at):
    pipeline, phases = pipeline_of("nan"), []

    def run(self, synthetic, phase, path, original=Student.run):
        found = original(self, synthetic, phase, path)
        phases.append(phase)
        if len(phases) == 2 * at + 2:
            found.by_rows.images_TCHH[1, 0, 2, 2] = float("nan")
        return found

    said = rf"iteration {at + 1}: the classifier phase produced NaN or Inf.*expert \d"
    with monkeypatch.context() as patch:
        patch.setattr(Student, "run", run)
        with pytest.raises(NumericalError, match=said):
            pipeline.distill()
    assert not pipeline.run.distilled.exists()
    assert int(checkpoint(pipeline)["iteration"]) == at
    pipeline.distill()
    assert result(pipeline) == result(undisturbed)


@pytest.mark.parametrize("at", [0, 2])
def test_a_step_out_of_the_finite_numbers_is_taken_back(pipeline_of, undisturbed, monkeypatch, at):
    """Each phase's gradient is finite; their sum, one float32 further, is not."""
    pipeline, results = pipeline_of("step"), []

    def run(self, synthetic, phase, path, original=Student.run):
        results.append(original(self, synthetic, phase, path))
        if len(results) == 2 * at + 2:
            both = [r.by_rows for r in results[-2:]]
            (row, *_) = set(both[0].rows_T.tolist()) & set(both[1].rows_T.tolist())
            for by_rows in both:
                by_rows.images_TCHH[by_rows.rows_T == row, 0, 0, 0] = 3e38
        return results[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Student, "run", run)
        with pytest.raises(NumericalError, match=rf"iteration {at + 1}: the step produced NaN or Inf"):
            pipeline.distill()
    saved = checkpoint(pipeline)
    assert int(saved["iteration"]) == at and bool(saved["images"].isfinite().all())
    assert ("momentum_images" in saved) == (at > 0)
    pipeline.distill()
    assert result(pipeline) == result(undisturbed)


def test_where_another_rank_cannot_step_nothing_moves(pipeline_of, undisturbed, monkeypatch):
    """Ranks whose alphas differ in the last bit may disagree."""
    pipeline, asked = pipeline_of("other"), []

    def everywhere(self, good):
        asked.append(good)
        return len(asked) != 4

    with monkeypatch.context() as patch:
        patch.setattr(Distillation, "_everywhere", everywhere)
        with pytest.raises(NumericalError, match="iteration 4: "):
            pipeline.distill()
    assert asked == [True] * 4 and int(checkpoint(pipeline)["iteration"]) == 3  # a checkpoint of this moment alone
    pipeline.distill()
    assert result(pipeline) == result(undisturbed)


def test_a_learning_rate_that_is_not_positive(pipeline_of):
    pipeline = pipeline_of(seed=1, distill={"lr_alpha": 1e6})  # of a seed whose first steps lead below zero
    with pytest.raises(NumericalError, match=r"iteration \d+: .*lr_alpha"):
        pipeline.distill()
    assert float(checkpoint(pipeline)["alpha"]) > 0


# --- methods ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "stages", "span", "weighted", "soft"), [
    ("lad", ["representation", "classifier"], "backbone", True, True),
    ("lad-without-wma", ["representation", "classifier"], "backbone", False, True),
    ("lad-without-adm", ["representation"], "all", True, True),
    ("datm", ["representation"], "all", False, True),
    ("mtt", ["representation"], "all", False, False),
])  # fmt: skip
def test_methods(pipeline_of, method, stages, span, weighted, soft):
    lambdas = {"lambda_representation": 0.5, "lambda_classifier": 2.0}
    pipeline = pipeline_of(method=method, distill={"iterations": 2, **lambdas})
    work = work_of(pipeline)
    phases, layout = work.phases(0), work.student.layout
    assert [p.stage for p in phases] == stages
    assert [p.weight for p in phases] == [0.5, 2.0][: len(stages)]
    assert phases[0].phase.span == layout.span(span) and not phases[0].phase.classifier_only
    assert (phases[0].phase.class_weights_K is not None) == weighted
    if weighted:
        assert float(phases[0].phase.class_weights_K.mean()) == pytest.approx(1)
    if len(phases) == 2:
        assert phases[1].phase.span == layout.span("all") and phases[1].phase.classifier_only
        assert phases[1].phase.class_weights_K is None and len(phases[1].phase.batches) == 2
        backbone = layout.span("backbone")
        assert torch.equal(phases[1].phase.start_P[backbone], phases[1].phase.target_P[backbone])
    pipeline.distill()
    distilled = DistilledSet.load(pipeline.run.distilled)
    assert distilled.meta.method == method and distilled.meta.iteration == 2
    assert not torch.equal(distilled.images, distilled.initial_images)
    one_hot = torch.nn.functional.one_hot(distilled.labels, 10).float()
    assert torch.equal(distilled.label_logits, HARD_LABEL_LOGIT * one_hot) == (not soft)
    for event in events(pipeline, "iteration"):
        assert [w[0] for w in event["windows"]] == stages
        for stage in stages:
            assert event[f"loss_{stage}"] > 0 and -1 <= event[f"cosine_{stage}"] <= 1
            assert event[f"norm_ratio_{stage}"] > 0 and event[f"student_loss_{stage}"] > 0


def test_joint_methods_need_no_classifier_experts(pipeline_of):
    import shutil

    pipeline = pipeline_of(method="datm")
    shutil.rmtree(pipeline.run.trajectories / "classifier")
    pipeline.distill()
    other = pipeline_of("lad")
    shutil.rmtree(other.run.trajectories / "classifier")
    with pytest.raises(TrajectoryError, match="classifier expert"):
        other.distill()


def test_labels_start_as_the_experts_see_the_images(pipeline_of):
    pipeline = pipeline_of(distill={"iterations": 1, "lr_images": 0.0, "lr_labels": 0.0})
    pipeline.distill()
    distilled = DistilledSet.load(pipeline.run.distilled)
    (initial,) = events(pipeline, "initial-set")
    images, labels = pipeline.data.train.batch(torch.tensor(initial["indices"]))
    seed, augmentation = pipeline.recipe.seed, pipeline.recipe.augment
    varied = vary_repeats(images, np.array(initial["indices"]), seed, augmentation)
    changed = [i for i in range(len(images)) if not torch.equal(varied[i], images[i])]
    assert len(changed) == initial["images_repeated"] > 0
    assert torch.equal(distilled.images, varied) and torch.equal(distilled.initial_images, varied)
    assert torch.equal(distilled.labels, labels) and labels.tolist() == [c for c in range(10) for _ in range(2)]
    work = work_of(pipeline)
    views = [work.student.layout.views(work.windows.teacher(e)) for e in (0, 1)]
    with torch.no_grad():
        logits = torch.stack([functional.logits(work.student.module, v, images) for v in views])
    supported = (logits.argmax(2) == labels).any(0)
    assert int((~supported).sum()) == initial["images_no_expert_classified"]
    for i in supported.nonzero().flatten().tolist():
        right = logits[:, i].argmax(1) == labels[i]
        torch.testing.assert_close(distilled.label_logits[i], logits[:, i][right].mean(0), rtol=1e-5, atol=1e-5)


# --- what is recorded -------------------------------------------------------------------------------------------------


def test_per_class_gradient_norms(pipeline_of, monkeypatch):
    pipeline, totals = pipeline_of(distill={"iterations": 2, "lambda_classifier": 0.3}), []

    def step(self, phases, iteration, original=Optimizers.step_set):
        totals.append(sum(lam * r.by_rows.images_SCHH for lam, r in phases))
        original(self, phases, iteration)

    monkeypatch.setattr("lad_dist.distill.update.Optimizers.step_set", step)
    pipeline.distill()
    for event, total in zip(events(pipeline, "iteration"), totals, strict=True):
        norms = event["pixel_gradient_norm"]
        assert len(norms) == 10
        assert norms == pytest.approx([float(total[2 * c : 2 * c + 2].norm()) for c in range(10)], rel=1e-3)


def test_of_many_classes_the_gradient_norms_are_by_group(pipeline_of, monkeypatch):
    """An event's size must not grow with the classes: 10,000 iterations of 1,000 classes would take 100 MB."""
    by_class, by_group = (
        pipeline_of("whole", distill={"iterations": 1}),
        pipeline_of("groups", distill={"iterations": 1}),
    )
    by_class.distill()
    monkeypatch.setattr("lad_dist.distill.loop._NORMS_BY_CLASS", 9)
    by_group.distill()
    (norms,) = (event["pixel_gradient_norm"] for event in events(by_class, "iteration"))
    (event,) = events(by_group, "iteration")
    assert "pixel_gradient_norm" not in event
    for part, of in head_medium_tail(by_group.data.counts)["by_thirds"].items():
        expected = sum(norms[c] for c in of) / len(of)
        assert event["pixel_gradient_norms"][part] == pytest.approx(expected, rel=1e-3)


def test_windows_in_the_events_are_those_used(pipeline_of):
    pipeline = pipeline_of()
    pipeline.distill()
    work = work_of(pipeline)
    assert len(events(pipeline, "iteration")) == 6
    for i, event in enumerate(events(pipeline, "iteration")):
        assert event["iteration"] == i + 1
        assert event["windows"] == [[p.stage, p.window.expert, p.window.epoch] for p in work.phases(i)]


def test_the_distilled_set_says_how_it_was_made(undisturbed):
    meta = json.loads((undisturbed.run.distilled / "meta.json").read_text())
    recipe, train = undisturbed.recipe, undisturbed.data.splits.train
    assert meta["recipe_hash"] == recipe.recipe_hash() and meta["experts_hash"] == recipe.experts_hash()
    assert meta["data_fingerprint"] == train.fingerprint() and meta["counts"] == list(train.counts)
    assert (meta["ipc"], meta["iteration"], meta["selection"]) == (2, 6, "last")
    assert meta["recipe"] == recipe.model_dump(mode="json")


def test_buffers_of_other_images_are_refused(pipeline_of, monkeypatch):
    pipeline = pipeline_of()
    monkeypatch.setattr(type(pipeline.data.splits.train), "fingerprint", lambda self: "other")
    with pytest.raises(TrajectoryError, match="other training images"):
        pipeline.distill()


def test_only_the_newest_checkpoint_is_kept(undisturbed):
    assert [p.name for p in undisturbed.run.distill_checkpoint.iterdir()] == ["iteration-000006"]


# --- class weights ----------------------------------------------------------------------------------------------------


def test_published_weights_are_the_share_of_each_class():
    weights = class_weights((60, 30, 10), "published", 0.0)
    torch.testing.assert_close(weights, torch.tensor([0.6, 0.3, 0.1]))
    assert float(class_weights((4993, 77, 12), "published", 0.0).sum()) == pytest.approx(1)


def test_mean_one_weights_have_mean_one_and_the_same_ratios():
    counts = (500, 100, 20, 5)
    weights = class_weights(counts, "mean-one", 0.0)
    assert float(weights.mean()) == pytest.approx(1)
    torch.testing.assert_close(weights / weights[0], class_weights(counts, "published", 0.0) / 0.8)


def test_offset():
    torch.testing.assert_close(class_weights((60, 30, 10), "published", 20.0), torch.tensor([80.0, 50.0, 30.0]) / 120)
    weights = class_weights((60, 30, 10), "mean-one", 20.0)
    torch.testing.assert_close(weights, torch.tensor([80.0, 50.0, 30.0]) * 3 / 160)


def test_a_label_temperature_divides_the_first_soft_labels_and_no_hard_ones(pipeline_of):
    def first_logits(name, **changes):
        pipeline = pipeline_of(name, **changes)
        work = work_of(pipeline)
        return work.start(pipeline.data).optimizers.logits_SK

    hot = {"label_temperature": 4.0}
    assert torch.equal(first_logits("soft", distill=hot), first_logits("plain") / 4)
    assert torch.equal(first_logits("hard", method="mtt", distill=hot), first_logits("mtt", method="mtt"))
