"""Steps as functions that are captured once and replayed: with a stand-in for CUDA graphs, and on a GPU with them."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from lad_dist.data.prepare import prepare
from lad_dist.distill.memory import faster
from lad_dist.distilled import DistilledSet
from lad_dist.evaluate.train import Settings, TrainingSet, rows_of, train
from lad_dist.experts.train import ExpertTrainer
from lad_dist.labeller import Labeller
from lad_dist.models.captured import MOST, Captured
from lad_dist.models.convnet import build, flat_parameters
from lad_dist.models.layout import Layout
from lad_dist.progress import read_events
from lad_dist.ranks import ALONE
from lad_dist.recipe import AugmentConfig, ModelConfig
from lad_dist.trajectories import Buffer
from tests.distill.test_student import Problem, quantities, worst

SETTINGS = Settings(epochs=4, batch=4, lr=0.05, momentum=0.9, weight_decay=5e-4, decay=0.1,
                    augment=AugmentConfig(operations=("crop", "flip")))  # fmt: skip


class Graphs:
    """Runs on the tensors that it was made with, as a CUDA graph does, and counts."""

    def __init__(self) -> None:
        self.made, self.replayed, self.wrong = 0, 0, 0.0

    def capture(self, captured, function, held):
        results = tuple(t.clone() for t in function(*held))
        self.made += 1

        def launch() -> None:
            self.replayed += 1
            for mine, new in zip(results, function(*held), strict=True):
                mine.copy_(new + self.wrong)

        return results, launch


@pytest.fixture
def graphs(monkeypatch):
    stand_in = Graphs()
    monkeypatch.setattr(Captured, "_capture", lambda *args: stand_in.capture(*args))
    monkeypatch.setattr(Captured, "applies", staticmethod(lambda device: True))
    return stand_in


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("classifier_only", [False, True], ids=["representation", "classifier"])
def test_replayed_steps_equal_the_others(graphs, classifier_only, weighted):
    problem = Problem(torch.float64, weighted=weighted)
    phase = problem.phase(classifier_only)
    expected = problem.expected(phase)
    for _ in range(2):
        found = quantities(problem.student.run(problem.synthetic, phase, "captured"))
        assert worst(found, expected)[0] < 1e-12
    sizes = len({len(b.rows_B) for b in phase.batches})
    assert sizes == 2 and graphs.made == 2 * sizes  # there and back, for each size of batch
    assert graphs.replayed == 2 * graphs.made + 2 * 2 * len(phase.batches)  # tried twice, then two runs


def test_a_graph_serves_one_kind_of_step_only(graphs):
    problem = Problem(torch.float32)
    steps = [problem.student.step_function(problem.phase(c), 5, back) for c in (False, True) for back in (False, True)]
    steps.append(problem.student.step_function(problem.phase(False), 6, back=False))
    for each in problem.student.module.modules():
        each.rounded = True
    steps.append(problem.student.step_function(problem.phase(False), 6, back=False))
    assert len(set(steps)) == len(steps) == 6
    assert problem.student.step_function(problem.phase(False), 6, back=False) == steps[-1]


def test_wrong_graphs_are_not_used_and_one_line_says_so(graphs, caplog):
    graphs.wrong = 0.1
    problem = Problem(torch.float64)
    found = quantities(problem.student.run(problem.synthetic, problem.phase(False), "captured"))
    assert worst(found, problem.expected(problem.phase(False)))[0] < 1e-12
    (record,) = caplog.records
    assert "without CUDA graphs" in record.message


def test_without_a_gpu_the_captured_call_is_the_function_itself():
    captured = Captured("steps")
    assert captured(lambda t: (t + 1,), torch.ones(2))[0].tolist() == [2, 2] and captured._known == {}


def test_what_cannot_be_captured_is_called(monkeypatch, caplog):
    monkeypatch.setattr(Captured, "applies", staticmethod(lambda device: True))
    captured = Captured("steps")  # a capture on a machine without CUDA fails

    def double(t):
        return (2 * t,)

    assert [captured(double, torch.ones(1))[0].item() for _ in range(3)] == [2, 2, 2]
    assert len(caplog.records) == 1


def test_graphs_are_few_and_can_be_given_back(graphs):
    captured = Captured("steps")

    def double(t):
        return (2 * t,)

    for size in range(1, MOST + 5):
        assert captured(double, torch.ones(size))[0].tolist() == [2] * size
    assert graphs.made == MOST == len(captured._known)
    captured.clear()
    assert captured._known == {} and captured(double, torch.ones(2))[0].tolist() == [2, 2]


def test_the_faster_path_is_taken(monkeypatch):
    now, taken = [0.0], {"keep": [9.0, 2.0], "captured": [8.0, 1.0]}
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def run(path):
        now[0] += taken[path].pop(0)

    path, why = faster(["keep", "captured"], run, ALONE, torch.device("cpu"))
    assert path == "captured" and "keep 2 s, captured 1 s" in why


def test_auto_measures_on_a_gpu(pipeline_of, graphs):
    ours, theirs = pipeline_of("ours"), pipeline_of("theirs", distill={"gradient": "keep"})
    for pipeline in (ours, theirs):
        pipeline.distill()
    (started,) = [e for e in read_events(ours.run.events) if e["kind"] == "distill-started"]
    assert started["gradient"] in ("keep", "captured") and "time per iteration: keep" in started["why"]
    images = [DistilledSet.load(p.run.distilled).images for p in (ours, theirs)]
    torch.testing.assert_close(*images, rtol=1e-5, atol=1e-6)


# --- experts, teachers and evaluated networks --------------------------------------------------------------------------

MIXED = {"cutmix": 0.4, "mixup": 0.3, "momentum": 0.9, "gsam_rho": 0.0, "logit_adjustment": 1.0, "classifier_epochs": 0}


def expert_of(recipe, folder, device="cpu") -> dict[tuple[str, int], np.ndarray]:
    """Every checkpoint of expert 0."""
    data = prepare(recipe, folder / "whitening.safetensors", torch.device(device))
    list(ExpertTrainer(recipe, data, folder / "buffer").train(0))
    buffer = Buffer(folder / "buffer")
    stages = ("representation", "classifier") if recipe.experts.classifier_epochs else ("representation",)
    return {(s, t): buffer.read(s, 0, t) for s in stages for t in buffer.epochs(s, 0)}


@pytest.mark.parametrize(("method", "experts"), [("lad", {}), ("aligned", MIXED)])
def test_experts_steps_are_replayed(graphs, small_recipe, tmp_path, monkeypatch, method, experts):
    recipe = small_recipe(method=method, experts=experts)
    found = expert_of(recipe, tmp_path / "graphs")
    assert graphs.replayed > 2 * graphs.made > 0  # each is tried twice
    made = graphs.made
    monkeypatch.setattr(Captured, "applies", staticmethod(lambda device: False))
    expected = expert_of(recipe, tmp_path / "eager")
    assert graphs.made == made and found.keys() == expected.keys()
    assert all(np.array_equal(found[at], expected[at]) for at in expected)


def trained(network, settings=SETTINGS, labelled=False, device="cpu") -> torch.Tensor:
    """The weights after training on random images, with labels of their own or of a teacher of all views."""
    draws = torch.Generator().manual_seed(0)
    images = torch.randn(10, 1, 8, 8, generator=draws).to(device)
    p = torch.randn(10, 3, generator=draws).softmax(1).to(device)
    of = TrainingSet(rows_of(images, p), 10, np.arange(10) % 3)
    if labelled:
        config = ModelConfig(width=4, depth=2)
        views = [
            Layout.of(network).views(flat_parameters(build(1, 8, 3, 4, 2, seed=i, purpose=("t",)))) for i in (1, 2)
        ]
        label = Labeller(config, (1, 8, 3), [{k: v.clone() for k, v in each.items()} for each in views], 1.0)
        of = replace(of, label_views=label, label_logits=label.logits)
    network.to(device)
    train(network, of, settings, 0, ("test",), lambda: None)
    return torch.cat([p.detach().flatten() for p in network.parameters()]).cpu()


EVALUATIONS = [
    (SETTINGS, False),
    (SETTINGS, True),
    (replace(SETTINGS, logit_adjustment=1.0), False),
    (replace(SETTINGS, optimizer="adamw", lr=0.001, cutmix=0.5, label_loss="logits", ema=0.9), True),
]


@pytest.mark.parametrize(("settings", "labelled"), EVALUATIONS, ids=["plain", "teacher", "adjusted", "rldd"])
def test_networks_steps_are_replayed(graphs, monkeypatch, settings, labelled):
    found = trained(small(), settings, labelled)
    sizes = {4, 2}
    assert graphs.made == len(sizes) * (2 if labelled else 1)
    monkeypatch.setattr(Captured, "applies", staticmethod(lambda device: False))
    assert torch.equal(found, trained(small(), settings, labelled))


def small() -> torch.nn.Module:
    return build(1, 8, 3, 4, 2, seed=0, purpose=("test",))


def test_moved_teachers_are_captured_anew_and_copies_have_no_graphs(graphs):
    weights = [dict(small().named_parameters())]
    label, images = Labeller(ModelConfig(width=4, depth=2), (1, 8, 3), weights, 1.0), torch.randn(2, 1, 8, 8)
    first = label.logits(images)
    assert torch.equal(label.logits(images), first) and graphs.made == 1
    label._network = None  # as where images come from another device
    label.logits(images)
    assert graphs.made == 2
    again = pickle.loads(pickle.dumps(copy.deepcopy(label)))
    assert again._captured._known == {} and torch.equal(again.logits(images), first)


def test_a_network_with_running_statistics_is_not_captured(graphs):
    """A replay, and the warm-ups before a capture, would count batches that were not trained on."""
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(144, 3)
    )
    trained(network)
    assert graphs.made == 0 and int(network[1].num_batches_tracked) == SETTINGS.epochs * 3


def moved_alike(there: torch.Tensor, here: torch.Tensor, start: torch.Tensor) -> bool:
    """Whether two trainings from the same start differ by a tenth of their movement at most: TF32 is not float32."""
    return float((there - here).norm() / (here - start).norm()) < 0.1


def test_what_moved_alike_means():
    start, here = torch.zeros(10), torch.ones(10)
    assert moved_alike(here * 1.05, here, start) and not moved_alike(start, here, start)


@pytest.fixture
def captures(monkeypatch) -> list[object]:
    """The functions that were captured."""
    made: list[object] = []
    original = Captured._capture

    def capture(self, function, held):
        made.append(function)
        return original(self, function, held)

    monkeypatch.setattr(Captured, "_capture", capture)
    return made


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("settings", "labelled"), EVALUATIONS, ids=["plain", "teacher", "adjusted", "rldd"])
def test_networks_on_a_gpu(caplog, captures, settings, labelled):
    there, here = (trained(small(), settings, labelled, device) for device in ("cuda", "cpu"))
    assert moved_alike(there, here, flat_parameters(small())) and caplog.records == [] and captures


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("method", "experts"), [("lad", {}), ("aligned", MIXED)])
def test_experts_on_a_gpu(caplog, captures, small_recipe, tmp_path, method, experts):
    recipe = small_recipe(method=method, experts=experts)
    there, here = (expert_of(recipe, tmp_path / device, device) for device in ("cuda", "cpu"))
    assert caplog.records == [] and there.keys() == here.keys() and captures
    for stage in {stage for stage, _ in here}:
        last = max(at for at in here if at[0] == stage)
        assert moved_alike(*(torch.tensor(of[at]) for of, at in ((there, last), (here, last), (here, (stage, 0)))))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("classifier_only", [False, True], ids=["representation", "classifier"])
def test_on_a_gpu(classifier_only, caplog):
    problem = Problem(torch.float32, width=16, side=16, count=20, batch=20)
    phase = problem.phase(classifier_only)
    expected = quantities(problem.student.run(problem.synthetic, phase, "keep"))
    there = problem.to(torch.device("cuda"))
    for _ in range(3):
        found = quantities(there.student.run(there.synthetic, there.phase(classifier_only), "captured"))
        assert worst({k: v.cpu() for k, v in found.items()}, expected)[0] < 1e-2  # TF32
    assert caplog.records == [] and there.student.captured._known
