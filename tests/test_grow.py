"""A run that grows: what a run folder takes on from a recipe that has changed, and what it refuses; runs of earlier versions."""

from __future__ import annotations

import os
import shutil
import tarfile
import threading
import time
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel

from lad_dist import pipeline as pipeline_module
from lad_dist import ranks, recipe_file, results
from lad_dist.distilled import DistilledSet
from lad_dist.errors import RunDirError, TrajectoryError
from lad_dist.evaluate import tune
from lad_dist.evaluate.measure import not_done, planned_rows
from lad_dist.launch.chain import StageSelection, stages_left
from lad_dist.pipeline import open_pipeline
from lad_dist.profile import Profile
from lad_dist.progress import read_events
from lad_dist.recipe import Recipe, affects, section_of
from lad_dist.rundir import STAGES
from lad_dist.status.read import read_status
from lad_dist.trajectories import claims
from lad_dist.trajectories.reader import Buffer

CPU = torch.device("cpu")
EARLIER = Path(__file__).parent / "golden" / "earlier-runs.tar.xz"


@pytest.fixture
def grown(pipeline_of, small_recipe, silent, tmp_path):
    """The pipeline of a run folder, opened once more with a changed recipe."""

    def again(name="run", **changes):
        return open_pipeline(small_recipe(**changes), tmp_path / name, Profile(fleet="off"), None, CPU, silent)

    return again


def same_set(a: Path, b: Path) -> bool:
    one, other = DistilledSet.load(a), DistilledSet.load(b)
    return torch.equal(one.images, other.images) and torch.equal(one.label_logits, other.label_logits)


def distilled_rows(run) -> list[str]:
    return [row["set_id"] for row in results.read(run.results) if row["source"] == "distilled"]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_more_iterations_go_on_and_equal_a_run_of_as_many(pipeline_of, grown, optimizer):
    how = {"optimizer": optimizer, "lr_images": 0.05, "lr_labels": 0.05} if optimizer == "adam" else {}
    first = pipeline_of("run", distill={**how, "iterations": 3})
    first.all()
    (before,) = set(distilled_rows(first.run))
    measured = {row["source"]: row for row in results.read(first.run.results)}
    assert stages_left(first.recipe, first.run, STAGES) == []
    for other in (
        {"epochs": 4},
        {"protocol": "rldd"},
        {"batch": 9},
        {"norm": "batch"},
        {"label_adjustment": "adsa"},
    ):  # what is measured otherwise is not done
        asked = first.recipe.model_dump(mode="json")
        asked["evaluate"] |= other
        if "protocol" in other:
            asked = recipe_file.from_document(first.recipe.model_dump(mode="json"), ["evaluate.protocol=rldd"])
        else:
            asked = type(first.recipe).model_validate(asked)
        assert stages_left(asked, first.run, STAGES) == ["evaluate", "report"]

    more = grown(distill={**how, "iterations": 7})
    assert stages_left(more.recipe, more.run, STAGES) == ["distill", "evaluate", "report"]
    status = {stage.name: stage for stage in read_status(more.run.root).stages}
    assert status["distill"].state != "done" and "iteration 3 of 7" in status["distill"].detail
    more.distill()
    assert stages_left(more.recipe, more.run, STAGES) == ["evaluate", "report"]  # the old set's rows do not count
    more.all()
    at_once = pipeline_of("at-once", distill={**how, "iterations": 7})
    at_once.distill()
    assert same_set(more.run.distilled, at_once.run.distilled)
    iterations = [e["iteration"] for e in read_events(more.run.events) if e["kind"] == "iteration"]
    assert iterations == [1, 2, 3, 4, 5, 6, 7]
    (after,) = set(distilled_rows(more.run))
    assert after != before
    kept = {row["source"]: row for row in results.read(more.run.results)}
    for source in ("initial", "random", "full"):
        assert kept[source]["overall"] == measured[source]["overall"]
    evaluated = [e["source"] for e in read_events(more.run.events) if e["kind"] == "evaluated"]
    assert evaluated.count("distilled") == 2 * more.recipe.evaluate.seeds
    assert evaluated.count("full") == more.recipe.evaluate.seeds
    assert stages_left(more.recipe, more.run, STAGES) == [] and read_status(more.run.root).finished


