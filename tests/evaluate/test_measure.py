"""The evaluation stage: what is measured, what is kept, what is measured again."""

from __future__ import annotations

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lad_dist import results
from lad_dist.distilled import DistilledSet
from lad_dist.errors import DistilledError, NumericalError
from lad_dist.evaluate import measure
from lad_dist.evaluate.baselines import random_real
from lad_dist.evaluate.measure import planned_rows
from lad_dist.evaluate.sources import settings_of
from lad_dist.pipeline import Pipeline
from lad_dist.progress import read_events

MEASURED = ("overall", "balanced", "head", "medium", "tail", "per_class", "by_count", "ece", "confusion", "train_loss")


@pytest.fixture
def distilled(pipeline_of):
    """A pipeline with a distilled set."""
    pipeline = pipeline_of()
    pipeline.distill()
    return pipeline


def with_changes(pipeline: Pipeline, small_recipe, **changes) -> Pipeline:
    """The same run with other settings of how it is measured."""
    return replace(pipeline, recipe=small_recipe(**changes))


def rows(pipeline: Pipeline, source: str = "distilled") -> list[dict]:
    return [r for r in results.read(pipeline.run.results) if r["source"] == source]


def evaluated(pipeline: Pipeline) -> list[tuple[str, int]]:
    return [(e["source"], e["seed"]) for e in read_events(pipeline.run.events) if e["kind"] == "evaluated"]


def test_a_row_for_every_source_and_seed(distilled):
    for source in ("distilled", "random", "full"):
        distilled.evaluate(source)
    found = results.read(distilled.run.results)
    sources = ("distilled", "random", "full")
    assert [(r["source"], r["seed"]) for r in found] == [(source, seed) for source in sources for seed in (0, 1)]
    for r in found:
        classes = r["per_class"]
        assert len(classes) == 10 and np.mean(classes) == pytest.approx(r["overall"])  # a balanced test set
        assert 0 <= r["overall"] <= 1 and r["architecture"] == "convnet" and r["split"] == "test"
        assert (r["head"], r["tail"]) == pytest.approx((np.mean(classes[:3]), np.mean(classes[7:])))
        assert set(r["settings"]) == {"epochs", "batch", "lr", "momentum", "weight_decay", "decay", "augment", "sampling",
                                      "logit_adjustment", "labels", "network"}  # fmt: skip
        confusion = np.array(r["confusion"])
        assert confusion.shape == (10, 10) and np.trace(confusion) / confusion.sum() == pytest.approx(r["overall"])
        assert r["balanced"] == pytest.approx(np.mean(classes)) and 0 <= r["ece"] <= 1
        assert r["recipe_hash"] == distilled.recipe.recipe_hash() and r["counts"] == list(distilled.data.counts)
    assert [r["train_images"] for r in found] == [20, 20, 20, 20, 96, 96]
    assert [r["method"] for r in found] == ["lad", "lad", "random", "random", "full", "full"]
    assert [r["selection"] for r in found] == ["last", "last", *["none"] * 4]
    assert [r["ipc"] for r in found] == [2, 2, 2, 2, None, None]


def test_rates_and_lengths(distilled, small_recipe):
    def of(source: str, **evaluate) -> tuple[int, int, float]:
        p = with_changes(distilled, small_recipe, evaluate=evaluate)
        s = settings_of(p.recipe, distilled.data, distilled.run, source)
        return s.epochs, s.batch, s.lr

    learned = DistilledSet.load(distilled.run.distilled).lr
    assert learned != 0.05
    assert of("distilled") == (3, 8, learned)
    assert of("random") == (3, 8, 0.05)  # there is no learned rate: where distillation starts
    assert of("full") == (1, 32, 0.01)
    assert of("distilled", lr=0.3)[2] == of("random", lr=0.3)[2] == 0.3
    assert of("full", lr=0.3, full_lr=0.2)[2] == 0.2


def test_the_whole_set_trains_in_one_way_under_every_protocol(distilled, small_recipe):
    def of(source: str, protocol: str) -> dict[str, object]:
        recipe = with_changes(distilled, small_recipe, evaluate={"protocol": protocol}).recipe
        return settings_of(recipe, distilled.data, distilled.run, source).document()

    for source in ("full", "full-balanced", "full-logit-adjusted"):
        assert of(source, "rldd") == of(source, "lad")
    assert of("random", "rldd")["weight_decay"] == 0.01 != of("random", "lad")["weight_decay"]


def test_nothing_is_measured_twice(distilled):
    distilled.evaluate("distilled")
    before = distilled.run.results.read_bytes()
    distilled.evaluate("distilled")
    assert distilled.run.results.read_bytes() == before
    assert evaluated(distilled) == [("distilled", 0), ("distilled", 1)]


