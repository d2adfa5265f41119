"""A newcomer's own images: from the folder to the report by one ``init`` and one ``run``, without a refusal."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from lad_dist import recipe_file
from lad_dist.errors import DataError
from lad_dist.plan import quick
from lad_dist.plan.dataset_info import dataset_info

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from newcomer import COUNTS, TEST_PER_CLASS, make

CHEAP = [
    part
    for value in ("experts.count=2", "experts.epochs=6", "experts.classifier_epochs=5", "distill.start_epoch_max=3",
                  "distill.iterations=4", "evaluate.epochs=5", "evaluate.full_epochs=2", "evaluate.seeds=1", "model.width=8",
                  "distill.classifier_start_epoch_max=2")
    for part in ("--set", value)
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_from_a_folder_to_a_report(lad, tmp_path, monkeypatch):
    """The two commands as the page says them, with a sixteenth of the budget, which is short of what they take."""
    monkeypatch.setattr(quick, "SECONDS", quick.SECONDS / 16)
    make(tmp_path / "Meine Vögel")
    lad("init", "Meine Vögel").succeeds()
    ended = lad("run", "meine-vogel.yaml", "--quick").succeeds()
    assert "quick: about" in ended.out and "report: runs/meine-vogel+quick/report/index.html" in ended.out
    rows = json.loads((tmp_path / "runs/meine-vogel+quick/evaluation/results.json").read_text())
    distilled = [row["overall"] for row in rows["rows"] if row["source"] == "distilled"]
    assert sum(distilled) / len(distilled) > 2 / len(COUNTS)
    page = (tmp_path / "runs/meine-vogel+quick/report/index.html").read_text(encoding="utf-8")
    assert all(name in page for name in COUNTS)


@pytest.mark.parametrize("split", [False, True])
def test_what_init_writes_is_planned_and_run(lad, tmp_path, split):
    make(tmp_path / "my birds", split)
    said = lad("init", "my birds", "--out", "birds.yaml").succeeds().out
    assert "7 classes" in said and "grey and colour" in said and "not all square" in said
    lad("plan", "birds.yaml", "--no-calibrate").succeeds()
    ended = lad("run", "birds.yaml", "--quick", *CHEAP, "--out", "run").succeeds()
    assert "quick: nothing had to be shortened" in ended.out
    assert (tmp_path / "run/report/index.html").exists()
    lad("run", "birds.yaml", "--quick", *CHEAP, "--out", "run").succeeds()  # the same command again: nothing left to do
    lad("run", "run", "--quick").fails(2, "--quick: run is a run folder")


def test_held_out_images_of_such_a_tail(lad, tmp_path):
    make(tmp_path / "birds")
    lad("init", "birds").succeeds()
    held = ["--set", "data.validation_per_class=5", "--set", "evaluate.split=validation", "--set", "distill.select=validation",
            "--set", "distill.select_every=2"]  # fmt: skip
    lad("run", "birds.yaml", *CHEAP, *held, "--out", "run").succeeds()
    rows = json.loads((tmp_path / "run/evaluation/results.json").read_text())["rows"]
    assert {row["source"] for row in rows} >= {"distilled", "random"}


def test_the_counts_of_the_split(tmp_path):
    make(tmp_path)
    facts = dataset_info(recipe_file.from_document(
        {"data": {"dataset": "image-folder", "root": str(tmp_path), "train": ".", "test_fraction": 0.2, "imbalance": "natural",
                  "image_size": 16, "fit": "center-crop", "channels": 3}}).data)  # fmt: skip
    assert facts.test + facts.train == sum(COUNTS.values()) and min(facts.counts) == 1
    in_order = [COUNTS[name] for name in sorted(COUNTS)]
    assert facts.counts == tuple(n - max(1, round(n * 0.2)) for n in in_order)


def test_an_existing_file_is_not_replaced(lad, tmp_path):
    make(tmp_path / "birds", split=True)
    (tmp_path / "birds.yaml").write_text("mine")
    lad("init", "birds").fails(2, "birds.yaml: exists", "--force")
    assert (tmp_path / "birds.yaml").read_text() == "mine"
    lad("init", "birds", "--force").succeeds()
    assert recipe_file.load(tmp_path / "birds.yaml").data.test_fraction is None
    assert len(list((tmp_path / "birds/test").rglob("*.*"))) == TEST_PER_CLASS * len(COUNTS)


@pytest.mark.parametrize("damage", ["colour among grey", "truncated", "one class", "another size"])
def test_plan_and_run_refuse_the_same_data(lad, tmp_path, damage):
    for split, count in (("train", 4), ("test", 2)):
        for name in ("a", "b") if damage != "one class" else ("a",):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("L", (8, 8), 40 * i).save(tmp_path / "images" / split / name / f"{i}.png")
    last = tmp_path / "images/test" / ("a" if damage == "one class" else "b") / "1.png"
    if damage == "colour among grey":
        Image.new("RGB", (8, 8), (200, 10, 10)).save(last)
    elif damage == "truncated":
        Image.effect_noise((8, 8), 50).save(last)
        last.write_bytes(last.read_bytes()[:-40])
    elif damage == "another size":
        Image.new("L", (9, 9)).save(last)
    (tmp_path / "job.yaml").write_text(
        "name: job\ndata: {dataset: image-folder, root: images, imbalance: natural}\nmodel: {depth: 1}\n"
    )
    planned, run = lad("plan", "job.yaml", "--no-calibrate"), lad("run", "job.yaml")
    assert planned.code == run.code == DataError.exit_code
    assert planned.err.startswith("error: ") and run.err.removeprefix("error: ").strip() in planned.err