def test_what_slurm_counts_as_done_is_what_is_done_here(pipeline_of, monkeypatch):
    """The chain compares settings without data or experts; it must not differ from the evaluation itself."""
    fields = {"data": {"validation_per_class": 2, "n_max": 20, "imbalance_factor": 5}}
    teachers = ["random-teacher", "teachers", "random-stored", "random-soft"]
    first = pipeline_of("run", **fields, evaluate={"seeds": 1, "baselines": teachers})
    first.all()
    for change in (
        {}, {"tune_lr": (0.01, 0.1)}, {"tune_lr": (0.05,)}, {"tune_epochs": (2,)}, {"teachers": 1}, {"stored_views": 3},
        {"cutmix": 0.5, "augmentation": "randaugment"}, {"teachers_from": str(first.run.root)}, {"norm": "batch"},
    ):  # fmt: skip
        asked = first.recipe.model_copy(update={"evaluate": first.recipe.evaluate.model_copy(update=change)})
        here = [
            row["source"]
            for source in results.wanted(asked, first.run)
            if source != "teachers" or change.keys() & {"teachers", "teachers_from"}
            for row in (planned_rows if not tune.asked(asked, source) else no_rows)(
                asked, first.data, first.run, source
            )
            if not_done(first.run, [row])
        ]
        tuned = any(tune.asked(asked, source) for source in results.wanted(asked, first.run))
        assert bool(stages_left(asked, first.run, STAGES)) == bool(here or tuned), change
    rows = results.read(first.run.results)
    for row in rows:
        row["settings"]["labels"] = "hard" if row["source"] == "distilled" else row["settings"]["labels"]
    monkeypatch.setattr(results, "read", lambda path: rows)  # as an older version recorded a set with other labels
    assert stages_left(first.recipe, first.run, STAGES) == ["evaluate", "report"]


def no_rows(*_):
    return []


def test_a_growing_run_keeps_its_set_until_there_is_a_larger_one(pipeline_of, grown, monkeypatch):
    first = pipeline_of("run", distill={"iterations": 3})
    first.all()
    before = DistilledSet.load(first.run.distilled)
    more = grown(distill={"iterations": 7, "checkpoint_every": 1})
    emit = type(more.events).emit

    def stops(self, kind, **fields):
        emit(self, kind, **fields)
        if kind == "iteration" and fields["iteration"] == 5:
            raise OSError("the power went")

    monkeypatch.setattr(type(more.events), "emit", stops)
    with pytest.raises(OSError, match="the power went"):
        more.distill()
    monkeypatch.undo()
    assert torch.equal(DistilledSet.load(more.run.distilled).images, before.images)
    assert stages_left(more.recipe, more.run, STAGES) == ["distill", "evaluate", "report"]
    again = grown(distill={"iterations": 7})
    again.distill()
    at_once = pipeline_of("at-once", distill={"iterations": 7})
    at_once.distill()
    assert same_set(again.run.distilled, at_once.run.distilled)


def test_candidates_of_a_growing_run(pipeline_of, grown):
    choosing = {"select": "test-as-published", "select_every": 2}
    first = pipeline_of("run", distill={**choosing, "iterations": 2})
    first.distill()
    more = grown(distill={**choosing, "iterations": 6})
    more.distill()
    found = sorted(p.name for p in more.run.candidate(0).parent.iterdir())
    assert found == [f"iteration-{i:06d}" for i in (2, 4, 6)]
    meta = DistilledSet.load(more.run.distilled).meta
    assert meta.iterations == 6
    more.distill()  # done, whichever iteration was chosen
    assert [e["kind"] for e in read_events(more.run.events)].count("distill-finished") == 2


def test_more_experts_before_anything_is_distilled(pipeline_of, grown):
    first = pipeline_of("run")
    two = Buffer(first.run.trajectories).digest()
    more = grown(experts={"count": 3})
    assert more.recipe.experts_hash() == first.recipe.experts_hash()
    more.experts()
    buffer = Buffer(more.run.trajectories)
    assert buffer.experts("representation") == (0, 1, 2) and buffer.digest() != two
    trained = [e["expert"] for e in read_events(more.run.events) if e["kind"] == "expert-epoch"]
    assert set(trained) == {2}


