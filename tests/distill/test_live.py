"""Distillation that begins while experts are still in training: what counts as complete, waiting, drawing, stopping."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from lad_dist import recipe_file
from lad_dist.distill.live import REFRESH_SECONDS, LiveExperts
from lad_dist.distill.student import Student
from lad_dist.distilled import DistilledSet
from lad_dist.errors import Interrupted, RecipeError, TrajectoryError
from lad_dist.interrupts import StopFlag, as_exceptions
from lad_dist.profile import Profile
from lad_dist.progress import read_events
from lad_dist.trajectories import Buffer


def events(pipeline, kind: str) -> list[dict]:
    return [e for e in read_events(pipeline.run.events) if e["kind"] == kind]


def live_of(pipeline, **fields) -> LiveExperts:
    return LiveExperts(Buffer(pipeline.run.trajectories), pipeline.recipe, **fields)


# --- the recipe -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "said"), [
    (0, "buffer.start_after: 0: should be greater than or equal to 1"),
    ("many", "buffer.start_after: 'many': should be a valid integer"),
    (3, "buffer.start_after: 3 is above experts.count 2; at most 2 is valid"),
])  # fmt: skip
def test_recipe_faults(value, said):
    with pytest.raises(RecipeError) as fault:
        recipe_file.from_document({"experts": {"count": 2}, "buffer": {"start_after": value}}, source="x.yaml")
    assert [f"x.yaml: {said}" in line for line in fault.value.faults] == [True]


def test_a_misspelt_field_is_answered_with_the_right_one():
    with pytest.raises(RecipeError, match=r"buffer.start_afer: unknown key; did you mean buffer.start_after"):
        recipe_file.from_document({"buffer": {"start_afer": 1}})


def test_it_names_another_distillation_of_the_same_experts(small_recipe):
    plain, live = small_recipe(), small_recipe(buffer={"start_after": 1})
    assert plain.buffer.start_after is None
    assert plain.recipe_hash() != live.recipe_hash() and plain.experts_hash() == live.experts_hash()


# --- what is complete -------------------------------------------------------------------------------------------------


def test_complete_means_every_epoch_of_every_stage_that_is_needed(live_pipeline, publish_experts, small_recipe):
    pipeline = live_pipeline(experts=[0])
    publish_experts(pipeline, [1], "representation")
    publish_experts(pipeline, [2, 3])
    folder = pipeline.run.trajectories
    sorted((folder / "classifier" / "expert-0002").iterdir())[-1].unlink()  # its last epochs
    sorted((folder / "representation" / "expert-0003").iterdir())[0].unlink()  # its first
    lad, datm = (small_recipe(method=method) for method in ("lad", "datm"))
    assert (lad.labelling, datm.labelling) == (("classifier", 3), ("representation", 4))
    buffer, first = Buffer(folder), ("representation", 4)
    assert buffer.complete(dict([first, lad.labelling]), range(4)) == (0,)
    assert buffer.complete(dict([first, datm.labelling]), range(4)) == (0, 1, 2)
    assert buffer.complete(dict([first]), range(2)) == (0, 1)  # a shared buffer may hold more than the recipe wants


# --- waiting ----------------------------------------------------------------------------------------------------------


def test_new_experts_are_noticed_within_seconds_and_by_a_thread(live_pipeline, publish_experts, silent, monkeypatch):
    pipeline = live_pipeline(experts=[0, 1])
    live = live_of(pipeline)
    live.wait(silent, pipeline.events)
    listed_by, original = set(), Buffer.refresh

    def refresh(self):
        listed_by.add(threading.current_thread().name)
        return original(self)

    monkeypatch.setattr(Buffer, "refresh", refresh)
    assert live.now() == (0, 1)
    publish_experts(pipeline, [3])
    began = time.monotonic()
    while live.now() == (0, 1) and time.monotonic() - began < 20:
        time.sleep(0.01)
    assert live.now() == (0, 1, 3) and time.monotonic() - began < REFRESH_SECONDS + 3
    assert listed_by == {"live-buffer"}
    publish_experts(pipeline, [2])
    live._thread.join(20)  # all are there: nothing is left to look for
    assert live.now() == (0, 1, 2, 3) and not live._thread.is_alive()
    live.close()


def test_waiting_says_what_it_waits_for(live_pipeline, publisher, capsys):
    from rich.console import Console

    from lad_dist.progress import Screen

    pipeline = live_pipeline()
    publisher(pipeline, 0.5, [3, 0])
    live = live_of(pipeline)
    live.wait(Screen(Console(width=300)), pipeline.events)
    assert live.now() == (0, 3)
    live.close()
    waited = [(e["complete"], e["wanted"]) for e in events(pipeline, "distill-waiting")]
    assert waited in ([(0, 2), (1, 2)], [(0, 2)])  # one may come right after the other
    assert "distill: waiting for experts: 0 of the first 2 complete in" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_waiting_can_be_interrupted(live_pipeline, number):
    pipeline = live_pipeline(experts=[0])
    began, before = time.monotonic(), threading.active_count()
    threading.Timer(1.0, os.kill, (os.getpid(), number)).start()
    with as_exceptions(), pytest.raises(Interrupted, match=number.name):
        pipeline.distill()
    assert time.monotonic() - began < 10 and threading.active_count() == before
    assert not pipeline.run.distilled.exists() and not pipeline.run.distill_checkpoint.exists()


def test_waiting_stops_when_a_rank_was_told_to(live_pipeline, silent):
    pipeline, flag = live_pipeline(), StopFlag()
    flag.name = "SIGTERM"
    live = live_of(pipeline, flag=flag)
    with pytest.raises(Interrupted, match="SIGTERM"):
        live.wait(silent, pipeline.events)
    live.close()


def test_a_buffer_that_can_no_longer_be_listed_is_said_in_the_loop(live_pipeline, silent, monkeypatch):
    pipeline = live_pipeline(experts=[0, 1])
    live = live_of(pipeline)
    monkeypatch.setattr("lad_dist.distill.live.REFRESH_SECONDS", 0.05)
    live.wait(silent, pipeline.events)

    def fail(self):
        raise TrajectoryError("the store is gone")

    monkeypatch.setattr(Buffer, "refresh", fail)
    live._thread.join(10)
    with pytest.raises(TrajectoryError, match="the store is gone"):
        live.now()
    live.close()


def test_without_the_field_missing_experts_are_an_error(live_pipeline):
    pipeline = live_pipeline(experts=[0, 1], start_after=None)
    with pytest.raises(TrajectoryError, match=r"expert 2 epoch \d is missing"):
        pipeline.distill()


def test_another_recipes_buffer_is_refused_after_waiting_too(live_pipeline, monkeypatch):
    pipeline = live_pipeline(experts=[0, 1])
    monkeypatch.setattr(type(pipeline.recipe), "experts_hash", lambda self: "ff" * 32)
    with pytest.raises(TrajectoryError, match="made by another recipe"):
        pipeline.distill()


# --- drawing ----------------------------------------------------------------------------------------------------------


def slow_down(monkeypatch, seconds: float) -> None:
    def run(self, *args, original=Student.run):
        time.sleep(seconds)
        return original(self, *args)

    monkeypatch.setattr(Student, "run", run)


@pytest.mark.parametrize("method", ["lad", "datm"])
def test_experts_that_come_while_it_distills_are_drawn_once_they_are_complete(
    live_pipeline, publisher, monkeypatch, method
):
    monkeypatch.setattr("lad_dist.distill.live.REFRESH_SECONDS", 0.2)
    slow_down(monkeypatch, 0.025 if method == "lad" else 0.05)
    pipeline = live_pipeline(experts=[1], method=method, distill={"iterations": 80})
    assert pipeline.data.classes == 10  # loaded before the clock starts
    process = publisher(pipeline, 0.8, [3, 0, 2])
    pipeline.distill()
    published = {int(e): float(at) for e, at in (line.split() for line in process.communicate()[0].splitlines())}
    published[1] = 0.0
    (initial,) = events(pipeline, "initial-set")
    assert set(initial["experts"]) in ({1, 3}, {0, 1, 3})  # the second on a machine that was busy for a second
    first: dict[int, float] = {}
    for event in events(pipeline, "iteration"):
        for _, expert, _ in event["windows"]:
            began = event["time"] - event["seconds"]
            first.setdefault(expert, began)
            assert began > published[expert] - 0.01  # before that it was not complete
    assert set(first) == {0, 1, 2, 3}
    for expert in (0, 2):
        assert first[expert] - published[expert] < 5


def test_complete_experts_are_drawn_as_they_are_without_the_field(live_pipeline):
    """With all experts there from the beginning, the field changes nothing."""
    made = []
    for name, start_after in (("live", 1), ("plain", None)):
        pipeline = live_pipeline(name, experts=range(4), start_after=start_after)
        pipeline.distill()
        made.append((pipeline.run.distilled / "tensors.safetensors").read_bytes())
        assert events(pipeline, "initial-set")[0]["experts"] == [0, 1, 2, 3]
    assert made[0] == made[1]


def test_two_ranks_draw_the_same_windows(live_pipeline, publisher, monkeypatch):
    """Rank 0's view counts: what one rank distilled from the record of two is the same to rounding."""
    import torch

    # Long enough that experts come in between.
    pipeline = live_pipeline(experts=[1, 3], distill={"iterations": 400, "checkpoint_every": 100})
    pipeline.profile = Profile(fleet="off", ranks=2, threads=1)

    def late() -> None:
        while len(events(pipeline, "iteration")) < 20:
            time.sleep(0.02)
        publisher(pipeline, 0.0, [0, 2])

    threading.Thread(target=late, daemon=True).start()
    pipeline.distill()
    drawn = [{w[1] for w in e["windows"]} for e in events(pipeline, "iteration")]
    assert set().union(*drawn[:20]) <= {1, 3} < set().union(*drawn)
    again = live_pipeline("again", experts=range(4), distill={"iterations": 400, "checkpoint_every": 100})
    again.distill(replay=pipeline.run.root)
    ours, theirs = (events(p, "iteration") for p in (again, pipeline))
    assert [e["windows"] for e in ours] == [e["windows"] for e in theirs]
    # Sooner or later one value before a ReLU lies so near zero that rounding decides its side: a small jump from there on.
    far = [
        abs(a["loss_classifier"] - b["loss_classifier"]) / b["loss_classifier"]
        for a, b in zip(ours, theirs, strict=True)
    ]
    assert max(far[:50]) < 1e-3 and max(far) < 0.1
    ours, theirs = (DistilledSet.load(p.run.distilled) for p in (again, pipeline))
    torch.testing.assert_close(ours.images, theirs.images, rtol=0, atol=0.1)
    assert ours.lr == pytest.approx(theirs.lr, rel=1e-3)
