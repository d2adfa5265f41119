"""Learning rate and epochs chosen on held-out training images, by one rule for every source."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lad_dist import results
from lad_dist.distilled import DistilledSet
from lad_dist.errors import Interrupted, NumericalError
from lad_dist.evaluate import measure
from lad_dist.evaluate.baselines import random_real
from lad_dist.evaluate.measure import candidate_rows, planned_rows, settings_in
from lad_dist.evaluate.train import train
from lad_dist.recipe import Recipe
from lad_dist.status import print_results, read_status

HELD_OUT = {"dataset": "digits", "imbalance_factor": 5, "n_max": 20, "validation_per_class": 3}
GRID = {"tune_lr": [0.01, 0.2], "tune_epochs": [1, 4], "seeds": 2}


@pytest.fixture(scope="module")
def tuned_experts(tmp_path_factory, small_recipe, silent):
    import torch

    from lad_dist.pipeline import open_pipeline
    from lad_dist.profile import Profile

    folder = tmp_path_factory.mktemp("held-out") / "run"
    pipeline = open_pipeline(
        small_recipe(data=HELD_OUT), folder, Profile(fleet="off"), None, torch.device("cpu"), silent
    )
    pipeline.experts()
    pipeline.distill()
    return folder


@pytest.fixture
def tuned(tuned_experts, tmp_path, small_recipe, silent):
    """A pipeline of a distilled set, whose evaluation chooses from two rates and two numbers of epochs."""
    import shutil

    import torch

    from lad_dist.pipeline import open_pipeline
    from lad_dist.profile import Profile

    def make(**evaluate):
        shutil.copytree(tuned_experts, tmp_path / "run", dirs_exist_ok=True)
        recipe = small_recipe(data=HELD_OUT, evaluate={**GRID, **evaluate})
        return open_pipeline(recipe, tmp_path / "run", Profile(fleet="off"), None, torch.device("cpu"), silent)

    return make


def pairs(pipeline, source):
    rows = candidate_rows(pipeline.recipe, pipeline.data, pipeline.run, source)
    return [(row["settings"]["lr"], row["settings"]["epochs"]) for row in rows]


def test_the_same_grid_for_all_and_the_learned_alpha_for_the_distilled_set_and_its_start(tuned):
    pipeline = tuned()
    grid = [(0.01, 1), (0.2, 1), (0.01, 4), (0.2, 4)]
    alpha = DistilledSet.load(pipeline.run.distilled).lr
    assert pairs(pipeline, "random") == pairs(pipeline, "random-soft") == pairs(pipeline, "k-center") == grid
    assert set(pairs(pipeline, "distilled")) == set(pairs(pipeline, "initial")) == {*grid, (alpha, 1), (alpha, 4)}
    assert pairs(pipeline, "full") == [(0.01, 1), (0.2, 1)]  # keeps full_epochs
    assert pairs(tuned(tune_lr=[], tune_epochs=[]), "random") == []
    assert pairs(tuned(tune_epochs=[]), "random") == [(0.01, 3), (0.2, 3)]


def test_a_single_pair_is_taken_without_measuring(tuned):
    pipeline = tuned(tune_lr=[0.07], tune_epochs=[2])
    assert pairs(pipeline, "random") == [] and len(pairs(pipeline, "distilled")) == 2  # the learned alpha is another
    for source, epochs in (("random", 2), ("random-soft", 2), ("full", pipeline.recipe.evaluate.full_epochs)):
        (row, *_) = planned_rows(pipeline.recipe, pipeline.data, pipeline.run, source)
        assert (row["settings"]["lr"], row["settings"]["epochs"]) == (0.07, epochs) and row["chosen_from"] == [
            [0.07, epochs]
        ]
    only = tuned(tune_lr=[], tune_epochs=[2])
    (row, *_) = planned_rows(only.recipe, only.data, only.run, "full")
    assert "chosen" not in row["settings"] and row["settings"]["lr"] == only.recipe.evaluate.full_lr


@pytest.mark.parametrize("source", ["random", "initial", "full"])
def test_the_best_pair_on_held_out_images_is_taken_and_recorded(tuned, source):
    pipeline = tuned()
    pipeline.evaluate(source)
    candidates = results.read(pipeline.run.tuning)
    assert {row["split"] for row in candidates} == {"validation"} and len(candidates) == len(pairs(pipeline, source))
    assert all(sum(map(sum, row["confusion"])) == 30 for row in candidates)  # 3 of each class
    best = max(candidates, key=lambda row: row["overall"])
    assert best["overall"] > min(row["overall"] for row in candidates)
    for row in results.read(pipeline.run.results):
        assert (row["split"], row["lr_rule"]) == ("test", "chosen on validation images")
        assert all(row["settings"][k] == best["settings"][k] for k in ("lr", "epochs"))
        assert [best["settings"]["lr"], best["settings"]["epochs"]] in row["chosen_from"]


def test_the_network_that_is_measured_is_trained_as_chosen(tuned, monkeypatch):
    pipeline, used = tuned(seeds=1), []

    def watched(network, images, settings, *rest):
        used.append((settings.lr, settings.epochs))
        return train(network, images, settings, *rest)

    monkeypatch.setattr(measure, "train", watched)
    pipeline.evaluate("random")
    (row,) = results.read(pipeline.run.results)
    assert used == [*pairs(pipeline, "random"), (row["settings"]["lr"], row["settings"]["epochs"])]
    assert settings_in(row).lr == row["settings"]["lr"]


def test_candidates_train_on_a_draw_that_no_seed_reports(tuned, monkeypatch):
    pipeline, seeds = tuned(seeds=3), []
    monkeypatch.setattr(
        "lad_dist.evaluate.baselines.rng",
        lambda seed, *counters: seeds.append(counters[2]) or np.random.default_rng(0),
    )
    pipeline.evaluate("random")
    assert set(seeds) == {"tune", 0, 1, 2}
    monkeypatch.undo()
    drawn = {str(seed): random_real(pipeline.recipe, pipeline.data, seed).tolist() for seed in ("tune", 0, 1, 2)}
    assert len({str(images) for images in drawn.values()}) == 4


def test_a_choice_is_made_once_and_an_interrupted_one_goes_on(tuned, monkeypatch):
    pipeline, put = tuned(), results.put

    def stops_after_two(path, row):
        put(path, row)
        if len(results.read(path)) == 2:
            raise Interrupted("here")

    monkeypatch.setattr(results, "put", stops_after_two)
    with pytest.raises(Interrupted):
        pipeline.evaluate("random")
    monkeypatch.undo()
    before = {file: file.stat().st_mtime_ns for file in results.rows_folder(pipeline.run.tuning).iterdir()}
    pipeline.evaluate("random")
    assert len(before) == 2 and all(file.stat().st_mtime_ns == time for file, time in before.items())
    kept = pipeline.run.tuning.read_bytes()
    pipeline.evaluate("random")
    assert pipeline.run.tuning.read_bytes() == kept
    other = replace(pipeline, recipe=pipeline.recipe.model_copy(update={"evaluate": pipeline.recipe.evaluate.model_copy(
        update={"tune_lr": (0.01,)})}))  # fmt: skip
    other.evaluate("random")
    assert {row["settings"]["lr"] for row in results.read(pipeline.run.results)} == {0.01}


def test_a_rate_that_diverges_is_not_taken_and_ends_nothing(tuned, monkeypatch):
    pipeline = tuned()

    def diverges(network, images, settings, *rest):
        if settings.lr == 0.2:
            raise NumericalError("the loss is NaN")
        return train(network, images, settings, *rest)

    monkeypatch.setattr(measure, "train", diverges)
    pipeline.evaluate("full")
    assert {row["settings"]["lr"] for row in results.read(pipeline.run.results)} == {0.01}
    assert [row["error"] for row in results.read(pipeline.run.tuning) if "error" in row] == ["the loss is NaN"]


def test_each_architecture_has_its_own_choice(tuned):
    pipeline = tuned(architectures=["convnet", "mlp"], seeds=1)
    pipeline.evaluate("random")
    candidates, rows = results.read(pipeline.run.tuning), results.read(pipeline.run.results)
    assert {row["architecture"] for row in rows} == {"convnet", "mlp"}
    for row in rows:
        mine = [c for c in candidates if c["architecture"] == row["architecture"]]
        best = max(mine, key=lambda c: c["overall"])
        assert len(mine) == 4 and row["settings"]["lr"] == best["settings"]["lr"]


def test_the_choice_is_shown(tuned, capsys):
    from rich.console import Console

    pipeline = tuned()
    pipeline.evaluate("random")
    row = results.read(pipeline.run.results)[0]
    status = read_status(pipeline.run.root)
    print_results(status.rows, Console(width=160))
    told = capsys.readouterr().out
    schedule = f"{row['settings']['epochs']}, {row['settings']['lr']:.3g}"
    assert f"Schedules. epochs, rate {schedule}; chosen on validation images: Random real." in told
    assert [s.state for s in status.stages if s.name == "tune random"] == ["done"]


@pytest.mark.parametrize("field", ["tune_lr", "tune_epochs"])
def test_choosing_needs_images_that_are_held_out(field):
    with pytest.raises(ValueError, match=rf"evaluate\.{field}: .* needs data\.validation_per_class above 0"):
        Recipe.model_validate({"evaluate": {field: [1] if field == "tune_epochs" else [0.1]}})


def test_ranks_share_the_candidates(tuned):
    from lad_dist.profile import Profile

    pipeline = tuned(seeds=1)
    over = replace(pipeline, profile=Profile(fleet="off", ranks=2, threads=1))
    over.evaluate("random")
    many = {row["seed"]: row["overall"] for row in results.read(pipeline.run.tuning)}
    import shutil

    shutil.rmtree(pipeline.run.results.parent)
    pipeline.evaluate("random")
    assert many == {row["seed"]: row["overall"] for row in results.read(pipeline.run.tuning)}
    assert planned_rows(pipeline.recipe, pipeline.data, pipeline.run, "random")[0]["settings"]["chosen"]
