"""Real images chosen in a feature space, and the other sources beside the distilled set."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import types
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from lad_dist import results
from lad_dist.data.herding import herd
from lad_dist.errors import RecipeError, RunDirError
from lad_dist.evaluate import baselines
from lad_dist.evaluate.baselines import CHOOSERS, chosen_real, feature_space, graph_cut, k_center
from lad_dist.evaluate.sources import settings_of, training_set
from lad_dist.recipe import BASELINES

LINE = torch.tensor([[0.0], [1.0], [2.0], [4.0], [10.0]])


def test_k_center_by_hand():
    """The mean is 3.4, closest to 4; farthest from it 10, then 0; then 1 and 2 are 1 and 2 away from what is chosen."""
    assert k_center(LINE, 5).tolist() == [3, 4, 0, 2, 1]
    assert k_center(LINE, 2).tolist() == [3, 4]
    assert sorted(k_center(torch.ones(3, 2), 9).tolist()) == [0, 1, 2]  # copies: each once


def test_graph_cut_by_hand():
    """Greedy maximisation of sum_{i, j in A} s_ij over V and A less that within A, against all subsets' best first step."""
    features = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    s = (1 + unit @ unit.T) / 2

    def value(chosen: tuple[int, ...]) -> float:
        a = list(chosen)
        return float(s[:, a].sum() - s[a][:, a].sum())

    picked = graph_cut(features, 4).tolist()
    for n in range(1, 5):
        best = max(value((*picked[: n - 1], j)) for j in range(7) if j not in picked[: n - 1])
        assert value(tuple(picked[:n])) == pytest.approx(best)
    assert value(tuple(picked[:2])) >= 0.9 * max(value(pair) for pair in combinations(range(7), 2))
    assert sorted(graph_cut(features, 99).tolist()) == list(range(7))


@pytest.fixture
def pipeline(pipeline_of):
    return pipeline_of()


def never() -> None:
    raise AssertionError("an expert is there")


def whole(pipeline) -> dict:
    return settings_of(pipeline.recipe, pipeline.data, pipeline.run, "full").document()


@pytest.mark.parametrize("source", CHOOSERS)
def test_ipc_images_of_every_class_chosen_in_the_experts_space(pipeline, source):
    data = pipeline.data
    assert feature_space(pipeline.recipe, pipeline.run, whole(pipeline)).name == "expert 0, representation epoch 4"
    chosen = chosen_real(pipeline.recipe, data, pipeline.run, source, never, whole(pipeline))
    labels = data.splits.train.labels_N.numpy()
    assert labels[chosen].tolist() == [c for c in range(10) for _ in range(2)]
    assert len(set(chosen.tolist())) == 20
    torch.manual_seed(4)
    shutil.rmtree(pipeline.run.results.parent)
    np.testing.assert_array_equal(
        chosen_real(pipeline.recipe, data, pipeline.run, source, never, whole(pipeline)), chosen
    )


def test_the_choice_is_made_with_the_features_of_the_class(pipeline, monkeypatch):
    monkeypatch.setattr(
        baselines, "_features", lambda recipe, data, *_: data.train.batch(torch.arange(96))[0].flatten(1)
    )
    chosen = chosen_real(pipeline.recipe, pipeline.data, pipeline.run, "herding", never, whole(pipeline))
    members = np.flatnonzero(pipeline.data.splits.train.labels_N.numpy() == 3)
    own = pipeline.data.train.batch(torch.from_numpy(members))[0].flatten(1)
    assert chosen[6:8].tolist() == members[herd(own, 2)].tolist()


def test_a_class_with_fewer_images_gives_them_repeatedly(pipeline, small_recipe):
    chosen = chosen_real(small_recipe(ipc=6), pipeline.data, pipeline.run, "k-center", never, whole(pipeline))
    assert len(chosen) == 60 and len(set(chosen[-6:].tolist())) == 4  # the smallest class has 4


