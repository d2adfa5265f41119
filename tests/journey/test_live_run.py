"""``lad-dist run`` with ``buffer.start_after``: the experts train in a process of their own while this one distills."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from lad_dist.trajectories import Buffer

EXPERTS = 8  # many: on a busy machine the first must end and iterations begin while the others still train
LIVE = {
    "experts": {"count": EXPERTS, "epochs": 40, "classifier_epochs": 10, "batch": 8, "epochs_per_part": 3},
    "buffer": {"start_after": 1},
    "distill": {"iterations": 60, "student_steps": 2, "student_steps_classifier": 2, "batch": 5, "window_epochs": 1,
                "start_epoch_max": 9, "class_weights": "mean-one", "lr_images": 1.0, "lr_alpha": 1e-7,
                "checkpoint_every": 7},
}  # fmt: skip
RUN = Path("run")


@pytest.fixture
def live_job(job):
    return job("live.yaml", name="live", **LIVE)


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def trains_and_distills(events) -> bool:
    return sum(e["kind"] == "iteration" for e in events) >= 3 and not experts_done(events)


def experts_done(events) -> bool:
    return any(e["kind"] == "stage-finished" and e["stage"] == "experts" for e in events)


def check_finished(look, run: Path = RUN, experts: int = EXPERTS) -> None:
    """All is there, nothing is left over, and the run can be replayed from its own record."""
    from lad_dist import recipe_file
    from lad_dist.distill.replay import ReplayRecord
    from lad_dist.rundir import RunDir

    recipe = recipe_file.load(run / "recipe.yaml")
    record = ReplayRecord.read(run, recipe, RunDir(run / "elsewhere"))
    record.check(Buffer(run / "trajectories"), recipe)
    assert len(record.windows) == LIVE["distill"]["iterations"]
    assert (run / "report" / "index.html").exists() and look.leftovers(run) == []
    assert [len(Buffer(run / "trajectories").epochs("classifier", e)) for e in range(experts)] == [11] * experts


def test_distillation_begins_while_experts_train_and_the_run_is_whole(lad, live_job, look):
    process = lad.start("run", live_job, "--out", RUN)
    assert look.wait_for(RUN, process, trains_and_distills)
    ended = lad.ended(process).succeeds()
    assert (
        "experts: trained in this process" in ended.out
        and f"experts: {EXPERTS * 50}/{EXPERTS * 50} epochs done" in ended.out
    )
    found = look.events(RUN)
    kinds = [(e["kind"], e.get("stage")) for e in found]
    assert kinds.index(("initial-set", None)) < kinds.index(("stage-finished", "experts"))
    assert kinds.index(("stage-finished", "experts")) < kinds.index(("stage-started", "evaluate distilled"))
    first = next(e for e in found if e["kind"] == "initial-set")
    assert 1 <= len(first["experts"]) < EXPERTS
    check_finished(look)
    assert "experts: done" in lad("run", live_job, "--out", RUN).succeeds().out


@pytest.mark.parametrize(("number", "to_group"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_both_processes_end_within_seconds_and_the_run_goes_on(lad, live_job, look, number, to_group):
    process = lad.start("run", live_job, "--out", RUN, preexec_fn=os.setsid)
    assert look.wait_for(RUN, process, trains_and_distills)
    (child,) = children(process.pid)
    began = time.monotonic()
    if to_group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    ended = lad.ended(process).fails(130, f"interrupted by {number.name}", "the same command continues")
    assert time.monotonic() - began < 10 and gone(child)
    assert "Traceback" not in ended.out
    stopped = {e["stage"] for e in look.events(RUN) if e["kind"] == "stage-stopped"}
    assert stopped == {"experts", "distill"} and look.leftovers(RUN) == []
    if to_group:
        lad("run", live_job, "--out", RUN).succeeds()
        check_finished(look)


def test_interrupted_while_it_waits_for_the_first_expert(lad, job, look):
    slow = {**LIVE["experts"], "epochs": 4000}
    process = lad.start("run", job(**{**LIVE, "experts": slow}), "--out", RUN)
    assert look.wait_for(RUN, process, lambda events: sum(e["kind"] == "expert-epoch" for e in events) > 3)
    (child,) = children(process.pid)
    process.send_signal(signal.SIGTERM)
    lad.ended(process, timeout=10).fails(130, "interrupted by SIGTERM")
    assert gone(child)


def test_the_experts_process_is_killed(lad, live_job, look):
    process = lad.start("run", live_job, "--out", RUN)
    assert look.wait_for(RUN, process, trains_and_distills)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    lad.ended(process, timeout=20).fails(9, "the process that trains the experts was killed by SIGKILL", "same command")
    lad("run", live_job, "--out", RUN).succeeds()
    check_finished(look)


def test_an_error_of_the_experts_is_told_once_with_its_exit_code(lad, job):
    broken = {**LIVE["experts"], "lr": 1e20}
    ended = lad("run", job(**{**LIVE, "experts": broken}), "--out", RUN)
    ended.fails(
        7, "the process that trains the experts ended with exit code 7: expert 0, representation stage, epoch 1"
    )
    assert (ended.out + ended.err).count("the loss is") == 1


def test_an_error_of_the_distillation_ends_the_experts(lad, job, look):
    wild = {**LIVE["distill"], "lr_images": 1e38}
    slow = {**LIVE["experts"], "count": 40}
    process = lad.start("run", job(**{**LIVE, "distill": wild, "experts": slow}), "--out", RUN)
    assert look.wait_for(RUN, process, lambda events: any(e["kind"] == "distill-started" for e in events))
    (child,) = children(process.pid) or (0,)
    lad.ended(process).fails(7, "iteration")
    assert gone(child) and not experts_done(look.events(RUN))


def test_the_experts_do_not_outlive_a_run_that_was_killed(lad, job, look):
    """Nobody tells them: they notice that nobody reads what they say, which they do every 10 s."""
    slow = {**LIVE["experts"], "epochs": 40000}
    process = lad.start("run", job(**{**LIVE, "experts": slow}), "--out", RUN)
    assert look.wait_for(RUN, process, lambda events: sum(e["kind"] == "expert-epoch" for e in events) > 3)
    (child,) = children(process.pid)
    process.kill()
    process.wait()
    until = time.monotonic() + 30
    while not gone(child) and time.monotonic() < until:
        time.sleep(0.1)
    alive = not gone(child)
    if alive:
        os.kill(child, signal.SIGKILL)
    assert not alive


def test_what_is_complete_already_needs_no_other_process(lad, job, look):
    two = job(**{**LIVE, "experts": {**LIVE["experts"], "count": 2}})
    lad("experts", two, "--out", RUN).succeeds()
    ended = lad("run", two, "--out", RUN).succeeds()
    assert "experts: done" in ended.out and "experts: trained" not in ended.out
    check_finished(look, experts=2)
