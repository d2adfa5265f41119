"""What a cluster or a profile can get wrong: one clear error each, and nothing left in the queue."""

from __future__ import annotations

import re

import pytest

pytestmark = pytest.mark.slurm


def refused(slurm, lad, profile, code, *said):
    before = slurm.live()
    _, err = lad("run", lad.job(), "--on", profile, "--out", lad.folder / "run", code=code)
    assert err.startswith("error: ") and err.count("error: ") == 1, err
    for text in said:
        assert text in err
    assert slurm.live() == before
    return err


def test_asking_for_more_than_there_is(slurm, lad):
    """The experts, submitted first, are withdrawn."""
    profile = lad.profile(stages={"distill": {"gpus_per_node": 8, "tasks_per_node": 1}})
    refused(slurm, lad, profile, 11, "distill: SLURM refused the job: Requested node configuration is not available")
    assert '"submissions": []' in (lad.folder / "run/slurm/jobs.json").read_text()


@pytest.mark.parametrize(("fields", "said"), [
    ({"partition": "gpux"}, "experts: SLURM refused the job: invalid partition specified: gpux"),
    ({"constraint": "a100"}, "experts: SLURM refused the job: Invalid feature specification"),
])  # fmt: skip
def test_what_the_cluster_does_not_have(slurm, lad, fields, said):
    refused(slurm, lad, lad.profile(**fields), 11, said)


def test_a_log_folder_that_cannot_be_written(slurm, lad):
    (lad.folder / "file").touch()
    refused(
        slurm, lad, lad.profile(logs=str(lad.folder / "file" / "logs")), 11, "profile: slurm.logs", "Not a directory"
    )


def test_an_option_that_submitit_does_not_know(slurm, lad):
    refused(
        slurm,
        lad,
        lad.profile(options={"slurm_nice_value": 3}),
        2,
        "slurm.options",
        "slurm_nice_value",
        "slurm_exclude",
    )


def test_a_warning_longer_than_the_limit(slurm, lad):
    profile = lad.profile(stages={"distill": {"time_minutes": 2}}, warning_seconds=120)
    refused(
        slurm,
        lad,
        profile,
        2,
        "slurm.warning_seconds: 120 s is not below the 2 min of slurm.stages.distill.time_minutes",
    )


def test_a_setup_line_that_fails(slurm, lad):
    run = lad.folder / "run"
    _, err = lad(
        "experts", lad.job(), "--on", lad.profile(setup=["module load nowhere"]), "--out", run, "--wait", code=11
    )
    assert "slurm.setup: exit code 127: module load nowhere" in err and "log" in err
    status, _ = lad("status", run, "--watch")  # it ends: nothing more was submitted
    assert "module load nowhere" in status


def test_slurm_commands_that_are_missing(slurm, lad, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    _, err = lad("run", lad.job(), "--on", lad.profile(), "--out", lad.folder / "run", code=11)
    assert err.startswith("error: sbatch: not found; submit from a login node")


def test_a_dry_run_submits_and_writes_nothing(slurm, lad):
    before, run = slurm.live(), lad.folder / "run"
    profile = lad.profile(dependency="singleton", stages={"report": {"mem_gb": 1}})
    out, _ = lad("run", lad.job(), "--on", profile, "--out", run, "--ranks", 4, "--dry-run")
    stages = re.findall(r"^(\w+): (.*); SLURM would take it\n  asks for (.*)\n  sbatch (.*)$", out, re.MULTILINE)
    found = {stage: (what, options.split()) for stage, what, _, options in stages}
    asks = {stage: resources for stage, _, resources, _ in stages}
    assert asks["distill"] == "2 nodes, 2 tasks on a node with 1 core each, 2 GB on a node, 60 min"
    assert asks["report"] == "1 node, 1 task on a node with 1 core, 1 GB on a node, 60 min"
    assert list(found) == ["experts", "distill", "evaluate", "report"]
    assert found["distill"][0] == "one job, 4 ranks, on the CPU"
    assert {"--nodes=2", "--ntasks-per-node=2", "--mem=2GB"} <= set(found["distill"][1])
    assert {"--array=0-1", "--dependency=singleton"} <= set(found["experts"][1]) and "--mem=1GB" in found["report"][1]
    assert "--dependency='singleton,afterany:<experts>,afterok:<distill>,afterany:<evaluate>'" in found["report"][1]
    assert slurm.live() == before and not run.exists()
    more = lad.profile(stages={"distill": {"mem_gb": 900}})
    out, err = lad("run", lad.job(), "--on", more, "--out", run, "--dry-run", code=11)
    assert re.search(
        r"^distill: one job, 2 ranks, on the CPU; SLURM would refuse it: .*memory \(mem_gb\): 900 GB", out, re.M
    )
    assert "would refuse distill;" in err
    assert slurm.live() == before and not run.exists()


def test_data_that_are_refused_leave_nothing(slurm, lad):
    before, run = slurm.live(), lad.folder / "run"
    job = lad.job(data={"dataset": "image-folder", "root": str(lad.folder / "nowhere"), "image_size": 8})
    _, err = lad("run", job, "--on", lad.profile(), "--out", run, code=3)
    assert "nowhere" in err and not run.exists() and slurm.live() == before
