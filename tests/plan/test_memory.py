"""The memory estimate against measured peaks, and against what autograd says that it saves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lad_dist.distill.memory import step_bytes
from lad_dist.distill.student import Batch, Phase, Student, SyntheticSet
from lad_dist.models.convnet import build, flat_parameters
from lad_dist.plan import memory
from lad_dist.plan.dataset_info import published
from lad_dist.plan.memory import Batches
from lad_dist.plan.shapes import Shapes
from lad_dist.recipe import DataConfig, Recipe

ROOT = Path(__file__).parents[2]
COLOUR, GREY = Shapes(3, 32, 10, 32, 3), Shapes(1, 28, 10, 64, 2)


def measured_peak(shapes: Shapes, images: int, steps: int, phase: str, path: str) -> int:
    sizes = (shapes.width, shapes.channels, shapes.size, shapes.classes, shapes.depth, images, steps)
    command = [sys.executable, str(ROOT / "tests" / "support" / "phase_memory.py"), *map(str, sizes), phase, path]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    return int(done.stdout)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="other systems do not tell the peak")
@pytest.mark.parametrize(("shapes", "images", "steps", "phase", "path"), [
    (COLOUR, 60, 8, "representation", "keep"),
    (COLOUR, 60, 4, "representation", "keep"),
    (COLOUR, 60, 8, "representation", "recompute"),
    (COLOUR, 60, 8, "classifier", "keep"),
    (COLOUR, 100, 8, "classifier", "recompute"),
    (GREY, 50, 6, "representation", "keep"),
    (GREY, 50, 6, "representation", "recompute"),
    (GREY, 50, 6, "classifier", "keep"),
])  # fmt: skip
def test_the_estimate_is_within_a_quarter_of_the_measured_peak(shapes, images, steps, phase, path):
    estimate = memory.phase_bytes(shapes, Batches(images, images), phase, path, steps, "cpu")
    assert estimate == pytest.approx(measured_peak(shapes, images, steps, phase, path), rel=0.25)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="other systems do not tell the peak")
def test_recomputing_takes_no_more_for_more_steps():
    """Measured: eight times the student steps, the same peak (within 5% of a process's).

    A process may keep freed memory beyond what it needs, never less than that: of up to three peaks the least counts.
    """
    few, many = [], []
    for _ in range(3):
        few.append(measured_peak(COLOUR, 60, 10, "representation", "recompute"))
        many.append(measured_peak(COLOUR, 60, 80, "representation", "recompute"))
        if abs(min(many) - min(few)) < 0.05 * (memory.PROCESS["cpu"] + min(few)):
            return
    raise AssertionError(f"peaks of 10 steps {few}, of 80 steps {many}")


def test_keeping_grows_with_the_steps_and_recomputing_does_not():
    batches = Batches(100, 100)

    def needs(path: str, steps: int) -> int:
        return memory.phase_bytes(COLOUR, batches, "representation", path, steps, "cpu")

    assert needs("recompute", 80) == needs("recompute", 8)
    assert needs("keep", 80) - needs("keep", 40) == pytest.approx(needs("keep", 60) - needs("keep", 20), rel=1e-6)
    assert needs("keep", 80) > 8 * needs("keep", 8) / 2


@pytest.mark.parametrize("shapes", [COLOUR, GREY, Shapes(3, 64, 20, 8, 4), Shapes(3, 11, 3, 5, 2)])
def test_sizes_are_those_of_the_network(shapes):
    module = build(shapes.channels, shapes.size, shapes.classes, shapes.width, shapes.depth, seed=0, purpose=("test",))
    assert shapes.parameters == len(flat_parameters(module))
    assert shapes.classifier == sum(p.numel() for p in module.classifier.parameters())
    seen = []
    for layer in module.features:
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(lambda _, __, out: seen.append(out.numel()))
    module(torch.zeros(1, shapes.channels, shapes.size, shapes.size))
    assert shapes.activations == sum(seen) and shapes.largest == max(seen)


@pytest.mark.parametrize("shapes", [COLOUR, GREY])
def test_a_graph_holds_what_autograd_saves(shapes):
    module = build(shapes.channels, shapes.size, shapes.classes, shapes.width, shapes.depth, seed=0, purpose=("test",))
    student, start = Student(module), flat_parameters(module)

    def saved(images: int) -> int:
        batch = Batch(torch.arange(images))
        phase = Phase(start, start + 1, [batch], student.layout.span("all"))
        pixels = torch.randn(images, shapes.channels, shapes.size, shapes.size)
        synthetic = SyntheticSet(pixels, torch.randn(images, shapes.classes), torch.tensor(0.1))
        return step_bytes(student, synthetic, phase, batch)

    extra = 2 * 4 * shapes.image  # the view and its intermediate: step_bytes augments nothing
    per_image = (saved(8) - saved(4)) / 4
    assert memory.graph_bytes(shapes, "representation", 1) - extra == pytest.approx(per_image, rel=0.03)


def test_a_rank_holds_a_share():
    whole, quarter = Batches(500, 500), Batches(500, 500, 4)
    assert (quarter.rows, quarter.largest(80), quarter.all_steps(80)) == (125, 125, 80 * 125)
    assert Batches(501, 600, 4).rows == 126
    assert whole.largest(80) == 500
    drawn = Batches(10_000, 500, 4)  # batches of a part of the set: shares differ
    assert 125 < drawn.largest(25) < 180
    assert 25 * 125 < drawn.all_steps(25) < 25 * drawn.largest(25)


def test_many_drawn_batches_fall_within_the_estimate():
    import numpy as np

    generator, drawn = np.random.default_rng(0), Batches(1000, 100, 4)
    shares = np.array([
        np.bincount(generator.permutation(1000)[:100] // 250, minlength=4) for _ in range(20 * 200)
    ]).reshape(200, 20, 4)  # fmt: skip
    assert drawn.largest(20) == pytest.approx(shares.max(axis=(1, 2)).mean(), rel=0.05)
    assert drawn.all_steps(20) == pytest.approx(shares.sum(axis=1).max(axis=1).mean(), rel=0.05)


def test_the_buffer_is_as_large_as_a_real_one(small_experts, small_recipe):
    recipe = small_recipe()
    facts_shapes = Shapes(1, 8, 10, recipe.model.width, recipe.model.depth)
    rows = [f.stat().st_size for f in (small_experts / "trajectories").rglob("*.parquet")]
    estimate = memory.buffer_bytes(recipe, facts_shapes)
    # such small rows are mostly footers (schema, recipe): the estimate is of the vectors in them
    assert 0.2 * estimate < sum(rows)


def test_the_compression_is_the_measured_one():
    table = (ROOT / "benchmarks" / "results" / "buffer_encoding.md").read_text()
    sizes = [
        float(line.split("|")[7]) for line in table.splitlines() if line.startswith("| list | zstd 1 | split | yes |")
    ]
    assert sizes and abs(memory.COMPRESSION - sizes[0]) < 0.02


def test_zca_of_cifar_and_of_large_images():
    recipe = Recipe(data=DataConfig(dataset="cifar10"))
    facts = published(recipe.data)
    assert memory.whitening_bytes(COLOUR, "zca") == 5 * 3072**2 * 8
    assert memory.whitening_bytes(Shapes(3, 64, 10, 8, 3), "zca") == 5 * 12288**2 * 4
    assert memory.whitening_bytes(COLOUR, "standardize") == 0
    on_device, on_host = memory.data_bytes(facts, COLOUR, "zca")
    assert on_host == (facts.train + 10_000) * 3072
    assert on_device == 4 * facts.train * 3072 + 2 * 4 * 3072**2
