"""docs/extending.md: its module, outside the package, through the whole pipeline; alone, with a Ray fleet, over two ranks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml

from lad_dist import cli, recipe_file, results
from lad_dist.distilled import DistilledSet
from lad_dist.errors import TrajectoryError
from lad_dist.pipeline import open_pipeline
from lad_dist.profile import Profile
from lad_dist.progress import read_events
from lad_dist.rundir import RunDir
from lad_dist.trajectories import Buffer

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
SMALL = {
    "experts": {"count": 2, "epochs": 3, "classifier_epochs": 2, "batch": 32, "epochs_per_part": 2},
    "distill": {"iterations": 3, "student_steps": 2, "batch": 7, "start_epoch_max": 2, "lr_images": 1.0, "lr_alpha": 1e-7},
}  # fmt: skip
EVALUATE = {"seeds": 1, "epochs": 2, "full_epochs": 1}


def blocks(first_line: str) -> list[str]:
    """The page's indented blocks that begin with a line, without their indentation."""
    found = re.findall(rf"^    {re.escape(first_line)}\n(?:(?:    .*)?\n)*", PAGE, re.MULTILINE)
    return [textwrap.dedent(block).strip() + "\n" for block in found]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the page's module and recipe, shortened."""
    folder = tmp_path_factory.mktemp("extending")
    (folder / "modules").mkdir()
    (folder / "modules" / "mine.py").write_text("\n\n".join(blocks("# mine.py")))
    (recipe,) = (yaml.safe_load(text) for text in blocks("name: mine"))
    (folder / "mine.yaml").write_text(yaml.safe_dump({**recipe, **SMALL, "evaluate": recipe["evaluate"] | EVALUATE}))
    return folder


def lad_dist(place: Path, *words: object) -> str:
    """Run lad-dist on one thread, with the module on PYTHONPATH; returns what it printed."""
    path = os.pathsep.join((str(ROOT), str(place / "modules")))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "lad_dist.cli", *map(str, words), "--device", "cpu"]
    done = subprocess.run(command, cwd=place, env=environment, timeout=200, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def alone(place):
    """A run in one process."""
    lad_dist(place, "run", "mine.yaml", "--out", "alone", "--buffers", "store", "--fleet", "off", "--threads", 1)
    return place / "alone"


def test_one_process(alone, monkeypatch):
    monkeypatch.syspath_prepend(str(alone.parent / "modules"))
    rows = results.read(RunDir.existing(alone).results)
    sources = ("distilled", "initial", "mine:outliers", "mine:outliers-soft", "full")
    measured = {(r["source"], r["architecture"]) for r in rows}
    assert measured == {(s, a) for s in sources for a in ("mine:Small", "convnet")}
    page = (alone / "report" / "index.html").read_text()
    assert "Distilled (Cosine matching)" in page and "mine:outliers, soft labels" in page and "mine:Small" in page
    meta = Buffer(RunDir.existing(alone).trajectories).meta
    assert meta.classifier_parameters == ("head.weight", "head.bias")
    distilled = DistilledSet.load(alone / "distilled")
    assert distilled.images.shape == (10, 1, 8, 8) and not torch.equal(distilled.images, distilled.initial_images)
    saved = yaml.safe_load((alone / "recipe.yaml").read_text())
    assert (saved["method"], saved["distill"]["matching"], saved["distill"]["window_epochs"]) == (
        "mine:COSINE",
        "joint",
        1,
    )


@pytest.mark.slow
def test_two_ranks_make_the_set_of_one_and_measure_the_same(alone, place, monkeypatch, silent):
    monkeypatch.syspath_prepend(str(place / "modules"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(place / "modules"))))
    recipe, profile = recipe_file.load(place / "mine.yaml"), Profile(fleet="off", ranks=2, threads=1)
    pipeline = open_pipeline(recipe, place / "two", profile, place / "store", torch.device("cpu"), silent)
    pipeline.distill()
    pipeline.evaluate("mine:outliers-soft")
    ours, theirs = (DistilledSet.load(place / name / "distilled") for name in ("two", "alone"))
    for name in ("images", "label_logits"):
        a, b = getattr(ours, name), getattr(theirs, name)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
    measured = [
        [(r["architecture"], r["overall"], r["train_loss"]) for r in rows if r["source"] == "mine:outliers-soft"]
        for rows in (results.read(RunDir.existing(place / name).results) for name in ("two", "alone"))
    ]
    assert measured[0] == measured[1] and len(measured[0]) == 2


@pytest.mark.slow
def test_a_fleet_trains_the_same_experts(alone, place):
    lad_dist(place, "experts", "mine.yaml", "--out", "fleet", "--fleet", "on")
    assert Buffer(place / "fleet" / "trajectories").digest() == Buffer(RunDir.existing(alone).trajectories).digest()


