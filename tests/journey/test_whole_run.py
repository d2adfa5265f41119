"""Whole runs that go well: what is in the folder, what is shown, and what may be shared."""

from __future__ import annotations

import json
import os
import pty
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lad_dist
from lad_dist import recipe_file
from lad_dist.methods import METHODS
from lad_dist.status import read_status


def test_what_a_run_leaves(finished, look):
    assert sorted(p.name for p in finished.iterdir()) == [
        "checkpoints", "claims", "distilled", "evaluation", "events.jsonl", "recipe.yaml", "report", "trajectories"]  # fmt: skip
    rows = json.loads((finished / "evaluation/results.json").read_text())["rows"]
    assert [(r["source"], r["architecture"], r["seed"]) for r in rows] == [
        (source, "convnet", 0) for source in ("distilled", "initial", "random-soft", "random", "full")]  # fmt: skip
    for row in rows:
        assert {"overall", "head", "medium", "tail", "selection"} <= set(row) and len(row["per_class"]) == 10
        assert 0 <= row["overall"] <= 1
    assert look.leftovers(finished) == []
    images, soft_labels, lr = lad_dist.load(finished / "distilled")
    assert images.shape == (10, 1, 8, 8) and soft_labels.shape == (10, 10) and lr > 0


def test_the_saved_recipe_reloads_equal(lad, job, finished):
    assert recipe_file.load(finished / "recipe.yaml") == recipe_file.load(job())


def test_run_ends_with_the_table_and_where_the_report_is(lad, finished):
    shown = lad("run", finished).succeeds().out
    for part in ("Distilled (LAD)", "Starting set", "distilled added ", "Random real",
                 "Whole long-tailed set", "overall %", "tail %", "test split",
                 "last iteration", f"report: {finished}/report/index.html"):  # fmt: skip
        assert part in shown
    assert shown.strip().endswith("index.html")


def test_the_table_says_when_the_test_set_chose(lad, job):
    distill = {"iterations": 4, "select": "test-as-published", "select_every": 2, "student_steps": 1, "lr_alpha": 0.0,
               "student_steps_classifier": 1, "window_epochs": 1, "start_epoch_max": 2}  # fmt: skip
    shown = lad("run", job(distill=distill), "--out", "run").succeeds().out
    assert "selected on the test set, as published" in shown
    assert json.loads(Path("run/evaluation/results.json").read_text())["rows"][0]["selection"] == "test-as-published"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_is_spelled_out_in_the_saved_recipe(lad, finished, method, tmp_path):
    store = tmp_path / "store"
    lad("run", finished, "--set", f"method={method}", "--out", "run", "--buffers", store).succeeds()
    saved = Path("run/recipe.yaml").read_text()
    for field, value in METHODS[method].distill.items():
        assert f"\n  {field}: {str(value).lower() if isinstance(value, bool) else value}\n" in saved
    assert len(list(store.iterdir())) == 1


def test_two_jobs_share_their_experts(lad, job, look):
    lad("experts", job(), "--out", "one", "--buffers", "store").succeeds()
    before = look.contents(Path("store"))
    shown = lad("run", job(), "--out", "two", "--buffers", "store", "--set", "ipc=2").succeeds().out
    assert "experts: done" in shown and look.contents(Path("store")) == before
    lad("buffer", "verify", "two").succeeds()


def test_the_default_folder_keeps_variants_apart(lad, job):
    lad("experts", job()).succeeds()
    lad("experts", job(), "--set", "experts.epochs=4", "--set", "data.n_max=21").succeeds()
    assert sorted(os.listdir("runs")) == ["tiny", "tiny+data.n_max=21+experts.epochs=4"]


def figures(run: Path) -> dict[str, float]:
    rows = json.loads((run / "evaluation/results.json").read_text())["rows"]
    return {row["source"]: row["overall"] for row in rows}