def test_more_seeds_add_to_those_there_are(distilled, small_recipe):
    distilled.evaluate("distilled")
    first = rows(distilled)
    with_changes(distilled, small_recipe, evaluate={"seeds": 3}).evaluate("distilled")
    assert rows(distilled)[:2] == first and [r["seed"] for r in rows(distilled)] == [0, 1, 2]
    assert evaluated(distilled) == [("distilled", 0), ("distilled", 1), ("distilled", 2)]


@pytest.mark.parametrize("change", [{"epochs": 4}, {"lr": 0.02}, {"batch": 5}, {"momentum": 0.5}])
def test_changed_settings_measure_again_and_replace(distilled, small_recipe, change):
    distilled.evaluate("distilled")
    distilled.evaluate("random")
    before = rows(distilled)
    with_changes(distilled, small_recipe, evaluate=change).evaluate("distilled")
    after = rows(distilled)
    assert len(after) == 2 and all(a["train_loss"] != b["train_loss"] for a, b in zip(after, before, strict=True))
    assert len(rows(distilled, "random")) == 2


def test_another_distilled_set_is_measured_again(distilled, pipeline_of):
    distilled.evaluate("distilled")
    other = pipeline_of("other", distill={"iterations": 3})
    other.distill()
    for file in other.run.distilled.iterdir():
        (distilled.run.distilled / file.name).write_bytes(file.read_bytes())
    before = rows(distilled)
    distilled.evaluate("distilled")
    assert [r["set_id"] for r in rows(distilled)] != [r["set_id"] for r in before]
    assert len(evaluated(distilled)) == 4


def test_changed_test_images_are_measured_again(distilled):
    distilled.evaluate("distilled")
    before, data = rows(distilled), distilled.data
    images = data.splits.test
    changed = replace(images, images_NCHW=255 - images.images_NCHW)
    distilled._data = replace(data, splits=replace(data.splits, test=changed))
    distilled.evaluate("distilled")
    after = rows(distilled)
    assert [r["fingerprints"] for r in before] == [
        {"train": data.splits.train.fingerprint(), "test": images.fingerprint()}
    ] * 2
    assert {r["fingerprints"]["test"] for r in after} == {changed.fingerprint()} and len(evaluated(distilled)) == 4
    distilled.evaluate("distilled")
    assert len(evaluated(distilled)) == 4


@pytest.mark.parametrize("source", ["distilled", "random", "full"])
def test_seeds_are_deterministic_and_differ(distilled, source):
    distilled.evaluate(source)
    first = [{k: r[k] for k in MEASURED} for r in rows(distilled, source)]
    shutil.rmtree(distilled.run.results.parent)
    torch.manual_seed(5)
    distilled.evaluate(source)
    assert [{k: r[k] for k in MEASURED} for r in rows(distilled, source)] == first
    assert first[0]["train_loss"] != first[1]["train_loss"]


def test_an_interruption_keeps_the_networks_that_are_finished(distilled, small_recipe, monkeypatch):
    distilled = with_changes(distilled, small_recipe, evaluate={"together": "off"})

    def train(network, images, settings, seed, counters, on_epoch, original=measure.train):
        if counters[-1] == 1:
            raise NumericalError("stop")
        return original(network, images, settings, seed, counters, on_epoch)

    with monkeypatch.context() as patch:
        patch.setattr(measure, "train", train)
        with pytest.raises(NumericalError):
            distilled.evaluate("distilled")
    assert [r["seed"] for r in rows(distilled)] == [0]
    distilled.evaluate("distilled")
    assert [r["seed"] for r in rows(distilled)] == [0, 1]


def test_random_takes_ipc_images_of_every_class(distilled, small_recipe):
    labels = distilled.data.splits.train.labels_N.numpy()
    assert distilled.data.counts[-1] == 4
    for ipc in (2, 6):
        recipe = small_recipe(ipc=ipc)
        chosen = random_real(recipe, distilled.data, 0)
        assert labels[chosen].tolist() == [c for c in range(10) for _ in range(ipc)]
        for c, count in enumerate(distilled.data.counts):
            assert len(set(chosen[c * ipc : (c + 1) * ipc].tolist())) == min(ipc, count)  # repeats only where it must
        np.testing.assert_array_equal(random_real(recipe, distilled.data, 0), chosen)
        assert random_real(recipe, distilled.data, 1).tolist() != chosen.tolist()
        assert random_real(small_recipe(ipc=ipc, seed=1), distilled.data, 0).tolist() != chosen.tolist()


def test_baselines_need_no_distilled_set(pipeline_of):
    pipeline = pipeline_of()
    pipeline.evaluate("random")
    pipeline.evaluate("full")
    assert len(results.read(pipeline.run.results)) == 4
    with pytest.raises(DistilledError, match="lad-dist distill"):
        pipeline.evaluate("distilled")


