"""``--json``: one document on standard output, with what the tables show."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from lad_dist import catalog, cli
from lad_dist.doctor.findings import fail, ok


def run(*words, code: int = 0):
    ended = CliRunner().invoke(cli.app, [str(word) for word in words], prog_name="lad-dist")
    assert ended.exit_code == code, ended.output
    return ended


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two runs of one recipe with two seeds, both measured."""
    from lad_dist import Profile, Recipe, Run
    from tests.test_docs import SMALL

    folder, made = tmp_path_factory.mktemp("json"), []
    for seed in (0, 1):
        document = {
            **SMALL,
            "seed": seed,
            "evaluate": {"seeds": 2, "epochs": 2, "full_epochs": 1, "baselines": ["initial"]},
        }
        one = Run.open(folder / f"run{seed}", Recipe.model_validate(document), quiet=True, buffers=folder / "buffers",
                       profile=Profile(fleet="off", device="cpu", threads=1))  # fmt: skip
        one.run_all()
        made.append(one.folder)
    return made


def test_status(finished):
    found = json.loads(run("status", finished[0], "--json").stdout)
    assert found["finished"] and found["error"] is None and found["name"] == "digits-lt"
    assert [(stage["name"], stage["state"]) for stage in found["stages"]][:2] == [
        ("experts", "done"),
        ("distill", "done"),
    ]
    by_source = {row["source"]: row for row in found["results"]}
    assert set(by_source) == {"distilled", "initial"} and by_source["distilled"]["seeds"] == 2
    assert 0 <= by_source["distilled"]["overall"] <= 1
    assert "valid: without --watch" in run("status", finished[0], "--json", "--watch", code=2).stderr


def test_compare(finished, tmp_path):
    found = json.loads(run("compare", *finished, "--json", "--out", tmp_path / "page.html").stdout)
    assert (tmp_path / "page.html").exists()
    first, second = found["runs"]
    assert first["run"] == str(finished[0]) and [g["over"] for g in first["gains"]] == ["initial"]
    (pair,) = found["pairs"]
    assert pair["minus"] == str(finished[0]) and pair["not_comparable"] is None
    overall = next(one for one in pair["differences"] if one["figure"] == "overall")
    mean = {row["source"]: row["overall"] for row in second["results"]}["distilled"]
    base = {row["source"]: row["overall"] for row in first["results"]}["distilled"]
    assert overall["mean"] == pytest.approx(mean - base) and overall["seeds"] == [0, 1]


def test_jobs_and_clusters():
    every = json.loads(run("jobs", "--json").stdout)
    assert [job["name"] for job in every] == list(catalog.jobs())
    (digits,) = json.loads(run("jobs", "digits-lt", "matching", "--json").stdout)
    assert digits["ipc"] == 2 and digits["dataset"] == "digits" and digits["imbalance_factor"] == 20
    assert [profile["name"] for profile in json.loads(run("clusters", "--json").stdout)] == list(catalog.profiles())
    assert "valid: without show" in run("jobs", "show", "digits-lt", "--json", code=2).stderr


def test_doctor(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "lad_dist.doctor.examine", lambda *args: iter([ok("python", "3.11"), fail("disk", "full", "free it")])
    )
    ended = run("doctor", "--json", "--out", tmp_path, code=12)
    assert json.loads(ended.stdout) == [
        {"level": "ok", "name": "python", "found": "3.11", "todo": ""},
        {"level": "fail", "name": "disk", "found": "full", "todo": "free it"},
    ]
    assert "1 check failed: disk" in ended.stderr
