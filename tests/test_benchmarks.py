"""benchmarks/all.py gathers rows and keeps them; benchmarks/compare.py says what changed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STEP = {
    "seconds": {"representation/textbook": 2.0, "representation/keep": 0.5, "gsam/classifier": 0.1},
    "ratio": {"representation/textbook": 1.0, "representation/keep": 0.25, "gsam/classifier": 0.2},
    "floor": {"representation/keep": 0.4},
    "rates": {"convolutions": [1e11, 2e11], "copy": 3e10},
}
FOUND = {
    "fleet.py": [{"way": "one", "per_hour": 10.0, "pss": 2**20}, {"way": "two", "per_hour": 19.0, "pss": 2**21}],
    "buffer.py": {"windows": {"cold": [0.01, 0.02], "warm": [0.005, 0.01], "peak": 2**27}, "processes": {"rate": 100.0},
                  "pt": {"cold": 5.0, "warm": 1.0, "peak": 2**30}},
    "evaluation.py": {"case": {"alone": 2.0, "alone: processor": 1.0, "together": 1.0}},
}  # fmt: skip
RANKS = {"iterations": {"keep": {"alone": 1.0, "together": 0.6}}, "settings": {"world": 2}}


@pytest.fixture
def everything(benchmark_module, monkeypatch):
    """all.py with made-up measurements."""
    module = benchmark_module("all")

    def called(script: str, *options: str) -> str:
        if "--peak-of" in options:
            return "104857600"
        return json.dumps(STEP if script == "step.py" else RANKS)

    monkeypatch.setattr(module, "called", called)
    monkeypatch.setattr(module, "from_file", lambda script, *options: FOUND[script])
    return module


def test_all_rows_are_printed_and_kept(everything, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["all.py", "--out", str(tmp_path / "new.json")])
    everything.main()
    printed, kept = capsys.readouterr().out, json.loads((tmp_path / "new.json").read_text())
    rows = {row["name"]: row for row in kept["rows"]}
    assert all(name in printed for name in rows) and {"date", "machine", "commit", "versions", "threads"} <= set(kept)
    keep = rows["step, 128, 3x32x32: representation/keep"]
    assert (keep["value"], keep["ratio"], keep["of"], keep["floor"]) == (0.5, 0.25, "textbook", 0.4)
    assert rows["experts: two"]["ratio"] == 1.9 and rows["experts: two"]["better"] == "more"
    assert rows["window read, cold, median"]["ratio"] == 0.002
    assert rows["iteration, keep, 2 ranks"]["ratio"] == pytest.approx(1.2)
    assert rows["evaluation, case: together"]["ratio"] == 0.5 and not any("processor" in name for name in rows)
    assert rows["peak memory, recompute, 80 student steps"]["ratio"] == 1


def test_some_rows(everything, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["all.py", "--only", "ranks"])
    everything.main()
    assert "iteration, keep" in capsys.readouterr().out


def test_a_benchmark_that_fails_is_named(benchmark_module):
    with pytest.raises(SystemExit, match=r"benchmarks/step\.py failed with exit code 1"):
        benchmark_module("all").called("step.py", "--shape", "1x8x9", "--json")


def test_what_it_calls_takes_its_options(benchmark_module):
    """Every script is asked for its help, so that an option that is renamed there is noticed here."""
    text = (ROOT / "benchmarks" / "all.py").read_text()
    for script in ("step.py", "fleet.py", "buffer.py", "ranks.py", "evaluation.py"):
        assert f'"{script}"' in text
        command = [sys.executable, f"benchmarks/{script}", "--help"]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert "--json" in said


def result(path: Path, factor: float, name: str = "step") -> Path:
    rows = [
        {
            "name": name,
            "value": 2.0 * factor,
            "unit": "s",
            "better": "less",
            "ratio": 0.5 * factor,
            "of": "x",
            "floor": 1.0,
        },
        {
            "name": "rate",
            "value": 3.0 * factor,
            "unit": "1/s",
            "better": "more",
            "ratio": None,
            "of": None,
            "floor": None,
        },
    ]
    machine = {"date": "2026-01-02", "machine": "m", "threads": 2, "commit": "abc", "versions": {"torch": "2"}}
    path.write_text(json.dumps({**machine, "rows": rows}))
    return path


@pytest.mark.parametrize(
    ("factor", "of_step", "of_rate"), [(2.0, "worse", "better"), (0.5, "better", "worse"), (1.05, "", "")]
)
def test_what_changed(benchmark_module, monkeypatch, capsys, tmp_path, factor, of_step, of_rate):
    old, new = result(tmp_path / "old.json", 1), result(tmp_path / "new.json", factor)
    monkeypatch.setattr(sys, "argv", ["compare.py", str(old), str(new)])
    benchmark_module("compare").main()
    printed = capsys.readouterr().out.splitlines()
    (step,), (rate,) = ([line for line in printed if line.startswith(name)] for name in ("step", "rate"))
    assert f"0.50 -> {0.5 * factor:.2f}" in step and f"{factor:.2f}" in rate
    assert [word in ("better", "worse") and word for word in (step.split()[-1], rate.split()[-1])] == [
        of_step or False, of_rate or False]  # fmt: skip


def test_rows_that_come_and_go_and_another_machine(benchmark_module, monkeypatch, capsys, tmp_path):
    old, new = result(tmp_path / "old.json", 1), result(tmp_path / "new.json", 1, "another")
    new.write_text(new.read_text().replace('"m"', '"n"'))
    monkeypatch.setattr(sys, "argv", ["compare.py", str(old), str(new)])
    benchmark_module("compare").main()
    printed = capsys.readouterr().out
    assert "step: no longer measured" in printed and "new row" in printed
    assert "machine: m before, n now: compare ratios, not values" in printed


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"rows": 3}', '{"rows": [{}]}'])
def test_a_file_that_is_no_result(benchmark_module, monkeypatch, tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    monkeypatch.setattr(sys, "argv", ["compare.py", str(tmp_path / "bad.json"), str(tmp_path / "none.json")])
    with pytest.raises(SystemExit, match=r"bad\.json: not a result of benchmarks/all\.py"):
        benchmark_module("compare").main()


def test_the_kept_result_is_one(benchmark_module):
    kept = benchmark_module("compare").load(ROOT / "benchmarks" / "results" / "all.json")
    measured = [row for row in kept["rows"].values() if row["ratio"] is not None]
    assert len(measured) > 20 and kept["commit"] != "unknown"
