"""What a run folder holds before and while it is worked on: nothing before the data are accepted, one run at a time."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from lad_dist import ranks
from lad_dist.errors import DataError, RecipeError, RunDirError
from lad_dist.launch import local
from lad_dist.pipeline import Pipeline, open_pipeline
from lad_dist.profile import Profile
from lad_dist.progress import Screen, read_events
from lad_dist.recipe import Recipe
from lad_dist.rundir import host_name
from lad_dist.trajectories import claims

CPU = torch.device("cpu")


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        for value, name in enumerate(("ant", "bee")):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for k in range(3):
                Image.new("L", (8, 8), 40 * value + 9 * k).save(tmp_path / "data" / split / name / f"{k}.png")
    return tmp_path / "data"


def recipe_of(root: Path, **data) -> Recipe:
    return Recipe.model_validate({
        "ipc": 1, "data": {"dataset": "image-folder", "root": str(root), "imbalance": "natural", **data},
        "model": {"width": 2, "depth": 1}, "experts": {"count": 1, "epochs": 3, "classifier_epochs": 2},
        "distill": {"start_epoch_max": 1},
    })  # fmt: skip


@pytest.mark.parametrize("buffers", [None, "buffers"])
def test_nothing_is_written_for_data_that_are_refused_and_the_correction_runs(tmp_path, folders, silent, buffers):
    store = None if buffers is None else tmp_path / buffers
    (folders / "train" / "ant" / "2.png").write_bytes(b"no image")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=r"2\.png"):
        open_pipeline(recipe_of(folders, n_max=None), tmp_path / "run", Profile(), store, CPU, silent)
    Image.new("L", (8, 8)).save(folders / "train" / "ant" / "2.png")
    Image.new("L", (9, 9)).save(folders / "test" / "ant" / "2.png")
    with pytest.raises(DataError, match=r"data\.image_size"):
        open_pipeline(recipe_of(folders), tmp_path / "run", Profile(), store, CPU, silent)
    assert sorted(tmp_path.rglob("*")) == before
    pipeline = open_pipeline(recipe_of(folders, image_size=8), tmp_path / "run", Profile(), store, CPU, silent)
    assert pipeline.run.whitening.is_file() and pipeline.data is pipeline._accepted
    assert [e["kind"] for e in read_events(pipeline.run.events)] == ["data", "threads"]
    again = open_pipeline(recipe_of(folders, image_size=8), tmp_path / "run", Profile(), store, CPU, silent)
    assert again._accepted is None and torch.equal(again.data.whitening.matrix, pipeline.data.whitening.matrix)


def test_data_that_cannot_be_whitened_leave_no_folder(tmp_path, folders, silent):
    for file in folders.rglob("*.png"):
        Image.new("L", (8, 8), 7).save(file)
    with pytest.raises(DataError, match="is constant"):
        open_pipeline(recipe_of(folders, whitening="standardize"), tmp_path / "run", Profile(), None, CPU, silent)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("seconds", "shown"), [(-1.0, True), (60.0, False)])
def test_decoding_that_takes_long_is_shown(tmp_path, folders, monkeypatch, seconds, shown):
    monkeypatch.setattr("lad_dist.pipeline._UNSHOWN_SECONDS", seconds)
    screen = Screen(Console(file=io.StringIO(), width=100))
    pipeline = open_pipeline(recipe_of(folders, image_size=8), tmp_path / "run", Profile(), None, CPU, screen)
    images = sum(1 for _ in folders.rglob("*.png"))
    said = screen.console.file.getvalue()
    assert pipeline.data and (f"data: {images}/{images} images done" in said) == shown, said


HOLD = """
import sys, time
from lad_dist.trajectories import claims
with claims.hold(sys.argv[1], sys.argv[2], claims.owner_id()) as held:
    print(held, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that runs or distils in a folder: ``other(folder, "run")``."""
    started = []

    def start(folder: Path, verb: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, str(folder), verb]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "True\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("verb", ["run", "distill"])
def test_a_second_one_refuses_and_names_the_first(pipeline_of, other, verb):
    pipeline = pipeline_of()
    first = other(pipeline.run.root, verb)
    began = time.monotonic()
    with pytest.raises(RunDirError, match=rf"lad-dist {verb}` in this folder \(process {first.pid} on {host_name()}, "):
        pipeline.all() if verb == "run" else pipeline.distill()
    assert time.monotonic() - began < 10 and not list(read_events(pipeline.run.events))
    assert not pipeline.run.distilled.exists()


def test_one_that_was_killed_is_in_nobodys_way(pipeline_of, other):
    pipeline = pipeline_of()
    first = other(pipeline.run.root, "distill")
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    began = time.monotonic()
    pipeline.distill()
    assert pipeline.run.distilled.exists() and time.monotonic() - began < 20
    assert list((pipeline.run.root / "claims").iterdir()) == []


@pytest.mark.parametrize("dead", [True, False])
def test_one_of_another_host_counts_while_it_is_refreshed(pipeline_of, monkeypatch, dead):
    pipeline = pipeline_of()
    monkeypatch.setattr(claims, "STALE_SECONDS", 2.0)
    monkeypatch.setattr(claims, "REFRESH_SECONDS", 0.5)
    with claims.hold(pipeline.run.root, "distill", "of another host"):
        file = pipeline.run.root / "claims" / "distill.json"
        content = json.loads(file.read_text()) | {"host": "elsewhere", "pid": 7}
        monkeypatch.setattr(claims._Folder, "refresh", lambda *_: True if dead else (os.utime(file), True)[1])
        file.write_text(json.dumps(content))
        if dead:
            pipeline.distill()
            assert pipeline.run.distilled.exists()
        else:
            with pytest.raises(RunDirError, match="process 7 on elsewhere"):
                pipeline.distill()


def test_ranks_and_evaluations_share_a_folder(pipeline_of, other, monkeypatch):
    """A rank that is not the first asks nobody; experts and evaluations have claims and rows of their own."""
    pipeline = pipeline_of()
    pipeline.distill()
    other(pipeline.run.root, "run")
    other(pipeline.run.root, "distill")
    pipeline.experts()
    pipeline.evaluate("distilled")
    pipeline.report()
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pipeline._alone("distill"):
        pass


@pytest.mark.parametrize(("changes", "field"), [
    ({"model": {"width": 4096}, "experts": {"count": 100_000}}, "experts.count"),
    ({"ipc": 10_000, "distill": {"start_epoch_max": 1, "batch": 1_000_000}, "model": {"width": 4096, "depth": 1}}, "distill.batch"),
])  # fmt: skip
def test_what_this_machine_cannot_hold_is_refused_before_anything_is_written(tmp_path, folders, silent, changes, field):
    recipe = Recipe.model_validate(recipe_of(folders).model_dump() | changes)
    with pytest.raises(RecipeError, match=rf"{field}: .* GB"):
        local.run(recipe, tmp_path / "run", Profile(device="cpu", fleet="off"), None, silent, [lambda p: p.all()])
    assert not (tmp_path / "run").exists()


def test_only_the_first_rank_of_a_launcher_selects_and_the_others_wait_as_long(pipeline_of, monkeypatch):
    pipeline, waited = pipeline_of(distill={"select": "test-as-published", "select_every": 2}), []
    monkeypatch.setattr(ranks, "place", lambda: ranks.ProcessRank(1, 2, 1))
    monkeypatch.setattr(Pipeline, "_distill", lambda self, record: None)
    monkeypatch.setattr(Pipeline, "_await", lambda self, published, times=1: waited.append(times))
    monkeypatch.setattr("lad_dist.evaluate.select.select", lambda *_: pytest.fail("rank 1 selected"))
    pipeline.distill()
    assert waited == [1 + 6 // 2]