def test_a_run_that_keeps_windows_only_grows_and_equals_one_that_keeps_all(pipeline_of, grown, small_recipe):
    narrow = {"distill": {"iterations": 2, "start_epoch_max": 1, "window_epochs": 1}, "buffer": {"keep": "windows"}}
    first = grown(**narrow)
    first.experts()
    buffer, epochs = Buffer(first.run.trajectories), first.recipe.experts.epochs
    assert buffer.epochs("representation", 0) == (0, 1, epochs) and buffer.verify() == []
    first.distill()
    everything = pipeline_of("all", distill=narrow["distill"])
    everything.distill()
    assert first.recipe.experts_hash() == everything.recipe.experts_hash()
    assert small_recipe().recipe_hash() == small_recipe(buffer={"keep": "all"}).recipe_hash()
    assert same_set(first.run.distilled, everything.run.distilled)
    more = grown(**{**narrow, "distill": {**narrow["distill"], "iterations": 4}})
    more.experts()
    more.distill()
    assert DistilledSet.load(more.run.distilled).meta.iteration == 4
    trained = [e for e in read_events(more.run.events) if e["kind"] == "expert-epoch"]
    assert len(trained) == 2 * (epochs + more.recipe.experts.classifier_epochs)


def test_other_windows_of_a_run_that_keeps_its_own_only(grown):
    grown(distill={"start_epoch_max": 1, "window_epochs": 1}, buffer={"keep": "windows"}).experts()
    wider = grown(distill={"start_epoch_max": 2, "window_epochs": 1}, buffer={"keep": "windows"})
    for stage in (wider.experts, wider.distill):
        with pytest.raises(TrajectoryError, match=r"keeps only .*needs representation epochs 0 to 2; valid"):
            stage()


def test_before_anything_is_distilled_all_of_distillation_may_change(pipeline_of, grown):
    first = pipeline_of("run")
    more = grown(ipc=3, seed=7, method="datm", distill={"iterations": 2, "schedule": "cosine"})
    assert recipe_file.load(first.run.recipe) == more.recipe
    more.distill()
    assert len(DistilledSet.load(more.run.distilled).images) == 30


@pytest.mark.parametrize(("changes", "said"), [
    ({"ipc": 3}, "ipc is 2 there, 3 here"),
    ({"seed": 5}, "seed is 0 there, 5 here"),
    ({"distill": {"lr_images": 0.5, "iterations": 9}}, "distill.lr_images is 1.0 there, 0.5 here"),
    ({"experts": {"count": 3}}, "experts.count is 2 there, 3 here"),
    ({"distill": {"iterations": 1}}, "distill.iterations is 1 here, and 3 are done there; valid: 3 or more"),
])  # fmt: skip
def test_what_contradicts_a_distilled_set(pipeline_of, grown, changes, said):
    first = pipeline_of("run", distill={"iterations": 3})
    first.distill()
    text = first.run.recipe.read_text()
    changes = {**changes, "distill": {"iterations": 3, **changes.get("distill", {})}}
    with pytest.raises(RunDirError) as refused:
        grown(**changes)
    assert said in str(refused.value) and "another folder with --out" in str(refused.value)
    assert first.run.recipe.read_text() == text


def test_experts_that_were_trained_otherwise(pipeline_of, grown):
    pipeline_of("run")
    with pytest.raises(RunDirError, match=r"experts\.lr is 0\.05 there, 0\.1 here"):
        grown(experts={"lr": 0.1})


def test_a_cosine_cannot_grow(pipeline_of, grown):
    cosine = {"schedule": "cosine", "optimizer": "adam", "lr_images": 0.05}
    pipeline_of("run", distill={**cosine, "iterations": 3}).distill()
    with pytest.raises(RunDirError, match=r"with distill\.schedule cosine every step depends on it; .*--buffers"):
        grown(distill={**cosine, "iterations": 5})


def test_another_ipc_on_the_same_experts(pipeline_of, small_recipe, silent, tmp_path):
    first = pipeline_of("run")
    first.distill()
    other = open_pipeline(small_recipe(ipc=3), tmp_path / "three", Profile(fleet="off"), first.run.root, CPU, silent)
    other.experts()
    other.distill()
    assert not [e for e in read_events(other.run.events) if e["kind"] == "expert-epoch"]


def test_nothing_changes_below_a_process_that_distils(pipeline_of, grown):
    first = pipeline_of("run")
    with claims.hold(first.run.root, "distill", claims.owner_id()):
        with pytest.raises(RunDirError, match=rf"is being distilled by process {os.getpid()} .*ipc is 2 there, 3 here"):
            grown(ipc=3)
        grown(evaluate={"seeds": 1})


