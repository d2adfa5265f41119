"""Distilling again from the record of a run: the same bits; and what cannot be replayed is refused with its name."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
import torch

from lad_dist.distill.live import LiveExperts
from lad_dist.distill.replay import ReplayRecord
from lad_dist.distill.state import State
from lad_dist.distill.student import Student
from lad_dist.distill.update import Optimizers
from lad_dist.distilled import DistilledSet
from lad_dist.errors import Interrupted, RunDirError, TrajectoryError
from lad_dist.interrupts import as_exceptions
from lad_dist.progress import read_events

CPU = torch.device("cpu")


def events(pipeline, kind: str) -> list[dict]:
    return [e for e in read_events(pipeline.run.events) if e["kind"] == kind]


def tensors(pipeline) -> bytes:
    return (pipeline.run.distilled / "tensors.safetensors").read_bytes()


def last_windows(pipeline) -> list:
    return [w for _, w in sorted({e["iteration"]: e["windows"] for e in events(pipeline, "iteration")}.items())]


def fail_at(patch, iteration: int, error: BaseException) -> None:
    """Stop between the two phases of an iteration, counted from this process's first."""
    phases = []

    def run(self, *args, original=Student.run):
        phases.append(args)
        if len(phases) == 2 * iteration + 2:
            raise error
        return original(self, *args)

    patch.setattr(Student, "run", run)


@pytest.fixture
def killed(live_pipeline, publish_experts, monkeypatch):
    """A run that began with experts 1 and 3, was killed after 5 iterations (checkpoint at 4), and went on with all four.

    Iteration 5 is recorded twice, with other windows.
    """
    pipeline = live_pipeline("killed", experts=[1, 3])
    with monkeypatch.context() as patch:
        fail_at(patch, 5, SystemError("as a kill: nobody saves anything"))
        with pytest.raises(SystemError):
            pipeline.distill()
    publish_experts(pipeline, [0, 2])
    pipeline.distill()
    return pipeline


@pytest.fixture
def replaying(live_pipeline, small_recipe):
    """A pipeline with all four experts, which by itself would wait for all and draw from all."""

    def make(name: str = "replay", start_after: int | None = None, **changes):
        return live_pipeline(name, experts=range(4), start_after=start_after, **changes)

    return make


def edit(pipeline, change) -> None:
    """Rewrite the events: ``change(event)`` returns the event to keep, or None."""
    path = pipeline.run.events
    found = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(e) + "\n" for e in found if e is not None))


# --- the same bits ----------------------------------------------------------------------------------------------------


def test_a_killed_and_resumed_live_run_is_replayed_bit_for_bit(killed, replaying):
    told = [(e["iteration"], e["windows"]) for e in events(killed, "iteration")]
    assert [i for i, _ in told] == [1, 2, 3, 4, 5, 5, 6]
    assert told[4][1] != told[5][1], "the two records of iteration 5 must differ, or this test shows nothing"
    pipeline = replaying()
    pipeline.distill(replay=killed.run.root)
    assert tensors(pipeline) == tensors(killed)
    assert last_windows(pipeline) == last_windows(killed)
    assert events(pipeline, "initial-set")[0]["experts"] == events(killed, "initial-set")[0]["experts"] == [1, 3]
    assert events(pipeline, "distill-started")[0]["replayed_from"] == str(killed.run.root)
    teachers = [(p.run.distilled / "teachers.safetensors").read_bytes() for p in (pipeline, killed)]
    assert teachers[0] == teachers[1] and len(DistilledSet.load(killed.run.distilled).teachers.weights) == 2
    drawn = replaying("drawn")
    drawn.distill()
    assert tensors(drawn) != tensors(killed)


def test_a_replay_can_be_replayed_and_needs_no_live_buffer(killed, replaying):
    first, second = replaying("first", start_after=4), replaying("second")
    first.distill(replay=killed.run.root)
    shutil.rmtree(killed.run.root)
    second.distill(replay=first.run.root)
    assert tensors(second) == tensors(first)


