"""The table of devices: its counts are those of the code, its CPU rates those of the benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lad_dist.distill.student import Batch, Phase, Student, SyntheticSet
from lad_dist.experts.gsam import gsam_gradient
from lad_dist.experts.train import classifier_loss, network_loss
from lad_dist.models import block
from lad_dist.models.convnet import build, flat_parameters
from lad_dist.plan.shapes import Shapes
from lad_dist.plan.speed import CARDS, CPU_SECONDS, WORK, card_named, cpu_step, gpu_step

ROOT = Path(__file__).parents[2]
NO_WORK = ("detach", "empty", "_local_scalar", "lift_fresh")


class Counted(TorchDispatchMode):
    """Operations that do something, the values they read and write, and their FLOPs."""

    def __init__(self) -> None:
        super().__init__()
        self.found = torch.zeros(3, dtype=torch.float64)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and not any(name in str(func) for name in NO_WORK):
            flops = flop_registry.get(func._overloadpacket)
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            count = flops(*args, **(kwargs or {}), out_val=out) if flops else 0
            self.found += torch.tensor([1, sum(t.numel() for t in tensors), count], dtype=torch.float64)
        return out


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The block by torch's operations, which a dispatch mode can count."""
    monkeypatch.setattr(block, "_compiled", lambda: None)


def counted(shapes: Shapes, kind: str, images: int, steps: int) -> torch.Tensor:
    """(operations, values, FLOPs) of some steps of a kind."""
    module = build(shapes.channels, shapes.size, shapes.classes, shapes.width, shapes.depth, seed=0, purpose=("test",))
    student, start = Student(module), flat_parameters(module)
    layout, pixels = student.layout, torch.randn(images, shapes.channels, shapes.size, shapes.size)
    labels, classifier = torch.zeros(images, dtype=torch.long), student.layout.span("classifier")
    room, _, what = kind.partition("/")
    batches = [Batch(torch.arange(images))] * steps
    only = room == "classifier"
    phase = Phase(start, start + 0.01, batches, layout.span("all" if only else "backbone"),
                  None if only else torch.ones(shapes.classes), only)  # fmt: skip
    synthetic = SyntheticSet(pixels, torch.randn(images, shapes.classes), torch.tensor(0.01))
    with Counted() as mode:
        if room in ("representation", "classifier"):
            student.run(synthetic, phase, what)
        elif kind == "evaluate/train":
            F.cross_entropy(module(pixels), labels).backward()
        elif kind == "experts/representation":
            gsam_gradient(network_loss(module, layout, pixels, labels), start, 0.01, 0.3)
        else:
            gsam_gradient(classifier_loss(module, layout, start, pixels, labels), start[classifier], 0.01, 0.3)
    return mode.found


@pytest.mark.parametrize("kind", WORK)
@pytest.mark.parametrize("shapes", [Shapes(3, 32, 10, 32, 3), Shapes(3, 64, 10, 64, 4)], ids=["depth-3", "depth-4"])
def test_the_counts_are_those_of_the_code(kind, shapes, as_on_a_gpu):
    if kind.startswith(("experts", "evaluate")):
        one, two = (counted(shapes, kind, images, 1) for images in (1, 2))
        operations, per_image = one[0], two - one
    else:  # of one more step
        one, two = (counted(shapes, kind, images, 2) - counted(shapes, kind, images, 1) for images in (1, 2))
        operations, per_image = one[0], two - one
    work = WORK[kind]
    assert work.launches(shapes.depth) == pytest.approx(float(operations), rel=0.15)
    assert work.passes == pytest.approx(float(per_image[1]) / shapes.activations, rel=0.1)
    assert work.flops == pytest.approx(float(per_image[2]) / shapes.forward_flops, rel=0.15)


def test_the_cpu_is_as_fast_as_the_benchmark_measured():
    kept = json.loads((ROOT / "benchmarks" / "results" / "all.json").read_text())
    row = "step, 128, 3x32x32: "
    measured = {
        r["name"].removeprefix(row).replace("gsam", "experts"): round(r["value"], 4)
        for r in kept["rows"]
        if r["name"].startswith(row)
    }
    shared = set(CPU_SECONDS) & set(measured)
    assert len(shared) == 6
    assert {kind: CPU_SECONDS[kind][0] for kind in shared} == {kind: measured[kind] for kind in shared}
    shapes = Shapes(3, 32, 10, 128, 3)
    for kind, (seconds, images) in CPU_SECONDS.items():
        assert cpu_step(kind, shapes, 2).seconds(images) == pytest.approx(seconds, rel=0.05)
        assert cpu_step(kind, shapes, 1).per_image == pytest.approx(2 * cpu_step(kind, shapes, 2).per_image)


def test_a_gpu_is_bound_by_launches_or_by_work():
    step = gpu_step("representation/keep", Shapes(3, 32, 10, 128, 3), CARDS["a100"])
    assert step.seconds(1) == step.seconds(10) == step.launch
    assert step.seconds(1000) == pytest.approx(2 * step.seconds(500))
    faster = gpu_step("representation/keep", Shapes(3, 32, 10, 128, 3), CARDS["h200"])
    assert faster.seconds(1000) < step.seconds(1000) and faster.launch == step.launch


def test_torchs_names_of_cards():
    assert card_named("NVIDIA A100-SXM4-80GB") is CARDS["a100"]
    assert card_named("NVIDIA GeForce RTX 4090") is CARDS["rtx4090"]
    assert card_named("Tesla T4") is None
