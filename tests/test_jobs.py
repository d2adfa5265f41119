"""The recipes that ship: all load, are named as their files, and say what they are for."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from lad_dist import recipe_file
from lad_dist.data.longtail import exponential_counts

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "jobs").rglob("*.yaml"))


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_jobs", ROOT / "benchmarks" / "make_jobs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["make_jobs"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_cell_of_the_published_tables_has_a_recipe() -> None:
    names = {file.stem for file in FILES}
    wanted = {f"cifar10-lt-f{f}-ipc{i}" for f in (10, 50, 100, 200) for i in (10, 20, 50)}
    wanted |= {f"cifar100-lt-f{f}-ipc{i}" for f in (10, 20, 50) for i in (10, 20, 50)}
    wanted |= {f"tiny-imagenet-lt-f{f}-ipc{i}" for f in (10, 20, 100) for i in (10, 20)}
    wanted |= {"digits-lt", "cifar10-jpeg-lt-f100-ipc10", "imagenet-lt-f256-ipc10", "places-lt-f996-ipc10"}
    assert wanted <= names


def test_imbalance_factors_from_10_to_1000() -> None:
    def factors(dataset: str) -> set[float]:
        recipes = (recipe_file.load(file) for file in FILES)
        return {r.data.imbalance_factor for r in recipes if r.data.dataset == dataset and r.ipc == 10}

    assert {10, 50, 100, 200, 500, 1000} <= factors("cifar10") & factors("fashion-mnist")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recipe_loads_and_says_what_it_is_for(file: Path) -> None:
    recipe = recipe_file.load(file)
    assert recipe.name == file.stem
    comments = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
    assert any(line.startswith("# Purpose:") for line in comments)
    assert any(line.startswith(f"# Command:   lad-dist run {file.stem}") for line in comments)


def test_the_generator_writes_exactly_the_committed_files(generator: ModuleType) -> None:
    for name, text in generator.jobs().items():
        assert (ROOT / "jobs" / f"{name}.yaml").read_text(encoding="utf-8") == text, (
            f"{name}: run benchmarks/make_jobs.py"
        )


def test_every_generated_line_is_short(generator: ModuleType) -> None:
    assert [line for text in generator.jobs().values() for line in text.splitlines() if len(line) > 120] == []


def test_published_cells_keep_the_published_protocol(generator: ModuleType) -> None:
    for name in generator.published():
        recipe = recipe_file.load(ROOT / "jobs" / f"{name}.yaml")
        assert recipe.evaluate.lr is None and recipe.evaluate.epochs == 1000 and recipe.distill.iterations == 10_000
        assert (
            recipe.distill.weighted_loss and recipe.distill.matching == "decoupled" and recipe.distill.labels == "soft"
        )
        assert recipe.distill.class_weights == "published" and recipe.distill.select == "last"
        assert recipe.distill.window_epochs == 2 and recipe.distill.classifier_start_epoch_max == 1


@pytest.mark.parametrize(
    ("name", "n_max", "classes", "tail"),
    [
        ("cifar10-lt-f200-ipc50", 5000, 10, 25),
        ("cifar100-lt-f50-ipc10", 500, 100, 10),
        ("tiny-imagenet-lt-f100-ipc20", 500, 200, 5),
        ("cifar10-lt-f1000-ipc10", 5000, 10, 5),
        ("fashion-mnist-lt-f1000", 1000, 10, 1),
    ],
)
def test_the_factors_leave_images_in_every_class(name: str, n_max: int, classes: int, tail: int) -> None:
    recipe = recipe_file.load(ROOT / "jobs" / f"{name}.yaml")
    assert exponential_counts(n_max, classes, recipe.data.imbalance_factor)[-1] == tail


PIXELS = {"samples_predicted_correctly": "real-correct", "real": "real-random"}


def official() -> list[dict[str, str]]:
    """The numbers of the official configurations, a row for each cell that has one (github.com/ichbill/LTDD, ec8a4b3)."""
    with (ROOT / "tests" / "golden" / "official_configs.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_cell_with_a_configuration_is_compared() -> None:
    cells = [row["cell"] for row in official()]
    assert len(set(cells)) == len(cells) == 22
    without = {f"cifar100-lt-f50-ipc{i}" for i in (10, 20, 50)} | {f"tiny-imagenet-lt-f100-ipc{i}" for i in (10, 20)}
    tables = {
        f.stem for f in FILES if f.stem.startswith(("cifar10-lt", "cifar100-lt", "tiny")) and "f500" not in f.stem
    }
    assert tables - {"cifar10-lt-f1000-ipc10"} == set(cells) | without


@pytest.mark.parametrize("row", official(), ids=lambda row: row["cell"])
def test_a_recipe_is_its_official_configuration(row: dict[str, str]) -> None:
    recipe = recipe_file.load(ROOT / "jobs" / f"{row['cell']}.yaml")
    d, grows = recipe.distill, row["Sequential_Generation"] == "True"
    correct = PIXELS[row["pix_init"]] == "real-correct"
    expected = {
        "iterations": int(row["Iteration"]),
        "batch": int(row["batch_syn"]),
        "student_steps": int(row["syn_steps"]),
        "student_steps_classifier": int(row["syn_steps_second"]),
        "window_epochs": int(row["expert_epochs"]),
        "lambda_representation": float(row["first_stage_lambda"]),
        "lambda_classifier": float(row["second_stage_lambda"]),
        "start_epoch_min": int(row["min_start_epoch"]),
        "start_epoch_max": int(row["max_start_epoch"]),
        "start_epoch_max_first": int(row["current_max_start_epoch"]) if grows else None,
        "start_epoch_growth": int(row["expansion_end_epoch"]) if grows else 0,
        "classifier_start_epoch_max": int(row["second_max_start_epoch"]),
        "lr_images": float(row["lr_img"]),
        "lr_labels": float(row["lr_y"]),
        "lr_alpha": float(row["lr_lr"]),
        "momentum_labels": float(row["Momentum_y"]),
        "alpha": float(row["lr_teacher"]),
        "initial": PIXELS[row["pix_init"]],
        "initial_labels": "correct-experts" if correct else "one-expert",
        "weighted_loss": row["weighted_loss"] == "True",
        "class_weight_offset": float(row["first_weight_factor"]),
        "labels": "hard" if row["hard_label"] == "True" else "soft",
    }
    assert {name: getattr(d, name) for name in expected} == expected
    assert (recipe.data.whitening == "zca") == (row["zca"] == "True")
    assert recipe.data.normalize_before_zca == ("published" if recipe.data.dataset == "cifar100" else "none")
    named = int(row["cell"].rpartition("ipc")[2]), float(row["cell"].split("-f")[1].split("-")[0])
    assert (recipe.ipc, recipe.data.imbalance_factor) == named
    asked = int(row["ipc"]), 1 / float(row["imbalance_rate"])
    differs = {"cifar10-lt-f50-ipc50", "cifar10-lt-f200-ipc50"}  # whose headers say so
    assert (asked == pytest.approx(named)) == (row["cell"] not in differs)


@pytest.mark.parametrize("row", official(), ids=lambda row: row["cell"])
def test_headers_name_what_differs_from_the_configuration(row: dict[str, str]) -> None:
    text = (ROOT / "jobs" / f"{row['cell']}.yaml").read_text(encoding="utf-8")
    empty = row["Sequential_Generation"] == "True" and row["second_current_max_start_epoch"] == "0"
    assert ("draws start epochs from an empty range" in text) == empty
    other_ipc = row["ipc"] != row["cell"].rpartition("ipc")[2]
    assert (f"The configuration says ipc: {row['ipc']}" in text) == other_ipc


def test_the_recipes_of_published_cells_say_how_labels_start() -> None:
    values = {f.stem: recipe_file.load(f).distill.initial_labels for f in FILES}
    one = {name for name, value in values.items() if value == "one-expert"}
    assert len([name for name in one if name.startswith(("cifar100", "tiny"))]) == 15
    assert not [name for name in one if name.startswith(("cifar10-", "digits", "fashion"))]