def test_a_deterministic_run_is_replayed_too(pipeline_of):
    original, again = pipeline_of("original"), pipeline_of("again")
    original.distill()
    again.distill(replay=original.run.root)
    assert tensors(again) == tensors(original)


def test_an_interrupted_replay_goes_on_as_one(killed, replaying, monkeypatch):
    pipeline = replaying()
    with monkeypatch.context() as patch:
        fail_at(patch, 3, Interrupted("stop"))
        with pytest.raises(Interrupted):
            pipeline.distill(replay=killed.run.root)
    with pytest.raises(RunDirError, match=r"is a replay of .*killed; continue it with .*--replay"):
        pipeline.distill()
    pipeline.distill(replay=killed.run.root)
    assert tensors(pipeline) == tensors(killed)


def test_a_finished_replay_without_its_set_is_published_again(killed, replaying):
    pipeline = replaying()
    pipeline.distill(replay=killed.run.root)
    shutil.rmtree(pipeline.run.distilled)
    pipeline.distill(replay=killed.run.root)
    assert tensors(pipeline) == tensors(killed)


def test_what_was_begun_otherwise_is_not_continued_as_a_replay(killed, replaying, monkeypatch):
    pipeline = replaying()
    with monkeypatch.context() as patch:
        fail_at(patch, 3, Interrupted("stop"))
        with pytest.raises(Interrupted):
            pipeline.distill()
    with pytest.raises(RunDirError, match="its initial set is another; remove it"):
        pipeline.distill(replay=killed.run.root)


def test_the_recorded_gradient_path_is_taken(killed, replaying):
    assert {e["gradient"] for e in events(killed, "iteration")} == {"keep"}
    edit(killed, lambda e: {**e, "gradient": "recompute"} if e.get("iteration") == 3 and "windows" in e else e)
    pipeline = replaying()
    pipeline.distill(replay=killed.run.root)
    assert [e["gradient"] for e in events(pipeline, "iteration")] == ["keep"] * 2 + ["recompute"] + ["keep"] * 3
    own = replaying("own", distill={"gradient": "recompute"})  # the recipe's own word is kept
    own.distill(replay=killed.run.root)
    assert {e["gradient"] for e in events(own, "iteration")} == {"recompute"}


def test_a_prefix_can_be_replayed(killed, replaying):
    pipeline = replaying(distill={"iterations": 4})
    pipeline.distill(replay=killed.run.root)
    assert last_windows(pipeline) == last_windows(killed)[:4]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_iteration_that_was_done_is_recorded_even_if_a_signal_comes_in_between(live_pipeline, monkeypatch, number):
    pipeline, steps = live_pipeline(experts=range(4)), []

    def step(self, phases, iteration, original=Optimizers.step_set):
        original(self, phases, iteration)
        steps.append(phases)
        if len(steps) == 3:
            os.kill(os.getpid(), number)

    monkeypatch.setattr("lad_dist.distill.update.Optimizers.step_set", step)
    with as_exceptions(), pytest.raises(Interrupted):
        pipeline.distill()
    done = State.load(pipeline.run.distill_checkpoint, pipeline.recipe, CPU).iteration
    assert done == 3 and [e["iteration"] for e in events(pipeline, "iteration")] == [1, 2, 3]


def test_a_course_that_came_to_nothing_is_forgotten(killed, small_recipe, replaying):
    """Killed after 6 iterations, resumed from 4, killed again after 5: the old sixth belongs to another course."""
    path = killed.run.events
    kinds = [json.loads(line) for line in path.read_text().splitlines()]
    at = [i for i, e in enumerate(kinds) if e["kind"] == "distill-started"]
    sixth = next(e for e in kinds if e["kind"] == "iteration" and e["iteration"] == 6)
    events_now = [*kinds[: at[1]], sixth, *[e for e in kinds[at[1] :] if e.get("iteration") != 6]]
    path.write_text("".join(json.dumps(e) + "\n" for e in events_now))
    pipeline = replaying()
    with pytest.raises(RunDirError, match=r"the record of iteration 6 of 6 is missing or damaged \(5 iterations"):
        pipeline.distill(replay=killed.run.root)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_run(replaying, tmp_path):
    with pytest.raises(RunDirError, match="nowhere: is not a run folder"):
        replaying().distill(replay=tmp_path / "nowhere")


