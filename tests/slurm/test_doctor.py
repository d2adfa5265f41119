"""``lad-dist doctor`` on a real SLURM: what is right, what is wrong, and nothing left in the queue or the folder."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lad_dist.cli import app
from lad_dist.doctor import machine

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slurm


def wait_until(reached, seconds):
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def examined(slurm, lad, profile, code, *said, more=()):
    """In this process, and without the check of ranks, which test_all_is_well makes."""
    before = slurm.live()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(machine, "ranks_meet", lambda profile: iter(()))
        patched.chdir(lad.folder)
        for name, value in (("COLUMNS", "200"), ("OMP_NUM_THREADS", "1"), ("PYTHONPATH", str(ROOT))):
            patched.setenv(name, value)
        asked = ["doctor", "--on", str(profile), "--out", str(lad.folder / "runs"), *map(str, more)]
        done = CliRunner().invoke(app, asked)
    assert done.exit_code == code, done.output
    for text in said:
        assert text in done.output, done.output
    nothing_left(slurm, lad, before)
    return done.output


def nothing_left(slurm, lad, before):
    assert slurm.live() == before
    assert not (lad.folder / "runs").exists() or list((lad.folder / "runs").iterdir()) == []


def test_all_is_well(slurm, lad, monkeypatch):
    monkeypatch.setenv("HOME", str(lad.folder))  # a Ray token there may be readable by others: a warning, rightly
    before = slurm.live()
    out, _ = lad("doctor", "--on", lad.profile(), "--out", lad.folder / "runs")
    nothing_left(slurm, lad, before)
    assert "ok    experts        SLURM would take its job" in out and "ok    accounting" in out
    assert "ok    shared folder  n" in out and "ok    node's python" in out and "fail" not in out and "warn" not in out


def test_an_unknown_partition(slurm, lad):
    examined(slurm, lad, lad.profile(partition="gpux"), 12, "gpux: unknown here -> set slurm.partition; valid: main",
             "error: 1 check failed: partition")  # fmt: skip


def test_a_log_folder_that_cannot_be_written(slurm, lad):
    (lad.folder / "file").touch()
    examined(slurm, lad, lad.profile(logs=str(lad.folder / "file" / "logs")), 12, "fail  logs", "Not a directory")


def test_a_missing_module(slurm, lad):
    out = examined(
        slurm,
        lad,
        lad.profile(setup=["module load nowhere"]),
        12,
        "module: command not found",
        "-> correct slurm.setup",
    )
    assert "fail  job            failed on n" in out


def test_asking_for_more_than_there_is(slurm, lad):
    """Each stage is told which resource the partition cannot give."""
    stages = {"experts": {"mem_gb": 900}, "distill": {"gpus_per_node": 8, "tasks_per_node": 1}, "evaluate": {"cpus_per_task": 9},
              "report": {"mem_gb": 1}}  # fmt: skip
    said = ("memory (mem_gb): 900 GB per node requested, main has at most 7.81 GB",
            "GPUs (gpus_per_node): 8 per node requested, main has at most 2",
            "cores (cpus_per_task): 9 per node requested, main has at most 4")  # fmt: skip
    out = examined(slurm, lad, lad.profile(stages=stages), 12, "Requested node configuration is not available", *said)
    for stage, lacks in zip(("experts", "distill", "evaluate"), said, strict=True):
        assert re.search(rf"^fail  {stage} .*{re.escape(lacks)}", out, re.MULTILINE)
    assert "ok    report " in out


def test_nodes_that_are_busy(slurm, lad):
    busy = ["sbatch", "--parsable", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 100"]
    number = subprocess.run(busy, check=True, capture_output=True, text=True, cwd=lad.folder).stdout.strip()
    try:
        wait_until(lambda: slurm.state(number) == "RUNNING", 20)
        examined(slurm, lad, lad.profile(), 0, "warn  job            still pending after 4 s (", more=("--wait", 4))
    finally:
        subprocess.run(["scancel", number], check=True)
        wait_until(lambda: slurm.state(number) == "CANCELLED", 20)
