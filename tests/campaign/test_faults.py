"""A short form of the campaign of faults, and that its judge tells them apart."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaign.campaign import Outcome
from tests.campaign.faults import (
    COUNTS,
    FAULTS,
    STAGES,
    VERDICTS,
    WRONG,
    Case,
    Done,
    Record,
    Undisturbed,
    cases,
    copy_before,
    judge_first,
    pace,
    read,
    table,
)

ROOT = Path(__file__).parents[2]
SHORT = 3


@pytest.mark.timeout(600)
def test_the_same_command_finishes_what_a_fault_disturbed(tmp_path):
    """One killed, one stopped while another takes over, one on a full disk."""
    command = [sys.executable, "-m", "tests.campaign.faults", "--seed", "1", "--out", str(tmp_path)]
    command += [word for name in COUNTS for word in (f"--{name}", str(SHORT if name == "process" else 0))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    records = read(tmp_path / "faults.jsonl")
    assert [record.fault for record in records] == list(FAULTS["process"][:SHORT])
    assert all(record.verdict in ("unharmed", "continued") for record in records), records


def test_the_seed_makes_the_cases_and_any_beginning_holds_all_faults():
    made = list(cases(3, "process", 40, STAGES))
    again = list(cases(3, "process", 40, STAGES))
    assert [(c.fault, c.stage, c.moment, c.draw.random()) for c in made] == [
        (c.fault, c.stage, c.moment, c.draw.random()) for c in again
    ]
    assert {c.fault for c in made[: len(FAULTS["process"])]} == set(FAULTS["process"])
    assert {c.stage for c in made} == set(STAGES)
    assert sum(COUNTS.values()) >= 200 and set(COUNTS) == set(FAULTS)


@pytest.mark.parametrize(
    ("verdict", "code", "err", "what"),
    [
        ("unharmed", 0, "", "a second driver"),
        ("continued", 8, "error: run/x: cannot be written", "no byte is left on the disk"),
        ("continued", -9, "", "killed"),
        ("unclear error", -9, "", "its folders are read-only"),
        ("unclear error", 1, "something", "killed"),
        ("unclear error", 8, "error: one\nerror: two", "killed"),
        ("traceback", 1, "error: x\nTraceback (most recent call last):", "killed"),
        ("hang", None, "", "killed"),
    ],
)
def test_verdicts_of_the_disturbed_command(verdict, code, err, what):
    assert judge_first([Outcome(code, "", err, 1.0)], Done(what, []))[0] == verdict


def happened(*names: str) -> list[dict[str, object]]:
    made: list[dict[str, object]] = []
    for time, name in enumerate(names):
        stage = {"stage": name} if name in STAGES or name.startswith("evaluate ") else {}
        made.append({"kind": "stage-started" if stage else name, "time": float(time), **stage})
    return made


def test_the_pace_of_the_stages():
    counts, seconds = pace(happened("data", "experts", "expert-epoch", "distill", "evaluate distilled", "evaluated"))
    assert counts == {"start": 1, "experts": 2, "distill": 1, "evaluate": 2}
    assert seconds == {"start": 1.0, "experts": 2.0, "distill": 1.0, "evaluate": 1.0}


def test_a_case_goes_on_with_what_comes_before_its_stage(tmp_path):
    run = tmp_path / "whole" / "run"
    for name in ("trajectories", "checkpoints", "distilled", "evaluation", "report"):
        (run / name).mkdir(parents=True)
    (run / "events.jsonl").touch()
    kept = {}
    for stage in STAGES:
        copy_before(stage, tmp_path / "whole", tmp_path / stage)
        copied = tmp_path / stage / "run"
        kept[stage] = {path.name for path in copied.iterdir()} if copied.exists() else set()
    assert kept["start"] == kept["experts"] == set()
    assert kept["distill"] == {"trajectories"}
    assert kept["evaluate"] == {"trajectories", "checkpoints", "distilled"}
    assert kept["report"] == kept["evaluate"] | {"evaluation"}


def test_the_journal_and_the_table(tmp_path):
    record = Record("0-a", "process", "killed", "experts", "experts, event 3", "continued", "", (-9, 0), 2.0)
    (tmp_path / "faults.jsonl").write_text(json.dumps(vars(record)) + '\n{"case')
    assert read(tmp_path / "faults.jsonl") == [record]
    head, _, row, total = table([record]).splitlines()
    assert head.count("|") == len(VERDICTS) + 4 and set(WRONG) < set(VERDICTS)
    assert row.startswith("| process | killed | 0 | 1 | 0 |") and total.endswith("| 1 |")


def test_a_case_that_ended_before_its_fault_is_too_late(tmp_path):
    from tests.campaign.faults import wait_for_moment

    class Over:
        pid = 1

        def ended(self) -> bool:
            return True

        def outcome(self, limit: float) -> Outcome:
            return Outcome(0, "", "", 0.0)

    case = Case("x", "process", "killed", "distill", 0.5, 0.0, random.Random(0))
    assert not wait_for_moment(case, tmp_path, Over(), Undisturbed(tmp_path, {}, {"distill": 4}, {"distill": 1.0}), 1.0)
