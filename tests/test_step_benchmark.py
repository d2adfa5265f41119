"""benchmarks/step.py prints what it measured as one JSON object."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
ARGUMENTS = ["--width", "4", "--shape", "1x8x8", "--classes", "3", "--batch", "6", "--steps", "2", "--depth", "1",
             "--expert-batch", "8", "--repeats", "1", "--threads", "1", "--json"]  # fmt: skip
PATHS = ("textbook", "keep", "recompute")
ROWS = {*(f"{phase}/{path}" for phase in ("representation", "classifier") for path in PATHS),
        *(f"gsam/{job}" for job in ("representation", "representation-plain-loop", "one-forward-and-backward",
                                    "classifier"))}  # fmt: skip


def test_all_rows(benchmark_module, monkeypatch, capsys):
    step = benchmark_module("step")
    monkeypatch.setattr(sys, "argv", ["step.py", *ARGUMENTS])
    monkeypatch.setattr(step, "peak_memory", lambda args, name: len(name))  # a process each: tested below for one
    step.main()
    report = json.loads(capsys.readouterr().out)
    assert set(report["seconds"]) == ROWS and all(s > 0 for s in report["seconds"].values())
    assert set(report["peak_memory_bytes"]) == ROWS
    assert report["ratio"]["representation/textbook"] == report["ratio"]["classifier/textbook"] == 1
    assert report["ratio"]["representation/keep"] == pytest.approx(
        report["seconds"]["representation/keep"] / report["seconds"]["representation/textbook"])  # fmt: skip
    assert report["settings"] == {"width": 4, "depth": 1, "shape": "1x8x8", "classes": 3, "batch": 6, "expert_batch": 8,
                                  "steps": 2, "threads": 1, "repeats": 1}  # fmt: skip
    assert report["machine"] and report["date"] and report["torch"] == torch.__version__


def test_peak_memory_in_a_process_of_its_own():
    command = [sys.executable, "benchmarks/step.py", *ARGUMENTS, "--only", "classifier/recompute"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert list(report["seconds"]) == ["classifier/recompute"]
    assert 2**24 < report["peak_memory_bytes"]["classifier/recompute"] < 2**34


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="other systems do not tell")
def test_what_a_parent_held_does_not_count():
    program = "from lad_dist.progress import peak_memory_bytes; print(peak_memory_bytes()['host'])"
    held = b"x" * 2**29
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 2**20 < int(done.stdout) < len(held)


def test_its_textbook_loop_agrees_with_the_student(benchmark_module):
    step = benchmark_module("step")
    arguments = {"shape": "1x8x8", "width": 4, "depth": 1, "classes": 3, "batch": 6, "steps": 2, "expert_batch": 8}
    problem = step.Problem(step.argparse.Namespace(device="cpu", **arguments))
    for name, phase in problem.phases.items():
        images, labels = problem.textbook(phase)
        for path in ("keep", "recompute"):
            found = problem.student.run(problem.synthetic, phase, path)
            scale = float(images.abs().max()), float(labels.abs().max())
            assert float((found.image_grad_SCHH - images).abs().max()) < 1e-5 * scale[0], (name, path)
            assert float((found.label_grad_SK - labels).abs().max()) < 1e-5 * scale[1], (name, path)


def test_plain_text(benchmark_module, monkeypatch, capsys):
    arguments = [a for a in ARGUMENTS if a != "--json"] + ["--no-memory", "--only", "gsam/classifier"]
    monkeypatch.setattr(sys, "argv", ["step.py", *arguments])
    benchmark_module("step").main()
    assert "gsam/classifier" in capsys.readouterr().out


def test_images_that_are_not_square(benchmark_module, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["step.py", *ARGUMENTS, "--shape", "1x8x9"])
    with pytest.raises(SystemExit, match="must be square"):
        benchmark_module("step").main()
