"""Quick measurements on the way: they keep to their share of the time, change nothing, and never end a run."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from lad_dist.distill.early import Budget, Early
from lad_dist.distill.loop import distill
from lad_dist.distilled import DistilledSet
from lad_dist.errors import NumericalError
from lad_dist.evaluate import early
from lad_dist.evaluate.early import MOST_BATCHES, MOST_IMAGES, EarlyEvaluation
from lad_dist.evaluate.train import Settings
from lad_dist.progress import Events, Screen, read_events

CPU = torch.device("cpu")
FOUND = SimpleNamespace(overall=0.75, head=0.9, medium=0.75, tail=None)


class Clock:
    """Seconds that pass only where the test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Measure:
    """Stands in for the evaluation; ``outcome`` is what it finds or raises."""

    split, epochs, batches = "test", 3, 10

    def __init__(self, outcome=FOUND):
        self.outcome, self.seen = outcome, []

    def __call__(self, images_SCHH, p_SK, alpha):
        self.seen.append((images_SCHH.clone(), p_SK, alpha))
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


def looks(run) -> list[dict]:
    return [e for e in read_events(run.events) if e["kind"] == "early-evaluation"]


# --- the budget -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.005, 0.02, 0.3])
@pytest.mark.parametrize("length", [0.01, 3.0, 500.0])
def test_work_keeps_within_its_share_at_every_moment(share, length):
    clock = Clock()
    budget, times = Budget(share, clock=clock), 0
    for _ in range(20_000):
        clock.now += 1.0  # an iteration
        if budget.allows(guess=length):
            clock.now += length
            budget.spend(length)
            times += 1
        assert budget.spent <= share * clock.now
    assert times >= math.floor(min(20_000, share * 20_000 / length) / 2)  # and is done where there is time


def test_a_guess_counts_only_until_the_length_is_known():
    clock = Clock()
    budget = Budget(0.1, clock=clock)
    clock.now = 100.0
    assert budget.allows(10.0) and not budget.allows(10.1)
    budget.spend(2.0)
    assert budget.allows(1e9)


def test_no_share_and_the_longest():
    clock = Clock()
    clock.now = 0.0
    none, short = Budget(0.0, clock=clock), Budget(0.5, longest=30.0, clock=clock)
    clock.now = 1e6
    assert not none.allows(0.0)
    assert short.allows(30.0) and not short.allows(30.1)


# --- in a distillation --------------------------------------------------------------------------------------------------


def distilled_with(pipeline, measure, share=0.5, eager=True):
    """The set, distilled with measurements that take (as it seems) no time where ``eager``."""
    p = pipeline
    early = Early(p.recipe, measure, p.events, Screen.silent())
    early.budget = Budget(share)
    if eager:
        early.wanted = lambda seconds: True
    distill(p.context(), p.data, early)
    return (p.run.distilled / "tensors.safetensors").read_bytes()


def test_it_is_recorded_and_the_set_is_the_same(pipeline_of):
    plain = pipeline_of("plain")
    without = distilled_with(plain, Measure(), eager=False, share=0.0)
    assert looks(plain.run) == []
    measure, pipeline = Measure(), pipeline_of("measured")
    assert distilled_with(pipeline, measure) == without
    found = looks(pipeline.run)
    # the starting set, then at checkpoints every two; at the sixth comes the full evaluation
    assert [e["iteration"] for e in found] == [0, 2, 4]
    assert [(e["overall"], e["tail"], e["split"], e["epochs"]) for e in found] == [(0.75, None, "test", 3)] * 3
    images, p_SK, alpha = measure.seen[0]
    made = DistilledSet.load(pipeline.run.distilled)
    assert torch.equal(images, made.initial_images) and alpha == pipeline.recipe.distill.alpha
    assert torch.equal(p_SK, made.initial_label_logits.softmax(1)) and not torch.equal(measure.seen[1][0], images)
    assert images.shape[0] == len(p_SK) and torch.allclose(p_SK.sum(1), torch.ones(len(p_SK))) and alpha > 0


def test_a_set_that_cannot_be_trained_on_ends_nothing(pipeline_of):
    pipeline = pipeline_of()
    distilled_with(pipeline, Measure(NumericalError("evaluation: the training loss is nan")))
    assert [("overall" in e, e["error"]) for e in looks(pipeline.run)] == [
        (False, "evaluation: the training loss is nan")
    ] * 3
    assert DistilledSet.load(pipeline.run.distilled).meta.iteration == 6


def test_a_short_run_has_no_time_for_it(pipeline_of):
    pipeline, measure = pipeline_of(), Measure()
    measure.batches = 10**9
    distilled_with(pipeline, measure, eager=False)
    assert measure.seen == []


def test_what_is_guessed_before_the_first(pipeline_of):
    pipeline, clock = pipeline_of(distill={"student_steps": 3, "student_steps_classifier": 2}), Clock()
    early = Early(pipeline.recipe, Measure(), Events.nowhere(), Screen.silent())
    early.budget = Budget(0.1, clock=clock)
    clock.now = 100.0  # 10 s may be spent; 10 batches of two sets at a fifth of an iteration's seconds each
    assert early.wanted(2.5) and not early.wanted(2.6)


# --- the measurement ------------------------------------------------------------------------------------------------------


