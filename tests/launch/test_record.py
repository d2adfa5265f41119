"""The record of a run's jobs, slurm/jobs.json: what is damaged is refused, since its numbers are those that are cancelled."""

from __future__ import annotations

import json

import pytest

from lad_dist.errors import RunDirError
from lad_dist.rundir import RunDir
from lad_dist.slurm_jobs import SlurmJob, Submission, read_submissions, write_submissions

MADE = Submission("20260101-000000-abc", 1.5, "here", "/logs", (SlurmJob("experts", "1234", 2, "/logs/1234.sh"),))


@pytest.fixture
def run(tmp_path):
    write_submissions(RunDir(tmp_path), [MADE])
    return RunDir(tmp_path)


def test_no_flipped_bit_changes_a_job(run):
    content = run.slurm_jobs.read_bytes()
    refused = 0
    for spot in range(len(content)):
        run.slurm_jobs.write_bytes(content[:spot] + bytes([content[spot] ^ 1]) + content[spot + 1 :])
        try:
            assert read_submissions(run) == [MADE]
        except RunDirError as error:
            assert "slurm/jobs.json: is not a record of submitted jobs" in str(error)
            refused += 1
    assert refused > len(content) / 2


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", "[" * 100_000, '{"submissions": 3, "format_version": 1}',
                                  '{"format_version": 99, "submissions": []}'])  # fmt: skip
def test_what_is_no_record_is_one_error(run, text):
    run.slurm_jobs.write_text(text)
    with pytest.raises(RunDirError, match="is not a record of submitted jobs"):
        read_submissions(run)


def test_a_record_of_a_version_without_checksums_is_still_read(run):
    document = json.loads(run.slurm_jobs.read_text())
    del document["sha256"]
    run.slurm_jobs.write_text(json.dumps(document))
    assert read_submissions(run) == [MADE]
