"""Whole jobs on a real SLURM of two virtual nodes: submitted, cancelled, killed, out of time, and what comes out."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lad_dist.distilled import DistilledSet
from lad_dist.progress import read_events
from lad_dist.rundir import RunDir
from lad_dist.slurm_jobs import read_submissions, squeue

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def wait_until(reached: Callable[[], Any], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < until, f"not within {seconds} s"
        time.sleep(0.2)


LOCAL = ("--on", "local", "--threads", 1, "--fleet", "off", "--device", "cpu")


def jobs_of(run: Path) -> dict[str, str]:
    """The newest job of every stage."""
    return {job.stage: job.id for submission in read_submissions(RunDir(run)) for job in submission.jobs}


def buffer_rows(run: Path) -> dict[tuple[str, int, int], bytes]:
    """The weights of every checkpoint of the run's buffer. How they are cut into files depends on when a job stopped."""
    from lad_dist.trajectories.reader import Buffer

    buffer, rows = Buffer(run / "trajectories"), {}
    for stage in ("representation", "classifier"):
        for expert in range(10):
            for epoch in range((buffer.last_contiguous_epoch(stage, expert) or -1) + 1):
                rows[stage, expert, epoch] = hashlib.sha256(buffer.read(stage, expert, epoch).tobytes()).digest()
    return rows


def same_set(run: Path, other: Path, tolerance: float = 1e-3) -> None:
    ours, theirs = DistilledSet.load(run / "distilled"), DistilledSet.load(other / "distilled")
    for name in ("images", "label_logits"):
        a, b = getattr(ours, name), getattr(theirs, name)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))
    assert ours.lr == pytest.approx(theirs.lr, rel=tolerance)


def kinds(run: Path) -> list[str]:
    return [event["kind"] for event in read_events(run / "events.jsonl")]