def test_stage_by_stage_equals_run(lad, job, finished, look):
    for verb in ("experts", "distill", "evaluate", "report"):
        ended = lad(verb, job(), "--out", "run").succeeds()
    assert "index.html" in ended.out
    assert look.distilled_bytes(Path("run")) == look.distilled_bytes(finished)
    baselines = ("--baseline", "full", "--baseline", "random", "--baseline", "initial", "--baseline", "random-soft")
    shown = lad("evaluate", "run", *baselines).succeeds().out
    assert "Random real" in shown and "Whole long-tailed set" in shown
    assert figures(Path("run")) == figures(finished)


def test_distill_without_experts_says_what_to_do(lad, job):
    lad("distill", job(), "--out", "run").fails(5, "lad-dist experts")


def test_evaluate_without_a_distilled_set_says_what_to_do(lad, job):
    lad("evaluate", job(), "--out", "run").fails(6, "lad-dist distill")


def test_other_users_of_a_shared_folder_can_read_every_file(lad, finished, tmp_path):
    """Whatever a run, a buffer and an export write has the mode that the umask says."""
    for kind in ("pt", "png", "folder", "parquet", "hf"):
        lad("export", finished, "--to", kind, "--out", tmp_path / "exported" / kind).succeeds()
    lad("buffer", "export", finished, tmp_path / "exported" / "buffer", "--to", "pt").succeeds()
    mask = os.umask(0)
    os.umask(mask)
    found = [path for folder in (finished, tmp_path / "exported") for path in (folder, *folder.rglob("*"))]
    assert {"whitening.safetensors", "tensors.safetensors", "index.html", "events.jsonl"} <= {
        path.name for path in found
    }
    assert len([path for path in found if path.suffix in (".parquet", ".pt", ".png")]) > 10
    wrong = {
        str(path): oct(stat.S_IMODE(path.lstat().st_mode))
        for path in found
        if not path.is_symlink() and stat.S_IMODE(path.lstat().st_mode) != (0o777 if path.is_dir() else 0o666) & ~mask
    }
    assert not wrong


# --- buffers ----------------------------------------------------------------------------------------------------------


def test_inspect(lad, finished):
    found = json.loads(lad("buffer", "inspect", finished, "--json").succeeds().out)
    assert found["stages"]["representation"]["1"]["epochs"] == [0, 1, 2, 3]
    assert found["stages"]["classifier"]["0"]["epochs"] == [0, 1, 2]
    assert len(found["digest"]) == 64 and found["checkpoints"] == 14
    assert json.loads(lad("buffer", "inspect", finished / "trajectories", "--json").out)["digest"] == found["digest"]
    shown = lad("buffer", "inspect", finished).succeeds().out
    assert found["digest"] in shown and "0-3" in shown


def test_inspect_says_how_far_it_is_and_can_leave_out_the_digest(lad, finished):
    with_it, without = (
        lad("buffer", "inspect", finished, "--json", *more).succeeds() for more in ([], ["--no-digest"])
    )
    assert "digest: 8/8 parts done" in with_it.err and not without.err
    whole = json.loads(with_it.out)
    whole.pop("digest")
    assert json.loads(without.out) == whole
    assert "digest" not in lad("buffer", "inspect", finished, "--no-digest").succeeds().out


def test_the_digest_does_not_depend_on_how_parts_are_cut(lad, job, finished):
    lad("experts", job(), "--out", "run", "--set", "experts.epochs_per_part=3").succeeds()
    digests = {json.loads(lad("buffer", "inspect", run, "--json").out)["digest"] for run in ("run", finished)}
    assert len(digests) == 1


def test_verify(lad, finished):
    assert lad("buffer", "verify", finished).succeeds().out == "8 parts, 14 checkpoints, all intact\n"


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_folder_without_a_buffer(lad, command, tmp_path):
    (tmp_path / "empty").mkdir()
    lad("buffer", command, "empty").fails(5, "empty", "no trajectory parts")
    lad("buffer", command, "nowhere").fails(5, "nowhere", "no trajectory parts")


# --- status -----------------------------------------------------------------------------------------------------------


def states(run: Path, now: float | None = None) -> dict[str, str]:
    return {stage.name: stage.state for stage in read_status(run, now).stages}


