"""A short form of the campaign of bad input, and that its judge tells faults from refusals."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaign.campaign import FAULTS, MARKER, VERDICTS, Attempt, Outcome, Record, case_names, judge, read, table
from tests.campaign.kinds import KINDS, payload

ROOT = Path(__file__).parents[2]
CASES = 42


def short_campaign(out: Path, cases: int) -> list[Record]:
    command = [sys.executable, "-m", "tests.campaign.campaign", "--seed", "1", "--cases", str(cases), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return read(out / "cases.jsonl")


@pytest.mark.timeout(900)
def test_no_case_ends_in_a_fault(tmp_path):
    records = short_campaign(tmp_path, CASES)
    assert len(records) == CASES and {record.kind for record in records} == set(KINDS)
    assert [record for record in records if record.verdict in FAULTS] == []
    assert sum(record.verdict == "clear refusal" for record in records) > CASES / 4
    again = short_campaign(tmp_path, CASES)  # which skips all that is there
    assert again == records


def outcome(code: int | None, text: str = "") -> Outcome:
    return Outcome(code, "", text, 1.0)


@pytest.mark.parametrize(
    ("verdict", "ended"),
    [
        ("clear refusal", outcome(2, "error: recipe.yaml: ipc: 0: at least 1 is valid")),
        ("unclear refusal", outcome(2, "error: something is wrong")),
        ("unclear refusal", outcome(2, "")),
        ("traceback", outcome(70, "Traceback (most recent call last):\nValueError: ipc")),
        ("traceback", outcome(1, "error: ipc\nTraceback (most recent call last):")),
        ("traceback", outcome(-11)),
        ("hang", outcome(None)),
        ("silent other result", outcome(0, "done")),
        ("accepted", outcome(0, "ipc: left out")),
    ],
)
def test_verdicts(tmp_path, verdict, ended):
    attempt = Attempt("x", [], ("ipc",), lambda _: "another result")
    assert judge(attempt, ended, tmp_path, None)[0] == verdict


def test_a_file_that_was_made_again_is_healed(tmp_path):
    file = tmp_path / "part"
    file.write_bytes(b"whole")
    attempt = Attempt("x", [], ("part",), lambda _: "", damaged=file)
    assert judge(attempt, outcome(0), tmp_path, b"damaged")[0] == "healed"
    assert judge(attempt, outcome(0), tmp_path, b"whole")[0] == "accepted"


def test_the_payload_is_seen_where_it_is_unpickled(tmp_path):
    attempt = Attempt("x", [], ("x",), lambda _: "")
    assert judge(attempt, outcome(1, "error: x"), tmp_path, None)[0] == "clear refusal"
    pickle.loads(payload(tmp_path))
    assert (tmp_path / MARKER).exists()
    assert judge(attempt, outcome(1, "error: x"), tmp_path, None)[0] == "executed code"


def test_any_beginning_holds_every_kind():
    assert {kind for kind, _ in case_names(KINDS, len(KINDS))} == set(KINDS)
    assert case_names(KINDS, 300)[:12] == case_names(KINDS, 12)


def test_the_table_counts_kinds_and_verdicts():
    records = [Record("0-a-0", "a", "", "", VERDICTS[0], "", 1.0), Record("0-b-0", "b", "", "", VERDICTS[5], "", 1.0)]
    assert table(records).splitlines()[-1] == "| all | 1 | 0 | 0 | 0 | 0 | 1 | 0 | 0 | 2 |"


def test_a_line_cut_off_in_the_journal_counts_for_nothing(tmp_path):
    journal = tmp_path / "cases.jsonl"
    whole = Record("0-a-0", "a", "", "", "hang", "", 1.0)
    journal.write_text(json.dumps(vars(whole)) + '\n{"case')
    assert read(journal) == [whole]