def test_a_set_of_other_data_is_refused(distilled, monkeypatch):
    monkeypatch.setattr(type(distilled.data.splits.train), "fingerprint", lambda self: "other")
    with pytest.raises(DistilledError, match="other training images"):
        distilled.evaluate("distilled")


def test_the_networks_of_a_seed_start_apart_for_each_source(distilled, monkeypatch):
    starts = []

    def build(*args, original=measure.network, **fields):
        starts.append(fields["purpose"])
        return original(*args, **fields)

    monkeypatch.setattr(measure, "network", build)
    distilled.evaluate("distilled")
    distilled.evaluate("random")
    assert len(set(starts)) == 4


def test_planned_rows_are_what_is_written(distilled):
    planned = planned_rows(distilled.recipe, distilled.data, distilled.run, "distilled")
    distilled.evaluate("distilled")
    assert all(results.same_measurement(r, p) for r, p in zip(rows(distilled), planned, strict=True))


# --- validation, and choosing by it -----------------------------------------------------------------------------------

CHOOSING = {"iterations": 5, "select_every": 2}


def candidates(pipeline: Pipeline) -> dict[int, float]:
    return {e["iteration"]: e["overall"] for e in read_events(pipeline.run.events) if e["kind"] == "candidate"}


@pytest.mark.parametrize("select", ["validation", "test-as-published"])
def test_the_best_candidate_is_published_and_every_row_says_how(pipeline_of, monkeypatch, select):
    split, seen = {"validation": "validation", "test-as-published": "test"}[select], []
    data = {"validation_per_class": 3}
    pipeline = pipeline_of(data=data, distill={**CHOOSING, "select": select})
    prepared = type(pipeline.data)

    def evaluation_set(self, name, original=prepared.evaluation_set):
        seen.append(name)
        return original(self, name)

    monkeypatch.setattr(prepared, "evaluation_set", evaluation_set)
    pipeline.experts()
    pipeline.distill()
    assert seen == [split]
    scores = candidates(pipeline)
    assert list(scores) == [2, 4, 5]
    best = min(i for i, score in scores.items() if score == max(scores.values()))
    meta = DistilledSet.load(pipeline.run.distilled).meta
    assert meta.iteration == best and meta.selection == select
    assert ((pipeline.run.distilled / "tensors.safetensors").read_bytes()
            == (pipeline.run.candidate(best) / "tensors.safetensors").read_bytes())  # fmt: skip
    for source in ("distilled", "random"):
        pipeline.evaluate(source)
    assert {r["selection"] for r in rows(pipeline)} == {select}
    assert {r["selection"] for r in rows(pipeline, "random")} == {"none"}
    assert results.summary(rows(pipeline))[0]["selection"] == select


@pytest.mark.parametrize(("scores", "best"), [((0.3, 0.6, 0.4), 4), ((0.3, 0.6, 0.6), 4), ((0.1, 0.2, 0.3), 5)])
def test_the_highest_score_wins_and_the_first_of_equals(pipeline_of, monkeypatch, scores, best):
    from lad_dist.evaluate import select as select_module

    pipeline, left = pipeline_of(distill={**CHOOSING, "select": "test-as-published"}), list(scores)
    monkeypatch.setattr(select_module, "accuracy", lambda *_: SimpleNamespace(overall=left.pop(0)))
    pipeline.distill()
    assert candidates(pipeline) == dict(zip((2, 4, 5), scores, strict=True))
    assert DistilledSet.load(pipeline.run.distilled).meta.iteration == best


def test_choosing_continues_after_an_interruption(pipeline_of, monkeypatch):
    from lad_dist.evaluate import select as select_module

    whole, broken = (pipeline_of(n, distill={**CHOOSING, "select": "test-as-published"}) for n in ("whole", "broken"))
    whole.distill()
    calls = []

    def train(*args, original=select_module.trained):
        calls.append(args)
        if len(calls) == 2:
            raise NumericalError("stop")
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(select_module, "trained", train)
        with pytest.raises(NumericalError):
            broken.distill()
    assert not broken.run.distilled.exists()
    broken.distill()
    assert candidates(broken) == candidates(whole)
    tensors = [(p.run.distilled / "tensors.safetensors").read_bytes() for p in (whole, broken)]
    assert tensors[0] == tensors[1]


def test_measuring_on_validation_images(pipeline_of):
    pipeline = pipeline_of(data={"validation_per_class": 3}, evaluate={"split": "validation"})
    pipeline.evaluate("random")
    assert len(rows(pipeline, "random")) == 2
    for r in rows(pipeline, "random"):
        assert r["split"] == "validation"
        assert r["overall"] * 30 == pytest.approx(round(r["overall"] * 30))
