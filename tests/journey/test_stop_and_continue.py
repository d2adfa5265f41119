"""Ctrl-C, SIGTERM and SIGKILL in every stage: the same command continues, with the same numbers bit for bit."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from lad_dist.trajectories import Buffer

# Long enough (a second or two per stage) to be hit in the middle.
LONGER = {
    "experts": {"count": 2, "epochs": 40, "classifier_epochs": 10, "batch": 32, "epochs_per_part": 3},
    "distill": {"iterations": 60, "student_steps": 2, "student_steps_classifier": 2, "batch": 5, "window_epochs": 1,
                "start_epoch_max": 9, "class_weights": "mean-one", "lr_images": 1.0, "lr_alpha": 1e-7,
                "checkpoint_every": 7},
    "evaluate": {"seeds": 4, "epochs": 600, "baselines": []},
}  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, look):
    """A run of the longer recipe from beginning to end: its buffer's digest and its distilled tensors."""
    import yaml

    from lad_dist import cli

    folder = tmp_path_factory.mktemp("undisturbed")
    job = folder / "job.yaml"
    tiny = {"name": "longer", "ipc": 1, "data": {"dataset": "digits", "imbalance_factor": 5, "n_max": 20},
            "model": {"width": 4, "depth": 1}, "augment": {"operations": ["crop", "scale"]}, **LONGER}  # fmt: skip
    job.write_text(yaml.safe_dump(tiny))
    for verb, more in (("experts", ("--fleet", "off")), ("distill", ())):
        with pytest.raises(SystemExit) as ended:
            cli.app([verb, str(job), "--out", str(folder / "run"), "--threads", "1", "--device", "cpu", *more])
        assert ended.value.code == 0
    return job, Buffer(folder / "run" / "trajectories").digest(), look.distilled_bytes(folder / "run")


def same_as(undisturbed, run: Path, look) -> None:
    _, digest, distilled = undisturbed
    assert Buffer(run / "trajectories").digest() == digest
    assert look.distilled_bytes(run) == distilled
    assert look.leftovers(run) == []


@pytest.mark.parametrize(("number", "steps"), [(signal.SIGINT, 10), (signal.SIGTERM, 0)])
def test_interrupted_in_every_stage(lad, undisturbed, look, number, steps):
    """A process of its own gets the signal when a stage begins, or after some epochs or iterations of it."""
    command, run = ("run", undisturbed[0], "--out", "run"), Path("run")
    for stage, step in (("experts", "expert-epoch"), ("distill", "iteration"), ("evaluate distilled", "evaluated")):
        seen = len(look.events(run))

        def reached(found, stage=stage, step=step, seen=seen):
            began = any(e["kind"] == "stage-started" and e["stage"] == stage for e in found[seen:])
            least = min(steps, 1) if step == "evaluated" else steps
            return began and sum(e["kind"] == step for e in found[seen:]) >= least

        process = lad.start(*command)
        assert look.wait_for(run, process, reached)
        process.send_signal(number)
        lad.ended(process).fails(130, f"interrupted by {number.name}", "the same command continues")
        assert look.leftovers(run) == []
        assert [e["stage"] for e in look.events(run)[seen:] if e["kind"] == "stage-stopped"] == [stage]
        assert f"last error: {stage}: Interrupted" in lad("status", run).succeeds().out
        assert (run / "distilled").exists() == (stage == "evaluate distilled")
    lad(*command).succeeds()
    same_as(undisturbed, run, look)
    assert (run / "report" / "index.html").exists()


@pytest.mark.parametrize("stage", ["experts", "distill", "evaluate", "report"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_in_the_middle_of_a_computation(lad, job, finished, look, monkeypatch, stage, number):
    """The signal arrives at one exact place of each stage, within this process."""
    inside = {"experts": "lad_dist.experts.train.gsam_gradient", "distill": "lad_dist.distill.loop.Student.run",
              "evaluate": "lad_dist.evaluate.measure.accuracy", "report": "lad_dist.report.page.render"}  # fmt: skip
    command = ("run", job(), "--out", "run")

    def interrupt(*args: object, **kwargs: object) -> None:
        signal.raise_signal(number)

    before = signal.getsignal(number)
    with monkeypatch.context() as patched:
        patched.setattr(inside[stage], interrupt)
        lad(*command).fails(130, f"interrupted by {number.name}")
    assert signal.getsignal(number) is before
    assert look.leftovers(Path("run")) == []
    assert not Path("run/report/index.html").exists()
    lad(*command).succeeds()
    assert look.distilled_bytes(Path("run")) == look.distilled_bytes(finished)


def test_killed_at_random_moments(lad, undisturbed, look):
    """Once while experts train, then twice while it distils, each time past a checkpoint."""
    command, run, draws = ("run", undisturbed[0], "--out", "run"), Path("run"), random.Random(1)
    moments = [("expert-epoch", "epoch", draws.randint(2, 40)), ("iteration", "iteration", draws.randint(8, 30)),
               ("iteration", "iteration", draws.randint(38, 57))]  # fmt: skip
    for kind, count, least in moments:
        seen, process = len(look.events(run)), lad.start(*command)

        def reached(found, kind=kind, count=count, least=least, seen=seen):
            return any(e["kind"] == kind and e[count] >= least for e in found[seen:])

        assert look.wait_for(run, process, reached)
        time.sleep(draws.random() * 0.02)
        process.kill()
        process.communicate()
        lad("status", run).succeeds()
    assert len(list((run / "checkpoints").iterdir())) >= 1
    lad(*command).succeeds()
    same_as(undisturbed, run, look)


def test_continuing_does_nothing_twice(lad, job, look):
    command, run = ("run", job(), "--out", "run"), Path("run")
    lad(*command).succeeds()
    before, seen = look.contents(run), len(look.events(run))
    again = lad(*command).succeeds()
    assert {e["kind"] for e in look.events(run)[seen:]} == {"data", "stage-started", "stage-finished"}
    assert {e.get("stage") for e in look.events(run)[seen:]} == {None, "report"}
    changed = {name for name, digest in look.contents(run).items() if before[name] != digest}
    assert changed <= {"events.jsonl", "report/index.html"}
    assert "experts: done" in again.out and "distill: done" in again.out
