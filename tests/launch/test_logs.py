"""``lad-dist logs``: what SLURM jobs have written, printed or followed."""

from __future__ import annotations

import json
import threading
import time

import pytest
from typer.testing import CliRunner

from lad_dist import cli, slurm_jobs
from lad_dist.errors import ClusterError
from lad_dist.launch import logs
from lad_dist.rundir import RunDir
from lad_dist.slurm_jobs import SlurmJob, Submission, write_submissions


@pytest.fixture
def run(tmp_path, small_recipe, monkeypatch):
    """A run folder with two stages submitted: an array of two experts' jobs, and a distillation of two ranks."""
    made = RunDir.open(tmp_path / "run", small_recipe())
    folder = tmp_path / "run" / "slurm" / "logs" / "first"
    jobs = (SlurmJob("experts", "7", 2, "experts.sh"), SlurmJob("distill", "8", None, "distill.sh"))
    write_submissions(made, [Submission("first", 0.0, "here", str(folder), jobs)])
    for task, rank, kind, text in (
        ("7_0", 0, "out", "expert 0\n"), ("7_1", 0, "out", "expert 1\n"), ("7_1", 0, "err", "a warning\n"),
        ("8", 1, "out", "rank 1\n"), ("8", 0, "out", "rank 0\nhalf a li"),
    ):  # fmt: skip
        (folder / task).mkdir(parents=True, exist_ok=True)
        (folder / task / f"{task}_{rank}_log.{kind}").write_text(text)
    monkeypatch.setattr(slurm_jobs, "ASK_SECONDS", 0.0)
    monkeypatch.setattr(logs, "LOOK_SECONDS", 0.02)
    return made


@pytest.fixture
def queue(monkeypatch):
    """squeue's answer: nothing unless a test puts something in."""
    listed: dict[str, dict[str, str]] = {}
    monkeypatch.setattr(slurm_jobs, "squeue", lambda ids: dict(listed))
    return listed


def shown(run, stage=None, follow=False) -> str:
    written = []
    logs.show(run, stage, follow, written.append)
    return "".join(written)


def test_every_job_and_rank_in_order(run, queue):
    text = shown(run)
    heads = [line.split("/")[-1] for line in text.splitlines() if line.startswith("==>")]
    assert heads == [
        "7_0_0_log.out <==",
        "7_1_0_log.out <==",
        "7_1_0_log.err <==",
        "8_0_log.out <==",
        "8_1_log.out <==",
    ]
    assert "expert 1\n" in text and "a warning\n" in text and "half" not in text
    assert "rank 1" not in shown(run, "experts") and "expert" not in shown(run, "distill").replace("experts", "")


def test_followed_to_the_end_nothing_twice(run, queue):
    queue["8"] = {"state": "RUNNING", "reason": "None", "node": "n1", "left": "1:00", "end": "", "command": ""}
    file = next((run.root / "slurm" / "logs" / "first" / "8").glob("8_0_log.out"))

    def work():
        time.sleep(0.1)
        with file.open("a") as log:
            log.write("ne\nlast\n")
        (file.parent / "task.json").write_text(json.dumps({"state": "finished"}))
        queue.clear()

    thread = threading.Thread(target=work)
    thread.start()
    text = shown(run, "distill", follow=True)
    thread.join()
    assert [line for line in text.splitlines() if not line.startswith("==>")] == [
        "rank 0",
        "rank 1",
        "half a line",
        "last",
    ]


def test_a_log_that_was_truncated_is_read_anew(tmp_path):
    written, file = [], tmp_path / "a.out"
    printer = logs._Printer(written.append)
    for text in ("one\ntwo\n", "three\n"):
        file.write_text(text)
        printer.print([file])
    assert "".join(written).count("==>") == 1 and written[-1] == "three\n"


def test_what_has_no_jobs(run, queue, tmp_path, small_recipe):
    with pytest.raises(ClusterError, match="no SLURM job of report; valid: experts, distill"):
        shown(run, "report")
    with pytest.raises(ClusterError, match="stage 'training' is not known; valid: experts, distill, evaluate, report"):
        shown(run, "training")
    with pytest.raises(ClusterError, match="no SLURM jobs were submitted"):
        shown(RunDir.open(tmp_path / "local", small_recipe()))


def test_the_command(run, queue):
    ended = CliRunner().invoke(cli.app, ["logs", str(run.root), "distill"], prog_name="lad-dist")
    assert ended.exit_code == 0 and "rank 0\n" in ended.stdout
    ended = CliRunner().invoke(cli.app, ["logs", str(run.root), "nothing"], prog_name="lad-dist")
    assert ended.exit_code == ClusterError.exit_code and "valid: experts" in ended.stderr
