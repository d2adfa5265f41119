"""What an installation without the optional packages does: all that it can, and one clear line for what it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from lad_dist.data.arrays import digits
from lad_dist.recipe import DataConfig

ROOT = Path(__file__).parents[1]
WITHOUT = "import sys; sys.modules[{0!r}] = None; from lad_dist import cli; cli.main()"


def without(package: str, *words, cwd: Path) -> subprocess.CompletedProcess[str]:
    """``lad-dist WORDS`` where ``package`` cannot be imported."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-c", WITHOUT.format(package), *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def job(tmp_path, small_recipe):
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(small_recipe().model_dump(mode="json")))
    return file


def test_without_ray_experts_are_trained_here(job, tmp_path):
    profile = tmp_path / "here.yaml"
    profile.write_text("threads: 4\nthreads_per_expert: 1\n")  # room for a fleet
    ended = without("ray", "experts", job, "--out", "run", "--on", profile, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "trained in this process: Ray is not installed (pip install 'lad-dist[ray]')" in ended.stdout


@pytest.mark.parametrize(("package", "words", "line"), [
    ("ray", ("experts", "job.yaml", "--out", "run", "--fleet", "on"),
     "error: a fleet of experts needs ray, which is not installed; valid: pip install 'lad-dist[ray]', or --fleet off"),
    ("submitit", ("run", "job.yaml", "--out", "run", "--on", "slurm-small"),
     "error: a job on SLURM needs submitit, which is not installed; valid: pip install 'lad-dist[slurm]'"),
])  # fmt: skip
def test_what_cannot_be_done_says_what_to_install(job, tmp_path, package, words, line):
    ended = without(package, *words, cwd=tmp_path)
    assert ended.returncode not in (0, 1) and "Traceback" not in ended.stderr
    assert [x for x in ended.stderr.splitlines() if x.startswith("error")] == [line]


def test_the_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    there = load_digits()
    train, test = digits(DataConfig(dataset="digits"))
    ours = sorted(
        (int(label), image.tobytes())
        for s in (train, test)
        for label, image in zip(s.labels_N, s.images_NCHW, strict=True)
    )
    levels = np.rint(there.images * 255 / 16).astype(np.uint8)
    assert ours == sorted((int(label), image.tobytes()) for label, image in zip(there.target, levels, strict=True))