def test_the_real_one_learns_and_leaves_no_trace(pipeline_of):
    pipeline = pipeline_of(evaluate={"epochs": 400, "lr": 0.05})
    measure = EarlyEvaluation(pipeline.recipe, pipeline.data)
    assert measure.epochs == 40 and measure.split == "test"
    images, labels = pipeline.data.train.batch(torch.arange(len(pipeline.data.train)))
    order = labels.argsort(stable=True)
    p = torch.nn.functional.one_hot(labels[order], pipeline.data.classes).float()
    before = torch.get_rng_state()
    first, again = (measure(images[order], p, 0.01) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before) and first == again
    assert first.overall > 1.5 / pipeline.data.classes
    assert sum(map(sum, first.confusion)) == min(MOST_IMAGES, len(pipeline.data.splits.test))


def test_it_trains_by_the_protocol_of_the_recipe(pipeline_of, monkeypatch):
    pipeline, seen = pipeline_of(evaluate={"protocol": "rldd", "epochs": 20}), []
    monkeypatch.setattr(early, "train", lambda network, images, settings, *_: seen.append((settings, images)))
    images, labels = pipeline.data.train.batch(torch.arange(8))
    p = torch.nn.functional.one_hot(labels, pipeline.data.classes).float()
    EarlyEvaluation(pipeline.recipe, pipeline.data)(images, p, 0.01)
    ((settings, trained_on),) = seen
    assert settings == dataclasses.replace(Settings.of_a_small_set(pipeline.recipe, 0.001), epochs=2)
    assert (settings.optimizer, settings.augmentation, settings.ema) == ("adamw", "randaugment", 0.99)
    assert trained_on.strong is not None


def test_its_network_has_the_normalisation_of_the_recipe(pipeline_of, monkeypatch):
    pipeline, seen = pipeline_of(evaluate={"norm": "batch"}), []
    monkeypatch.setattr(early, "train", lambda network, *_: seen.append(network))
    images, labels = pipeline.data.train.batch(torch.arange(8))
    EarlyEvaluation(pipeline.recipe, pipeline.data)(images, torch.nn.functional.one_hot(labels, 10).float(), 0.01)
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in seen[0].modules())


def test_held_out_images_are_looked_at_where_they_choose(pipeline_of):
    pipeline = pipeline_of(data={"validation_per_class": 3}, distill={"select": "validation"})
    measure = EarlyEvaluation(pipeline.recipe, pipeline.data)
    images, labels = pipeline.data.train.batch(torch.arange(8))
    found = measure(images, torch.nn.functional.one_hot(labels, pipeline.data.classes).float(), 0.01)
    assert measure.split == "validation"
    assert sum(map(sum, found.confusion)) == len(pipeline.data.splits.validation)


@pytest.mark.parametrize(("epochs", "batch", "expected"), [(5, 128, 1), (1000, 128, 100), (10**6, 1, None)])
def test_how_long_it_trains(pipeline_of, epochs, batch, expected):
    pipeline = pipeline_of(evaluate={"epochs": epochs, "batch": batch})
    measure = EarlyEvaluation(pipeline.recipe, pipeline.data)
    count = pipeline.data.classes * pipeline.recipe.ipc
    assert measure.epochs == (MOST_BATCHES // count if expected is None else expected)
    assert measure.batches == measure.epochs * math.ceil(count / batch) + math.ceil(MOST_IMAGES / batch)


def test_a_whole_pipeline_takes_it_at_checkpoints(pipeline_of, monkeypatch):
    pipeline = pipeline_of()
    monkeypatch.setattr(Budget, "allows", lambda self, guess: True)
    pipeline.distill()
    start, *later = looks(pipeline.run)
    assert [e["iteration"] for e in (start, *later)] == [0, 2, 4]
    assert all(0 <= e["overall"] <= 1 and e["seconds"] > 0 for e in (start, *later))
    assert [e["gain"] for e in later] == pytest.approx([e["overall"] - start["overall"] for e in later])
    assert "gain" not in start


def test_the_gain_since_the_start_is_shown(pipeline_of):
    import io
    import re

    from rich.console import Console

    from lad_dist.report.contents import read
    from lad_dist.report.figures import distill_charts
    from lad_dist.status import read_status
    from lad_dist.status.tensorboard import scalars

    pipeline, text = pipeline_of(), io.StringIO()
    values = iter([0.60, 0.625, 0.58])

    class Varied(Measure):
        def __call__(self, *given):
            return SimpleNamespace(overall=next(values), head=0.9, medium=0.7, tail=None)

    early = Early(pipeline.recipe, Varied(), pipeline.events, Screen(Console(file=text, width=200)))
    early.wanted = lambda seconds: True
    distill(pipeline.context(), pipeline.data, early)
    assert "the starting set, quick measurement (3 epochs): 60.0% overall" in text.getvalue()
    assert "+2.5 points since the start (60.0%)" in text.getvalue() and "-2.0 points since" in text.getvalue()
    assert [e.get("gain") for e in looks(pipeline.run)] == [None, pytest.approx(0.025), pytest.approx(-0.02)]
    (stage,) = [s for s in read_status(pipeline.run.root).stages if s.name == "distill"]
    assert re.search(r"quick measurement at iteration 4 58\.0%, -2\.0 points since the start", stage.detail)
    (figure,) = [
        f for f in distill_charts(read(pipeline.recipe, pipeline.run)) if f.title == "Accuracy during distillation"
    ]
    assert figure.note.endswith("(60.0 % overall); at iteration 4 -2.0 points since then.")
    assert ("distill/accuracy/gain", pytest.approx(-0.02), 4) in list(scalars(looks(pipeline.run)[-1]))
