"""The wheel and the sdist: the same bytes each time, and all that lad-dist needs outside a checkout."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from lad_dist import __version__

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "runs", "site", "dist", "data", "__pycache__", ".*_cache")


def built(source: Path, out: Path) -> dict[str, Path]:
    """The wheel and the sdist of a copy of the tree, by ending."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}
    subprocess.run(command, cwd=source, env=environment, check=True, capture_output=True)
    return {"whl": next(out.glob("*.whl")), "gz": next(out.glob("*.tar.gz"))}


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    shutil.copytree(ROOT, folder / "tree", ignore=lambda path, names: (
        LEFT_OUT(path, names) - {"data"} if Path(path) != ROOT else LEFT_OUT(path, names)))  # fmt: skip
    return folder / "tree", built(folder / "tree", folder / "first")


def test_the_same_bytes_from_another_folder_and_time(packages, tmp_path):
    tree, first = packages
    moved = shutil.copytree(tree, tmp_path / "elsewhere")
    for file in moved.rglob("*"):
        os.utime(file, (1, 1))
    second = built(moved, tmp_path / "second")
    for kind in first:
        assert (
            hashlib.sha256(first[kind].read_bytes()).digest() == hashlib.sha256(second[kind].read_bytes()).digest()
        ), kind


def test_what_is_in_them(packages):
    _, files = packages
    assert files["whl"].name == f"lad_dist-{__version__}-py3-none-any.whl"
    inside = set(zipfile.ZipFile(files["whl"]).namelist())
    assert {"lad_dist/_jobs/digits-lt.yaml", "lad_dist/_cluster/local.yaml", "lad_dist/data/digits.npz",
            "lad_dist/report/templates/page.html"} <= inside  # fmt: skip
    assert not any(name.startswith(("tests/", "benchmarks/", "docs/")) for name in inside)
    with tarfile.open(files["gz"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "Makefile", "constraints.txt", "tests/conftest.py", "docs/README.md", "jobs/digits-lt.yaml",
            "LICENSE", "lad_dist/data/digits.npz"} <= names  # fmt: skip


def test_the_wheel_works_outside_a_checkout(packages, tmp_path):
    _, files = packages
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target"]
    subprocess.run([*install, str(tmp_path / "site"), str(files["whl"])], check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "COLUMNS": "100"}

    def lad(*words: str) -> str:
        command = [sys.executable, "-P", "-c", "import lad_dist.cli as c; print(c.__file__); c.main()", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.startswith(str(tmp_path / "site"))
        return done.stdout

    assert "digits-lt" in lad("jobs") and "slurm-small" in lad("clusters") and "--out" in lad("demo", "--help")
    assert "405 training images" in lad("plan", "digits-lt", "--no-calibrate")
