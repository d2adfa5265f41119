"""A distilled set to export, made without distilling, and a job whose data it fits."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lad_dist import recipe_file
from lad_dist.cli import app
from lad_dist.data.torchvision_import import import_torchvision
from lad_dist.distilled import DistilledSet

sys.path.insert(0, str(Path(__file__).parent))  # tiny_sets.py, whichever import mode pytest runs in
import_torchvision()  # so that tests, and the code blocks of the documentation, may import what is in it


@pytest.fixture
def a_run(tmp_path: Path) -> Callable[..., Path]:
    """``a_run(make_set(...))``: a run folder that has this distilled set, and nothing else."""

    from tiny_sets import make_set

    def make(distilled: DistilledSet | None = None) -> Path:
        folder = tmp_path / "runs" / "digits-lt"
        (folder / "distilled").mkdir(parents=True)
        (distilled or make_set()).write(folder / "distilled")
        return folder

    return make


@pytest.fixture(scope="session")
def lad() -> Callable[..., Result]:
    """``lad("export", run, "--to", "pt")`` in this process; what is shown is one long line where it is one message."""

    def call(*args: object) -> Result:
        return CliRunner(env={"COLUMNS": "400"}).invoke(app, [str(a) for a in args])

    return call


@pytest.fixture
def job(tmp_path: Path, small_recipe: Callable[..., Any]) -> Path:
    """The small digits job (ten classes of 1x8x8, ipc 2, standardize), as a recipe file."""
    file = tmp_path / "job.yaml"
    file.write_text(recipe_file.dump(small_recipe(name="small"), header="small"))
    return file


@pytest.fixture(scope="session")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The package ``datasets``, kept from any network and from the user's cache."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path_factory.mktemp("hf")),
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    return pytest.importorskip("datasets", reason="needs the package datasets, of Hugging Face")