def test_without_experts_a_network_is_trained_once_and_named(pipeline, monkeypatch):
    shutil.rmtree(pipeline.run.trajectories)
    pipeline.run.trajectories.mkdir()
    pipeline.evaluate("herding")
    rows = results.read(pipeline.run.results)
    name = rows[0]["settings"]["chosen_by"]
    assert name.startswith("ConvNet trained on the long-tailed set: 1 epochs, lr 0.01, batch 32, settings ")
    kept = json.loads((pipeline.run.results.parent / "chosen" / "herding.json").read_text())
    assert kept["features"] == rows[0]["settings"]["chosen_by"]
    monkeypatch.setattr(baselines, "_features", never)
    pipeline.evaluate("herding")  # the choice is kept
    first = chosen_real(pipeline.recipe, pipeline.data, pipeline.run, "herding", never, whole(pipeline))
    assert first.tolist() == kept["images"]
    other = {**whole(pipeline), "weight_decay": 1.0}  # another network: not done, and chosen anew
    assert feature_space(pipeline.recipe, pipeline.run, other).name != name
    with pytest.raises(TypeError, match="never"):
        chosen_real(pipeline.recipe, pipeline.data, pipeline.run, "herding", never, other)


def test_experts_that_come_later_are_used_and_measured_again(pipeline):
    aside = shutil.copytree(pipeline.run.trajectories, pipeline.run.root / "aside")
    shutil.rmtree(pipeline.run.trajectories)
    pipeline.run.trajectories.mkdir()
    pipeline.evaluate("k-center")
    before = results.read(pipeline.run.results)
    shutil.copytree(aside, pipeline.run.trajectories, dirs_exist_ok=True)
    pipeline.evaluate("k-center")
    after = results.read(pipeline.run.results)
    assert len(after) == len(before) == 2 and after[0]["settings"]["chosen_by"].startswith("expert 0")


def test_a_damaged_choice_is_named(pipeline):
    file = pipeline.run.results.parent / "chosen" / "herding.json"
    file.parent.mkdir(parents=True)
    file.write_text("{")
    with pytest.raises(RunDirError, match=r"herding\.json: is not a selection of images"):
        pipeline.evaluate("herding")


# --- choosing by code of one's own ------------------------------------------------------------------------------------

COUNT = itertools.count()


@pytest.fixture
def own(monkeypatch):
    """Makes ``NAME:pick`` the given chooser, under a new name; returns it."""

    def give(choose) -> str:
        module = types.ModuleType(f"full_mine_{next(COUNT)}")  # begins as the name of a source of another kind
        module.pick = choose
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return f"{module.__name__}:pick"

    return give


def test_a_chooser_of_ones_own_is_one_more_baseline(pipeline_of, own):
    name = own(lambda features, count: k_center(features, count).tolist())
    names = [name, f"{name}-soft", f"{name}-soft-plain"]
    pipeline = pipeline_of(evaluate={"baselines": [*names, "k-center"], "seeds": 1})
    pipeline.all()
    pipeline.evaluate_all()  # everything is there
    rows = {row["source"]: row for row in results.read(pipeline.run.results)}
    assert set(rows) == {"distilled", "k-center", *names}
    assert [rows[n]["settings"]["labels"] for n in names] == ["hard", "soft", "soft"]
    assert rows[names[0]]["train_images"] == rows["k-center"]["train_images"] == 20
    assert rows[names[1]]["settings"]["labelled_by"].startswith("mean logits of")
    assert rows[names[2]]["settings"]["augment"]["operations"] == []
    folder = pipeline.run.results.parent / "chosen"
    theirs, ours = (json.loads(file.read_text()) for file in sorted(folder.iterdir(), key=lambda f: f.name[0] == "f"))
    assert ours["images"] == theirs["images"]
    page = (pipeline.run.report / "index.html").read_text()
    assert f"{name}, soft labels, no augmentation" in page


@pytest.mark.parametrize(("choose", "said"), [
    (lambda f, n: [0] * n, r"chose \[0 0\] of a class of \d+ images; valid: 1 to 2 different row numbers"),
    (lambda f, n: range(n + 1), r"chose \[0 1 2\] of a class"),
    (lambda f, n: [], r"chose \[\] of a class"),
    (lambda f, n: [0.5], r"chose \[0\.5\] of a class"),
    (lambda f, n: [-1], r"chose \[-1\] of a class"),
    (lambda f, n: None, r"chose None of a class"),
    (lambda f: f, "raised TypeError"),
    (7, "is a int; valid: a callable"),
])  # fmt: skip
def test_what_chooses_no_images_is_refused_in_one_line(pipeline, own, choose, said):
    name = own(choose)
    with pytest.raises(RecipeError, match=rf"^evaluate\.baselines: {name}:? {said}") as refused:
        chosen_real(pipeline.recipe, pipeline.data, pipeline.run, name, never, whole(pipeline))
    assert "\n" not in str(refused.value)


