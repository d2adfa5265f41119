"""What tests of several rooms share: one thread, the benchmarks as modules, a small recipe with trained experts."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(Path(__file__).parent / "support"))  # textbook.py, whichever import mode pytest runs in


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Sums are added up in an order that depends on the number of threads; tests compare bits."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def nothing_kept() -> None:
    """Data sets that tests read are not kept decoded in the user's cache; tests/data/test_decoded.py has its own."""
    os.environ["LAD_DIST_CACHE"] = "off"


@pytest.fixture(scope="session")
def benchmark_module() -> Callable[[str], ModuleType]:
    """A script of ``benchmarks/`` as a module."""

    sys.path.insert(0, str(ROOT / "benchmarks"))  # as for a script of it, which imports its neighbours

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up there
        spec.loader.exec_module(module)
        return module

    return load


SMALL: dict[str, Any] = {
    "ipc": 2,
    "data": {"dataset": "digits", "imbalance_factor": 5, "n_max": 20, "whitening": "standardize"},
    "model": {"width": 4, "depth": 2},
    "augment": {"operations": ["crop", "scale", "rotate", "flip", "color", "cutout"]},
    "experts": {"count": 2, "epochs": 4, "classifier_epochs": 3, "batch": 32, "lr": 0.05, "classifier_lr": 0.05,
                "epochs_per_part": 2},
    "distill": {"iterations": 6, "student_steps": 3, "student_steps_classifier": 2, "batch": 6, "window_epochs": 1,
                "start_epoch_max": 3, "classifier_start_epoch_max": 2, "class_weights": "mean-one", "lr_images": 1.0,
                "lr_labels": 0.5, "lr_alpha": 1e-6, "alpha": 0.05, "checkpoint_every": 2},
    "evaluate": {"seeds": 2, "epochs": 3, "batch": 8, "full_epochs": 1, "full_batch": 32},
}  # fmt: skip


@pytest.fixture(scope="session")
def small_recipe() -> Callable[..., Any]:
    """The small digits recipe (96 training images, 10 classes) with changes: ``small_recipe(ipc=1, distill={...})``."""
    from lad_dist.recipe import Recipe

    def make(**changes: Any) -> Recipe:
        doc = {k: dict(v) if isinstance(v, dict) else v for k, v in SMALL.items()}
        for name, value in changes.items():
            doc[name] = {**doc.get(name, {}), **value} if isinstance(value, dict) else value
        return Recipe.model_validate(doc)

    return make


@pytest.fixture(scope="session")
def silent() -> Any:
    """A screen that nobody watches."""
    import io

    from rich.console import Console

    from lad_dist.progress import Screen

    return Screen(Console(file=io.StringIO()))


@pytest.fixture(scope="session")
def small_experts(tmp_path_factory: pytest.TempPathFactory, small_recipe: Callable[..., Any], silent: Any) -> Path:
    """A run folder of the small recipe with trained experts. Read only: ``pipeline_of`` copies it."""
    import torch

    from lad_dist.pipeline import open_pipeline
    from lad_dist.profile import Profile

    folder = tmp_path_factory.mktemp("small") / "run"
    open_pipeline(small_recipe(), folder, Profile(fleet="off"), None, torch.device("cpu"), silent).experts()
    return folder


@pytest.fixture
def pipeline_of(
    tmp_path: Path, small_experts: Path, small_recipe: Callable[..., Any], silent: Any
) -> Callable[..., Any]:
    """A pipeline in a folder of its own with trained experts: ``pipeline_of("name", method="mtt", distill={...})``."""
    import torch

    from lad_dist.pipeline import Pipeline, open_pipeline
    from lad_dist.profile import Profile

    def make(name: str = "run", **changes: Any) -> Pipeline:
        run, recipe = tmp_path / name, small_recipe(**changes)
        pipeline = open_pipeline(recipe, run, Profile(fleet="off"), None, torch.device("cpu"), silent)
        if recipe.experts_hash() == small_recipe().experts_hash():
            shutil.copytree(small_experts / "trajectories", pipeline.run.trajectories, dirs_exist_ok=True)
        return pipeline

    return make