def test_every_phase_herding_and_early_looks_with_a_network_of_ones_own(place, tmp_path, monkeypatch, silent):
    monkeypatch.syspath_prepend(str(place / "modules"))
    monkeypatch.setattr("lad_dist.distill.early.Budget.allows", lambda self, guess: True)
    phases = ["distill.lambda_regression=1", "distill.gradient=recompute", "distill.initial=real-herded"]
    more = [*phases, "distill.checkpoint_every=1", "evaluate.baselines=[random-soft]"]
    recipe = recipe_file.load(place / "mine.yaml", ["method=lad", *more, "distill.window_epochs=1"])
    pipeline = open_pipeline(recipe, tmp_path / "run", Profile(fleet="off"), None, torch.device("cpu"), silent)
    pipeline.all()
    happened = list(read_events(pipeline.run.events))
    iterations = [e for e in happened if e["kind"] == "iteration"]
    assert [[w[0] for w in e["windows"]] for e in iterations] == 3 * [["representation", "classifier", "regression"]]
    assert all(0 < e["cosine_classifier"] < 1 and e["loss_regression"] > 0 for e in iterations)
    assert any(e["kind"] == "early-evaluation" for e in happened)
    assert {r["source"] for r in results.read(pipeline.run.results)} == {"distilled", "random-soft"}


def test_a_network_that_has_changed_under_its_name_is_refused(place, alone, tmp_path, monkeypatch, silent):
    text = (place / "modules" / "mine.py").read_text()
    (tmp_path / "mine.py").write_text(text.replace("nn.Conv2d(channels, 8, 3, padding=1)", "nn.Conv2d(channels, 8, 1)"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    recipe = recipe_file.load(place / "mine.yaml")
    pipeline = open_pipeline(
        recipe, tmp_path / "run", Profile(fleet="off"), place / "store", torch.device("cpu"), silent
    )
    for stage in (pipeline.distill, lambda: pipeline.evaluate("random-soft")):
        with pytest.raises(TrajectoryError, match="these trajectories are from another network"):
            stage()
    monkeypatch.delitem(sys.modules, "mine")


def test_a_plan_measures_the_network(place):
    out = lad_dist(place, "plan", "mine.yaml", "--no-calibrate")
    assert (
        "network mine:Small: 1386 weights, 1290 of them in the classifier" in out and "measured on one and two" in out
    )


@pytest.mark.parametrize(("setting", "said"), [
    ("model.network=mine:Smal", "model.network: mine:Smal: AttributeError: module 'mine' has no attribute 'Smal'"),
    ("model.network=mine:batch_norm", "model.network: mine:batch_norm: has buffers (1.running_mean and 2 more)"),
    ("model.network=mine:without", "model.network: mine:without: its classifier 'classifier' is no such module"),
    ("model.network=mine:COSINE", "model.network: mine:COSINE: is a Method; valid: a callable (channels, size, classes)"),
    ("model.network=smal", "--set model.network=smal: 'smal': should be 'convnet'"),
    ("evaluate.architectures=[mine:ten]", "evaluate.architectures: mine:ten: returns (2, 11) for 2 images; valid: logits of shape"),
    ("augment.operations=[mine:half]", "augment.operations: mine:half: returns (4, 1, 4, 8) for images of (4, 1, 8, 8)"),
    ("evaluate.baselines=[mine:nothing]", "evaluate.baselines: mine:nothing: AttributeError"),
    ("method=mine:digits", "method: mine:digits: is a function; valid: a lad_dist.methods.Method"),
])  # fmt: skip
def test_what_cannot_be_used_is_refused_in_one_line_before_anything_is_written(
    place, setting, said, monkeypatch, capsys, tmp_path
):
    (tmp_path / "mine.py").write_text(
        (place / "modules" / "mine.py").read_text()
        + textwrap.dedent("""

        def batch_norm(channels, size, classes):
            return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, classes))


        def without(channels, size, classes):
            return nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Linear(4, classes))


        def ten(channels, size, classes):
            return without(channels, size, classes + 1)


        def half(images, uniform):
            return images[:, :, ::2]
    """)
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.chdir(tmp_path)
    command = ["run", str(place / "mine.yaml"), "--fleet", "off", "--threads", "1", "--device", "cpu", "--set", setting]
    with pytest.raises(SystemExit) as ended:
        cli.app(command, prog_name="lad-dist")
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and said in error, error
    assert error.count("\n") == 1 and "Traceback" not in error and not (tmp_path / "runs").exists()