def wait_for_events(run: Path, kind: str, count: int, seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while (run / "events.jsonl").exists() is False or kinds(run).count(kind) < count:
        assert time.monotonic() < until, f"no {count} events {kind} within {seconds} s"
        time.sleep(0.1)


@pytest.fixture
def reference(lad: Any) -> Any:
    """The same job in one process on this machine."""

    def make(job: Path, verb: str = "run") -> Path:
        out = job.parent / "reference"
        lad(verb, job, "--out", out, *LOCAL)
        return out

    return make


def test_a_cancelled_chain_is_completed_by_the_same_command(slurm, lad, reference):
    job, run = lad.job(), lad.folder / "run"
    slow = lad.profile("slow.yaml", setup=['case "$SLURM_JOB_NAME" in *experts) sleep 20; esac'])
    waiting = lad.start("run", job, "--on", slow, "--out", run, "--wait")
    while "experts" not in (ids := jobs_of(run) if run.exists() else {}) or slurm.state(ids["experts"]) != "RUNNING":
        assert waiting.poll() is None, waiting.communicate()
        time.sleep(0.2)
    while "report" not in (ids := jobs_of(run)):
        time.sleep(0.1)
    subprocess.run(["scancel", ids["experts"]], check=True)
    out, err = lad.ended(waiting, code=11)
    assert re.search(rf"error: experts, job {ids['experts']}_\d: cancelled", err) and "scancel" in err
    assert "not started, as they need it: distill, evaluate, report" in err
    assert all(slurm.state(ids[stage]) == "CANCELLED" for stage in ids if stage != "distill")
    status, _ = lad("status", run, "--watch")
    assert f"experts, job {ids['experts']}_0: cancelled (scancel)" in status
    why = r"experts: its jobs have ended and it is not done \(missing: 0, 1\)"
    assert re.search(rf"distill, job {ids['distill']}: did not start: {why}", status)
    assert f"evaluate, job {ids['evaluate']}_0: cancelled, since a stage before it did not finish" in status
    slurm.nothing_left(*ids.values())

    out, _ = lad("run", job, "--on", lad.profile(), "--out", run, "--wait")
    again = jobs_of(run)
    assert set(again) == {"experts", "distill", "evaluate", "report"} and not set(again.values()) & set(ids.values())
    for stage, number in again.items():
        script = re.search(rf"^{stage}: job {number}.*: (/\S+)$", out, re.MULTILINE)
        assert script and Path(script[1]).read_text().startswith("#!/bin/bash")
    assert f"lad-dist cancel {run}" in out
    assert "over" not in slurm.live()
    alone = reference(job)
    assert buffer_rows(run) == buffer_rows(alone)
    same_set(run, alone)
    rows = json.loads((run / "evaluation/results.json").read_text())["rows"]
    assert sorted((r["source"], r["seed"]) for r in rows) == [
        ("distilled", 0),
        ("distilled", 1),
        ("random", 0),
        ("random", 1),
    ]
    assert (run / "report/index.html").exists()
    slurm.nothing_left(*again.values())
    out, _ = lad("run", job, "--on", lad.profile(), "--out", run)
    assert "all stages are done; nothing was submitted" in out


@pytest.mark.timeout(400)
def test_jobs_are_known_by_their_ids_and_ending_ones_are_not_queued(slurm, lad):
    """One chain: its comments are changed, its experts are cancelled, it is submitted again at once, and an array loses a job.

    Then other networks are asked for. The run folder has a space in its name.
    """
    job, run = lad.job(), lad.folder / "a run"
    stubborn = lad.profile(
        "stubborn.yaml", setup=["trap '' TERM", "sleep 60"]
    )  # ends by SIGKILL, seconds after scancel
    lad("run", job, "--on", stubborn, "--out", run)
    ids = jobs_of(run)
    wait_until(lambda: slurm.state(ids["experts"]) == "RUNNING", 30)
    for number in ids.values():
        subprocess.run(["scontrol", "update", f"JobId={number}", "Comment=mine"], check=True)
    out, _ = lad("run", job, "--on", stubborn, "--out", run)
    assert jobs_of(run) == ids and f"already queued: experts, job {ids['experts']}_0: running on n" in out

    subprocess.run(["scancel", ids["experts"]], check=True)
    assert slurm.state(ids["experts"]) == "COMPLETING"
    late = "if [ \"$SLURM_JOB_NAME/$SLURM_ARRAY_TASK_ID\" = 'a run-experts/1' ]; then sleep 120; fi"
    waiting = lad.start("run", job, "--on", lad.profile(setup=[late]), "--out", run, "--ranks", 4, "--wait")
    wait_until(lambda: "report" in jobs_of(run) and not set(jobs_of(run).values()) & set(ids.values()), 120)
    again = jobs_of(run)
    assert slurm.state(ids["distill"]) == slurm.state(ids["report"]) == "CANCELLED"
    wait_until(lambda: slurm.state(f"{again['experts']}_1") == "RUNNING", 60)
    assert slurm.state(ids["experts"]) == "CANCELLED"  # its last process is gone
    subprocess.run(["scancel", f"{again['experts']}_1"], check=True)
    out, _ = lad.ended(waiting, code=0)
    assert f"submitted again, since its dependency has ended: distill, job {ids['distill']}" in out
    assert f"already queued: experts, job {ids['experts']}" not in out
    assert slurm.state(f"{again['experts']}_1") == "CANCELLED" and (run / "report/index.html").exists()
    assert "nothing was submitted" in lad("run", job, "--on", lad.profile(), "--out", run, "--wait")[0]
    status, _ = lad("status", run)
    assert f"experts, job {again['experts']}_1: cancelled (scancel) on n" in status and "done nevertheless" in status
    output = dict(re.findall(r"^(\w+): job .*\n  output: (/.*|'/.*)$", out, re.MULTILINE))
    said = {stage: subprocess.run(f"cat {files}", shell=True, capture_output=True, text=True).stdout
            for stage, files in output.items()}  # fmt: skip
    assert "task 3 of 4 on n2: distill" in said["distill"] and f"{again['experts']}_0, task 0 of 1" in said["experts"]

    out, _ = lad("evaluate", run, "--arch", "mlp", "--on", lad.profile(), "--wait")
    (asked,) = (one for one in read_submissions(RunDir(run))[-1].jobs if one.question)
    assert asked.stage == "evaluate" and asked.array == 2 and re.search(r"evaluate, job \d+_1: done", out)
    rows = json.loads((run / "evaluation/results.json").read_text())["rows"]
    assert sorted(r["seed"] for r in rows if r["architecture"] == "mlp") == [0, 1]
    for index in (0, 1):  # each job of the array says what it does
        log = Path(read_submissions(RunDir(run))[-1].logs) / f"{asked.id}_{index}" / f"{asked.id}_{index}_0_log.out"
        assert re.search(rf"evaluate distilled: 3/3 epochs done .* mlp  seed {index}", log.read_text())
    told = [
        e for e in read_events(run / "events.jsonl") if e["kind"] == "evaluated"
    ]  # twice where job 0 took a row over
    of_events, of_rows = ({(x["source"], x["architecture"], x["seed"]) for x in found} for found in (told, rows))
    assert of_events == of_rows
    assert len(rows) == 6
    assert "mlp" not in (run / "recipe.yaml").read_text() and "mlp" in (run / "report/index.html").read_text()
    slurm.nothing_left(*ids.values(), *again.values(), asked.id)


STEADY = {
    "lr_images": 0.01,
    "lr_labels": 0.01,
    "lr_alpha": 0.0,
    "checkpoint_every": 10_000,
}  # over thousands of iterations


SLOW = """
import json, time
dumps = json.dumps
def slow(value, *args, **fields):
    if isinstance(value, dict) and value.get("kind") in ("expert-epoch", "iteration"):
        time.sleep(0.25)
    return dumps(value, *args, **fields)
json.dumps = slow
"""


def wait_for_a_look(slurm: Any) -> None:
    """Until SLURM has just looked at the time limits, which it does every 30 s."""
    log = slurm.folder / "log" / "slurmctld.log"
    subprocess.run(["scontrol", "setdebug", "debug2"], check=True)
    seen, deadline = log.read_text().count("Testing job time limits"), time.monotonic() + 40
    while log.read_text().count("Testing job time limits") == seen:
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.timeout(1000)
def test_a_time_limit_of_a_minute_in_the_middle_of_experts_and_distillation(slurm, lad):
    """A job that begins after one of SLURM's looks is warned at the next one, 30 s old: it has then 30 s left, below 10 + 30.

    The partition takes the job and starts it after the look. The first 15 s it sleeps, and then at every epoch or iteration,
    30 s in all, so that it outlasts the warning.
    """
    slow = lad.folder / "slow"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(SLOW)
    job = lad.job(experts={"count": 1, "epochs": 120, "epochs_per_part": 1000}, distill={**STEADY, "iterations": 120})
    first = f'if [ "${{SLURM_RESTART_COUNT:-0}}" = 0 ]; then sleep 15; export PYTHONPATH={slow}:$PYTHONPATH; fi'
    profile, run = lad.profile(time_minutes=1, warning_seconds=10, setup=[first]), lad.folder / "run"
    alone = lad.folder / "reference"
    for stage, how in (("experts", ("--fleet", "off")), ("distill", ("--ranks", 2))):
        reference = lad.start(stage, job, "--out", alone, "--on", "local", *how, "--threads", 1, "--device", "cpu")
        subprocess.run(["scontrol", "update", "PartitionName=main", "State=DOWN"], check=True)
        try:
            submitted = lad.start(stage, job, "--on", profile, "--out", run, "--wait")
            wait_until(slurm.live, 60)
            wait_for_a_look(slurm)
        finally:
            subprocess.run(["scontrol", "update", "PartitionName=main", "State=UP"], check=True)
        lad.ended(submitted, timeout=450)
        lad.ended(reference, timeout=450)
    for stage, progress in (("experts", "expert-epoch"), ("distill", "iteration")):
        number = jobs_of(run)[stage]
        (told,) = (run / "slurm" / "logs").glob(f"*/{number}/{number}_0_log.out")
        for said in ("SIGUSR2: SLURM will end this job soon", "the job is requeued", "Requeued job"):
            assert said in told.read_text()
        assert json.loads((told.parent / "task.json").read_text())["restarts"] >= 1
        events = [e for e in read_events(run / "events.jsonl") if e["kind"] == progress or e.get("stage") == stage]
        stopped = [e["kind"] for e in events].index("stage-stopped")
        assert [e["kind"] for e in events[:stopped]].count(progress) > 0
        steps = [(e.get("stage"), e.get("epoch"), e.get("iteration")) for e in events if e["kind"] == progress]
        assert len(steps) == len(set(steps)), "something was done again, though the warning came in time to save it"
        slurm.nothing_left(number)
    assert buffer_rows(run) == buffer_rows(alone)
    same_set(run, alone, 1e-6)  # as many ranks: the same sums, over thousands of iterations


def test_a_fleet_over_two_nodes_survives_the_warning(slurm, lad, reference):
    job, run = lad.job(experts={"epochs": 80, "epochs_per_part": 5}), lad.folder / "run"
    profile = lad.profile(stages={"experts": {"mode": "fleet"}})
    lad("experts", job, "--on", profile, "--out", run)
    number = jobs_of(run)["experts"]
    wait_for_events(run, "expert-epoch", 10)
    status, _ = lad("status", run)
    line = re.search(r"dashboard: ssh -N -L (\d+):127\.0\.0\.1:\1 -J \S+ n1, .* token in (\S+)", status)
    assert line and stat.S_IMODE(Path(line[2]).stat().st_mode) == 0o600
    deadline = time.monotonic() + 60
    while sum("raylet" in name.split(" ")[0] for name in slurm.processes(number).values()) != 2:  # one for each node
        assert time.monotonic() < deadline, slurm.processes(number)
        time.sleep(0.5)
    subprocess.run(["scancel", "--signal=USR2", number], check=True)  # as SLURM does before the limit
    deadline = time.monotonic() + 120
    while slurm.state(number) != "COMPLETED":
        assert time.monotonic() < deadline, slurm.state(number)
        time.sleep(0.5)
    (logs,) = (run / "slurm" / "logs").iterdir()
    said = (logs / number / f"{number}_0_log.out").read_text()
    assert "Requeued job" in said and "raylet" not in said.lower()  # no state dump of a node that was to end
    assert kinds(run).count("ray-started") == 2 and "expert-restarted" not in kinds(run)
    assert buffer_rows(run) == buffer_rows(reference(job, "experts"))
    slurm.nothing_left(number)
    assert not list(Path("/tmp").glob(f"r-*-{number}-*")) and not Path(line[2]).exists()


def test_requeues_end_where_the_profile_says(slurm, lad):
    """A warning counts as that of the limit where the limit is near, which with a limit of one minute it always is."""
    job, run = lad.job(experts={"count": 1, "epochs": 5000}), lad.folder / "run"
    profile = lad.profile(max_requeues=0, time_minutes=1, warning_seconds=10)
    waiting = lad.start("experts", job, "--on", profile, "--out", run, "--wait")
    wait_for_events(run, "expert-epoch", 2)
    number = jobs_of(run)["experts"]
    subprocess.run(["scancel", "--signal=USR2", number], check=True)  # as SLURM does before the limit
    _, err = lad.ended(waiting, code=11, timeout=60)
    assert "ran out of time and was requeued as often as slurm.max_requeues allows" in err
    assert kinds(run).count("stage-stopped") == 1  # what was done is saved all the same
    slurm.nothing_left(number)


def test_a_killed_driver_is_noticed_and_takes_its_ray_along_and_no_other(slurm, lad):
    from ray_nodes import RayNodes, session

    job, run = lad.job(experts={"epochs": 2000}), lad.folder / "run"
    others = RayNodes()
    try:
        other = others.head(cpus=1)
        waiting = lad.start(
            "experts", job, "--on", lad.profile(stages={"experts": {"mode": "fleet"}}), "--out", run, "--wait"
        )
        while not run.exists() or "experts" not in jobs_of(run):
            time.sleep(0.2)
        number = jobs_of(run)["experts"]
        wait_for_events(run, "expert-epoch", 2)
        known, processes = set(session(other)), slurm.processes(number)
        drivers = [
            pid
            for pid, name in processes.items()
            if " -m submitit.core._submit" in name and "launch.supervisor" not in name
        ]
        head = min(drivers, key=lambda pid: "SLURM_PROCID=0" not in Path(f"/proc/{pid}/environ").read_text())
        began = time.monotonic()
        os.kill(head, signal.SIGKILL)
        _, err = lad.ended(waiting, code=11, timeout=60)
        assert time.monotonic() - began < 30
        assert f"error: experts, job {number}: failed on n[1-2]" in err and "its log: " in err
        slurm.nothing_left(number)
        assert not list(Path("/tmp").glob(f"r-*-{number}-*"))
        assert len(known) > 2 and known <= set(session(other))
    finally:
        others.close()


def test_a_job_that_died_without_a_word_is_noticed(slurm, lad):
    job, run = lad.job(experts={"epochs": 5000}), lad.folder / "run"
    waiting = lad.start("run", job, "--on", lad.profile(), "--out", run, "--wait")
    while not run.exists() or "report" not in jobs_of(run):
        time.sleep(0.2)
    ids = jobs_of(run)
    wait_for_events(run, "expert-epoch", 1)
    rows = squeue([ids["experts"]])
    assert {row["state"] for row in rows.values()} == {"RUNNING"}
    members = subprocess.run(
        ["squeue", "-h", "-r", f"--jobs={ids['experts']}", "--format=%A"], capture_output=True, text=True
    )
    killed = [pid for member in members.stdout.split() for pid in slurm.processes(member)]
    began = time.monotonic()
    assert killed
    for pid in killed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _, err = lad.ended(waiting, code=11, timeout=60)
    assert time.monotonic() - began < 30
    assert "failed on n" in err and "not started, as they need it: distill, evaluate, report" in err
    text, _ = lad("logs", run, "experts", "--follow")
    assert text.startswith("==> ") and f"{ids['experts']}_0_0_log.out <==" in text and "experts: " in text
    slurm.nothing_left(*members.stdout.split())


def test_submitting_again_and_cancel(slurm, lad):
    job, run = lad.job(), lad.folder / "run"
    held = ["sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap", "true"]
    other = subprocess.run(held, check=True, capture_output=True, text=True, cwd=lad.folder).stdout.strip()
    profile = lad.profile(setup=["sleep 300"], dependency=f"afterany:{other}", comment="theirs", begin="now")
    lad("run", job, "--on", profile, "--out", run)
    ids = jobs_of(run)
    waits = dict.fromkeys(ids, f"afterany:{other}(unfulfilled)")
    waits["distill"] += f",afterany:{ids['experts']}_*(unfulfilled)"
    waits["evaluate"] = f"{waits['distill']},afterok:{ids['distill']}(unfulfilled)"
    waits["report"] = f"{waits['evaluate']},afterany:{ids['evaluate']}_*(unfulfilled)"
    for stage, number in ids.items():
        said = subprocess.run(
            ["scontrol", "-o", "show", "job", number], check=True, capture_output=True, text=True
        ).stdout
        assert f" Dependency={waits[stage]} " in said and " Comment=theirs " in said
    subprocess.run(["scontrol", "release", other], check=True)
    out, _ = lad("run", job, "--on", profile, "--out", run)
    assert jobs_of(run) == ids and f"already queued: distill, job {ids['distill']}: pending (Dependency)" in out
    status, _ = lad("status", run)
    assert re.search(rf"experts, job {ids['experts']}_0: (pending|running on n1, \S+ left)", status)
    out, _ = lad("cancel", run)
    assert f"cancelled: report, job {ids['report']}" in out
    for number in ids.values():
        deadline = time.monotonic() + 20
        while slurm.state(number) != "CANCELLED":
            assert time.monotonic() < deadline
            time.sleep(0.2)
    assert "no job of this run is queued or running" in lad("cancel", run)[0]
    slurm.nothing_left(*ids.values())
