"""What a cluster or a profile can get wrong: one clear error each, and nothing left in the queue."""

from __future__ import annotations

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


def test_slurm_commands_that_are_missing(slurm, lad, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    _, err = lad("run", lad.job(), "--on", lad.profile(), "--out", lad.folder / "run", code=11)
    assert err.startswith("error: sbatch: not found; submit from a login node")
