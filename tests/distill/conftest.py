"""Four trained experts, to be published one after another into the buffers of runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXPERTS = 4
# What a process that trains experts looks like to a distillation: whole parts that appear, stage by stage.
_PUBLISH = """
import os, shutil, sys, time
source, target, pause, *experts = sys.argv[1:]
for expert in experts:
    time.sleep(float(pause))
    for stage in ("representation", "classifier"):
        folder = f"{target}/{stage}/expert-{int(expert):04d}"
        os.makedirs(folder, exist_ok=True)
        for name in sorted(os.listdir(f"{source}/{stage}/expert-{int(expert):04d}")):
            shutil.copy(f"{source}/{stage}/expert-{int(expert):04d}/{name}", f"{folder}/.{name}.tmp")
            os.rename(f"{folder}/.{name}.tmp", f"{folder}/{name}")
    print(expert, time.time(), flush=True)
"""


@pytest.fixture(scope="session")
def four_experts(tmp_path_factory: pytest.TempPathFactory, small_recipe: Callable[..., Any], silent: Any) -> Path:
    """The buffer of four experts of the small recipe. Read only."""
    import torch

    from lad_dist.pipeline import open_pipeline
    from lad_dist.profile import Profile

    folder = tmp_path_factory.mktemp("four") / "run"
    recipe = small_recipe(experts={"count": EXPERTS})
    open_pipeline(recipe, folder, Profile(fleet="off"), None, torch.device("cpu"), silent).experts()
    return folder / "trajectories"


@pytest.fixture
def live_pipeline(
    tmp_path: Path, small_recipe: Callable[..., Any], four_experts: Path, silent: Any
) -> Callable[..., Any]:
    """A pipeline whose buffer holds only the experts given: ``live_pipeline("name", experts=[0, 1], buffer={...})``."""
    import torch

    from lad_dist.pipeline import Pipeline, open_pipeline
    from lad_dist.profile import Profile

    def make(name: str = "run", experts: Any = (), start_after: int | None = 2, **changes: Any) -> Pipeline:
        recipe = small_recipe(experts={"count": EXPERTS}, buffer={"start_after": start_after}, **changes)
        pipeline = open_pipeline(recipe, tmp_path / name, Profile(fleet="off"), None, torch.device("cpu"), silent)
        shutil.copy(four_experts / "whitening.safetensors", pipeline.run.whitening)
        publish(four_experts, pipeline.run.trajectories, experts)
        return pipeline

    return make


def publish(
    source: Path, target: Path, experts: Any, stages: tuple[str, ...] = ("representation", "classifier")
) -> None:
    for expert in experts:
        for stage in stages:
            name = f"{stage}/expert-{expert:04d}"
            shutil.copytree(source / name, target / name, dirs_exist_ok=True)


@pytest.fixture
def publish_experts(four_experts: Path) -> Callable[..., None]:
    """``publish_experts(pipeline, [2, 3])``: the experts are in its buffer when it returns."""

    def now(pipeline: Any, experts: Any, *stages: str) -> None:
        publish(four_experts, pipeline.run.trajectories, experts, stages or ("representation", "classifier"))

    return now


@pytest.fixture
def publisher(four_experts: Path) -> Any:
    """``publisher(pipeline, pause, experts)``: a process that publishes one every ``pause`` s; its output says when."""
    started: list[subprocess.Popen[str]] = []

    def start(pipeline: Any, pause: float, experts: Any) -> subprocess.Popen[str]:
        what = [str(four_experts), str(pipeline.run.trajectories), str(pause), *map(str, experts)]
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", _PUBLISH, *what], text=True, stdout=subprocess.PIPE, env=dict(os.environ)
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()
