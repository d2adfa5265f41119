"""How many threads a process works with: the fewest that are about as fast as any, kept with the run."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from lad_dist import cli, cores
from lad_dist.errors import RunDirError
from lad_dist.plan import calibration, threads
from lad_dist.plan.calibration import StepKind, Timer, calibrate
from lad_dist.plan.shapes import Shapes
from lad_dist.plan.threads import Team
from lad_dist.profile import Profile
from lad_dist.progress import Screen
from lad_dist.recipe import Recipe

SMALL = Shapes(1, 8, 3, 4, 1)


@pytest.fixture
def idle(monkeypatch):
    monkeypatch.setattr(cores, "obtained", lambda count, seconds=0.3: float(count))


def timed_by_threads(monkeypatch, seconds_of):
    """A call takes what ``seconds_of`` says for the number of threads that torch has."""

    def seconds(self, job):
        job()
        return seconds_of(torch.get_num_threads())

    monkeypatch.setattr(Timer, "seconds", seconds)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({1: 1.0, 2: 0.55}, 2),
        ({1: 1.0, 2: 0.95}, 1),  # not worth a second core
        ({1: 1.0, 2: 30.0}, 1),  # beside a busy process
        ({1: 1.0, 2: 0.6, 4: 0.58, 6: 0.3}, 6),
    ],
)
def test_the_fewest_threads_that_are_as_fast(monkeypatch, idle, times, expected):
    timed_by_threads(monkeypatch, lambda count: times[count] / 1e3)
    before = torch.get_num_threads()
    team = threads.choose(Recipe(ipc=1), SMALL, max(times))
    assert team.threads == expected and torch.get_num_threads() == before
    assert f"with {max(times)}" in team.why and "busy" not in team.why


def test_one_core_is_not_timed(monkeypatch):
    monkeypatch.setattr(Timer, "seconds", lambda self, job: pytest.fail("timed"))
    assert threads.choose(Recipe(), SMALL, 1).threads == 1


def test_a_busy_machine_is_named(monkeypatch):
    monkeypatch.setattr(cores, "obtained", lambda count, seconds=0.3: 1.1)
    timed_by_threads(monkeypatch, lambda count: 1e-3)
    assert "busy (1.1 of 2 cores are free)" in threads.choose(Recipe(ipc=1), SMALL, 2).why


def test_a_run_keeps_its_number(pipeline_of, monkeypatch):
    monkeypatch.setattr(threads, "most_threads", lambda profile: 2)
    monkeypatch.setattr(threads, "choose", lambda *args: Team(2, "measured"))
    before = torch.get_num_threads()
    try:
        first = pipeline_of()
        _ = first.data
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        monkeypatch.setattr(threads, "choose", lambda *args: pytest.fail("a resumed run chose again"))
        again = type(first)(first.recipe, first.run, Profile(fleet="off"), first.device, Screen.silent(), first.events)
        _ = again.data
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        told = type(first)(
            first.recipe, first.run, Profile(fleet="off", threads=1), first.device, Screen.silent(), first.events
        )
        _ = told.data
        assert torch.get_num_threads() == 1, "what the profile says stands"
    finally:
        torch.set_num_threads(before)


def test_a_damaged_choice_is_refused(tmp_path):
    file = tmp_path / "threads.json"
    Team(2, "why").save(file)
    assert Team.load(file) == Team(2, "why")
    for text in ("", "[]", '{"threads": 0, "why": ""}', '{"threads": "2", "why": ""}', '{"threads": true, "why": ""}'):
        file.write_text(text)
        with pytest.raises(RunDirError, match=r"threads.json: is not a record of threads"):
            Team.load(file)


# --- calibration ------------------------------------------------------------------------------------------------------


def test_the_least_of_several_timings_counts(monkeypatch):
    """Every second timing is fifty times longer, as beside a process that comes and goes."""
    calls = iter(range(10**6))

    def seconds(self, job):
        return 1e-3 * (50 if next(calls) % 2 else 1)

    monkeypatch.setattr(Timer, "seconds", seconds)
    monkeypatch.setattr(calibration.Steps, "of", lambda self, kind: lambda images: lambda: None)
    wanted = [StepKind("evaluate/train", 4, 1)]
    found = calibrate(Recipe(), SMALL, wanted, torch.device("cpu"), 1.0)["evaluate/train"]
    assert found.step.seconds(4) == pytest.approx(1e-3)


def test_steps_longer_than_the_calibration_are_taken_once_and_the_rest_is_left_out(monkeypatch):
    """Networks as wide as they come: each call takes longer than all the time there is."""
    calls, now = [], [0.0]

    def seconds(self, job):
        calls.append(job)
        now[0] += 5.0
        return 5.0

    monkeypatch.setattr(calibration.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(Timer, "seconds", seconds)
    monkeypatch.setattr(calibration.Steps, "of", lambda self, kind: lambda images: lambda: None)
    wanted = [StepKind(kind, 32, 1) for kind in ("evaluate/train", "experts/representation", "experts/classifier")]
    found = calibrate(Recipe(), SMALL, wanted, torch.device("cpu"), 4.0)
    assert list(found) == ["evaluate/train"] and len(calls) == 2  # to warm up, and to be timed
    assert found["evaluate/train"].images < 32 and found["evaluate/train"].step.seconds(2) == 5.0


def test_the_processors_time_does_not_count_what_others_take():
    import time

    assert Timer(torch.device("cpu"), 1).seconds(lambda: time.sleep(0.2)) < 0.05
    assert Timer(torch.device("cpu")).seconds(lambda: time.sleep(0.2)) >= 0.2


def test_a_plan_says_that_the_machine_is_busy(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    said = {}
    for name, share in (("busy", 0.4), ("idle", 1.0)):
        monkeypatch.setattr(cores, "obtained", lambda count, seconds=0.3, share=share: share * count)
        ended = CliRunner().invoke(cli.app, ["plan", "digits-lt", "--calibrate", "1", "--threads", "2", "--json"])
        assert ended.exit_code == 0, ended.output
        said[name] = " ".join(json.loads(ended.stdout)["notes"])
    assert "the machine is busy: 0.8 of 2 cores are free" in said["busy"] and "busy" not in said["idle"]


def test_a_plan_counts_with_the_threads_that_a_run_would_choose(monkeypatch, tmp_path, idle):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(threads, "choose", lambda *args: Team(1, "two are slower"))
    monkeypatch.setattr("lad_dist.plan.resources.cores_to_use", lambda profile: 2)
    used = []
    real = calibration.with_threads
    monkeypatch.setattr(calibration, "with_threads", lambda count: used.append(count) or real(count))
    ended = CliRunner().invoke(cli.app, ["plan", "digits-lt", "--calibrate", "1", "--json"])
    assert ended.exit_code == 0, ended.output
    assert "threads: 1 of 2: two are slower" in json.loads(ended.stdout)["notes"]
    assert set(used) == {1}


def test_steps_that_take_minutes_are_not_timed(monkeypatch):
    monkeypatch.setattr(threads, "Steps", None)  # would be called
    wide = Shapes(3, 32, 10, 4096, 3)
    assert threads.choose(Recipe(), wide, most=2).threads == 2