def test_nor_does_slurm_take_it_on(pipeline_of, small_recipe, monkeypatch):
    from lad_dist.launch import slurm

    first = pipeline_of("run")
    monkeypatch.setattr(slurm.shutil, "which", lambda name: f"/usr/bin/{name}")
    what = (small_recipe(ipc=3), first.run.root, Profile(launcher="slurm"), None, StageSelection(STAGES), print)
    refused = pytest.raises(RunDirError, match=r"is being distilled by .*ipc is 2 there, 3 here")
    with claims.hold(first.run.root, "distill", claims.owner_id()), refused:
        slurm.submit(*what)
    assert recipe_file.load(first.run.recipe).ipc == 2


def test_another_rank_waits_for_the_larger_set(pipeline_of, grown, monkeypatch, tmp_path):
    """Under torchrun it would measure the smaller one, which stays until rank 0 has replaced it."""
    first = pipeline_of("run", distill={"iterations": 3})
    first.distill()
    larger = pipeline_of("larger", distill={"iterations": 5})
    larger.distill()
    more = grown(distill={"iterations": 5})
    monkeypatch.setattr(ranks, "place", lambda: ranks.ProcessRank(1, 2, 1))
    monkeypatch.setattr(pipeline_module, "distill_as_rank", lambda pipeline, record: None)

    def publish():
        os.rename(more.run.distilled, tmp_path / "old")
        time.sleep(0.5)
        shutil.copytree(larger.run.distilled, tmp_path / "new")
        os.rename(tmp_path / "new", more.run.distilled)

    rank_0 = threading.Timer(0.5, publish)
    rank_0.start()
    more.distill()
    assert DistilledSet.load(more.run.distilled).meta.iteration == 5
    rank_0.join()


def test_every_field_says_what_it_affects():
    stages = {}
    for name, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            stages |= {f"{name}.{inner}": affects(f"{name}.{inner}") for inner in section_of(name).model_fields}
        else:
            stages[name] = affects(name)
    nothing = {name for name, stage in stages.items() if stage == "nothing"}
    assert nothing == {
        "name", "data.root", "data.download", "experts.epochs_per_part", "buffer.cache_mb", "buffer.keep", "distill.gradient",
        "distill.memory_gb", "distill.checkpoint_every", "distill.early_evaluation",
    }  # fmt: skip
    assert {stages[n] for n in ("ipc", "seed", "method", "experts.count", "buffer.start_after")} == {"distill"}
    assert {stage for name, stage in stages.items() if name.startswith("evaluate.")} == {"evaluate"}
    assert {stages[n] for n in ("data.n_max", "model.width", "augment.flip", "experts.lr")} == {"experts"}


# --- earlier versions -------------------------------------------------------------------------------------------------


@pytest.fixture
def earlier(tmp_path, silent):
    """The two runs that commit edc3e1f left, one stopped after iteration 2 of 6, opened by this version."""
    with tarfile.open(EARLIER) as archive:
        archive.extractall(tmp_path, filter="data")
    shutil.copytree(tmp_path / "stopped" / "trajectories", tmp_path / "finished" / "trajectories")

    def opened(name, **distill):
        recipe = recipe_file.load(tmp_path / name / "recipe.yaml")
        recipe = recipe.model_copy(update={"distill": recipe.distill.model_copy(update=distill)})
        return open_pipeline(recipe, tmp_path / name, Profile(fleet="off", threads=1), None, CPU, silent)

    return opened


def test_a_stopped_run_of_an_earlier_version_goes_on(earlier):
    stopped, finished = earlier("stopped"), earlier("finished")
    assert Buffer(stopped.run.trajectories).verify() == []
    stopped.all()
    done = [e for e in read_events(stopped.run.events) if e["kind"] in ("iteration", "expert-epoch")]
    assert [e["iteration"] for e in done if e["kind"] == "iteration"] == [1, 2, 3, 3, 4, 5, 6]  # 3 was not saved
    assert len([e for e in done if e["kind"] == "expert-epoch"]) == 2 * (4 + 3)  # by the earlier version
    ours, theirs = (DistilledSet.load(p.run.distilled) for p in (stopped, finished))
    torch.testing.assert_close(ours.images, theirs.images, rtol=1e-4, atol=1e-4)  # of another machine
    torch.testing.assert_close(ours.label_logits, theirs.label_logits, rtol=1e-4, atol=1e-4)


def test_a_finished_run_of_an_earlier_version_is_finished_and_can_grow(earlier):
    finished = earlier("finished")
    before = results.read(finished.run.results)
    finished.experts()
    finished.distill()
    finished.evaluate_all()
    assert results.read(finished.run.results) == before
    more = earlier("finished", iterations=8)
    more.all()
    assert DistilledSet.load(more.run.distilled).meta.iteration == 8