def test_a_run_that_has_not_begun_or_is_the_run_itself(replaying):
    pipeline, other = replaying(), replaying("other")
    with pytest.raises(RunDirError, match="which experts made the initial set is missing"):
        pipeline.distill(replay=other.run.root)
    with pytest.raises(RunDirError, match="cannot be replayed into itself"):
        pipeline.distill(replay=pipeline.run.root)


def test_another_recipe_is_named_field_by_field(killed, replaying):
    pipeline = replaying(seed=1, ipc=1, distill={"alpha": 0.03})
    with pytest.raises(RunDirError) as refused:
        pipeline.distill(replay=killed.run.root)
    for said in ("ipc is 2 there, 1 here", "seed is 0 there, 1 here", "distill.alpha is 0.05 there, 0.03 here"):
        assert said in str(refused.value)
    assert "start_after" not in str(refused.value) and "evaluate" not in str(refused.value)


def test_fields_that_do_not_matter_may_differ(killed, replaying):
    fields = {"name": "other", "evaluate": {"seeds": 9}, "distill": {"checkpoint_every": 5, "memory_gb": 1.0}}
    pipeline = replaying(start_after=3, **fields)
    pipeline.distill(replay=killed.run.root)
    assert tensors(pipeline) == tensors(killed)


@pytest.mark.parametrize("damage", [
    lambda e: None, lambda e: {**e, "windows": [["representation", 0]]}, lambda e: {**e, "windows": None},
    lambda e: {**e, "windows": e["windows"][:1]}, lambda e: {k: v for k, v in e.items() if k != "gradient"},
    lambda e: {**e, "windows": [["representation", "0", 1], ["classifier", 0, -1]]},
])  # fmt: skip
def test_the_first_missing_record_is_named(killed, replaying, damage):
    edit(killed, lambda e: damage(e) if e["kind"] == "iteration" and e["iteration"] in (4, 6) else e)
    with pytest.raises(RunDirError, match=r"events.jsonl: the record of iteration 4 of 6 is missing or damaged"):
        replaying().distill(replay=killed.run.root)


def test_more_iterations_than_were_recorded(killed, replaying):
    with pytest.raises(RunDirError, match=r"iteration 7 of 9 is missing or damaged \(6 iterations are recorded\)"):
        replaying(distill={"iterations": 9}).distill(replay=killed.run.root)


def test_a_checkpoint_that_the_buffer_lacks(killed, live_pipeline):
    pipeline = live_pipeline("poor", experts=[1, 3])
    first = next(i for i, w in enumerate(last_windows(killed), 1) if {e for _, e, _ in w} & {0, 2})
    with pytest.raises(
        TrajectoryError, match=rf"expert [02] epoch \d is missing, which iteration {first} of .*killed used"
    ):
        pipeline.distill(replay=killed.run.root)
    poorer = live_pipeline("poorer", experts=[0, 1, 2])
    with pytest.raises(TrajectoryError, match=r"expert 3 epoch 4 is missing, which the initial set of .*killed used"):
        poorer.distill(replay=killed.run.root)


def test_a_replay_does_not_wait_for_experts(killed, replaying, monkeypatch):
    monkeypatch.setattr(LiveExperts, "wait", lambda *_: pytest.fail("it waited"))
    replaying(start_after=4).distill(replay=killed.run.root)


def test_a_record_travels_between_processes(killed, replaying):
    import pickle

    pipeline = replaying()
    record = ReplayRecord.read(killed.run.root, pipeline.recipe, pipeline.run)
    assert pickle.loads(pickle.dumps(record)) == record
    assert record.window("classifier", 2) == tuple(last_windows(killed)[2][1][1:])