def test_status_of_a_finished_run(lad, finished):
    assert set(states(finished).values()) == {"done"}
    shown = lad("status", finished).succeeds().out
    assert "2 of 2 experts" in shown and "iteration 3 of 3" in shown and "Distilled (LAD)" in shown


def test_status_of_a_run_in_progress_and_killed(lad, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "distilled")
    shutil.rmtree(run / "evaluation")
    shutil.rmtree(run / "report")
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    last = next(i for i, line in enumerate(lines) if '"iteration"' in line and json.loads(line).get("iteration") == 2)
    (run / "events.jsonl").write_text("".join(lines[: last + 1]) + '{"time": 17')
    moment = json.loads(lines[last])["time"]
    assert states(run, moment + 1) == {"experts": "done", "distill": "running", "evaluate distilled": "not started",
                                       "evaluate initial": "not started", "evaluate random-soft": "not started",
                                       "evaluate random": "not started", "evaluate full": "not started",
                                       "report": "not started"}  # fmt: skip
    detail = read_status(run, moment + 1).stages[1].detail
    for part in ("iteration 2 of 3", "loss representation 0.", "loss classifier 0.", "alpha 0.0", "left", "0:01 ago"):
        assert part in detail
    assert states(run, moment + 3600)["distill"] == "stopped"
    assert "killed" in read_status(run, moment + 3600).stages[1].detail
    assert "Distilled (LAD)" not in lad("status", run).succeeds().out


def test_status_while_experts_train(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "distilled")
    shutil.rmtree(run / "trajectories/classifier/expert-0001")
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    at = [i for i, line in enumerate(lines) if "expert-epoch" in line][7]
    (run / "events.jsonl").write_text("".join(lines[: at + 1]))
    stage = read_status(run, json.loads(lines[at])["time"] + 2).stages[0]
    assert stage.state == "running"
    assert stage.detail.startswith("1 of 2 experts, expert 1: representation epoch 3 of 3, loss ")
    assert "left" in stage.detail


def test_status_of_a_run_that_has_hardly_begun(lad, finished, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(finished / "recipe.yaml", tmp_path / "run")
    assert set(states(tmp_path / "run").values()) == {"not started"}
    lad("status", "run").succeeds()


def test_status_of_something_else(lad, tmp_path):
    lad("status", tmp_path).fails(4, str(tmp_path), "not a run folder")
    lad("status", "nowhere").fails(4, "nowhere", "not a run folder")
    (tmp_path / "recipe.yaml").write_text("flour: 500 g\n")
    lad("status", tmp_path).fails(2, "recipe.yaml: flour: unknown key")


# --- terminals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["PYTHONIOENCODING=ascii", "PYTHONIOENCODING=latin-1", "COLUMNS=8"])
def test_the_table_fits_any_terminal(finished, setting):
    root = str(Path(lad_dist.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, **dict([setting.split("=")])}
    command = [sys.executable, "-m", "lad_dist.cli", "status", str(finished)]
    ended = subprocess.run(command, capture_output=True, env=environment, check=True)  # bytes of whatever encoding
    assert b"Traceback" not in ended.stderr and b"distill" in ended.stdout


def test_a_reader_that_goes_away(lad, finished):
    process = lad.start("status", finished)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(60) in (0, 1)
    assert process.stderr.read() == ""


def test_a_person_watching_sees_a_live_view(lad, job, tmp_path):
    """On a pseudo-terminal: bars, no traceback, the same result."""
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "lad_dist.cli", "run", str(job()), "--out", "run", "--device", "cpu",
               "--fleet", "off"]  # fmt: skip
    root = str(Path(lad_dist.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "TERM": "xterm", "COLUMNS": "90"}
    process = subprocess.Popen(command, stdout=terminal, stderr=terminal, cwd=tmp_path, env=environment)
    os.close(terminal)
    shown, until = b"", time.monotonic() + 120
    while time.monotonic() < until:
        try:
            piece = os.read(controller, 65536)
        except OSError:
            break
        if not piece:
            break
        shown += piece
    os.close(controller)
    assert process.wait(60) == 0
    text = shown.decode()
    assert "experts" in text and "10/10" in text and "Distilled (LAD)" in text and "Traceback" not in text
