"""``run --quick``: budgets that fit, the same ones everywhere, and windows that fit them."""

from __future__ import annotations

import pytest

from lad_dist import catalog, recipe_file
from lad_dist.plan import quick as module
from lad_dist.plan.dataset_info import DatasetInfo, published
from lad_dist.plan.quick import SECONDS, quick
from lad_dist.recipe import Recipe

FIT = ("cifar10-lt-f100-ipc10", "cifar10-lt-f10-ipc50", "cifar100-lt-f10-ipc50")
LARGE = (
    "tiny-imagenet-lt-f10-ipc20",
    "imagenet-lt-f256-ipc10",
)  # 64x64, 200 and 1,000 classes: shortened as far as it goes
SMALL = DatasetInfo(3, 32, (48, 30, 9, 2), 16, "a test")


@pytest.mark.parametrize("name", FIT + LARGE)
def test_published_recipes_fit_and_name_every_change(name):
    recipe = recipe_file.load(catalog.find_job(name).recipe)
    made = quick(recipe, published(recipe.data))
    assert (made.seconds <= SECONDS) == (name in FIT) and made.seconds < 600
    assert (
        made.recipe.model.width == (32 if name in FIT else 16) and made.recipe.data.image_size == recipe.data.image_size
    )
    changed = {field: now for field, _, now in made.changes}
    assert changed["experts.count"] == 2 and changed["distill.iterations"] < recipe.distill.iterations
    again = recipe_file.load(catalog.find_job(name).recipe, [f"{field}={now}" for field, now in changed.items()])
    assert again == made.recipe, "the changes, given as --set, make the shortened recipe"


def test_what_fits_stays_as_it_is():
    recipe = recipe_file.load(catalog.find_job("digits-lt").recipe)
    made = quick(recipe, published(recipe.data))
    assert made.recipe == recipe and made.changes == ()
    assert quick(made.recipe, published(recipe.data)).recipe == made.recipe


def test_the_longest_stage_is_lowered_and_others_are_left():
    recipe = Recipe(
        ipc=1,
        model={"width": 16},
        experts={"count": 2, "epochs": 30, "classifier_epochs": 10},
        distill={"iterations": 5, "student_steps": 2, "student_steps_classifier": 2},
        evaluate={"seeds": 5, "epochs": 100_000},
    )
    made = quick(recipe, SMALL)
    assert {field.split(".")[0] for field, _, _ in made.changes} == {"evaluate"} and made.seconds <= SECONDS


def test_windows_follow_the_epochs():
    recipe = Recipe(
        distill={
            "start_epoch_min": 30, "start_epoch_max": 90, "start_epoch_max_first": 60, "start_epoch_growth": 5000,
            "classifier_start_epoch_max": 8, "window_epochs": 3,
        },
        buffer={"start_after": 50}, experts={"warmup_epochs": 40},
    )  # fmt: skip
    made = quick(recipe, published(recipe.data))
    d, e = made.recipe.distill, made.recipe.experts
    assert d.start_epoch_max - 1 + d.window_epochs <= e.epochs and made.recipe.buffer.start_after == e.count == 2
    assert d.classifier_start_epoch_max - 1 + d.window_epochs <= e.classifier_epochs
    assert e.warmup_epochs == e.epochs < 40


def test_what_cannot_fit_says_so_by_its_seconds(monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 1e-3)
    made = quick(Recipe(), SMALL)
    assert made.seconds > 1e-3 and made.recipe.model.width == 16
