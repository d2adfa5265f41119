"""docs/first-run.ipynb and the blocks of docs/python.md do what they show."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "first-run.ipynb"


def executed(code: str, folder: Path) -> str:
    """What a fresh process prints that runs ``code`` in ``folder``."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 7 and not any(cell.get("outputs") for cell in cells)
    shorter = {
        '"epochs": 20, "classifier_epochs": 10': '"epochs": 11, "classifier_epochs": 2',
        '"iterations": 100': '"iterations": 5',
        '"epochs": 100': '"epochs": 5',
        '"full_epochs": 20': '"full_epochs": 1',
    }
    for text, less in shorter.items():
        assert text in code[0]
        code[0] = code[0].replace(text, less)
    said = executed("\n".join(code), tmp_path)
    assert "report/index.html" in said and (tmp_path / "runs/notebook-ipc5/distilled").is_dir()
    assert not (tmp_path / "runs/notebook-ipc5/trajectories/classifier").is_symlink()


def blocks() -> list[str]:
    """The code of docs/python.md, block by block."""
    text = (ROOT / "docs" / "python.md").read_text()
    found = re.findall(r"(?:^    .*\n(?:\n(?=    ))*)+", text, re.MULTILINE)
    return [textwrap.dedent(block) for block in found]


def test_the_blocks_of_the_page_run_one_after_the_other(tmp_path):
    pytest.importorskip("tensorboard", reason="a block writes for TensorBoard, which is not installed")
    first, profile, callback, teachers, data = blocks()
    less = (
        "experts.count=1", "experts.epochs=3", "experts.classifier_epochs=2", "experts.epochs_per_part=9", "distill.iterations=3",
        "distill.regression_epoch_max=3", "evaluate.seeds=1", "evaluate.epochs=2", "evaluate.full_epochs=1",
    )  # fmt: skip
    small = (
        'Run.open("runs/mine", "digits-lt")',
        f'Run.open("runs/mine", __import__("lad_dist").change("digits-lt", *{less}))',
    )
    assert small[0] in first
    said = executed("\n".join([first.replace(*small), profile, callback, teachers, "print(tuple(p.shape))"]), tmp_path)
    assert "distilled convnet 0 " in said and "report/index.html" in said
    assert re.search(r"^\(\d+, 10\)$", said, re.MULTILINE)  # the teachers' labels
    assert (tmp_path / "runs/ipc5/distilled").is_dir() and list((tmp_path / "logs").glob("events*"))
    compile(data, "birds.py", "exec")