def test_names_that_nobody_offers(small_recipe):
    for name in ("k-centre", "full-soft", "distilled-adsa"):
        with pytest.raises(ValueError, match=r"should be 'initial', .* or module:attribute"):
            small_recipe(evaluate={"baselines": [name]})
    with pytest.raises(RecipeError, match="source 'k-centre' is not known; valid: 'distilled'"):
        results.check_source("k-centre")
    assert results.check_source("distilled-adsa") and results.check_source("mine:pick-soft")


# --- sources ----------------------------------------------------------------------------------------------------------


def test_every_baseline_is_measured_into_one_table(pipeline_of):
    every = list(BASELINES)
    pipeline = pipeline_of(evaluate={"baselines": every, "seeds": 1, "label_adjustment": "adsa"})
    pipeline.all()
    rows = results.read(pipeline.run.results)
    assert [r["source"] for r in rows] == list(results.SOURCES)  # each once, in the order of tables
    assert len({json.dumps([r["overall"], r["train_loss"]]) for r in rows}) == len(rows)  # no two are the same training
    by_source = {r["source"]: r for r in rows}
    assert by_source["full-balanced"]["settings"]["sampling"] == "class-balanced"
    assert by_source["full-logit-adjusted"]["settings"]["logit_adjustment"] == 1.0
    labels = {
        s: by_source[s]["settings"]["labels"] for s in ("distilled", "distilled-adsa", "distilled-hard", "random")
    }
    assert list(labels.values()) == ["soft", "soft, adjusted by ADSA", "hard", "hard"]
    assert (
        by_source["distilled-adsa"]["label_adjustment"] == "adsa" and 0 <= by_source["distilled-adsa"]["label_tau"] <= 3
    )
    page = (pipeline.run.report / "index.html").read_text()
    for text in ("Distilled (LAD), labels adjusted (ADSA)", "arXiv 2511.17914", "Real, k-center greedy",
                 "Whole set, logit-adjusted loss", "Balanced accuracy and calibration", "ECE"):  # fmt: skip
        assert text in page, text


def test_adjusted_labels_are_off_by_default_and_hard_ones_are_the_classes(pipeline):
    assert pipeline.recipe.evaluate.label_adjustment == "none"
    pipeline.distill()
    pipeline.evaluate("distilled")
    assert {r["source"] for r in results.read(pipeline.run.results)} == {"distilled"}
    made = training_set(pipeline.recipe, pipeline.data, pipeline.run, "distilled-hard", 0)
    _, p = made.batch_of(torch.arange(20))
    assert p.argmax(1).tolist() == [c for c in range(10) for _ in range(2)] and p.sum() == p.max(1).values.sum() == 20


def test_variants_of_a_source_share_its_draws(pipeline, small_recipe):
    """With hard labels twice, the two distilled sources are one training."""
    mtt = replace(pipeline, recipe=small_recipe(method="mtt"))
    mtt.distill()
    mtt.evaluate("distilled")
    mtt.evaluate("distilled-hard")
    a, b = ([r for r in results.read(mtt.run.results) if r["source"] == s] for s in ("distilled", "distilled-hard"))
    assert [r["train_loss"] for r in a] == pytest.approx([r["train_loss"] for r in b], rel=1e-5)


def test_the_tau_of_logit_adjustment_is_the_recipes(pipeline, small_recipe):
    recipe = small_recipe(evaluate={"logit_adjustment": 2.0})
    assert settings_of(recipe, pipeline.data, pipeline.run, "full-logit-adjusted").logit_adjustment == 2.0
    assert settings_of(recipe, pipeline.data, pipeline.run, "full").logit_adjustment == 0.0
