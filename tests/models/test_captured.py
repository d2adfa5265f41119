"""Student steps as functions that are captured once and replayed: with a stand-in for CUDA graphs, and on a GPU with them."""

from __future__ import annotations

import pytest
import torch

from lad_dist.distill.memory import faster
from lad_dist.distilled import DistilledSet
from lad_dist.models.captured import MOST, Captured
from lad_dist.progress import read_events
from lad_dist.ranks import ALONE
from tests.distill.test_student import Problem, quantities, worst


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
