"""Sources whose augmented batches the experts label anew (``...-teacher``)."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch

from lad_dist import results
from lad_dist.data.augment import apply, draw
from lad_dist.distilled import DistilledSet
from lad_dist.errors import TrajectoryError
from lad_dist.evaluate.measure import planned_rows
from lad_dist.evaluate.sources import drawn_as, settings_of, training_set
from lad_dist.evaluate.train import Settings, TrainingSet, rows_of, train, train_together
from lad_dist.labeller import Labeller
from lad_dist.models.convnet import build
from lad_dist.recipe import AugmentConfig
from lad_dist.report.tables import label_notes, source_name
from lad_dist.results.paired import gains
from lad_dist.seeds import rng
from lad_dist.teachers import Teachers
from lad_dist.trajectories.reader import Buffer

EVERY = torch.arange(20)
SOURCES = ("distilled-teacher", "initial-teacher", "random-teacher", "herding-teacher")


@pytest.fixture
def pipeline(pipeline_of):
    made = pipeline_of()
    made.distill()
    return made


def set_of(pipeline, source, seed=0):
    return training_set(pipeline.recipe, pipeline.data, pipeline.run, source, seed)


@pytest.mark.parametrize("source", SOURCES)
def test_images_and_draws_are_those_of_the_source_without_teacher(pipeline, source):
    plain = source.removesuffix("-teacher")
    assert torch.equal(set_of(pipeline, source).batch_of(EVERY)[0], set_of(pipeline, plain).batch_of(EVERY)[0])
    assert drawn_as(source) == drawn_as(plain)
    of = [settings_of(pipeline.recipe, pipeline.data, pipeline.run, s) for s in (source, plain)]
    assert of[0] == of[1]
    assert set_of(pipeline, plain).label_views is None


def test_on_images_as_they_are_the_labels_are_the_fixed_soft_ones(pipeline):
    online, fixed = set_of(pipeline, "random-teacher"), set_of(pipeline, "random-soft")
    images, p = fixed.batch_of(EVERY)
    torch.testing.assert_close(online.label_views(images), p)
    assert not torch.allclose(online.label_views(images.flip(3)), p)


def test_fewer_teachers(pipeline_of):
    pipeline = pipeline_of(evaluate={"teachers": 1})
    buffer = Buffer(pipeline.run.trajectories, pipeline.recipe.experts_hash())
    images, _ = set_of(pipeline, "random").batch_of(EVERY)
    first, every = (Teachers(pipeline.recipe, pipeline.data, buffer).labeller(n)(images) for n in (1, 9))
    assert torch.equal(set_of(pipeline, "random-teacher").label_views(images), first) and not torch.equal(first, every)
    (row, *_) = planned_rows(pipeline.recipe, pipeline.data, pipeline.run, "random-teacher")
    assert row["settings"]["labels"] == "teacher"
    assert row["settings"]["labelled_by"].startswith("mean logits of 1 classifier expert, epoch")


def test_an_expert_that_is_missing_is_named(pipeline, monkeypatch):
    def read(self, stage, expert, epoch, original=Buffer.read):
        if expert == 1:
            raise TrajectoryError("expert 1 is gone")
        return original(self, stage, expert, epoch)

    monkeypatch.setattr(Buffer, "read", read)
    with pytest.raises(TrajectoryError, match="expert 1 is gone"):
        set_of(pipeline, "random-teacher")


# --- the loop -----------------------------------------------------------------------------------------------------------

SETTINGS = Settings(2, 8, 0.05, 0.9, 0.0, 0.1, AugmentConfig())


def toy(label_views=None, shift=0.0):
    images = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(1)) + shift
    p = torch.softmax(torch.randn(20, 3, generator=torch.Generator().manual_seed(2)), 1)
    return TrainingSet(rows_of(images, p), 20, label_views=label_views)


def network(seed=0):
    return build(1, 8, 3, width=4, depth=1, seed=seed, purpose=("t",))


def test_it_is_the_augmented_batch_that_is_labelled():
    seen = []

    def label(views):
        seen.append(views.clone())
        return torch.full((len(views), 3), 1 / 3)

    train(network(), toy(label), SETTINGS, 0, ("x",), lambda: None)
    order = rng(0, "evaluate", "x", "order", 0).permutation(20)
    drawn = draw(rng(0, "evaluate", "x", "augment", 0), SETTINGS.augment, 8, 8)
    images, _ = toy().batch_of(torch.from_numpy(order[:8]))
    assert len(seen) == 2 * 3 and torch.equal(seen[0], apply(images, drawn))


def test_a_teacher_that_says_what_the_fixed_labels_say_changes_nothing():
    plain, online = network(), network()
    fixed = torch.softmax(torch.arange(3.0), 0)
    labelled = TrainingSet(lambda rows: (toy().batch_of(rows)[0], fixed.expand(len(rows), 3)), 20)
    train(plain, labelled, SETTINGS, 0, ("x",), lambda: None)
    train(online, toy(lambda views: fixed.expand(len(views), 3)), SETTINGS, 0, ("x",), lambda: None)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), online.parameters(), strict=True))


def test_together_they_are_labelled_one_by_one():
    teacher = network(9).requires_grad_(False)

    def label(views):
        return torch.softmax(teacher(views), 1)

    first = [network(s) for s in (0, 1)]
    both, counters = copy.deepcopy(first), [("x", 0), ("x", 1)]
    sets = [toy(label), toy(label, shift=0.5)]
    for one, images, of in zip(first, sets, counters, strict=True):
        train(one, images, SETTINGS, 0, of, lambda: None)
    train_together(both, sets, SETTINGS, 0, counters, lambda: None)
    for one, other in zip(first, both, strict=True):
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b)


# --- in tables ----------------------------------------------------------------------------------------------------------


def test_gains_compare_labels_of_one_kind():
    def row(source, overall):
        return {
            "source": source,
            "architecture": "convnet",
            "seed": 0,
            "overall": overall,
            "tail": overall,
            "settings": {},
        }

    rows = [row("distilled", 0.5), row("initial", 0.4), row("distilled-teacher", 0.7), row("initial-teacher", 0.65)]
    found = {gain.reference: gain.figures["overall"].mean for gain in gains(rows)}
    assert found == {"initial": pytest.approx(0.1), "initial-teacher": pytest.approx(0.05)}
    assert source_name("mine:pick-teacher") == "mine:pick, teacher labels"
    assert source_name("random-teacher") == "Random real, teacher labels"


def test_a_run_measures_them_and_an_imported_set_has_no_experts_for_them(pipeline_of):
    pipeline = pipeline_of(evaluate={"baselines": ["initial", *SOURCES], "seeds": 1})
    pipeline.all()
    rows = {row["source"]: row for row in results.read(pipeline.run.results)}
    assert set(SOURCES) < rows.keys() and len({row["train_loss"] for row in rows.values()}) == len(rows)
    experts = Buffer(pipeline.run.trajectories, pipeline.recipe.experts_hash()).meta.parameters
    weights = sum(torch.Size(shape).numel() for _, shape in experts)
    count, kept = 10 * pipeline.recipe.ipc, {source: row["keeps"] for source, row in rows.items()}
    assert kept["distilled"] == {"images": count * 64 * 4, "labels": count * 40, "teachers": 0}
    teachers = 4 * pipeline.recipe.experts.count * weights
    assert kept["distilled-teacher"] == {"images": count * 64 * 4, "labels": 0, "teachers": teachers}
    assert kept["random-teacher"] == {"images": count * 64, "labels": 0, "teachers": teachers}
    (note,) = (n for n in label_notes(rows.values()) if n.startswith("Teacher labels"))
    assert note.startswith("Teacher labels: mean logits of") and f"and {teachers / 1e6:.2g} MB" in note
    page = (pipeline.run.report / "index.html").read_text()
    assert "Distilled (LAD), teacher labels" in page and "Random real, teacher labels" in page
    meta = pipeline.run.distilled / "meta.json"
    meta.write_text(meta.read_text().replace('"method": "lad"', '"method": "imported"'))
    recipe = pipeline.recipe.model_copy(
        update={
            "evaluate": pipeline.recipe.evaluate.model_copy(update={"baselines": (*SOURCES, "teachers", "random-soft")})
        }
    )
    assert results.wanted(recipe, pipeline.run) == ["distilled", "distilled-teacher", "teachers"]
    (pipeline.run.distilled / "teachers.safetensors").unlink()
    assert results.wanted(recipe, pipeline.run) == ["distilled"]
    elsewhere = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"teachers_from": "other"})})
    assert results.wanted(elsewhere, pipeline.run) == [
        "distilled",
        *SOURCES[:1],
        *SOURCES[2:],
        "teachers",
        "random-soft",
    ]


def test_fewer_teachers_of_an_imported_set(pipeline_of):
    pipeline = pipeline_of(evaluate={"teachers": 1})
    pipeline.distill()
    whole = DistilledSet.load(pipeline.run.distilled)
    whole.meta = replace(whole.meta, method="imported")
    with pipeline.run.publish_folder(pipeline.run.distilled) as folder:
        whole.write(folder)
    assert len(whole.teachers.weights) > 1
    images = whole.images
    first = Labeller(whole.teachers.model, whole.teachers.shape, whole.teachers.weights[:1], whole.teachers.temperature)
    assert torch.equal(set_of(pipeline, "distilled-teacher").label_views(images), first(images))
    (row, *_) = planned_rows(pipeline.recipe, pipeline.data, pipeline.run, "teachers")
    assert (
        "1 teachers that came with the set" in row["settings"]["labelled_by"]
        and row["keeps"]["teachers"] == first.bytes
    )
    assert (
        row["model"] == whole.teachers.model.model_dump()
        and row["settings"]["network"]["width"] == whole.teachers.model.width
    )


def test_a_set_made_before_all_experts_were_there_is_labelled_by_the_teachers_it_carries(pipeline_of):
    pipeline = pipeline_of(buffer={"start_after": 1})
    pipeline.distill()
    whole = DistilledSet.load(pipeline.run.distilled)
    first = Labeller(whole.teachers.model, whole.teachers.shape, whole.teachers.weights[:1], whole.teachers.temperature)
    whole.teachers = first
    shutil.rmtree(pipeline.run.distilled)
    pipeline.run.distilled.mkdir()
    whole.write(pipeline.run.distilled)
    images, _ = set_of(pipeline, "random").batch_of(EVERY)
    for source in ("distilled-teacher", "random-teacher"):
        assert torch.equal(set_of(pipeline, source).label_views(images), first(images))
        (row, *_) = planned_rows(pipeline.recipe, pipeline.data, pipeline.run, source)
        sums = json.loads((pipeline.run.distilled / "meta.json").read_text())["sha256"]
        said = f"mean logits of 1 teachers that came with the set ({sums['teachers.safetensors'][:8]})"
        assert row["settings"]["labelled_by"].startswith(said)
        assert row["keeps"]["teachers"] == first.bytes


def test_sources_and_what_they_are_made_of():
    assert [results.base_source(s) for s in SOURCES] == ["distilled", "initial", "random", "herding"]
    assert results.base_source("distilled-hard") == "distilled" and results.base_source("semi-hard") == "semi-hard"
    assert (
        results.labelled_online("mine:pick-teacher-plain")
        and results.base_source("mine:pick-teacher-plain") == "mine:pick"
    )


def test_a_set_of_an_older_version_has_no_start_to_label(pipeline_of):
    pipeline = pipeline_of(evaluate={"baselines": ["initial", "initial-teacher", "random-teacher"]})
    pipeline.distill()
    old = DistilledSet.load(pipeline.run.distilled)
    old.initial_label_logits = None
    shutil.rmtree(pipeline.run.distilled)
    pipeline.run.distilled.mkdir()
    old.write(pipeline.run.distilled)
    assert results.wanted(pipeline.recipe, pipeline.run) == ["distilled", "random-teacher"]
