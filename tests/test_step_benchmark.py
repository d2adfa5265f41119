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
PLAIN = {"representation/textbook", "classifier/textbook", "gsam/plain loop", "gsam/plain loop of the classifier"}
OURS = {*(f"{phase}/{path}" for phase in ("representation", "classifier") for path in ("keep", "recompute")),
        "gsam/representation", "gsam/classifier"}  # fmt: skip
KEEPING = {f"{phase}/textbook, memory kept" for phase in ("representation", "classifier")} | {
    "gsam/plain loop, memory kept"
}
ROWS = PLAIN | OURS | KEEPING


def test_all_rows(benchmark_module, monkeypatch, capsys):
    step = benchmark_module("step")
    monkeypatch.setattr(sys, "argv", ["step.py", *ARGUMENTS])
    monkeypatch.setattr(step, "peak_memory", lambda args, name: len(name))  # a process each: tested below for one
    step.main()
    report = json.loads(capsys.readouterr().out)
    assert set(report["seconds"]) == ROWS and all(s > 0 for s in report["seconds"].values())
    assert set(report["peak_memory_bytes"]) == ROWS
    assert all(report["ratio"][row] == 1 for row in PLAIN) and set(report["ratio"]) == ROWS
    assert set(report["floor"]) == OURS and all(s > 0 for s in report["floor"].values())
    assert len(report["rates"]["convolutions"]) == 1 and report["rates"]["copy"] > 0
    assert report["ratio"]["representation/keep"] == pytest.approx(
        report["seconds"]["representation/keep"] / report["seconds"]["representation/textbook"])  # fmt: skip
    assert report["ratio"]["gsam/classifier"] == pytest.approx(
        report["seconds"]["gsam/classifier"] / report["seconds"]["gsam/plain loop of the classifier"])  # fmt: skip
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
            assert float((found.by_rows.images_SCHH - images).abs().max()) < 1e-5 * scale[0], (name, path)
            assert float((found.by_rows.labels_SK - labels).abs().max()) < 1e-5 * scale[1], (name, path)


def test_the_plain_gsam_loop_takes_both_gradients(benchmark_module):
    step = benchmark_module("step")
    arguments = {"shape": "1x8x8", "width": 4, "depth": 1, "classes": 3, "batch": 6, "steps": 2, "expert_batch": 8}
    problem = step.Problem(step.argparse.Namespace(device="cpu", **arguments))
    before = {n: p.clone() for n, p in problem.plain.named_parameters()}
    for frozen in (False, True):
        passes = []
        handle = problem.plain.register_forward_hook(lambda *_: passes.append(1))  # noqa: B023
        problem.plain_gsam(frozen)
        handle.remove()
        assert len(passes) == 2
        assert (problem.plain.features[0].weight.grad is None) == frozen
        assert problem.plain.classifier.weight.grad.abs().max() > 0
    assert all(torch.equal(p, before[n]) for n, p in problem.plain.named_parameters())


def test_the_floor_counts_what_the_layers_do(benchmark_module):
    from lad_dist.models.convnet import ConvNet

    floor = benchmark_module("floor")
    net = ConvNet(3, 8, 5, width=4, depth=2, fused=False)
    (_, _, first), (_, x, second) = floor.layers(net.features, torch.randn(1, 3, 8, 8))
    assert first == floor.Layer(2 * 27 * 4 * 64, 4 * 64) and second == floor.Layer(2 * 36 * 4 * 16, 4 * 16)
    assert x.shape == (1, 4, 4, 4)
    rates = floor.Rates((1e9, 2e9), 1e10)
    batches = dict.fromkeys(floor.COUNTS, 10)
    found = floor.floors(net.features, torch.randn(1, 3, 8, 8), rates, batches)
    passes = 3.5 * 4 * (first.values + second.values) / 1e10
    assert found["classifier/keep"] == pytest.approx(
        10 * (2 * first.operations / 1e9 + 2 * second.operations / 2e9 + passes)
    )
    assert found["representation/keep"] < found["representation/recompute"]


def test_plain_text(benchmark_module, monkeypatch, capsys):
    arguments = [a for a in ARGUMENTS if a != "--json"] + ["--no-memory", "--only", "gsam/classifier"]
    monkeypatch.setattr(sys, "argv", ["step.py", *arguments])
    benchmark_module("step").main()
    printed = capsys.readouterr().out
    assert "gsam/classifier" in printed and "GFLOP/s" in printed


def test_images_that_are_not_square(benchmark_module, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["step.py", *ARGUMENTS, "--shape", "1x8x9"])
    with pytest.raises(SystemExit, match="must be square"):
        benchmark_module("step").main()
