"""The plain sbatch scripts of cluster/slurm/, as they are, with only what the virtual nodes lack asked for differently."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lad_dist.distilled import DistilledSet
from lad_dist.progress import read_events

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
EXAMPLES = Path(__file__).parents[2] / "cluster" / "slurm"
LESS = ["--cpus-per-task=1", "--mem=1000"]


@pytest.fixture
def sbatch(slurm, lad, monkeypatch):
    """``sbatch("one-gpu", "--array=0-1")`` submits and returns the job's number."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parents[1]))
    monkeypatch.setenv("RUN", str(lad.folder / "run"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def submit(name: str, *options: str) -> str:
        command = ["sbatch", "--parsable", *LESS, *options, EXAMPLES / f"{name}.sbatch"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=lad.folder, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return submit


def until(slurm, job: str, state: str, seconds: float, logs: Path) -> None:
    deadline = time.monotonic() + seconds
    while slurm.state(job) != state:
        said = {file.name: file.read_text()[-2000:] for file in logs.glob("*.log")}
        assert time.monotonic() < deadline, f"{job} is {slurm.state(job)}, not {state}: {said}"
        time.sleep(0.3)


@pytest.mark.timeout(400)
def test_an_array_of_experts_then_ranks_then_the_rest(slurm, lad, sbatch, monkeypatch):
    monkeypatch.setenv("JOB", str(lad.job(experts={"count": 4})))
    experts = sbatch("experts-array", "--array=0-1")
    distill = sbatch("distill-ranks", f"--dependency=afterok:{experts}", "--ntasks-per-node=1", "--gpus-per-node=1")
    rest = sbatch("one-gpu", f"--dependency=afterok:{distill}")
    until(slurm, rest, "COMPLETED", 200, lad.folder)
    run = lad.folder / "run"
    events = list(read_events(run / "events.jsonl"))
    epochs = [(e["expert"], e["stage"], e["epoch"]) for e in events if e["kind"] == "expert-epoch"]
    assert len(epochs) == len(set(epochs)) == 4 * (4 + 3)  # nothing was trained twice
    assert len(list(lad.folder.glob("lad-dist-experts-*.log"))) == 2
    assert len(DistilledSet.load(run)) == 20 and (run / "report" / "index.html").exists()
    slurm.nothing_left(experts, distill, rest)


@pytest.mark.timeout(300)
def test_a_warning_requeues_the_job_and_it_goes_on(slurm, lad, sbatch, monkeypatch):
    monkeypatch.setenv("JOB", str(lad.job(experts={"count": 1, "epochs": 400, "epochs_per_part": 1000})))
    number = sbatch("experts-array", "--array=0")
    run = lad.folder / "run"
    deadline = time.monotonic() + 60
    while not (run / "events.jsonl").exists() or "expert-epoch" not in (run / "events.jsonl").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    subprocess.run(["scancel", "--batch", "--signal=USR1", f"{number}_0"], check=True)
    until(slurm, f"{number}_0", "COMPLETED", 150, lad.folder)
    events = [
        e for e in read_events(run / "events.jsonl") if e["kind"] in ("expert-epoch", "stage-stopped", "stage-finished")
    ]
    kinds = [e["kind"] for e in events]
    assert kinds.count("stage-stopped") == 1 and kinds[-1] == "stage-finished"
    epochs = [(e["stage"], e["epoch"]) for e in events if e["kind"] == "expert-epoch"]
    assert len(epochs) == len(set(epochs)) == 400 + 3
    slurm.nothing_left(number)
