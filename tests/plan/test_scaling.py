"""The cost model of ranks, and the page that shows it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lad_dist.plan.scaling import (
    Link,
    Network,
    PhaseCost,
    StepTime,
    advice,
    best,
    iteration,
    largest_share,
    phases_of,
    scaling,
)
from lad_dist.plan.shapes import Shapes
from lad_dist.recipe import Recipe

ROOT = Path(__file__).parents[2]
FREE = Link("free", 1e30, 0.0, 0.0, "test")
LINE = Link("line", 1e9, 1e-4, 1e-5, "test")


def rows_of(step: StepTime, link: Link, worlds=(1, 2, 4, 8, 16), total=100, batch=100, count=10**6):
    phase = PhaseCost("representation", "keep", 10, count, 1, step)
    return scaling(lambda world: (phase,), total, batch, worlds, Network(link, link, 64))


def test_without_a_floor_and_without_sums_ranks_divide_the_time():
    assert [r.efficiency for r in rows_of(StepTime(0.01), FREE, (1, 2, 4))] == pytest.approx([1, 1, 1])


def test_a_floor_ends_the_scaling():
    rows = rows_of(StepTime(0.001, launch=0.025), FREE)
    assert [r.seconds for r in rows] == pytest.approx([1.0, 0.5, 0.25, 0.25, 0.25])
    assert best(rows).world == 4
    assert "stop helping at 4" in advice(rows, 16) and "up to 4" in advice(rows, 1)
    assert "best number of ranks is 4" in advice(rows, 4)


def test_what_a_sum_costs():
    network = Network(LINE, LINE, 4)
    assert network.allreduce(10**6, 1) == 0
    assert network.allreduce(10**6, 2) == pytest.approx(1e-4 + 2e-5 + 1e-3)  # 2 (W - 1) / W is 1
    assert network.allreduce(10**6, 4) == pytest.approx(1e-4 + 6e-5 + 1.5e-3)
    assert network.allreduce(10**6, 16) == pytest.approx(1e-4 + 2 * (3 + 2) * 1e-5 + 1.875e-3)


def test_recomputing_sums_the_whole_gradient_twice():
    recipe, shapes = Recipe(), Shapes(3, 32, 10, 128, 3)
    for path, sums in (("keep", 1), ("recompute", 2)):
        first, second = phases_of(recipe, shapes, path, lambda kind: StepTime(1.0))
        assert (first.bytes_per_sum, first.sums_per_step) == (4 * 320_010, sums)
        assert (second.bytes_per_sum, second.sums_per_step) == (4 * 20_490, 1)
    (joint,) = phases_of(Recipe(method="datm"), shapes, "keep", lambda kind: StepTime(1.0))
    assert joint.name == "representation"


def test_the_busiest_rank_sets_the_pace():
    generator = np.random.default_rng(0)
    shares = [np.bincount(generator.permutation(1000)[:100] // 125, minlength=8).max() for _ in range(3000)]
    assert largest_share(1000, 100, 8) == pytest.approx(np.mean(shares), rel=0.04)
    assert largest_share(100, 500, 8) == 13  # the whole set in every batch: exact


def test_slow_sums_can_make_more_ranks_slower():
    rows = rows_of(StepTime(1e-5), LINE, count=10**7)
    assert rows[1].seconds > rows[0].seconds and best(rows).world == 1
    assert "no faster" in advice(rows, 8)


def test_sums_are_part_of_an_iteration():
    phase = PhaseCost("representation", "recompute", 10, 10**6, 2, StepTime(0.001))
    seconds, sums, share = iteration((phase,), 100, 100, 2, Network(LINE, LINE, 2))
    assert (share, sums) == (50, pytest.approx(20 * (1.2e-4 + 1e-3)))
    assert seconds == pytest.approx(10 * 0.05 + sums)


@pytest.fixture(scope="module")
def script(benchmark_module):
    return benchmark_module("ranks")


def test_the_page_shows_what_the_model_and_the_measurements_say(script):
    page = script.PAGE.read_text()
    assert script.refreshed(page, script.blocks()) == page, "run python benchmarks/ranks.py --model --write"


def test_the_report_is_that_of_the_numbers(script):
    results = json.loads((script.RESULTS / "ranks.json").read_text())
    assert (script.RESULTS / "ranks.md").read_text() == script.report(results)


def test_the_benchmark_measures(tmp_path):
    """Small, in processes of its own."""
    import os
    import subprocess
    import sys

    command = [sys.executable, str(ROOT / "benchmarks" / "ranks.py"), "--width", "4", "--shape", "1x8x8", "--classes", "3",
               "--ipc", "3", "--batch", "6", "--steps", "2", "--depth", "2", "--repeats", "1", "--json"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["iterations"]) == {"keep", "recompute"}
    assert all(s > 0 for path in found["iterations"].values() for s in path.values())
    assert list(found["buckets"]) == ["64", "128"] and found["settings"]["world"] == 2
